"""Evaluation of a model: its held-out loss, images generated with it, and their CLIP scores."""

from prune_lab.evaluation.drawing import (
    asked_side,
    check_step_count,
    check_steps,
    draw_once,
    drawing_of,
    drawn_batches,
    generate,
    prompts_for,
)
from prune_lab.evaluation.files import read_pictures, save_grid, save_pictures
from prune_lab.evaluation.losses import heldout_loss
from prune_lab.evaluation.scores import clip_embeddings, clip_scores

__all__ = [
    "asked_side",
    "check_step_count",
    "check_steps",
    "clip_embeddings",
    "clip_scores",
    "draw_once",
    "drawing_of",
    "drawn_batches",
    "generate",
    "heldout_loss",
    "prompts_for",
    "read_pictures",
    "save_grid",
    "save_pictures",
]
