"""Distillation of pruned students from the original: losses, feature pairs, data, and the loop for one or many."""

from __future__ import annotations

from prune_lab.distill.course import Course
from prune_lab.distill.data import Batch, LatentData, cached_data, draw_batch, encode_data
from prune_lab.distill.features import FeaturePair, feature_pairs, tapped
from prune_lab.distill.joint import Student
from prune_lab.distill.loop import distill, distill_together
from prune_lab.distill.losses import FEATURE_VARIANTS, Losses, batch_losses
from prune_lab.distill.memory import TrainingMemory, training_memory
from prune_lab.distill.recovery import (
    HELDOUT_COLUMNS,
    RECOVERY_COLUMNS,
    Recovery,
    load_heldout,
    load_recovery,
)

__all__ = [
    "FEATURE_VARIANTS",
    "HELDOUT_COLUMNS",
    "RECOVERY_COLUMNS",
    "Batch",
    "Course",
    "FeaturePair",
    "LatentData",
    "Losses",
    "Recovery",
    "Student",
    "TrainingMemory",
    "batch_losses",
    "cached_data",
    "distill",
    "distill_together",
    "draw_batch",
    "encode_data",
    "feature_pairs",
    "load_heldout",
    "load_recovery",
    "tapped",
    "training_memory",
]
