"""Timing what each block's removal saves, by the difference between two U-Nets that take turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from diffusers import ModelMixin

from prune_lab.blocks import Architecture, architecture_of
from prune_lab.errors import ConfigError
from prune_lab.families import latent_shape
from prune_lab.plans import PruningPlan, native_layout
from prune_lab.probes import evaluating
from prune_lab.profiling.latency import (
    LatencyTable,
    MeasuredPlan,
    Saving,
    SavingKind,
    Use,
    calibrated,
    call_ms,
    check_runs,
    latency_of,
    random_inputs,
    saving_names,
)
from prune_lab.profiling.plan_matrix import SamplerGroup, sampler_groups
from prune_lab.runtime import Environment, track
from prune_lab.surgery import bypassed, materialise

ForwardTimer: TypeAlias = Callable[[ModelMixin, Mapping[str, Any]], float]


def forward_ms(unet: ModelMixin, inputs: Mapping[str, Any]) -> float:
    """Milliseconds of one forward pass, the device idle before and after."""
    return call_ms(lambda: unet(**inputs), unet.device)


class _Turns:
    """A U-Net that is timed before and after everything it is compared with.

    Against the mean of the two, whatever slows the machine by a factor cancels out, also one that changes evenly.
    """

    def __init__(self, whole: Callable[[], float]) -> None:
        self.whole = whole
        self.times = [whole()]

    def saved(self, took: float) -> float:
        """What share of the whole U-Net's time is saved by what just ``took`` so many milliseconds."""
        self.times.append(self.whole())
        return 1 - 2 * took / (self.times[-2] + self.times[-1])


def _check_plans(
    architecture: Architecture, calibrate: Sequence[PruningPlan], held_out: Sequence[PruningPlan]
) -> None:
    for plan in (*calibrate, *held_out):
        native_layout(architecture, plan)  # says why a plan cannot be built
        if not plan.removed:
            raise ConfigError("asked to time a plan that removes nothing; give plans that remove blocks")
    both = {plan.id: plan for plan in calibrate}.keys() & {plan.id: plan for plan in held_out}.keys()
    if both:
        raise ConfigError(
            f"asked to calibrate with plan {min(both)} and to hold it out; an error says something only about plans "
            "that were not calibrated with: give it once"
        )


def _take_blocks_off(saved: dict[str, list[float]], groups: Sequence[SamplerGroup]) -> None:
    """Reduce the saving of everything further in to that of its samplers, run by run."""
    for number, group in enumerate(groups):
        inner = [*group.blocks, *(other.name for other in groups[:number])]
        together = zip(*(saved[name] for name in inner), strict=True)
        saved[group.name] = [
            all_of_it - sum(parts) for all_of_it, parts in zip(saved[group.name], together, strict=True)
        ]


def _student_gain(
    unet: ModelMixin,
    plan: PruningPlan,
    inputs: Mapping[str, Any],
    timer: ForwardTimer,
    runs: int,
    warmup: int,
) -> float:
    """The median share of the whole U-Net's time that the materialised student saves."""
    student = materialise(unet, plan)
    for _ in range(warmup):
        timer(student, inputs)
    turns = _Turns(lambda: timer(unet, inputs))
    return statistics.median(turns.saved(timer(student, inputs)) for _ in range(runs))


def measure_latency_table(
    unet: ModelMixin,
    *,
    calibrate: Sequence[PruningPlan] = (),
    held_out: Sequence[PruningPlan] = (),
    runs: int = 20,
    warmup: int = 3,
    batch: int = 1,
    latent: int | None = None,
    tokens: int | None = None,
    seed: int = 0,
    timer: ForwardTimer = forward_ms,
) -> LatencyTable:
    """What each block's removal saves of a forward pass of ``unet``, on its device and in its number format.

    In each of ``runs`` rounds every removable block is bypassed once, in an order drawn from ``seed``, between two
    calls of the whole U-Net. The saving is the median over rounds of how much faster that was than the mean of the two,
    as a share of it, times the median of the whole. The saving of samplers that leave with everything further in is
    that of all of it together, less those of its blocks.

    The plans of ``calibrate`` and ``held_out`` are then materialised one at a time and timed in the same way: the
    first set the scale of the predictions, the second measure their error. About 2 * runs * (blocks + plans) calls of
    ``batch`` samples at ``latent`` squared (None: the config's size) and ``tokens`` words (None: 77), each timed by
    ``timer``, in milliseconds.

    Raises ConfigError for fewer than two runs, for a plan in both sets or one that removes nothing, NonNativePlanError
    for a plan that cannot be built, PlanError for one of another architecture; all before anything is timed.
    """
    check_runs(runs, warmup)
    architecture = architecture_of(unet, tokens=tokens)
    _check_plans(architecture, calibrate, held_out)
    inputs = random_inputs(
        unet.config,
        batch=batch,
        latent=latent,
        tokens=tokens,
        device=unet.device,
        dtype=unet.dtype,
        seed=seed,
    )
    groups = sampler_groups(architecture)
    blocks = {block.name: (block.name,) for block in architecture.blocks if block.removable}
    removals = list((blocks | {group.name: group.blocks for group in groups}).items())
    saved: dict[str, list[float]] = {name: [] for name, _ in removals}
    generator = np.random.default_rng(seed)

    def whole() -> float:
        return timer(unet, inputs)

    with evaluating(unet), torch.inference_mode():
        for _ in range(warmup):
            whole()
        turns = _Turns(whole)
        for _ in track(range(runs), "timing without each block"):
            for place in generator.permutation(len(removals)):
                name, removed = removals[place]
                with bypassed(unet, removed):
                    took = timer(unet, inputs)
                saved[name].append(turns.saved(took))
        latency = latency_of(turns.times, warmup)
        uses: list[tuple[PruningPlan, Use]] = [(plan, "calibrate") for plan in calibrate]
        uses += [(plan, "held-out") for plan in held_out]
        checks = []
        for plan, use in track(uses, "timing students"):
            gain = _student_gain(unet, plan, inputs, timer, runs, warmup)
            checks.append(MeasuredPlan(plan, use, latency.median_ms * (1 - gain)))
    _take_blocks_off(saved, groups)
    savings = []
    for name in saving_names(architecture):
        found = latency_of([latency.median_ms * share for share in saved[name]], 0)
        kind: SavingKind = "block" if name in blocks else "samplers"
        savings.append(Saving(name, kind, found.median_ms, found.p10_ms, found.p90_ms))
    dtype = str(unet.dtype).removeprefix("torch.")
    table = LatencyTable(
        architecture=architecture,
        whole=latency,
        savings=tuple(savings),
        scale=1.0,
        checks=(),
        batch=batch,
        latent=latent_shape(unet.config, latent),
        tokens=architecture.tokens,
        seed=seed,
        environment=Environment.capture(str(unet.device), dtype),
    )
    return calibrated(table, checks)
