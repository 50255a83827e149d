"""Precision and recall of a set of pictures (Kynkaanniemi et al. 2019), by balls that reach to the k-th neighbour."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prune_lab.errors import DataError
from prune_lab.metrics.rows import check_finite

NEIGHBOURS = 3
_ROWS = 2048  # whose distances are in memory at a time


@dataclass(frozen=True, slots=True)
class PrecisionRecall:
    """Shares from 0 to 1: of pictures that look real, and of real ones that could have been drawn."""

    precision: float
    recall: float


def _distances(part: Tensor, every: Tensor) -> Tensor:
    # in float64 the product of both keeps the digits that neighbours differ in
    return torch.cdist(part, every, compute_mode="use_mm_for_euclid_dist")


def _check(features: Tensor, real: Tensor, neighbours: int) -> None:
    if (
        min(len(features), len(real)) <= neighbours
        or features.ndim != 2
        or features.shape[1:] != real.shape[1:]
    ):
        raise DataError(
            f"asked for precision and recall of features of shapes {tuple(features.shape)} and {tuple(real.shape)} by "
            f"{neighbours} neighbours; give (N, D) and (M, D), {neighbours + 1} rows at least"
        )
    for rows in (features, real):
        check_finite(rows, "precision and recall")


def _radii(features: Tensor, neighbours: int, stays: Tensor) -> Tensor:
    """The distance from each row to its ``neighbours``-th neighbour, itself left out, by row of ``stays``, (G, N).

    ``stays`` (G, N) says which rows there are; where a row is not, its radius is below any distance.
    """
    found = torch.empty(stays.shape, dtype=torch.float64, device=features.device)
    for rows in torch.split(torch.arange(len(features), device=features.device), _ROWS):
        distances = _distances(features[rows], features)
        for group, kept in enumerate(stays):
            found[group, rows] = distances[:, kept].kthvalue(neighbours + 1).values
    return found.masked_fill(~stays, -1)


def _inside(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Whether each point lies in a ball, for each row of ``radii`` (G, centres): (G, points)."""
    found = []
    for part in torch.split(points, _ROWS):
        distances = _distances(part, centres)
        found.append(torch.stack([(distances <= one).any(dim=1) for one in radii]))
    return torch.cat(found, dim=1)


def _stays(groups: Tensor) -> Tensor:
    """Which rows there are: all, and then without each group of ``groups`` (N,), numbered from 0; (1 + G, N)."""
    every = torch.arange(-1, int(groups.max()) + 1, device=groups.device)
    return groups != every[:, None]


def precision_without(
    features: Tensor, real: Tensor, groups: Tensor, *, neighbours: int = NEIGHBOURS
) -> tuple[float, list[float]]:
    """Precision, and what it is without the rows of each of the ``groups`` (N,): the balls are those of real ones."""
    _check(features, real, neighbours)
    other = real.double()
    every = torch.ones(1, len(real), dtype=torch.bool, device=real.device)
    inside = _inside(features.double(), other, _radii(other, neighbours, every))[0].double()
    shares = [float(inside[kept].mean()) for kept in _stays(groups)]
    return shares[0], shares[1:]


def recall_without(
    features: Tensor, real: Tensor, groups: Tensor, *, neighbours: int = NEIGHBOURS
) -> tuple[float, list[float]]:
    """Recall, and what it is without the rows of each of the ``groups`` (N,), whose balls are then others."""
    _check(features, real, neighbours)
    one, stays = features.double(), _stays(groups)
    enough = stays.sum(dim=1) > neighbours
    shares = _inside(real.double(), one, _radii(one, neighbours, stays[enough])).double().mean(dim=1).tolist()
    return shares[0], shares[1:]


def precision_recall(features: Tensor, real: Tensor, *, neighbours: int = NEIGHBOURS) -> PrecisionRecall:
    """Precision and recall of ``features`` (N, D) against ``real`` (M, D).

    Misleads when: N and M differ between the sets that are compared. Raises DataError where a set has no more rows than
    ``neighbours``.
    """
    _check(features, real, neighbours)
    one, other = features.double(), real.double()
    radii = [
        _radii(rows, neighbours, torch.ones(1, len(rows), dtype=torch.bool, device=rows.device))
        for rows in (one, other)
    ]
    return PrecisionRecall(
        precision=float(_inside(one, other, radii[1]).double().mean()),
        recall=float(_inside(other, one, radii[0]).double().mean()),
    )
