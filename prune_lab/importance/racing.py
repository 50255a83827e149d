"""Scores as a race: blocks whose place in the order is settled stop receiving samples.

All groups start with the same few samples. After that only those go on whose distance to a neighbour in the order is
within the noise of their paired differences: both were measured on the same samples, so what a sample adds to both
cancels. What the others would have shown on the later samples is put in by ``intervals.impacts_of``.

Reference: successive elimination, Even-Dar et al., JMLR 7 (2006), here for the order of all instead of the best one.
That runs until all is certain; here a budget ends the race, and near-ties stay open.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prune_lab.blocks import BlockGroup
from prune_lab.errors import ConfigError
from prune_lab.importance.context import Samples, SampleScores, ScoringContext
from prune_lab.importance.intervals import impacts_of
from prune_lab.importance.outputs import known_values, measure_rows, named_sets
from prune_lab.prefix_sharing import ComputeCost, macs_without


@dataclass(frozen=True, slots=True)
class Race:
    """How much a race may cost and when a place counts as settled."""

    budget: float = 0.15
    """Share of the multiply-adds of the naive loop (a forward pass for each group and sample of the probe)."""
    start: int = 32  # samples that every group gets, as far as the budget goes
    step: int = 16  # samples of a round after that
    settled: float = 1.0  # standard errors between neighbours from which on their order counts as known

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1 or self.start < 2 or self.step < 1 or not self.settled > 0:
            raise ConfigError(
                f"cannot race with budget={self.budget}, start={self.start}, step={self.step}, "
                f"settled={self.settled}; the budget is a share above 0 and at most 1, start is 2 or more, step 1 or "
                "more, settled above 0"
            )


def sample_order(samples: Samples, seed: int) -> NDArray[np.int64]:
    """The samples in an order, drawn with ``seed``, whose beginnings have every timestep equally often (+-1)."""
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(samples))
    if samples.timesteps is None:
        return shuffled
    times, lap = samples.timesteps[shuffled], np.empty(len(samples), dtype=np.int64)
    for time in np.unique(times):
        lap[times == time] = np.arange((times == time).sum())
    return shuffled[np.argsort(lap, kind="stable")]


def distances(
    values: NDArray[np.float64], scales: NDArray[np.float64], population: int
) -> NDArray[np.float64]:
    """(G,) standard errors between each group and the nearer of its neighbours in the order of ``impacts_of``.

    ``values`` (G, R) are NaN where they were not measured. The error is of the mean paired difference over the samples
    that both have, of the ``population`` that could be measured.
    """
    impacts = impacts_of(values, scales)
    order = np.argsort(impacts, kind="stable")
    nearest = np.full(len(values), np.inf)
    unit = np.nanmean(scales)
    for lower, upper in itertools.pairwise(order):
        both = values[upper] - values[lower]
        both = both[~np.isnan(both)]
        rest = 1 - len(both) / population
        error = both.std(ddof=1) / np.sqrt(len(both)) * np.sqrt(max(rest, 0.0)) / unit
        gap = impacts[upper] - impacts[lower]
        distance = gap / error if error > 0 else np.inf  # the same on every sample, or all samples are known
        nearest[[lower, upper]] = np.minimum(nearest[[lower, upper]], distance)
    return nearest


def score_by_race(
    context: ScoringContext, groups: Sequence[BlockGroup], criterion: str, race: Race
) -> SampleScores:
    """What a criterion of one walk (``ONE_STEP``) finds within the race's budget; NaN for what it did without.

    Every group is walked on the samples it gets, never a sample twice: the U-Net's own pass serves all groups that are
    still in the race. The same seed gives the same race, also where an earlier one filled the cache.
    Raises ConfigError when the budget does not buy two samples of every group.
    """
    gone, named = named_sets(context, groups)
    sets, rows = list(named), len(context.probe)
    samples = Samples.of(context.probe)
    order = sample_order(samples, context.seed)
    own = context.architecture.total_macs
    after = np.array([macs_without(context.architecture, removed) for removed in sets], dtype=np.int64)
    left = int(race.budget * len(sets) * rows * own)
    reach = min(race.start, rows, left // int(own + after.sum()))
    if reach < 2:
        least = 2 * int(own + after.sum()) / (len(sets) * rows * own)
        raise ConfigError(
            f"asked to race {len(sets)} groups at {race.budget:.3g} of the naive cost on {rows} samples, which buys "
            f"less than two samples of every group; give a budget of {least:.2g} or more, or more samples"
        )
    compute = ComputeCost(forward_macs=own)
    racing = np.ones(len(sets), dtype=bool)
    known, begin = np.zeros((len(sets), rows), dtype=bool), 0
    while racing.any():
        round_rows = order[begin:reach]
        active = [removed for removed, on in zip(sets, racing, strict=True) if on]
        measure_rows(context, {removed: named[removed] for removed in active}, criterion, compute, round_rows)
        known[np.ix_(racing, round_rows)] = True
        left -= len(round_rows) * int(own + after[racing].sum())
        if reach == rows:
            break
        values, scales = known_values(context, sets, criterion)
        seen = order[:reach]
        # The cache may know more from earlier: this race goes by what it paid for.
        open_by = distances(np.where(known, values, np.nan)[:, seen], scales[seen], rows)
        begin, reach = reach, min(rows, reach + race.step)
        racing &= open_by < race.settled
        for place in np.argsort(-open_by):  # what the budget does not reach, the most settled first
            if left >= (reach - begin) * int(own + after[racing].sum()):
                break
            racing[place] = False
    compute.naive_macs = len(sets) * rows * own * (1 if context.unconditional is None else 2)
    values, scales = known_values(context, sets, criterion)
    seen = np.flatnonzero(known.any(axis=0))
    place_of = {removed: place for place, removed in enumerate(sets)}
    places = [place_of[removed] for removed in gone]
    found = np.where(known, values, np.nan)[places][:, seen]
    return SampleScores(found, scales[seen], samples.rows(seen), compute)
