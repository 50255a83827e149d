"""Taking blocks out of a model: bypassed for a trial, or gone for good in a smaller model, written and proved."""

from __future__ import annotations

from prune_lab.surgery.building import materialise, materialise_from_folder
from prune_lab.surgery.bypass import Bypass, bypassed, stand_in_for
from prune_lab.surgery.choosing import chosen_from_files, unit_magnitudes, with_first_units, with_units_chosen
from prune_lab.surgery.code import notes_on_form
from prune_lab.surgery.proof import Original, Proof, digest_of, get_ready_to_prove, prove
from prune_lab.surgery.writing import TEACHER, original_of, pipeline_with, prune_pipeline, save_model

__all__ = [
    "TEACHER",
    "Bypass",
    "Original",
    "Proof",
    "bypassed",
    "chosen_from_files",
    "digest_of",
    "get_ready_to_prove",
    "materialise",
    "materialise_from_folder",
    "notes_on_form",
    "original_of",
    "pipeline_with",
    "prove",
    "prune_pipeline",
    "save_model",
    "stand_in_for",
    "unit_magnitudes",
    "with_first_units",
    "with_units_chosen",
]
