"""Scoring by a race: groups whose position in the order is clear get no further samples.

All groups start with the same few samples. After each round only those groups go on that cannot be told apart from a
neighbour in the order, by the standard error of their paired differences (both were measured on the same samples, so
the noise that they share cancels). For the others ``intervals.impacts_of`` estimates the values on later samples.

Reference: successive elimination, Even-Dar et al., JMLR 7 (2006), here for the whole order instead of the best one.
The original runs until everything is certain; here a budget ends the race, and groups that are nearly equal may remain
undecided.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prune_lab.blocks import BlockGroup
from prune_lab.errors import ConfigError
from prune_lab.importance.context import Samples, SampleScores, ScoringContext
from prune_lab.importance.intervals import Floats, Integers, impacts_of
from prune_lab.importance.outputs import cached_values, measure_outputs, removed_sets
from prune_lab.prefix_sharing import ComputeCost, macs_without


@dataclass(frozen=True, slots=True)
class Race:
    """The cost limit of a race, and when the order of two groups counts as known."""

    budget: float = 0.15
    """Share of the multiply-adds of the naive loop (a forward pass for each group and sample of the probe)."""
    start: int = 32  # samples of the first round, for all groups; fewer if the budget does not allow so many
    step: int = 16  # samples of every further round
    separation: float = 1.0  # standard errors between neighbours from which on their order counts as known

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1 or self.start < 2 or self.step < 1 or not self.separation > 0:
            raise ConfigError(
                f"cannot race with budget={self.budget}, start={self.start}, step={self.step}, "
                f"separation={self.separation}; the budget is a share above 0 and at most 1, start is 2 or more, "
                "step 1 or more, separation above 0"
            )


def sample_order(samples: Samples, seed: int) -> Integers:
    """(R,) a random order of the samples, drawn with ``seed``.

    The first n samples, for every n, have each timestep equally often (+-1).
    """
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(samples))
    if samples.timesteps is None:
        return shuffled
    timesteps, repeat = samples.timesteps[shuffled], np.empty(len(samples), dtype=np.int64)
    for timestep in np.unique(timesteps):
        repeat[timesteps == timestep] = np.arange((timesteps == timestep).sum())
    return shuffled[np.argsort(repeat, kind="stable")]


def separations(values: Floats, scales: Floats, population: int) -> Floats:
    """(G,) difference in impact between each group and its nearest neighbour in the order, in standard errors.

    ``values`` (G, R) are NaN where not measured, ``scales`` (R,) as in ``impacts_of``. The standard error is that of
    the mean paired difference over the samples that both groups have, with the finite-population correction:
    ``population`` is the number of samples that could be measured.
    """
    impacts = impacts_of(values, scales)
    order = np.argsort(impacts, kind="stable")
    nearest = np.full(len(values), np.inf)
    mean_scale = np.nanmean(scales)
    for lower, upper in itertools.pairwise(order):
        differences = values[upper] - values[lower]
        differences = differences[~np.isnan(differences)]
        count = len(differences)
        correction = np.sqrt(max(1 - count / population, 0.0))
        error = differences.std(ddof=1) / np.sqrt(count) * correction / mean_scale
        # No error: the difference is the same on every sample, or all samples were measured.
        separation = (impacts[upper] - impacts[lower]) / error if error > 0 else np.inf
        nearest[[lower, upper]] = np.minimum(nearest[[lower, upper]], separation)
    return nearest


def score_by_race(
    context: ScoringContext, groups: Sequence[BlockGroup], criterion: str, race: Race
) -> SampleScores:
    """The values of a criterion of one step (``ONE_STEP``) within the race's budget; NaN where a group had no sample.

    A sample is never measured twice, and one pass of the whole model serves all groups that are still in the race. The
    same seed gives the same race, whether or not the cache already holds values.
    Raises ConfigError when the budget is too small for two samples of every group.
    """
    group_sets, names = removed_sets(context, groups)
    sets, rows = list(names), len(context.probe)
    samples = Samples.of(context.probe)
    order = sample_order(samples, context.seed)
    whole_macs = context.architecture.total_macs
    set_macs = np.array([macs_without(context.architecture, removed) for removed in sets], dtype=np.int64)
    budget = int(race.budget * len(sets) * rows * whole_macs)
    end = min(race.start, rows, budget // int(whole_macs + set_macs.sum()))
    if end < 2:
        least = 2 * int(whole_macs + set_macs.sum()) / (len(sets) * rows * whole_macs)
        raise ConfigError(
            f"asked to race {len(sets)} groups at {race.budget:.3g} of the naive cost on {rows} samples, which allows "
            f"less than two samples of every group; give a budget of {least:.2g} or more, or more samples"
        )
    compute = ComputeCost(forward_macs=whole_macs)
    active = np.ones(len(sets), dtype=bool)
    measured, begin = np.zeros((len(sets), rows), dtype=bool), 0
    while active.any():
        round_rows = order[begin:end]
        still = {removed: names[removed] for removed, on in zip(sets, active, strict=True) if on}
        measure_outputs(context, still, criterion, compute, round_rows)
        measured[np.ix_(active, round_rows)] = True
        budget -= len(round_rows) * int(whole_macs + set_macs[active].sum())
        if end == rows:
            break
        values, scales = cached_values(context, sets, criterion)
        so_far = order[:end]
        # The cache may hold more values, but only those that this race has measured may decide.
        separation = separations(np.where(measured, values, np.nan)[:, so_far], scales[so_far], rows)
        begin, end = end, min(rows, end + race.step)
        active &= separation < race.separation
        # Beyond the budget, the most clearly separated groups stop first.
        for index in np.argsort(-separation):
            if budget >= (end - begin) * int(whole_macs + set_macs[active].sum()):
                break
            active[index] = False
    compute.naive_macs = len(sets) * rows * whole_macs * (1 if context.unconditional is None else 2)
    values, scales = cached_values(context, sets, criterion)
    columns = np.flatnonzero(measured.any(axis=0))
    values = np.where(measured, values, np.nan)[[sets.index(removed) for removed in group_sets]]
    return SampleScores(values[:, columns], scales[columns], samples.rows(columns), compute)
