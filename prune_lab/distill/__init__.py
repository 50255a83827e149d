"""Distillation of pruned students from the original: losses, feature pairs, data, and the loop for many at once."""

from __future__ import annotations

from prune_lab.distill.batches import draw_batch
from prune_lab.distill.building import build_cache, encoded_now, training_data
from prune_lab.distill.cache import INDEX as CACHE_INDEX
from prune_lab.distill.cache import LatentCache, is_cache
from prune_lab.distill.conditioning import OtherCaptions, other_captions
from prune_lab.distill.consistency import (
    Consistency,
    ConsistencyPaths,
    check_consistency,
    distill_consistency,
    lcm_scheduler,
)
from prune_lab.distill.data import LatentData, Split, Subset, TrainingData, held_out, split_rows
from prune_lab.distill.drawing import check_draws_from_text, draw_cache, preview
from prune_lab.distill.encoding import LiveData, cached_data, encode_data
from prune_lab.distill.features import feature_pairs
from prune_lab.distill.image_source import ImageSource, left_out_text
from prune_lab.distill.loop import distill_together
from prune_lab.distill.losses import FEATURE_VARIANTS
from prune_lab.distill.memory import STATE_BYTES, TrainingMemory, pass_bytes, training_memory
from prune_lab.distill.recovery import Recovery, load_heldout, load_recovery
from prune_lab.distill.setup import DistillSetup, Student
from prune_lab.distill.shard_locks import PREVIEW, check_cache_folder
from prune_lab.distill.sharding import CacheBuild
from prune_lab.distill.sources import source_of

__all__ = [
    "CACHE_INDEX",
    "FEATURE_VARIANTS",
    "PREVIEW",
    "STATE_BYTES",
    "CacheBuild",
    "Consistency",
    "ConsistencyPaths",
    "DistillSetup",
    "ImageSource",
    "LatentCache",
    "LatentData",
    "LiveData",
    "OtherCaptions",
    "Recovery",
    "Split",
    "Student",
    "Subset",
    "TrainingData",
    "TrainingMemory",
    "build_cache",
    "cached_data",
    "check_cache_folder",
    "check_consistency",
    "check_draws_from_text",
    "distill_consistency",
    "distill_together",
    "draw_batch",
    "draw_cache",
    "encode_data",
    "encoded_now",
    "feature_pairs",
    "held_out",
    "is_cache",
    "lcm_scheduler",
    "left_out_text",
    "load_heldout",
    "load_recovery",
    "other_captions",
    "pass_bytes",
    "preview",
    "source_of",
    "split_rows",
    "training_data",
    "training_memory",
]
