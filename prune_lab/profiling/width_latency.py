"""What narrower blocks save in time, measured on real narrow models: one for each kind of sites, at half the width.

In torch a pass shows the time of every block, so the whole model and a narrow one are passed through by their parts, in
turns, and what a kind of sites saves is known for each block. Another runtime shows no parts: there each narrow model
is timed as a whole, in turns with the whole one, and what its kind saves is shared out to all sites of the kind by
their multiply-adds. That misleads where a layer at one resolution takes longer per multiply-add than one at another.

In both a last model is narrower everywhere, by a quarter: what that saves sets the scale of the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from diffusers import ModelMixin
from numpy.typing import NDArray

from prune_lab.blocks import Architecture, architecture_of
from prune_lab.counting import count_macs
from prune_lab.families import Site
from prune_lab.plans import PruningPlan
from prune_lab.prefix_sharing import compiling
from prune_lab.probes import evaluating
from prune_lab.profiling.latency import check_runs, fitting, random_inputs
from prune_lab.profiling.latency_parts import PartsTimer, pass_by_parts
from prune_lab.profiling.random_weights import compile_blocks, shell_of
from prune_lab.profiling.service import Backend, Service
from prune_lab.profiling.timed_plans import time_plans
from prune_lab.profiling.turns import LEAST_ROUNDS, median_interval
from prune_lab.profiling.width_costs import unit_costs
from prune_lab.profiling.width_savings import (
    UnitSaving,
    WidthSavings,
    outer_block,
    plan_everywhere,
    plans_by_kind,
    shared_out,
    width_savings,
)
from prune_lab.runtime import track
from prune_lab.runtimes import RUNTIMES
from prune_lab.surgery import materialise

_ALL = ""  # the name of the whole pass among its parts

Pass: TypeAlias = tuple[float, dict[str, float]]  # milliseconds, and those of each part


def _narrow_enough(saved: NDArray[np.float64], mark: float) -> bool:
    """Whether the interval of the median of every column is within ``mark`` to either side."""
    ends = [median_interval(column.tolist()) for column in saved.T]
    return all(end is not None and (end[1] - end[0]) / 2 <= mark for end in ends)


def _parts_of(passes: Sequence[Pass], names: Sequence[str]) -> NDArray[np.float64]:
    """(passes, names) milliseconds of the parts, and in a last column of all that is no part."""
    rows = [[*(parts[name] for name in names), took - sum(parts.values())] for took, parts in passes]
    return np.maximum(rows, 1e-9)  # of a clock with steps 0 is a time, too


def _saved_by_parts(
    timed: Mapping[bool, Callable[[], Pass]],
    names: Sequence[str],
    rounds: int,
    warmup: int,
    mark: float,
    seed: int,
) -> dict[str, float]:
    """The share of the whole model's pass that a narrow one saves in each part, ``names``, and in all.

    ``timed`` passes through either, True for the narrow one; every round does both, in an order that is drawn. A part
    saves its usual share of a pass, less what is left of it: the median of the ratios within a round. So neither an
    interrupted part nor a busy minute changes a result.
    """
    chance = np.random.default_rng(seed)
    passes: dict[bool, list[Pass]] = {False: [], True: []}
    for number in track(range(warmup + rounds), "timing narrow blocks"):
        both = {narrow: timed[narrow]() for narrow in map(bool, chance.permutation(2))}
        if number < warmup:
            continue
        for narrow, found in both.items():
            passes[narrow].append(found)
        whole, left = (_parts_of(passes[narrow], names) for narrow in (False, True))
        shares = np.median(whole / whole.sum(axis=1, keepdims=True), axis=0)
        shares /= shares.sum()
        saved = shares * (1 - left / whole)
        if len(whole) >= LEAST_ROUNDS and _narrow_enough(saved, mark):
            break
    middle = np.median(saved, axis=0)
    return {**dict(zip(names, middle.tolist(), strict=False)), _ALL: float(middle.sum())}


def _weights(architecture: Architecture, sizes: Mapping[str, Any]) -> dict[Site, float]:
    """Multiply-adds of one unit of each site."""
    count = count_macs(architecture.config, **sizes)
    return {site: float(cost.macs) for site, cost in unit_costs(architecture, count).items()}


def _gone(plan: PruningPlan) -> dict[str, int]:
    return {width.site: width.of - width.count for width in plan.widths}


def _by_blocks(
    architecture: Architecture,
    plans: Mapping[str, PruningPlan],
    saved: Mapping[str, Mapping[str, float]],
    weights: Mapping[Site, float],
) -> list[UnitSaving]:
    """What every unit saves, from what a narrow model of each kind saves in each block."""
    found = []
    for kind, plan in plans.items():
        by_block: dict[str, list[Site]] = {}
        for site in architecture.sites:
            if site.kind == kind:
                by_block.setdefault(outer_block(architecture, site), []).append(site)
        for around, sites in by_block.items():
            found += shared_out(sites, saved[kind][around], _gone(plan), weights)
    return found


def _in_torch(
    model: ModelMixin,
    architecture: Architecture,
    sizes: Mapping[str, Any],
    how: Mapping[str, Any],
    parts_timer: PartsTimer,
    *,
    compiled: bool,
) -> WidthSavings:
    plans, everywhere = plans_by_kind(architecture), plan_everywhere(architecture)
    inputs = random_inputs(model.config, **sizes, device=model.device, dtype=model.dtype, seed=how["seed"])
    paths = {unit.name: unit.path for unit in architecture.units}
    saved: dict[str, dict[str, float]] = {}

    def passing(model: ModelMixin) -> Callable[[], Pass]:
        return lambda: parts_timer(model, paths, inputs)

    with fitting(), evaluating(model), torch.inference_mode(), compiling(compiled):
        whole = shell_of(model) if compiled else model  # compiled in place: not what the caller has
        if compiled:
            compile_blocks(whole)
        for name, plan in (*plans.items(), (_ALL, everywhere)):  # one after another: they take memory
            narrow = materialise(model, plan, hand_over=True)
            if compiled:
                compile_blocks(narrow)
            timed = {False: passing(whole), True: passing(narrow)}
            saved[name] = _saved_by_parts(timed, tuple(paths), **how)
    units = _by_blocks(architecture, plans, saved, _weights(architecture, sizes))
    return width_savings(architecture, units, saved[_ALL][_ALL], how["rounds"])


def _in_runtime(architecture: Architecture, service: Service, how: Mapping[str, Any]) -> WidthSavings:
    plans, everywhere = plans_by_kind(architecture), plan_everywhere(architecture)
    by_id = {plan.id: plan for plan in (*plans.values(), everywhere)}
    turns = time_plans(architecture, by_id, service, **how)
    weights, units = _weights(architecture, service.sizes), []
    for kind, plan in plans.items():
        sites = [site for site in architecture.sites if site.kind == kind]
        units += shared_out(sites, -turns.change(plan.id).change, _gone(plan), weights)
    measured = -turns.change(everywhere.id).change
    return width_savings(architecture, units, measured, how["rounds"])


def measure_width_savings(
    model: ModelMixin,
    *,
    rounds: int = 40,
    warmup: int = 3,
    mark: float = 0.002,
    batch: int = 1,
    latent: int | None = None,
    tokens: int | None = None,
    frames: int | None = None,
    seed: int = 0,
    backend: Backend = "eager",
    parts_timer: PartsTimer = pass_by_parts,
) -> WidthSavings:
    """What units of the sites of ``model`` save of a forward pass, on its device, in its number format and ``backend``.

    Each narrow model (see the module) is timed in rounds with the whole one. It ends when every 95 % interval of what
    is saved is within ``mark`` of the whole pass to either side, at the latest after ``rounds``. ``parts_timer`` times
    a pass by parts, in milliseconds; the rest is as for ``measure_latency_table``. Another runtime than torch times
    random weights.

    Raises ConfigError for fewer than two rounds, UnsupportedModelError for a model without sites.
    """
    check_runs(rounds, warmup)
    architecture = architecture_of(model, tokens=tokens)
    sizes: dict[str, Any] = {"batch": batch, "latent": latent, "tokens": tokens, "frames": frames}
    how = {"rounds": rounds, "warmup": warmup, "mark": mark, "seed": seed}
    if backend in RUNTIMES:
        dtype = str(model.dtype).removeprefix("torch.")
        return _in_runtime(architecture, Service(str(model.device), dtype, **sizes, backend=backend), how)
    return _in_torch(model, architecture, sizes, how, parts_timer, compiled=backend == "compiled")
