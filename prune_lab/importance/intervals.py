"""Impacts from values per sample, where all were measured or some, and their bootstrap intervals over pictures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

INTERVAL = (2.5, 97.5)  # percentiles: a 95 % interval


def _profile(values: NDArray[np.float64], scales: NDArray[np.float64]) -> NDArray[np.float64]:
    """(R,) how much the samples count where values (G, R) are missing: what was measured on all of them says it.

    The mean of the complete groups, each relative to its own; the scales where a value may be negative.
    """
    whole = values[~np.isnan(values).any(axis=1)]
    means = whole.mean(axis=1, keepdims=True)
    if not len(whole) or (whole < 0).any() or not (means > 0).all():
        return scales
    shares: NDArray[np.float64] = (whole / means).mean(axis=0)
    return shares


def impacts_of(values: NDArray[np.float64], scales: NDArray[np.float64]) -> NDArray[np.float64]:
    """(G,) sums of ``values`` (G, R) over the sum of ``scales`` (R,), NaN standing for what was not measured.

    A group's missing values are put in by the ratio estimator (Cochran, Sampling Techniques, chapter 6): samples that
    are hard for the other groups are expected to be hard for this one.
    """
    if not np.isnan(values).any():
        whole: NDArray[np.float64] = values.sum(axis=1) / scales.sum()
        return whole
    profile = _profile(values, scales)
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):  # a group that nothing is known of has no impact: 0 / 0
        found: NDArray[np.float64] = np.nansum(values, axis=1) / (known @ profile)
    filled: NDArray[np.float64] = found * (profile.sum() / scales.sum())
    return filled


def resampled_impacts(
    values: NDArray[np.float64],
    scales: NDArray[np.float64],
    pictures: NDArray[np.int64],
    *,
    draws: int,
    seed: int,
) -> NDArray[np.float64]:
    """(draws, groups) ``impacts_of`` on bootstrap samples of pictures, the same samples for every group.

    Rows of one picture come and go together: they share its content, so they are no independent evidence.
    """
    _, index = np.unique(pictures, return_inverse=True)
    count = int(index.max()) + 1
    member = np.zeros((len(index), count))
    member[np.arange(len(index)), index] = 1.0
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)
    profile, known = _profile(values, scales), ~np.isnan(values)
    numerators: NDArray[np.float64] = drawn @ (np.nan_to_num(values) @ member).T
    counted: NDArray[np.float64] = drawn @ ((known * profile) @ member).T
    with np.errstate(invalid="ignore"):  # a draw may miss all samples of a group: 0 / 0
        found = numerators / counted
    ratio: NDArray[np.float64] = (drawn @ (profile @ member)) / (drawn @ (scales @ member))
    return found * ratio[:, None]


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
    ends: NDArray[np.float64] = np.nanpercentile(impacts, INTERVAL, axis=0)
    return ends
