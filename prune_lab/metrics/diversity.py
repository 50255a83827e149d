"""How much pictures of one prompt differ: a student that draws one picture whatever the noise has collapsed."""

from __future__ import annotations

import torch
from torch import Tensor

from prune_lab.errors import DataError
from prune_lab.metrics.rows import check_finite


def mean_distances(features: Tensor, *, cosine: bool) -> Tensor:
    """The mean distance between two of the K pictures of each prompt, (P,) float64, from features (P, K, D).

    ``cosine``: one minus the cosine, of embeddings; else the root of the mean square, of pixels. 0 where all are alike.
    Raises DataError for fewer than two pictures.
    """
    if features.ndim != 3 or features.shape[1] < 2:
        raise DataError(
            f"asked how features of shape {tuple(features.shape)} differ; give (prompts, pictures, D), two pictures "
            "at least"
        )
    check_finite(features, "diversity")
    one, other = torch.triu_indices(features.shape[1], features.shape[1], offset=1).unbind()
    rows = features.double()
    left, right = rows[:, one], rows[:, other]
    if cosine:
        return 1 - torch.nn.functional.cosine_similarity(left, right, dim=2).mean(dim=1)
    return (left - right).square().mean(dim=2).sqrt().mean(dim=1)
