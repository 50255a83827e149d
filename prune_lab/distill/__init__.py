"""Short distillation of pruned students from the original: losses, feature pairs, cached data, and the loop."""

from __future__ import annotations

from prune_lab.distill.data import Batch, LatentData, cached_data, draw_batch, encode_data
from prune_lab.distill.features import FeaturePair, feature_pairs, tapped
from prune_lab.distill.loop import distill
from prune_lab.distill.losses import Losses, batch_losses
from prune_lab.distill.recovery import RECOVERY_COLUMNS, Recovery, load_recovery

__all__ = [
    "RECOVERY_COLUMNS",
    "Batch",
    "FeaturePair",
    "LatentData",
    "Losses",
    "Recovery",
    "batch_losses",
    "cached_data",
    "distill",
    "draw_batch",
    "encode_data",
    "feature_pairs",
    "load_recovery",
    "tapped",
]
