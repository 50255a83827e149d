"""Repair of a pruned U-Net before any training: closed-form changes at its cuts, folded into its weights.

Each cut is taken in order of execution and fitted on the student as the earlier repairs left it. What is fitted are
sums over the pixels of the probe's rows; what decides is the student's prediction on rows that were held out. The
student and not the bypassed teacher is worked on: both compute the same to the bit, and only the student's weights may
change.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from diffusers import ModelMixin
from torch import Tensor, nn

from prune_lab.blocks import architecture_of
from prune_lab.errors import ConfigError, DataError, PlanError
from prune_lab.importance.outputs import mean_square
from prune_lab.plans import PruningPlan, native_layout
from prune_lab.probes import Probe, predict
from prune_lab.repair.activations import Spot, inserted, moments_at, undone
from prune_lab.repair.cuts import Cut, find_cuts, student_paths, teacher_paths
from prune_lab.repair.fitting import Change, Form, Moments, fit
from prune_lab.repair.folding import Kind, Side, fold, folded_parameters, why_not
from prune_lab.repair.reports import Choice, Repair, RepairReport
from prune_lab.runtime import track

_FOLDS = 4  # of the cross-validation that chooses the ridge
_HELD_OUT = 3  # every third picture judges
_NOT_NEARER = "the prediction on held-out rows does not come nearer to the teacher's"
_FORMS: dict[tuple[Side, Kind], Form] = {
    ("before", "shift"): "shift",
    ("before", "scale-shift"): "scale-shift",
    ("before", "linear"): "linear-shift",
    ("before", "refit"): "linear-shift",
    ("after", "scale-shift"): "scale",
    ("after", "linear"): "linear",
}


# Rows to fit on and rows to judge by --------------------------------------------------------------------------------


def _pictures_in_order(probe: Probe) -> list[int]:
    """Pictures by their earliest timestep, so that any regular share of them is spread over the schedule."""
    earliest: dict[int, int] = {}
    for picture, timestep in zip(probe.pictures.tolist(), probe.timesteps.tolist(), strict=True):
        earliest[picture] = min(timestep, earliest.get(picture, timestep))
    return sorted(earliest, key=lambda picture: (earliest[picture], picture))


def _rows_of(probe: Probe, pictures: Sequence[int]) -> Probe:
    wanted = set(pictures)
    return probe.rows([row for row, picture in enumerate(probe.pictures.tolist()) if picture in wanted])


def _split(probe: Probe, judged: Probe | None) -> tuple[Probe, list[int], Probe]:
    """Rows to fit on, the fold of each of them, and rows to judge by; no picture is in two of these."""
    pictures = _pictures_in_order(probe)
    least = _HELD_OUT if judged is None else 2
    if len(pictures) < least:
        raise DataError(
            f"asked to repair with a probe of {len(pictures)} pictures, found too few to fit on some and judge by "
            f"others; give at least {least}, better 64"
        )
    fitting = pictures
    if judged is None:
        judged = _rows_of(probe, pictures[1::_HELD_OUT])
        fitting = [picture for place, picture in enumerate(pictures) if place % _HELD_OUT != 1]
    number = {picture: place % min(_FOLDS, len(fitting)) for place, picture in enumerate(fitting)}
    fitted = _rows_of(probe, fitting)
    return fitted, [number[picture] for picture in fitted.pictures.tolist()], judged


# One cut after the other --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Option:
    """A change that may be tried at a cut."""

    side: Side
    kind: Kind
    obstacle: str  # why it has no exact fold there


@dataclass(frozen=True, slots=True, eq=False)
class _Bench:
    """The two models, and the rows they are compared on."""

    student: ModelMixin
    teacher: ModelMixin
    ours: Mapping[str, str]  # unit: module path in the student
    theirs: Mapping[str, str]  # and in the teacher
    fitted: Probe
    folds: Sequence[int]
    judged: Probe
    answer: Tensor  # (N, C, H, W) of the teacher on the judged rows
    batch: int

    def unit(self, name: str) -> nn.Module | None:
        return self.student.get_submodule(self.ours[name]) if name in self.ours else None

    def impact(self) -> float:
        """Of the student as it is now, as ``importance`` defines output-mse."""
        found = predict(self.student, self.judged, batch=self.batch).double()
        return float(mean_square(found - self.answer).sum() / mean_square(self.answer).sum())

    def moments(self, cut: Cut, side: Side, of_layer: bool) -> tuple[list[Moments], Moments]:
        """Of the folds of the fitted rows, and of the judged rows."""
        # Before the cut there is one tensor for all readers: least squares to each of their wanted tensors is least
        # squares to the mean of these.
        readers = cut.readers if side == "before" else (cut.main,)
        spot = Spot(
            student=self.ours[cut.before if side == "before" else cut.after],
            side=side,
            wanted=tuple(self.theirs[reader.place] for reader in readers),
            of_layer=of_layer,
        )
        models = (self.student, self.teacher)
        folds = moments_at(*models, spot, self.fitted, self.folds, batch=self.batch)
        (judged,) = moments_at(*models, spot, self.judged, [0] * len(self.judged), batch=self.batch)
        return folds, judged


def _options(bench: _Bench, cut: Cut, choice: Choice) -> tuple[_Option, ...]:
    """What to try at the cut; first before it, and then, on what that gave, after it."""
    kinds: tuple[Kind, ...] = get_args(Kind) if choice == "best" else (choice,)
    options: list[_Option] = []
    ahead: list[_Option] = []
    for kind in kinds:
        obstacle = why_not(kind, "before", bench.unit(cut.before), cut.before)
        if ("after", kind) in _FORMS and (obstacle or choice == "best"):
            also = why_not(kind, "after", bench.unit(cut.after), cut.after)
            if not also:
                ahead.append(_Option("after", kind, ""))
            elif obstacle:
                obstacle = f"{obstacle}; {also}"
        options.append(_Option("before", kind, obstacle))
    if all(option.obstacle for option in options):
        options.append(_Option("before", "shift", ""))
    return (*options, *ahead)


def _trial(bench: _Bench, option: _Option, name: str, change: Change) -> float:
    """The impact with ``change``, which is taken back: folded into the unit, or as a module where it does not fold."""
    unit = bench.unit(name)
    assert unit is not None
    if option.obstacle:
        with inserted(unit, option.side, change):
            return bench.impact()
    with undone(folded_parameters(unit)):
        fold(unit, option.kind, option.side, change)
        return bench.impact()


def _repair_side(bench: _Bench, cut: Cut, options: Sequence[_Option], impact: float) -> list[Repair]:
    """What the options of one side came to; the best is in the student's weights now, if any lowers the impact."""
    repairs: list[Repair] = []
    best: tuple[int, Change] | None = None
    lowest = impact
    for of_layer, group in itertools.groupby(options, key=lambda option: option.kind == "refit"):
        moments: tuple[list[Moments], Moments] | None = None
        for option in group:
            found = Repair(
                cut=cut,
                kind=option.kind,
                side=option.side,
                folds=not option.obstacle,
                applied=False,
                reason=option.obstacle,
            )
            if of_layer and option.obstacle:
                repairs.append(found)
                continue
            folds, judged = moments = moments or bench.moments(cut, option.side, of_layer)
            change = fit(folds, _FORMS[option.side, option.kind])
            after = _trial(bench, option, found.unit, change)
            if not option.obstacle and after < lowest:
                best, lowest = (len(repairs), change), after
            repairs.append(
                replace(
                    found,
                    strength=change.strength,
                    cut_error_before=judged.error,
                    cut_error_after=judged.error_with(change),
                    impact_before=impact,
                    impact_after=after,
                )
            )
    if best is None:
        return [replace(one, reason=one.reason or _NOT_NEARER) for one in repairs]
    chosen, change = best
    kept = repairs[chosen]
    unit = bench.unit(kept.unit)
    assert unit is not None
    fold(unit, kept.kind, kept.side, change)
    return [
        replace(one, applied=True)
        if place == chosen
        else replace(
            one,
            reason=one.reason or (_NOT_NEARER if one.impact_after >= impact else f"{kept.kind} is better"),
        )
        for place, one in enumerate(repairs)
    ]


def _bench(
    student: ModelMixin,
    teacher: ModelMixin,
    plan: PruningPlan,
    probe: Probe,
    judged: Probe | None,
    batch: int,
) -> _Bench:
    architecture = architecture_of(teacher)
    wanted = architecture_of(native_layout(architecture, plan).config)
    if architecture_of(student).signature != wanted.signature:
        raise PlanError(
            f"asked to repair what plan {plan.label} leaves, found a student of another architecture; "
            "give the U-Net that materialise(teacher, plan) made"
        )
    fitted, folds, judged = _split(probe, judged)
    answer = predict(teacher, judged, batch=batch).double()
    if not answer.isfinite().all() or not answer.any():
        raise DataError(
            "asked to repair towards a teacher whose prediction is 0 or not finite; "
            "repair in float32, or check its weights"
        )
    return _Bench(
        student=student,
        teacher=teacher,
        ours=student_paths(architecture, plan),
        theirs=teacher_paths(architecture),
        fitted=fitted,
        folds=folds,
        judged=judged,
        answer=answer,
        batch=batch,
    )


def repair(
    student: ModelMixin,
    teacher: ModelMixin,
    plan: PruningPlan,
    probe: Probe,
    *,
    kind: Choice = "best",
    judged: Probe | None = None,
    batch: int = 32,
) -> RepairReport:
    """Bring ``student``, the native U-Net that ``plan`` leaves of ``teacher``, nearer to it, in place.

    At each cut least squares finds what has to be added to the student's tensor: a ``shift`` (one number a channel), a
    ``scale-shift``, a ``linear`` map of the channels, or a ``refit`` of the last layer before the cut on that layer's
    own input. A map that has no exact fold gives way to the strongest that has, and is reported with the reason;
    ``best`` takes of all that fold what lowers the impact most. Nothing stays that does not lower it. ``teacher`` is
    only read; equal arguments give equal weights.

    Two thirds of the probe's pictures are fitted on, the others judge; or all are, and the rows of ``judged`` judge.
    The impacts in the report are of these rows, which also chose: before plans are compared, measure on others.

    Raises NonNativePlanError or PlanError when the plan or the student does not fit, ConfigError for an unknown kind,
    DataError for too few pictures, or a teacher that answers nothing or nothing finite.
    Source: bias correction, arXiv:1906.04721; reconstruction of a layer's output by least squares, arXiv:1707.06168.
    """
    if kind not in get_args(Choice):
        raise ConfigError(f"asked for a repair of kind {kind!r}; known are {', '.join(get_args(Choice))}")
    bench = _bench(student, teacher, plan, probe, judged, batch)
    cuts = find_cuts(architecture_of(teacher), plan)
    before = impact = bench.impact()
    repairs: list[Repair] = []
    for cut in track(cuts, "repairing cuts", len(cuts)):
        for _, options in itertools.groupby(_options(bench, cut, kind), key=lambda option: option.side):
            found = _repair_side(bench, cut, tuple(options), impact)
            repairs += found
            impact = next((one.impact_after for one in found if one.applied), impact)
    return RepairReport(
        plan=plan,
        kind=kind,
        cuts=cuts,
        repairs=tuple(repairs),
        fitted_rows=len(bench.fitted),
        judged_rows=len(bench.judged),
        impact_before=before,
        impact_after=impact,
    )
