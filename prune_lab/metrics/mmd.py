"""CMMD (Jayasumana et al. 2024): the maximum mean discrepancy of CLIP embeddings of two sets of pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from prune_lab.errors import DataError
from prune_lab.metrics.rows import check_finite

SIGMA = 10.0  # of the Gaussian kernel
SCALE = 1000.0  # what the squared discrepancy is multiplied by, to be read more easily
_ROWS = 2048  # of one set whose kernel values are in memory at a time


def _kernel_sums(one: Tensor, other: Tensor, of_one: Tensor, of_other: Tensor) -> Tensor:
    """The sums of exp(-|x - y|^2 / (2 sigma^2)) over the pairs of each group of ``one`` with each of ``other``."""
    norms, columns = other.square().sum(dim=1), _one_hot(of_other)
    sums = torch.zeros(len(one), columns.shape[1], dtype=torch.float64, device=one.device)
    for rows in torch.split(torch.arange(len(one), device=one.device), _ROWS):
        part = one[rows]
        squared = part.square().sum(dim=1, keepdim=True) + norms - 2 * part @ other.T
        sums[rows] = (-squared / (2 * SIGMA**2)).exp() @ columns
    return _one_hot(of_one).T @ sums


def _one_hot(groups: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(groups).double()


def _squared(
    within: Tensor, others: Tensor, between: Tensor, count: int, other: int, unbiased: bool
) -> Tensor:
    """The squared discrepancy of sums of kernel values; a row with itself has the value one."""
    parts = [
        (total - rows) / (rows * (rows - 1)) if unbiased else total / rows**2
        for total, rows in ((within, count), (others, other))
    ]
    return parts[0] + parts[1] - 2 * between / (count * other)


def cmmd(features: Tensor, real: Tensor, *, unbiased: bool = False) -> float:
    """1000 times the squared discrepancy of ``features`` (N, D) and ``real`` (M, D), CLIP embeddings of length one.

    The usual figures are of the biased estimator, which is 0 for the same set and never below; ``unbiased`` leaves the
    pairs of a row with itself out, and may be below zero. Misleads when: compared between CLIP models. Raises DataError
    for fewer than two rows, or different widths.
    """
    groups = torch.zeros(len(features), dtype=torch.long, device=features.device)
    return cmmd_without(features, real, groups, unbiased=unbiased)[0]


def cmmd_without(
    features: Tensor, real: Tensor, groups: Tensor, *, paired: bool = False, unbiased: bool = False
) -> tuple[float, list[float]]:
    """``cmmd``, and what it is without the rows of each of the ``groups`` (N,), numbered from 0, in one pass.

    ``paired``: the same rows are left out of ``real``, too.
    """
    if min(len(features), len(real)) < 2 or features.ndim != 2 or features.shape[1:] != real.shape[1:]:
        raise DataError(
            f"asked for the discrepancy of features of shapes {tuple(features.shape)} and {tuple(real.shape)}; give "
            "(N, D) and (M, D), two rows at least"
        )
    for rows in (features, real):
        check_finite(rows, "the discrepancy")
    one, other, whole = features.double(), real.double(), torch.zeros(len(real), dtype=torch.long).to(groups)
    of_other = groups if paired else whole
    within = _kernel_sums(one, one, groups, groups)
    others = _kernel_sums(other, other, of_other, of_other)
    between = _kernel_sums(one, other, groups, of_other)
    count, many = len(one), len(other)
    value = SCALE * _squared(within.sum(), others.sum(), between.sum(), count, many, unbiased)
    without = []
    for group, size in enumerate(groups.bincount().tolist()):
        stays = torch.arange(len(within), device=one.device) != group
        kept = stays if paired else torch.ones(1, dtype=torch.bool, device=one.device)
        left = (count - size, many - size if paired else many)
        if min(left) > 1:
            sums = within[stays][:, stays].sum(), others[kept][:, kept].sum(), between[stays][:, kept].sum()
            without.append(float(SCALE * _squared(*sums, *left, unbiased)))
    return float(value), without
