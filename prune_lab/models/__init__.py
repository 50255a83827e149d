"""Where a model comes from, whether its files are sound, and loading it.

A model is named by ``reference`` or ``transformer``, which ship, by a preset, a pipeline or model folder, a
``config.json`` (structure only) or a hub id. Only safetensors are read: pickled weights and repositories that bring
their own code are refused. Whatever is wrong with the files is found from a few kilobytes of headers, before anything
is loaded or written.
"""

from __future__ import annotations

from prune_lab.models.digests import folder_digest, pipeline_digest
from prune_lab.models.files import weight_files
from prune_lab.models.kinship import check_same_class, of_shipped_family, shipped_like
from prune_lab.models.loading import load_model, load_pipeline, plain_source
from prune_lab.models.scorer import ScorerChoice, ScorerInputs, choose_scorer, load_scorer
from prune_lab.models.sources import (
    PRESETS,
    ModelSource,
    configured_model,
    model_digest,
    preset_config,
    recorded_model,
    resolve_model,
)
from prune_lab.models.usual_drawing import (
    UsualDrawing,
    check_draws_in,
    check_teaches_few,
    drawing_asked,
    note_trained_for_many,
    usual_drawing,
)

__all__ = [
    "PRESETS",
    "ModelSource",
    "ScorerChoice",
    "ScorerInputs",
    "UsualDrawing",
    "check_draws_in",
    "check_same_class",
    "check_teaches_few",
    "choose_scorer",
    "configured_model",
    "drawing_asked",
    "folder_digest",
    "load_model",
    "load_pipeline",
    "load_scorer",
    "model_digest",
    "note_trained_for_many",
    "of_shipped_family",
    "pipeline_digest",
    "plain_source",
    "preset_config",
    "recorded_model",
    "resolve_model",
    "shipped_like",
    "usual_drawing",
    "weight_files",
]
