"""From a model, a probe and a criterion to a table: what each group of blocks is worth, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prune_lab.blocks import BlockGroup
from prune_lab.importance.cache import ScoreCache
from prune_lab.importance.criteria import criterion_named
from prune_lab.importance.intervals import intervals
from prune_lab.importance.measured import Drawing, Subject
from prune_lab.importance.tables import Importance, ImportanceTable
from prune_lab.probes import Probe


def score(
    subject: Subject,
    groups: Sequence[BlockGroup],
    criterion: str = "output-mse",
    *,
    bootstrap: int = 1000,
    model: str = "",
) -> ImportanceTable:
    """What each of ``groups`` is worth to ``subject`` by one criterion.

    ``bootstrap`` resamplings of the pictures, the same for all groups, give the intervals; 0 means none. ``model`` is
    noted in the table; empty means the architecture's signature. What was measured stays in the subject's cache.
    Raises UnknownCriterionError, UnknownBlockError, and DataError when a value is not finite or when the criterion
    draws pictures and the subject does not say how.
    """
    measure = criterion_named(criterion)
    architecture = subject.architecture
    starred = [any(architecture.block(name).starred for name in group.blocks) for group in groups]
    try:
        found = measure(subject, groups)
    finally:
        subject.cache.save()  # also what was there when it was interrupted
    lows, highs = intervals(
        found.values, found.scales, found.samples.pictures, draws=bootstrap, seed=subject.seed
    )
    impacts = found.values.sum(axis=1) / found.scales.sum()
    entries = tuple(
        Importance(group, float(impact), float(low), float(high), len(found.samples), star)
        for group, impact, low, high, star in zip(groups, impacts, lows, highs, starred, strict=True)
    )
    return ImportanceTable(
        entries,
        criterion=criterion,
        probe=subject.probe.digest,
        model=model or architecture.signature,
        values=found.values,
        scales=found.scales,
        samples=found.samples,
        effort=found.effort,
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
    drawing: Drawing | None = None,
    cache: ScoreCache | None = None,
) -> ImportanceTable:
    """``score`` of ``unet`` on ``probe``, ``batch`` rows at a time (None: what fits into memory).

    The U-Net is asked on its device and in its number format, and left as it was.
    """
    subject = Subject(
        unet, probe, batch=batch, seed=seed, drawing=drawing, cache=ScoreCache() if cache is None else cache
    )
    return score(subject, groups, criterion, bootstrap=bootstrap, model=model)
