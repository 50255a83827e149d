"""Differences over common random numbers: all candidates are measured on the same rows, so the shared noise cancels.

A row is a held-out picture with its noise and timestep, or a prompt with its seed. Rows are treated as independent, so
rows that share a picture or a prompt should be averaged first. Each interval is for one comparison; there is no
correction for multiple comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from prune_lab.errors import DataError

COVERAGE = 0.975  # the quantile on either side of a 95 % interval


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean paired difference and its 95 % t interval, in the unit of the values; one row has no interval (NaN)."""

    mean: float
    low: float
    high: float

    @property
    def direction(self) -> Literal["lower", "tie", "higher"]:
        """The side of zero on which the whole interval lies; a tie when it contains zero or there is no interval."""
        if self.high < 0:
            return "lower"
        return "higher" if self.low > 0 else "tie"

    @property
    def tie(self) -> bool:
        """Whether the rows do not show which of the two is better."""
        return self.direction == "tie"

    def __str__(self) -> str:
        # Four decimals, or more where four would round an end to zero.
        ends = [abs(end) for end in (self.low, self.high) if math.isfinite(end) and end]
        digits = min(max(4, -math.floor(math.log10(min(ends, default=1.0)))), 7)
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


Better = Literal["higher", "lower", "neither"]
"""Which way a metric is better; neither: a change is only a change."""


def verdict_on(value: float, low: float, high: float, better: Better, floor: float = math.nan) -> str:
    """What a difference ``value`` with the 95 % interval from ``low`` to ``high`` says of what was changed: better,
    worse, higher, lower, not told apart, or no interval.

    A difference within ``floor``, that of the same thing measured twice, is not told apart either; NaN: none is known.
    """
    if not math.isfinite(low):
        return "no interval"
    if low <= 0 <= high or (math.isfinite(floor) and abs(value) <= floor):
        return "not told apart"
    if better == "neither":
        return "higher" if value > 0 else "lower"
    return "better" if (value > 0) == (better == "higher") else "worse"


def _rows(values: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64).ravel()


def paired_difference(one: ArrayLike, other: ArrayLike) -> Difference:
    """``one`` minus ``other``, row by row. Raises DataError when they are empty or differ in the number of rows."""
    left, right = _rows(one), _rows(other)
    if len(left) != len(right) or not len(left):
        raise DataError(
            f"asked to compare {len(left)} rows with {len(right)}; paired values need the same rows, one or more"
        )
    differences = left - right
    mean, count = float(differences.mean()), len(differences)
    if count < 2:
        return Difference(mean, float("nan"), float("nan"))
    half = float(stdtrit(count - 1, COVERAGE) * differences.std(ddof=1) / np.sqrt(count))
    return Difference(mean, mean - half, mean + half)


def tie_groups(losses: Mapping[str, ArrayLike]) -> dict[str, int]:
    """The tie group of each name, numbered from 1 and ordered by mean loss; ``losses`` holds the loss of each row.

    The name with the lowest mean loss leads group 1. The following names belong to its group as long as they are tied
    with it; the first that is not leads the next group.
    Raises DataError when names differ in the number of rows or a loss is not finite.
    """
    rows = {name: _rows(values) for name, values in losses.items()}
    for name, values in rows.items():
        if not np.isfinite(values).all():
            raise DataError(
                f"asked for the tie group of {name}, found losses that are not finite; leave it out as failed"
            )
    groups: dict[str, int] = {}
    leader, group = "", 0
    for name in sorted(rows, key=lambda one: float(rows[one].mean())):
        if not group or not paired_difference(rows[name], rows[leader]).tie:
            leader, group = name, group + 1
        groups[name] = group
    return groups
