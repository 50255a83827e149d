"""From a model, a probe and a criterion to a table: what each group of blocks is worth, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from prune_lab.blocks import BlockGroup
from prune_lab.importance.cache import ScoreCache
from prune_lab.importance.context import GenerationSettings, ScoringContext
from prune_lab.importance.criteria import check_race, criterion_named
from prune_lab.importance.intervals import impacts_of, intervals
from prune_lab.importance.racing import Race, score_by_race
from prune_lab.importance.tables import Importance, ImportanceTable
from prune_lab.probes import Probe


def score(
    context: ScoringContext,
    groups: Sequence[BlockGroup],
    criterion: str = "output-mse",
    *,
    bootstrap: int = 1000,
    model: str = "",
    race: Race | None = None,
) -> ImportanceTable:
    """What each of ``groups`` is worth to ``context`` by one criterion.

    With ``race`` groups whose place in the order is settled do without the later samples (``racing``): nearly the same
    order for a fraction of the cost, and ``Importance.samples`` says how many each got. ``bootstrap`` resamplings of
    the pictures, the same for all groups, give the intervals; 0 means none. ``model`` is noted in the table; empty
    means the architecture's signature. What was measured stays in the context's cache.
    Raises UnknownCriterionError, UnknownBlockError, DataError when a value is not finite or when the criterion
    draws pictures and the context does not say how, and ConfigError for a race by a criterion without a walk.
    """
    measure = criterion_named(criterion)
    if race is not None:
        check_race(criterion)
    architecture = context.architecture
    starred = [any(architecture.block(name).starred for name in group.blocks) for group in groups]
    try:
        found = measure(context, groups) if race is None else score_by_race(context, groups, criterion, race)
    finally:
        context.cache.save()  # also what was there when it was interrupted
    lows, highs = intervals(
        found.values, found.scales, found.samples.pictures, draws=bootstrap, seed=context.seed
    )
    impacts = impacts_of(found.values, found.scales)
    spent = (~np.isnan(found.values)).sum(axis=1)
    entries = tuple(
        Importance(group, float(impact), float(low), float(high), int(samples), star)
        for group, impact, low, high, samples, star in zip(
            groups, impacts, lows, highs, spent, starred, strict=True
        )
    )
    return ImportanceTable(
        entries,
        criterion=criterion,
        probe=context.probe.digest,
        model=model or architecture.signature,
        values=found.values,
        scales=found.scales,
        samples=found.samples,
        compute=found.compute,
    )


def score_groups(
    unet: Any,
    groups: Sequence[BlockGroup],
    probe: Probe,
    *,
    criterion: str = "output-mse",
    batch: int | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    model: str = "",
    drawing: GenerationSettings | None = None,
    cache: ScoreCache | None = None,
    race: Race | None = None,
) -> ImportanceTable:
    """``score`` of ``unet`` on ``probe``, ``batch`` rows at a time (None: what fits into memory).

    The U-Net is asked on its device and in its number format, and left as it was.
    """
    context = ScoringContext(
        unet, probe, batch=batch, seed=seed, drawing=drawing, cache=ScoreCache() if cache is None else cache
    )
    return score(context, groups, criterion, bootstrap=bootstrap, model=model, race=race)
