"""What a search comes back with, and the measuring that it pays for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from prune_lab.errors import DataError
from prune_lab.plans import PruningPlan
from prune_lab.profiling import Metric
from prune_lab.search.space import Removed

ImpactOf: TypeAlias = Callable[[Sequence[Removed]], NDArray[np.float64]]
"""Measures a batch: sets of removed blocks in, (sets,) impacts out, one forward walk shared by all where possible."""


@dataclass(frozen=True, slots=True)
class SearchResult:
    """A plan found by measuring: its measured impact, and how many sets of blocks were measured to find it."""

    plan: PruningPlan
    impact: float
    measured: int


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """One plan of a Pareto front: its impact, predicted or measured, and what it leaves of every metric known."""

    plan: PruningPlan
    impact: float
    costs: Mapping[Metric, int | float]


def undominated(points: Sequence[FrontPoint], metrics: Sequence[Metric]) -> tuple[FrontPoint, ...]:
    """The points that no other one beats in impact and all ``metrics``, cheapest in the first metric first.

    A point beats another when it is nowhere worse and somewhere better; of equal points the first stays.
    """
    by_values = {
        (point.impact, *(point.costs[metric] for metric in metrics)): point for point in reversed(points)
    }
    kept = [
        point
        for values, point in by_values.items()
        if not any(
            other != values and all(o <= v for o, v in zip(other, values, strict=True)) for other in by_values
        )
    ]
    return tuple(sorted(kept, key=lambda point: ([point.costs[metric] for metric in metrics], point.impact)))


class CachedObjective:
    """Impacts of sets of blocks, each set measured once; the intact model has impact 0 and is not measured."""

    def __init__(self, impact_of: ImpactOf, known: Mapping[Removed, float] = MappingProxyType({})) -> None:
        self._impact_of = impact_of
        self._known: dict[Removed, float] = {frozenset(): 0.0} | dict(known)
        self.count = 0

    def of(self, sets: Sequence[Removed]) -> NDArray[np.float64]:
        """(sets,) impacts; those not known yet are measured in one batch. Raises DataError for a bad measurement."""
        new = [removed for removed in dict.fromkeys(sets) if removed not in self._known]
        if new:
            impacts = np.asarray(self._impact_of(new), dtype=np.float64)
            if impacts.shape != (len(new),) or not np.isfinite(impacts).all():
                raise DataError(
                    f"asked for the impacts of {len(new)} sets of blocks, found an array of shape {impacts.shape} with "
                    f"{int(np.isfinite(impacts).sum())} finite numbers; impact_of has to give one for each set"
                )
            self._known.update(zip(new, impacts.tolist(), strict=True))
            self.count += len(new)
        return np.array([self._known[removed] for removed in sets], dtype=np.float64)
