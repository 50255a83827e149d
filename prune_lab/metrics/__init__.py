"""How near one set of pictures is to another, as short functions of their features: (N, D) tensors in, a number out.

Nothing here knows of models, files or prompts. Each function computes in float64 on the device of its features.
"""

from __future__ import annotations

from prune_lab.metrics.diversity import mean_distances
from prune_lab.metrics.frechet import Gaussian, fid, frechet_distance, gaussian_of
from prune_lab.metrics.inception_score import inception_score
from prune_lab.metrics.manifold import PrecisionRecall, precision_recall
from prune_lab.metrics.mmd import cmmd

__all__ = [
    "Gaussian",
    "PrecisionRecall",
    "cmmd",
    "fid",
    "frechet_distance",
    "gaussian_of",
    "inception_score",
    "mean_distances",
    "precision_recall",
]
