"""How near one set of pictures is to another, as short functions of their features: (N, D) tensors in, a number out.

Nothing here knows of models, files or prompts. Each function computes in float64 on the device of its features. Those
called ``..._without`` say too what the number is without each group of rows, which intervals are made of.
"""

from __future__ import annotations

from prune_lab.metrics.diversity import mean_distances
from prune_lab.metrics.frechet import Gaussian, fid, fid_without, frechet_distance, gaussian_of
from prune_lab.metrics.inception_score import inception_score, inception_score_without
from prune_lab.metrics.manifold import PrecisionRecall, precision_recall, precision_without, recall_without
from prune_lab.metrics.mmd import cmmd, cmmd_without

__all__ = [
    "Gaussian",
    "PrecisionRecall",
    "cmmd",
    "cmmd_without",
    "fid",
    "fid_without",
    "frechet_distance",
    "gaussian_of",
    "inception_score",
    "inception_score_without",
    "mean_distances",
    "precision_recall",
    "precision_without",
    "recall_without",
]
