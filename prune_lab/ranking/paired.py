"""Differences over common random numbers: everyone is measured on the same rows, so what a row adds to both cancels.

A row is a held-out picture with its noise and timestep, or a prompt with its seed. Rows count as independent: rows that
share a picture or a prompt should be averaged first. Each interval is for one comparison; none is widened for how many
comparisons there are.
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
    """A mean paired difference with its 95 % t interval, in the unit of the values; no interval (nan) for one row."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["lower", "tie", "higher"]:
        """Which side of zero the whole interval lies on; a tie where it holds zero, or where there is none."""
        if self.high < 0:
            return "lower"
        return "higher" if self.low > 0 else "tie"

    @property
    def tie(self) -> bool:
        """Whether the rows cannot tell the two apart."""
        return self.verdict == "tie"

    def __str__(self) -> str:
        # Four decimals, or more where they would turn an end that is not zero into one.
        ends = [abs(end) for end in (self.low, self.high) if math.isfinite(end) and end]
        digits = min(max(4, -math.floor(math.log10(min(ends, default=1.0)))), 7)
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def _rows(values: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64).ravel()


def paired_difference(one: ArrayLike, other: ArrayLike) -> Difference:
    """``one`` less ``other``, row by row. Raises DataError when they are empty or have unequally many rows."""
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
    """The group of each name, from 1 for the lowest mean loss, in that order; ``losses`` holds the loss of each row.

    Whoever cannot be told apart from the leader of the current group belongs to it, the first who can opens the next.
    Raises DataError for other than the same rows, and for losses that are not finite.
    """
    rows = {name: _rows(values) for name, values in losses.items()}
    for name, values in rows.items():
        if not np.isfinite(values).all():
            raise DataError(
                f"asked to group {name}, found losses that are not finite; leave it out as failed"
            )
    groups: dict[str, int] = {}
    leader, group = "", 0
    for name in sorted(rows, key=lambda one: float(rows[one].mean())):
        if not group or not paired_difference(rows[name], rows[leader]).tie:
            leader, group = name, group + 1
        groups[name] = group
    return groups
