"""The impact of many plans after the repair of their cuts, with everything shared that the plans have in common.

The numbers are those of ``repair`` on each plan's own student (its ``impact_after``). What a unit gives depends on what
was removed up to it and on what was folded into the units up to it, and on nothing else: it is kept under these, so a
plan that differs in one block computes only what follows that block. The teacher runs once. A correction is kept in the
same way, by the state before its cut and by who reads the tensor there.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, get_args

import numpy as np
import torch
from diffusers import ModelMixin
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prune_lab.blocks import architecture_of
from prune_lab.errors import ConfigError, DataError, PlanError
from prune_lab.families import prediction_of
from prune_lab.importance.outputs import mean_square
from prune_lab.models.streamed import is_streamed
from prune_lab.plans import PruningPlan, gone_with, plan_of
from prune_lab.prefix_sharing import ComputeCost
from prune_lab.prefix_sharing.sharing import own_macs
from prune_lab.probes import Probe, evaluating
from prune_lab.repair.activations import (
    FitPoint,
    Reading,
    as_tensor,
    mains_of,
    moments_of_readings,
    read_student,
    restored,
    target_of,
)
from prune_lab.repair.bench import Bench, split_rows
from prune_lab.repair.cuts import Cut, find_cuts, student_paths, teacher_paths
from prune_lab.repair.fitting import Correction, Moments
from prune_lab.repair.folding import Side, fold, folded_parameters
from prune_lab.repair.repairing import check_student, repair_cuts
from prune_lab.repair.reports import Repair, RepairKind, RepairReport
from prune_lab.runtime import bytes_text, device_of, free_bytes, track
from prune_lab.surgery import bypassed
from prune_lab.surgery.patching import patched

_MEMORY_SHARE = 0.3  # of what is free at the start, for what units gave
_MOST_BYTES = 6 << 30
_EIGEN = 9  # multiply-adds of the eigenvalues and vectors of a matrix, times the cube of its side

Key: TypeAlias = tuple[Any, ...]


class _Kept:
    """What units gave, the latest used; the oldest go when there is no room."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._bytes = 0
        self._found: OrderedDict[Key, tuple[Any, int, tuple[int, ...]]] = OrderedDict()

    def get(self, key: Key) -> Any:
        """What was kept under ``key``; None where it is not there."""
        if key not in self._found:
            return None
        self._found.move_to_end(key)
        output, _, versions = self._found[key]
        if versions != _versions(output):
            raise DataError(
                "asked to share what plans have in common, found that the model changes in place what a unit gave; "
                "use the objective impact"
            )
        return output

    def put(self, key: Key, output: Any) -> None:
        """Keep ``output``."""
        size = sum(leaf.nbytes for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        self._found[key] = output, size, _versions(output)
        self._bytes += size
        while self._bytes > self._room and len(self._found) > 1:
            _, (_, freed, _) = self._found.popitem(last=False)
            self._bytes -= freed


def _versions(output: Any) -> tuple[int, ...]:
    return tuple(leaf._version for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


@dataclass(frozen=True, slots=True)
class _Batch:
    """Some rows of the fitted or the held-out ones, and the inputs of the model for them."""

    number: int
    rows: slice
    inputs: dict[str, Any]

    @property
    def count(self) -> int:
        return int(self.rows.stop - self.rows.start)


class MemoryShortError(DataError):
    """The memory does not hold what the units of the teacher give."""


@dataclass(frozen=True, slots=True, eq=False)
class _Mended:
    """What the repair of one plan tried, and the corrections that it kept."""

    cuts: tuple[Cut, ...]
    repairs: tuple[Repair, ...]
    kept: tuple[tuple[Repair, Correction], ...]
    impact_before: float
    impact_after: float


class _Enough(Exception):  # noqa: N818 - no error: the rest of the pass is not needed
    pass


class SharedRepair:
    """Repairs plans of one model on the rows of one probe, and says what is lost after it.

    The model's weights are changed while a plan is looked at and put back bit for bit. ``kind`` and ``heldout`` are
    those of ``repair``; ``compute`` adds up what was run in multiply-adds, the fits included. ``impact_of`` is an
    ``ImpactOf`` of searches.
    Raises ConfigError for an unknown kind or a model that is read from disk, DataError for too few pictures, or where
    the memory does not hold what the teacher's units give.
    """

    def __init__(
        self,
        model: ModelMixin,
        probe: Probe,
        *,
        kind: RepairKind = "linear",
        heldout: Probe | None = None,
        batch: int = 32,
    ) -> None:
        if kind not in get_args(RepairKind):
            raise ConfigError(
                f"asked for a repair of kind {kind!r}; known kinds are {', '.join(get_args(RepairKind))}"
            )
        if is_streamed(model):
            raise ConfigError(
                "asked to repair plans of a model that is read from disk, whose weights cannot be changed while it "
                "runs; search by the objective impact"
            )
        self.model: Any = model
        self.kind = kind
        self.architecture = architecture_of(model)
        self.fitted, self.folds, self.heldout = split_rows(probe, heldout)
        self.rows = len(probe)
        self.compute = ComputeCost(forward_macs=self.architecture.total_macs)
        self.places = {unit.name: place for place, unit in enumerate(self.architecture.units, start=1)}
        self.places |= {unit.name: self.places[unit.inside] for unit in self.architecture.layers}
        self.places[self.architecture.stem] = 0
        self.paths = teacher_paths(self.architecture)
        own, self._around = own_macs(self.architecture)
        self._macs = {name: own[name] for name in own if name not in dict.fromkeys(self._layers())}
        for unit in self.architecture.layers:
            self._macs[unit.inside] += own[unit.name]
        self._batch = batch
        self._room = min(_MOST_BYTES, int(_MEMORY_SHARE * free_bytes(device_of(model))))
        self._kept = _Kept(self._room)
        self._batches: dict[str, list[_Batch]] = {}
        self._teacher: dict[tuple[str, int, str], Tensor] = {}
        self._prediction: Tensor | None = None
        self.fits: dict[Key, tuple[Correction, float, float]] = {}

    def _layers(self) -> tuple[str, ...]:
        return tuple(unit.name for unit in self.architecture.layers)

    @property
    def forwards(self) -> float:
        """What was run so far, in passes of the whole model over the whole probe."""
        return self.compute.forwards / self.rows

    def batches(self, which: str) -> list[_Batch]:
        """The batches of the ``fitted`` or the ``heldout`` rows."""
        if which not in self._batches:
            probe: Probe = getattr(self, which)
            found = enumerate(probe.batches(self._batch, self.model))
            self._batches[which] = [_Batch(number, rows, inputs) for number, (rows, inputs) in found]
        return self._batches[which]

    # Passes --------------------------------------------------------------------------------------------------

    def run(
        self,
        which: str,
        batch: _Batch,
        key_of: Callable[[int], Key],
        names: Sequence[str],
        *,
        until: int | None = None,
        anew: str = "",
    ) -> Tensor | None:
        """The prediction for ``batch``, from what is kept where it is kept; ``names`` are the units that are there.

        With ``until`` nothing after the unit of that place is run, and there is no prediction. The unit ``anew`` is run
        even where it is known what it gives.
        """

        def answering(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            place = self.places[name]

            def answer(*args: Any, **kwargs: Any) -> Any:
                if until is not None and place > until:
                    raise _Enough
                key = which, batch.number, name, key_of(place)
                found = None if name == anew else self._kept.get(key)
                if found is None:
                    found = forward(*args, **kwargs)
                    self._kept.put(key, found)
                    self.compute.macs += self._macs[name] * batch.count
                return found

            return answer

        modules = {name: self.model.get_submodule(self.paths[name]) for name in names}
        forwards = {self.paths[name]: answering(name, module.forward) for name, module in modules.items()}
        self.compute.macs += self._around * batch.count
        try:
            with patched(self.model, forwards):
                output = self.model(**batch.inputs, return_dict=False)[0]
        except _Enough:
            return None
        probe: Probe = getattr(self, which)
        return prediction_of(self.model, output, probe.noisy[batch.rows]).float().cpu()

    def _ask_teacher(self) -> Tensor:
        """The teacher's prediction on the held-out rows; what its units give is kept on the CPU."""
        if self._prediction is not None:
            return self._prediction
        names, mains = tuple(self.paths), mains_of(self.model)
        predictions = []
        for which in ("fitted", "heldout"):
            for batch in track(self.batches(which), "running the teacher", len(self.batches(which))):

                def keep(name: str, which: str = which, batch: _Batch = batch) -> Callable[..., None]:
                    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                        if isinstance(output, Tensor) or isinstance(output[0], Tensor):
                            found = as_tensor(output, mains.get(self.paths[name], 0))
                            self._teacher[which, batch.number, name] = found.cpu()

                    return hook

                with contextlib.ExitStack() as stack:
                    for name in names:
                        module = self.model.get_submodule(self.paths[name])
                        stack.enter_context(module.register_forward_hook(keep(name)))
                    answer = self.run(which, batch, lambda _place: (frozenset(), ()), names[1:])
                assert answer is not None
                if which == "heldout":
                    predictions.append(answer)
                held = sum(tensor.nbytes for tensor in self._teacher.values())
                if held > self._room:
                    self._teacher.clear()
                    raise MemoryShortError(
                        f"asked to search by the loss after the repair, found that the teacher's activations on "
                        f"{self.rows} rows take more than {bytes_text(self._room)}; give fewer probe.samples, or the "
                        "objective impact"
                    )
        self._prediction = torch.cat(predictions).double()
        if not self._prediction.isfinite().all() or not self._prediction.any():
            raise DataError(
                "asked to repair with a teacher whose prediction is 0 or not finite; "
                "repair in float32, or check its weights"
            )
        return self._prediction

    def teacher(self, which: str, batch: _Batch, names: Sequence[str]) -> list[Tensor]:
        """What the teacher's units ``names`` give for ``batch``."""
        return [self._teacher[which, batch.number, name] for name in names]

    # Plans ---------------------------------------------------------------------------------------------------

    def impact(self, removed: Iterable[str]) -> float:
        """The impact without these blocks after the repair of what they leave, on the held-out rows."""
        return self._mended(plan_of(self.architecture, removed), folding=True).impact_after

    def repair(self, student: ModelMixin, plan: PruningPlan) -> RepairReport:
        """``repair`` of the ``student`` of ``plan``: the same report, and the same weights up to rounding.

        The corrections are found on the model itself, and what is kept is folded into the student. Raises PlanError for
        a plan with widths, or a student of another architecture.
        """
        if plan.widths:
            raise PlanError(
                f"asked to repair {plan.label} beside others, found a plan that makes blocks narrower; use repair()"
            )
        check_student(student, self.architecture, plan)
        mended = self._mended(plan, folding=False)
        paths = student_paths(self.architecture, plan)
        for option, correction in mended.kept:
            fold(student.get_submodule(paths[option.unit]), option.kind, option.side, correction)
        return RepairReport(
            plan=plan,
            kind=self.kind,
            cuts=mended.cuts,
            repairs=mended.repairs,
            fitted_rows=len(self.fitted),
            heldout_rows=len(self.heldout),
            impact_before=mended.impact_before,
            impact_after=mended.impact_after,
        )

    def _mended(self, plan: PruningPlan, *, folding: bool) -> _Mended:
        with evaluating(self.model), torch.inference_mode(False), torch.no_grad():
            prediction = self._ask_teacher()
            gone = frozenset(gone_with(self.architecture, plan.removed))
            with bypassed(self.model, plan.removed), contextlib.ExitStack() as stack:
                walk = _Walk(
                    student=self.model,
                    teacher=self.model,
                    student_paths={name: path for name, path in self.paths.items() if name not in gone},
                    teacher_paths=self.paths,
                    fitted=self.fitted,
                    folds=self.folds,
                    heldout=self.heldout,
                    prediction=prediction,
                    batch=self._batch,
                    shared=self,
                    gone=gone,
                    stack=stack,
                )
                cuts, before = find_cuts(self.architecture, plan), walk.impact()
                repairs, after = repair_cuts(walk, cuts, self.kind, before, folding=folding)
                return _Mended(cuts, tuple(repairs), tuple(walk.kept), before, after)

    def impact_of(self, sets: Sequence[frozenset[str]]) -> NDArray[np.float64]:
        """(sets,) the impact of each; sets that begin alike follow each other."""

        def code(removed: frozenset[str]) -> list[bool]:
            return [unit.name in removed for unit in self.architecture.units]

        order = sorted(range(len(sets)), key=lambda number: code(sets[number]))
        impacts = np.empty(len(sets))
        for number in track(order, "repairing plans", len(order)):
            impacts[number] = self.impact(sets[number])
        return impacts


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Walk(Bench):
    """The repair of one plan, cut after cut, on the model itself with its blocks bypassed."""

    shared: SharedRepair
    gone: frozenset[str]
    stack: contextlib.ExitStack  # puts the weights back
    folded: list[tuple[float, Key]] = field(default_factory=list)  # place and name of every correction
    kept: list[tuple[Repair, Correction]] = field(default_factory=list)

    def key_of(self, place: int) -> Key:
        """What the output of the unit there hangs on."""
        places = self.shared.places
        gone = frozenset(name for name in self.gone if places[name] <= place)
        return gone, tuple(key for at, key in self.folded if at <= place)

    @property
    def names(self) -> tuple[str, ...]:
        """The units that are still there."""
        return tuple(name for name in self.student_paths if self.shared.places[name])

    def impact(self) -> float:
        prediction = torch.cat(
            [
                answer
                for batch in self.shared.batches("heldout")
                if (answer := self.shared.run("heldout", batch, self.key_of, self.names)) is not None
            ]
        ).double()
        return float(mean_square(prediction - self.prediction).sum() / mean_square(self.prediction).sum())

    def moments(self, cut: Cut, side: Side, refit: bool) -> tuple[list[Moments], Moments]:
        shared, name = self.shared, cut.before if side == "before" else cut.after
        consumers = cut.consumers if side == "before" else (cut.main,)
        sources = tuple(one.teacher_source for one in consumers)
        point = FitPoint(self.student_paths[name], side, (), refit)
        cost = 0

        def readings(which: str) -> Iterator[Reading]:
            nonlocal cost
            for batch in shared.batches(which):

                def run(batch: _Batch = batch) -> None:
                    until = shared.places[name]
                    shared.run(which, batch, self.key_of, self.names, until=until, anew=name if refit else "")

                features, tensor, gate = read_student(self.student, point, run, batch.count)
                target = target_of(shared.teacher(which, batch, sources), tensor)
                width = features.shape[-1]
                cost += features[..., 0].numel() * width * (width + tensor.shape[-1])
                yield Reading(batch.rows, features, tensor, target, gate)

        folds = moments_of_readings(readings("fitted"), self.folds, point.student_path)
        (heldout,) = moments_of_readings(readings("heldout"), [0] * len(self.heldout), point.student_path)
        shared.compute.macs += cost
        return folds, heldout

    def fitted_to(self, option: Repair) -> tuple[Correction, float, float]:
        key = self._name_of(option)
        if key not in self.shared.fits:
            found = self.shared.fits[key] = Bench.fitted_to(self, option)
            if option.kind in ("linear", "refit"):
                self.shared.compute.macs += (
                    (len(set(self.folds)) + 1) * _EIGEN * found[0].weight.shape[1] ** 3
                )
        return self.shared.fits[key]

    def _name_of(self, option: Repair) -> Key:
        assert isinstance(option.cut, Cut)
        return option.cut, option.side, option.kind, self.key_of(self.shared.places[option.cut.before])

    @contextlib.contextmanager
    def trying(self, option: Repair, correction: Correction) -> Iterator[None]:
        # What does not fold is a hook behind the unit: the unit itself gives what it gave.
        behind = 0.0 if option.folds else 0.5
        self.folded.append((self.shared.places[option.unit] + behind, self._name_of(option)))
        try:
            with Bench.trying(self, option, correction):
                yield
        finally:
            self.folded.pop()

    def keep(self, option: Repair, correction: Correction) -> None:
        unit = self.unit(option.unit)
        assert unit is not None
        name = self._name_of(option)
        self.stack.enter_context(restored(folded_parameters(unit)))
        Bench.keep(self, option, correction)
        self.folded.append((self.shared.places[option.unit], name))
        self.kept.append((option, correction))
