"""Scoring: the table of importance of groups of blocks by one criterion, with intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prune_lab.blocks import BlockGroup
from prune_lab.importance.context import ScoringContext
from prune_lab.importance.criteria import check_race, criterion_named
from prune_lab.importance.intervals import impacts_of, intervals
from prune_lab.importance.racing import Race, score_by_race
from prune_lab.importance.tables import Importance, ImportanceTable


def score(
    context: ScoringContext,
    groups: Sequence[BlockGroup],
    criterion: str = "output-mse",
    *,
    bootstrap: int = 1000,
    model: str = "",
    race: Race | None = None,
) -> ImportanceTable:
    """The impact of each of ``groups`` by one criterion, on the model and inputs of ``context``.

    With ``race``, groups whose position in the order is clear get no further samples (``racing``): nearly the same
    order for a fraction of the cost; ``Importance.samples`` is the number that each got. Intervals come from
    ``bootstrap`` resamples of the pictures, the same for all groups; 0 gives no intervals. ``model`` is the name that
    the table notes, the architecture's signature if empty. Measured values stay in the context's cache.
    Raises UnknownCriterionError, UnknownBlockError, ConfigError for a race by a criterion that does not measure single
    samples, and DataError when a value is not finite or the context lacks settings that the criterion needs.
    """
    measure = criterion_named(criterion)
    if race is not None:
        check_race(criterion)
    architecture = context.architecture
    starred = [any(architecture.block(name).starred for name in group.blocks) for group in groups]
    try:
        scores = measure(context, groups) if race is None else score_by_race(context, groups, criterion, race)
    finally:
        context.cache.save()  # also after an interruption
    lows, highs = intervals(
        scores.values, scores.scales, scores.samples.pictures, draws=bootstrap, seed=context.seed
    )
    impacts = impacts_of(scores.values, scores.scales)
    counts = (~np.isnan(scores.values)).sum(axis=1)
    entries = tuple(
        Importance(group, float(impact), float(low), float(high), int(samples), star)
        for group, impact, low, high, samples, star in zip(
            groups, impacts, lows, highs, counts, starred, strict=True
        )
    )
    return ImportanceTable(
        entries,
        criterion=criterion,
        probe=context.probe.digest,
        model=model or architecture.signature,
        values=scores.values,
        scales=scores.scales,
        samples=scores.samples,
        compute=scores.compute,
    )
