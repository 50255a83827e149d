"""Stable Diffusion's U-Net, ``UNet2DConditionModel``: what its forward pass takes, and the functions that know it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from torch import Tensor

from prune_lab.errors import UnsupportedModelError
from prune_lab.families import (
    unet_blocks,
    unet_conditions,
    unet_config,
    unet_levels,
    unet_neutral,
    unet_plans,
    unet_settings,
    unet_wiring,
)
from prune_lab.families.family import CLIP_TOKENS, Family, arranged, sample_size


def embedding_width(config: Mapping[str, Any]) -> int:
    """Width of the text embedding that the U-Net expects; 0 where it reads none.

    Its stages may have widths of their own. Where each has that of its own channels, as in AudioLDM, no text is given
    and they attend to themselves. Raises UnsupportedModelError for widths that no text has.
    """
    if config.get("encoder_hid_dim"):
        return int(config["encoder_hid_dim"])
    width = config.get("cross_attention_dim")
    if isinstance(width, int):
        return width
    widths = set(width or ())
    if len(widths) > 1:  # those of stages that attend to no text mean nothing
        read = unet_conditions.text_widths(config)
        widths = {text for text, _ in read} or widths
        if len(widths) > 1 and all(text == own for text, own in read):
            return 0
    if len(widths) != 1:
        raise UnsupportedModelError(
            f"asked for the text width of a U-Net; its cross_attention_dim is {width!r}; one is needed, or that of "
            "the stage's own channels for each stage"
        )
    return int(widths.pop())


def arrange(config: Mapping[str, Any], *given: Any) -> dict[str, Any]:
    """Keyword arguments of ``forward``; encoder_hidden_states is None where the model reads no text."""
    inputs = arranged(config, *given)
    return inputs if inputs["encoder_hidden_states"].shape[-1] else {**inputs, "encoder_hidden_states": None}


def example_inputs(
    config: Mapping[str, Any],
    *,
    batch: int = 1,
    latent: int | None = None,
    tokens: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Keyword arguments for ``unet.forward``: zeros of the right shapes.

    sample (B, C, H, W), timestep (B,), encoder_hidden_states (B, L, D), None where no text is read, and what else the
    config asks for (``unet_conditions``). None for ``latent`` and ``tokens`` means the model's size and 77.
    """
    height, width = sample_size(config) if latent is None else (latent, latent)
    length = CLIP_TOKENS if tokens is None else tokens

    def zeros(*shape: int, whole: bool = False) -> Tensor:
        return torch.zeros(batch, *shape, device=device, dtype=torch.long if whole else dtype)

    wanted = unet_conditions.conditions(config)
    text = embedding_width(config)
    return arrange(
        config,
        wanted,
        zeros(unet_conditions.latent_channels(config), height, width),
        zeros(whole=True),
        zeros(length, text),
        {one.name: zeros(*one.row_shape(height, width), whole=one.whole) for one in wanted},
    )


UNET2D_CONDITION = Family(
    model_class=lambda: diffusers.UNet2DConditionModel,
    check=unet_settings.check_settings,
    channels=unet_conditions.latent_channels,
    pixels=lambda config: 8 if unet_conditions.latent_channels(config) == 4 else None,  # others draw pixels
    text=embedding_width,
    answers=("text", None, "text_embeds", None),
    example_inputs=example_inputs,
    conditions=unet_conditions.conditions,
    arrange=arrange,
    outline=unet_blocks.outline,
    layout=functools.partial(unet_wiring.layout, describe=unet_config.describe),
    neutral=functools.partial(unet_neutral.layout, describe=unet_config.describe),
    tied=unet_neutral.tied,
    levels=unet_levels.levels,
    more_options=unet_levels.more_options,
    plans=unet_plans.PLANS,
    groups={
        "pair": unet_blocks.pairs,
        "triplet": unet_blocks.triplets,
        "inner": unet_blocks.inner_stages,
    },
    stage_features=unet_levels.stage_features,
    stem=lambda config: "conv_in",
    head=lambda config: "conv_out",
    compiled=("ResnetBlock2D", "BasicTransformerBlock"),
)
