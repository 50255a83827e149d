"""Distillation of pruned students from the original: losses, feature pairs, data, and the loop for one or many."""

from __future__ import annotations

from prune_lab.distill.batches import Batch, draw_batch
from prune_lab.distill.building import CacheBuild, build_cache, source_of, training_data
from prune_lab.distill.cache import INDEX as CACHE_INDEX
from prune_lab.distill.cache import LatentCache, is_cache
from prune_lab.distill.data import (
    EncodedBatch,
    LatentData,
    Subset,
    TrainingData,
    cached_data,
    encode_data,
    held_out,
)
from prune_lab.distill.encoding import LiveData
from prune_lab.distill.features import FeaturePair, feature_pairs, tapped
from prune_lab.distill.joint import Student
from prune_lab.distill.loop import distill, distill_together
from prune_lab.distill.losses import FEATURE_VARIANTS, Losses, batch_losses
from prune_lab.distill.memory import TrainingMemory, training_memory
from prune_lab.distill.recovery import (
    Recovery,
    load_heldout,
    load_recovery,
)
from prune_lab.distill.setup import DistillSetup
from prune_lab.distill.sources import ImageSource, open_source

__all__ = [
    "CACHE_INDEX",
    "FEATURE_VARIANTS",
    "Batch",
    "CacheBuild",
    "DistillSetup",
    "EncodedBatch",
    "FeaturePair",
    "ImageSource",
    "LatentCache",
    "LatentData",
    "LiveData",
    "Losses",
    "Recovery",
    "Student",
    "Subset",
    "TrainingData",
    "TrainingMemory",
    "batch_losses",
    "build_cache",
    "cached_data",
    "distill",
    "distill_together",
    "draw_batch",
    "encode_data",
    "feature_pairs",
    "held_out",
    "is_cache",
    "load_heldout",
    "load_recovery",
    "open_source",
    "source_of",
    "tapped",
    "training_data",
    "training_memory",
]
