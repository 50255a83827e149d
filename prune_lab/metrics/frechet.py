"""Frechet inception distance (Heusel et al. 2017): the distance of two Gaussians that are fitted to features.

The trace of the root of the product of two covariances, S1 S2 with S = F^T F, is the sum of the singular values of
F1 F2^T: the eigenvalues of S1 S2 that are not zero are those of (F1 F2^T)^T (F1 F2^T). So no matrix has to be made
positive by adding to its diagonal, and no root is taken of one that is nearly singular. Covariances of fewer pictures
than features are exact in this form, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prune_lab.errors import DataError
from prune_lab.metrics.rows import check_finite

_ROUNDING = (
    1e-13  # of the traces: what is left of their difference, in float64, where the Gaussians are equal
)


@dataclass(frozen=True, slots=True, eq=False)
class Gaussian:
    """A Gaussian of D dimensions that was fitted to ``count`` rows; its covariance is ``factor.T @ factor``."""

    mean: Tensor  # (D,) float64
    factor: Tensor  # (k, D) float64, k at most D
    count: int

    @property
    def covariance(self) -> Tensor:
        """The covariance, (D, D), unbiased."""
        return self.factor.T @ self.factor


def gaussian_of(features: Tensor) -> Gaussian:
    """The mean and the unbiased covariance of ``features`` (N, D). Raises DataError for fewer than two rows."""
    if features.ndim != 2 or len(features) < 2:
        raise DataError(
            f"asked to fit a Gaussian to features of shape {tuple(features.shape)}; give (N, D), N at least 2"
        )
    check_finite(features, "a Gaussian")
    rows = features.double()
    mean = rows.mean(dim=0)
    centred = (rows - mean) / (len(rows) - 1) ** 0.5
    if len(centred) > centred.shape[1]:
        centred = torch.linalg.qr(centred, mode="r").R  # the same product with itself, in D rows
    return Gaussian(mean, centred, len(rows))


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). Raises DataError for Gaussians of different dimensions."""
    if len(one.mean) != len(other.mean):
        raise DataError(
            f"asked for the distance of features of {len(one.mean)} and {len(other.mean)} dimensions; give features of "
            "one extractor"
        )
    apart = (one.mean - other.mean).square().sum()
    traces = one.factor.square().sum() + other.factor.square().sum()
    shared = torch.linalg.svdvals(one.factor @ other.factor.T).sum()
    distance = float(apart + traces - 2 * shared)
    return distance if distance > _ROUNDING * float(traces) else 0.0


def fid(features: Tensor, real: Tensor) -> float:
    """The Frechet distance of ``features`` (N, D) and ``real`` (M, D); 0 for the same set.

    Misleads when: N differs between the sets that are compared, because few pictures make it larger; and below D
    pictures, where the covariance has directions without any.
    """
    return frechet_distance(gaussian_of(features), gaussian_of(real))


def fid_without(
    features: Tensor, real: Tensor, groups: Tensor, *, paired: bool = False
) -> tuple[float, list[float]]:
    """``fid``, and what it is without the rows of each of the ``groups`` (N,), numbered from 0.

    ``paired``: the same rows are left out of ``real``, too.
    """
    other = gaussian_of(real)
    value, without = frechet_distance(gaussian_of(features), other), []
    for group in range(int(groups.max()) + 1):
        kept = groups != group
        if int(kept.sum()) > 1:
            left = gaussian_of(real[kept]) if paired else other
            without.append(frechet_distance(gaussian_of(features[kept]), left))
    return value, without
