"""The latency table of a model: what its parts take within one pass, and how well that foretells real students.

One pass times all parts at once, each from the end of the part before it to its own end, so that what is done for it in
between (the concatenation with a skip) is its own. Every pass is set to one speed: how much slower most of its parts
are than in other passes. So a busy minute changes nothing, and neither does what interrupts a pass in one part of it.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from diffusers import ModelMixin
from numpy.typing import NDArray
from torch import nn

from prune_lab.blocks import Architecture, architecture_of
from prune_lab.errors import ConfigError
from prune_lab.families import latent_shape
from prune_lab.forms import layout_of
from prune_lab.plans import PruningPlan
from prune_lab.prefix_sharing import compiling
from prune_lab.probes import evaluating
from prune_lab.profiling.latency import (
    Latency,
    LatencyTable,
    MeasuredPlan,
    Saving,
    Use,
    calibrated,
    call_ms,
    check_runs,
    fitting,
    latency_of,
    random_inputs,
    saving_names,
)
from prune_lab.profiling.plan_matrix import sampler_groups
from prune_lab.profiling.random_weights import compile_blocks, shell_of
from prune_lab.profiling.service import Backend, Service
from prune_lab.profiling.timed_plans import TEACHER, time_plans
from prune_lab.profiling.turns import LEAST_ROUNDS, TimedCall, Turns, median_interval, time_in_turns
from prune_lab.runtime import Environment, synchronize, track
from prune_lab.runtimes import RUNTIMES
from prune_lab.surgery import materialise

ForwardTimer: TypeAlias = Callable[[ModelMixin, Mapping[str, Any]], float]
PartsTimer: TypeAlias = Callable[
    [ModelMixin, Mapping[str, str], Mapping[str, Any]], tuple[float, dict[str, float]]
]

Shares: TypeAlias = Mapping[str, NDArray[np.float64]]  # (passes,) by name

_STUDENT_ROUNDS = 20  # at most, of the students that calibrate and check the table
_STUDENT_MARK = 0.01  # half the width of the interval of their ratios, at which it is enough


# One pass ------------------------------------------------------------------------------------------------


def forward_ms(model: ModelMixin, inputs: Mapping[str, Any]) -> float:
    """Milliseconds of one forward pass, the device idle before and after."""
    return call_ms(lambda: model(**inputs), model.device)


class _Stopwatch:
    """Moments of the work given to a device; on CUDA read there, without waiting for it in the middle of a pass."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._moments: list[tuple[str, Any]] = []

    def stop(self, name: str) -> None:
        """Note that what is called ``name`` ends here."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._moments.append((name, event))
            return
        synchronize(self._device)
        self._moments.append((name, time.perf_counter()))

    def laps(self) -> list[tuple[str, float]]:
        """(name, milliseconds since the moment before), without the first."""
        synchronize(self._device)
        pairs = zip(self._moments, self._moments[1:], strict=False)
        if self._device.type == "cuda":
            return [(name, float(before.elapsed_time(now))) for (_, before), (name, now) in pairs]
        return [(name, 1e3 * (now - before)) for (_, before), (name, now) in pairs]


class _Watched(nn.Module):
    """In place of a module: calls it, ``before`` and ``after``. A hook would be compiled together with its module."""

    def __init__(self, module: nn.Module, before: Callable[[], None], after: Callable[[], None]) -> None:
        super().__init__()
        self._module = (module,)  # in a tuple: no submodule, so that nothing is moved or renamed
        self._before, self._after = before, after

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives."""
        self._before()
        found = self._module[0](*args, **kwargs)
        self._after()
        return found


@contextlib.contextmanager
def _watched(model: ModelMixin, paths: Mapping[str, str], watch: _Stopwatch) -> Iterator[None]:
    """Inside, ``watch`` is stopped at the start of the first part that is called, and at the end of each."""
    started: list[bool] = []

    def start() -> None:
        if not started:
            started.append(True)
            watch.stop("")  # what comes before the first part is nobody's

    originals = {path: model.get_submodule(path) for path in paths.values()}
    try:
        for name, path in paths.items():
            ended = lambda name=name: watch.stop(name)  # noqa: E731
            model.set_submodule(path, _Watched(originals[path], start, ended))
        yield
    finally:
        for path, module in originals.items():
            model.set_submodule(path, module)


def pass_by_parts(
    model: ModelMixin, paths: Mapping[str, str], inputs: Mapping[str, Any]
) -> tuple[float, dict[str, float]]:
    """(milliseconds of one forward pass, of each of its parts); ``paths`` has the module path of every part.

    A part's time starts where the part before it ends. What comes before the first and after the last is no part's.
    """
    watch = _Stopwatch(model.device)
    synchronize(model.device)
    with _watched(model, paths, watch):
        watch.stop("")
        model(**inputs)
        watch.stop("")
    laps = watch.laps()
    return sum(took for _, took in laps), {name: took for name, took in laps if name}


# The table -----------------------------------------------------------------------------------------------


def _check_plans(
    architecture: Architecture, calibrate: Sequence[PruningPlan], held_out: Sequence[PruningPlan]
) -> None:
    for plan in (*calibrate, *held_out):
        layout_of(architecture, plan)  # says why a plan cannot be built
        if not plan.changes:
            raise ConfigError("asked to time a plan that removes nothing; give plans that remove blocks")
    both = {plan.id: plan for plan in calibrate}.keys() & {plan.id: plan for plan in held_out}.keys()
    if both:
        raise ConfigError(
            f"asked to calibrate with plan {min(both)} and to hold it out; an error says something only about plans "
            "that were not calibrated with: give it once"
        )


def _shares(
    passes: Sequence[tuple[float, Mapping[str, float]]], names: Mapping[str, Sequence[str]]
) -> Shares:
    """For each name the share of a usual pass that its parts together took in each of ``passes``."""
    times = np.array([list(parts.values()) for _, parts in passes])  # (passes, parts)
    usual = np.median(times, axis=0)
    relative = times[:, usual > 0] / usual[usual > 0]
    speeds = np.median(relative, axis=1) if relative.size else np.ones(len(times))
    whole = float(np.median([took for took, _ in passes] / speeds))
    return {
        name: np.sum([[parts[part] for part in together] for _, parts in passes], axis=1) / speeds / whole
        for name, together in names.items()
    }


def _narrow(shares: Shares, mark: float) -> bool:
    """Whether the interval of every share's median is within ``mark`` of the whole to either side."""
    for values in shares.values():
        found = median_interval(values.tolist())
        if found is None or (found[1] - found[0]) / 2 > mark:
            return False
    return True


def measure_latency_table(
    model: ModelMixin,
    *,
    calibrate: Sequence[PruningPlan] = (),
    held_out: Sequence[PruningPlan] = (),
    rounds: int = 100,
    warmup: int = 3,
    mark: float = 0.002,
    batch: int = 1,
    latent: int | None = None,
    tokens: int | None = None,
    frames: int | None = None,
    seed: int = 0,
    backend: Backend = "eager",
    timer: ForwardTimer = forward_ms,
    parts_timer: PartsTimer = pass_by_parts,
) -> LatencyTable:
    """What each block's removal saves of a forward pass of ``model``, on its device and in its number format.

    Each round is one pass that times all parts in place, each pass set to one speed. A saving is the median over rounds
    of the part's share of a pass, times the median of the passes. It ends when every share's 95 % interval is within
    ``mark`` of the whole to either side, at the latest after ``rounds``. Samplers that leave together are added up.

    The plans of ``calibrate`` and ``held_out`` are then built, with the weights of ``model`` and no others, and timed
    in turns with it: the first set the scale of the predictions, the second measure their error. ``batch`` samples at
    ``latent`` squared (None: the config's size) and ``tokens`` words (None: 77). ``timer`` times a pass and
    ``parts_timer`` a pass by parts, in milliseconds.

    Another runtime than torch shows no parts: the shares are then those of a pass in torch, the whole and the plans are
    timed in the runtime with random weights, and so the scale and the errors are what they are there.

    Raises ConfigError for fewer than two rounds, for a plan in both sets or one that removes nothing,
    FormError for a plan that cannot be built, PlanError for one of another architecture; all before anything
    is timed.
    """
    check_runs(rounds, warmup)
    architecture = architecture_of(model, tokens=tokens)
    _check_plans(architecture, calibrate, held_out)
    sizes: dict[str, Any] = {"batch": batch, "latent": latent, "tokens": tokens, "frames": frames}
    inputs = random_inputs(model.config, **sizes, device=model.device, dtype=model.dtype, seed=seed)
    paths = {unit.name: unit.path for unit in architecture.units}
    leaving = {name: tuple(name.split("+")) for name in saving_names(architecture)}
    assert {part for parts in leaving.values() for part in parts} <= set(paths)
    passes: list[tuple[float, dict[str, float]]] = []
    compiled = backend == "compiled"
    with fitting(), evaluating(model), torch.inference_mode(), compiling(compiled):
        whole = shell_of(model) if compiled else model  # compiled in place: not what the caller has
        plans = () if backend in RUNTIMES else (*calibrate, *held_out)
        students = {plan.id: materialise(whole, plan, hand_over=True) for plan in plans}
        for one in (whole, *students.values()) if compiled else ():
            compile_blocks(one)
        for number in track(range(warmup + rounds), "timing the parts of a pass"):
            found = parts_timer(whole, paths, inputs)
            if number >= warmup:
                passes.append(found)
            if len(passes) >= LEAST_ROUNDS and _narrow(_shares(passes, leaving), mark):
                break
        latency = latency_of([took for took, _ in passes], warmup)
        checks = _checked(whole, students, calibrate, held_out, inputs, timer, warmup, seed)
    if backend in RUNTIMES:
        service = Service(
            str(model.device), str(model.dtype).removeprefix("torch."), **sizes, backend=backend
        )
        latency, checks = _checked_in_runtime(architecture, service, calibrate, held_out, warmup, seed)
    groups = {group.name for group in sampler_groups(architecture)}
    savings = []
    for name, shares in _shares(passes, leaving).items():
        saved = latency_of((latency.median_ms * shares).tolist(), warmup)
        kind: Any = "samplers" if name in groups else "block"
        savings.append(Saving(name, kind, saved.median_ms, saved.p10_ms, saved.p90_ms))
    table = LatencyTable(
        architecture=architecture,
        whole=latency,
        savings=tuple(savings),
        scale=1.0,
        checks=(),
        batch=batch,
        latent=latent_shape(model.config, latent),
        tokens=architecture.tokens,
        seed=seed,
        environment=Environment.capture(str(model.device), str(model.dtype).removeprefix("torch.")),
        backend=backend,
        measured=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    measured = [MeasuredPlan(plan, use, latency.median_ms * (1 + change)) for plan, use, change in checks]
    return calibrated(table, measured)


def _checked(
    model: ModelMixin,
    students: Mapping[str, ModelMixin],
    calibrate: Sequence[PruningPlan],
    held_out: Sequence[PruningPlan],
    inputs: Mapping[str, Any],
    timer: ForwardTimer,
    warmup: int,
    seed: int,
) -> list[tuple[PruningPlan, Use, float]]:
    """(plan, its use, change of the time of a pass) for every student, timed in turns with ``model``."""
    if not students:
        return []

    def timed(model: ModelMixin) -> TimedCall:
        return lambda: timer(model, inputs)

    calls = {name: timed(model) for name, model in {TEACHER: model, **students}.items()}
    turns = time_in_turns(calls, rounds=_STUDENT_ROUNDS, warmup=warmup, seed=seed, mark=_STUDENT_MARK)
    return _changes(turns, calibrate, held_out)


def _changes(
    turns: Turns, calibrate: Sequence[PruningPlan], held_out: Sequence[PruningPlan]
) -> list[tuple[PruningPlan, Use, float]]:
    uses: list[tuple[PruningPlan, Use]] = [(plan, "calibrate") for plan in calibrate]
    uses += [(plan, "held-out") for plan in held_out]
    return [(plan, use, turns.change(plan.id).change) for plan, use in uses]


def _checked_in_runtime(
    architecture: Architecture,
    service: Service,
    calibrate: Sequence[PruningPlan],
    held_out: Sequence[PruningPlan],
    warmup: int,
    seed: int,
) -> tuple[Latency, list[tuple[PruningPlan, Use, float]]]:
    """(time of the whole model, (plan, its use, change of the time)) in the runtime of ``service``."""
    plans = {plan.id: plan for plan in (*calibrate, *held_out)}
    timing = {"rounds": _STUDENT_ROUNDS, "warmup": warmup, "mark": _STUDENT_MARK, "seed": seed}
    turns = time_plans(architecture, plans, service, **timing)  # type: ignore[arg-type]
    return turns.latency(TEACHER), _changes(turns, calibrate, held_out)
