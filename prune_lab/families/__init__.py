"""What is known about each class of model: how it is built, what it takes, which parts it has."""

from __future__ import annotations

from prune_lab.families.unet2d_condition import (
    CLIP_TOKENS,
    SDXL_TIME_IDS,
    embedding_width,
    example_inputs,
    latent_shape,
    meta_unet,
    plain_config,
)

__all__ = [
    "CLIP_TOKENS",
    "SDXL_TIME_IDS",
    "embedding_width",
    "example_inputs",
    "latent_shape",
    "meta_unet",
    "plain_config",
]
