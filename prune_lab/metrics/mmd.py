"""CMMD (Jayasumana et al. 2024): the maximum mean discrepancy of CLIP embeddings of two sets of pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from prune_lab.errors import DataError

SIGMA = 10.0  # of the Gaussian kernel
SCALE = 1000.0  # what the squared discrepancy is multiplied by, to be read more easily
_ROWS = 2048  # of one set whose kernel values are in memory at a time


def _kernel_sum(one: Tensor, other: Tensor) -> Tensor:
    """The sum of exp(-|x - y|^2 / (2 sigma^2)) over all pairs of rows."""
    total = torch.zeros((), dtype=torch.float64, device=one.device)
    norms = other.square().sum(dim=1)
    for part in torch.split(one, _ROWS):
        squared = part.square().sum(dim=1, keepdim=True) + norms - 2 * part @ other.T
        total += (-squared / (2 * SIGMA**2)).exp().sum()
    return total


def cmmd(features: Tensor, real: Tensor, *, unbiased: bool = False) -> float:
    """1000 times the squared discrepancy of ``features`` (N, D) and ``real`` (M, D), CLIP embeddings of length one.

    The usual figures are of the biased estimator, which is 0 for the same set and never below; ``unbiased`` leaves the
    pairs of a row with itself out, and may be below zero. Misleads when: compared between CLIP models. Raises DataError
    for fewer than two rows, or different widths.
    """
    if min(len(features), len(real)) < 2 or features.shape[1:] != real.shape[1:]:
        raise DataError(
            f"asked for the discrepancy of features of shapes {tuple(features.shape)} and {tuple(real.shape)}; give "
            "(N, D) and (M, D), two rows at least"
        )
    one, other = features.double(), real.double()
    between = _kernel_sum(one, other) / (len(one) * len(other))
    within = []
    for rows in (one, other):
        count, total = len(rows), _kernel_sum(rows, rows)
        within.append((total - count) / (count * (count - 1)) if unbiased else total / count**2)
    return float(SCALE * (within[0] + within[1] - 2 * between))
