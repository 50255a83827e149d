"""Bootstrap intervals over pictures, with the same resamples for every group."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

INTERVAL = (2.5, 97.5)  # percentiles: a 95 % interval


def resampled_impacts(
    values: NDArray[np.float64],
    scales: NDArray[np.float64],
    pictures: NDArray[np.int64],
    *,
    draws: int,
    seed: int,
) -> NDArray[np.float64]:
    """(draws, groups) impacts on bootstrap samples of pictures, the same samples for every group.

    Rows of one picture come and go together: they share its content, so they are no independent evidence.
    """
    _, index = np.unique(pictures, return_inverse=True)
    count = int(index.max()) + 1
    member = np.zeros((len(index), count))
    member[np.arange(len(index)), index] = 1.0
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)
    numerators: NDArray[np.float64] = drawn @ (values @ member).T
    denominators: NDArray[np.float64] = drawn @ (scales @ member)
    return numerators / denominators[:, None]


def intervals(
    values: NDArray[np.float64],
    scales: NDArray[np.float64],
    pictures: NDArray[np.int64],
    *,
    draws: int,
    seed: int,
) -> NDArray[np.float64]:
    """(2, groups) ends of the percentile interval; NaN where there is none (unknown is not zero)."""
    if draws < 1 or len(np.unique(pictures)) < 2:
        return np.full((2, len(values)), np.nan)
    impacts = resampled_impacts(values, scales, pictures, draws=draws, seed=seed)
    ends: NDArray[np.float64] = np.percentile(impacts, INTERVAL, axis=0)
    return ends
