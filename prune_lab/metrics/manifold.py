"""Precision and recall of a set of pictures (Kynkaanniemi et al. 2019), by balls that reach to the k-th neighbour."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prune_lab.errors import DataError

NEIGHBOURS = 3
_ROWS = 2048  # whose distances are in memory at a time


@dataclass(frozen=True, slots=True)
class PrecisionRecall:
    """Shares from 0 to 1: of pictures that look real, and of real ones that could have been drawn."""

    precision: float
    recall: float


def _distances(part: Tensor, every: Tensor) -> Tensor:
    # not by the product of both: that loses the digits that neighbours differ in
    return torch.cdist(part, every, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """The distance from each row to its ``neighbours``-th neighbour, itself left out."""
    found = [
        _distances(part, features).kthvalue(neighbours + 1).values for part in torch.split(features, _ROWS)
    ]
    return torch.cat(found)


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    inside = [(_distances(part, centres) <= radii).any(dim=1) for part in torch.split(points, _ROWS)]
    return float(torch.cat(inside).double().mean())


def precision_recall(features: Tensor, real: Tensor, *, neighbours: int = NEIGHBOURS) -> PrecisionRecall:
    """Precision and recall of ``features`` (N, D) against ``real`` (M, D).

    Misleads when: N and M differ between the sets that are compared. Raises DataError where a set has no more rows than
    ``neighbours``.
    """
    if min(len(features), len(real)) <= neighbours or features.shape[1:] != real.shape[1:]:
        raise DataError(
            f"asked for precision and recall of features of shapes {tuple(features.shape)} and {tuple(real.shape)} by "
            f"{neighbours} neighbours; give (N, D) and (M, D), {neighbours + 1} rows at least"
        )
    one, other = features.double(), real.double()
    return PrecisionRecall(
        precision=_share_inside(one, other, _radii(other, neighbours)),
        recall=_share_inside(other, one, _radii(one, neighbours)),
    )
