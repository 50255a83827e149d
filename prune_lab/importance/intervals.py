"""Impacts from values per sample, of which some may be missing, and their bootstrap intervals over pictures."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]

INTERVAL = (2.5, 97.5)  # percentiles: a 95 % interval


def _sample_weights(values: Floats, scales: Floats) -> Floats:
    """(R,) relative size of the values to expect on each sample, to fill in those missing in ``values`` (G, R).

    It is the mean over the groups that were measured on all samples, each divided by its own mean. The scales take its
    place when there is no such group or when values may be negative.
    """
    complete = values[~np.isnan(values).any(axis=1)]
    means = complete.mean(axis=1, keepdims=True)
    if not len(complete) or (complete < 0).any() or not (means > 0).all():
        return scales
    weights: Floats = (complete / means).mean(axis=0)
    return weights


def impacts_of(values: Floats, scales: Floats) -> Floats:
    """(G,) sums of ``values`` (G, R) divided by the sum of ``scales`` (R,); NaN in ``values`` means not measured.

    Missing values are estimated with the ratio estimator (Cochran, Sampling Techniques, chapter 6): a sample with large
    values for other groups is expected to have a large value for this group too.
    """
    if not np.isnan(values).any():
        impacts: Floats = values.sum(axis=1) / scales.sum()
        return impacts
    weights, measured = _sample_weights(values, scales), ~np.isnan(values)
    with np.errstate(invalid="ignore"):  # 0 / 0 for a group without any value: its impact is NaN
        ratios: Floats = np.nansum(values, axis=1) / (measured @ weights)
    estimates: Floats = ratios * (weights.sum() / scales.sum())
    return estimates


def resampled_impacts(values: Floats, scales: Floats, pictures: Integers, *, draws: int, seed: int) -> Floats:
    """(draws, groups) ``impacts_of`` on bootstrap resamples of the pictures, the same resamples for every group.

    ``pictures`` (R,) numbers the picture of each sample. Samples of one picture are drawn together, because they share
    its content and are not independent.
    """
    _, index = np.unique(pictures, return_inverse=True)
    count = int(index.max()) + 1
    member = np.zeros((len(index), count))
    member[np.arange(len(index)), index] = 1.0
    generator = np.random.default_rng(seed)
    times = generator.multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)
    weights, measured = _sample_weights(values, scales), ~np.isnan(values)
    numerators: Floats = times @ (np.nan_to_num(values) @ member).T
    denominators: Floats = times @ ((measured * weights) @ member).T
    with np.errstate(invalid="ignore"):  # 0 / 0 where a resample holds no measured sample of a group
        ratios = numerators / denominators
    totals: Floats = (times @ (weights @ member)) / (times @ (scales @ member))
    return ratios * totals[:, None]


def intervals(values: Floats, scales: Floats, pictures: Integers, *, draws: int, seed: int) -> Floats:
    """(2, groups) low and high ends of the 95 % percentile interval; NaN without draws or with only one picture."""
    if draws < 1 or len(np.unique(pictures)) < 2:
        return np.full((2, len(values)), np.nan)
    impacts = resampled_impacts(values, scales, pictures, draws=draws, seed=seed)
    ends: Floats = np.nanpercentile(impacts, INTERVAL, axis=0)
    return ends
