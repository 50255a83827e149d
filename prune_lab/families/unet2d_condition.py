"""Stable Diffusion's U-Net, ``UNet2DConditionModel``: what its forward pass takes, and BK-SDM's plans for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from torch import Tensor

from prune_lab.errors import PlanError, UnsupportedModelError
from prune_lab.families import unet_blocks, unet_conditions, unet_settings, unet_walk, unet_wiring
from prune_lab.families.family import CLIP_TOKENS, Family, Outline, PrefixWalk, Removed, arranged


def latent_shape(config: Mapping[str, Any], latent: int | None = None) -> tuple[int, int]:
    """Height and width of the latent: ``latent`` squared, or the size the model was trained at."""
    size = config.get("sample_size") if latent is None else latent
    if size is None:
        raise UnsupportedModelError(
            "asked for the latent size of a U-Net; its config has no sample_size; pass a latent size"
        )
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def embedding_width(config: Mapping[str, Any]) -> int:
    """Width of the text embedding the U-Net expects."""
    width = config.get("encoder_hid_dim") or config.get("cross_attention_dim")
    if not isinstance(width, int):  # one width per stage: they all read the same embedding
        widths = set(width or ())
        if len(widths) != 1:
            raise UnsupportedModelError(
                f"asked for the text width of a U-Net; its cross_attention_dim is {width!r}; one is needed"
            )
        (width,) = widths
    return int(width)


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

    sample (B, C, H, W), timestep (B,), encoder_hidden_states (B, L, D) and what else the config asks for
    (``unet_conditions``). None for ``latent`` and ``tokens`` means the model's size and 77.
    """
    height, width = latent_shape(config, latent)
    length = CLIP_TOKENS if tokens is None else tokens

    def zeros(*shape: int, whole: bool = False) -> Tensor:
        return torch.zeros(batch, *shape, device=device, dtype=torch.long if whole else dtype)

    wanted = unet_conditions.conditions(config)
    return arranged(
        wanted,
        zeros(unet_conditions.latent_channels(config), height, width),
        zeros(whole=True),
        zeros(length, embedding_width(config)),
        {one.name: zeros(*one.row_shape(height, width), whole=one.whole) for one in wanted},
    )


# BK-SDM's plans (arXiv:2305.15798, section 3) -----------------------------------------------------------------------


def _bk_base(outline: Outline) -> Removed:
    """``bk-base``: the second residual-attention pair of every stage but the mid stage."""
    stages = [stage for stage in outline.stages if stage.lane != "middle"]
    found = {stage.name: len(outline.units_in(stage.name, "resnet")) for stage in stages}
    expected = {stage.name: 2 if stage.lane == "left" else 3 for stage in stages}
    if found != expected or len(found) != 8:
        raise PlanError(
            "BK-SDM's plans are defined for four stages of two layers with a mid stage, as in Stable Diffusion 1 "
            f"and 2; this U-Net has residual blocks {found}; name the blocks instead, for example '-Dn1.R2 -Dn1.A2'"
        )
    names = {stage.name for stage in stages}
    return frozenset(
        unit.name for unit in outline.units if unit.stage in names and unit.local_name in ("R2", "A2")
    )


def _bk_small(outline: Outline) -> Removed:
    """``bk-small``: the mid stage as well."""
    middle = outline.units_in(unet_blocks.MIDDLE)
    return _bk_base(outline) | {unit.name for unit in middle}


def _bk_tiny(outline: Outline) -> Removed:
    """``bk-tiny``: the innermost stages as well."""
    small = _bk_small(outline)
    innermost = (unit for stage in ("Dn4", "Up1") for unit in outline.units_in(stage))
    return small | {unit.name for unit in innermost if unit.kind != "sampler"}


UNET2D_CONDITION = Family(
    model_class=lambda: diffusers.UNet2DConditionModel,
    check=unet_settings.check_settings,
    size=latent_shape,
    example_inputs=example_inputs,
    conditions=unet_conditions.conditions,
    outline=unet_blocks.outline,
    layout=unet_wiring.layout,
    levels=unet_wiring.levels,
    plans={"bk-base": _bk_base, "bk-small": _bk_small, "bk-tiny": _bk_tiny},
    groups={
        "pair": unet_blocks.pairs,
        "triplet": unet_blocks.triplets,
        "inner": unet_blocks.inner_stages,
    },
    stage_features=unet_wiring.stage_features,
    stem="conv_in",
    head="conv_out",
    compiled=("ResnetBlock2D", "BasicTransformerBlock"),
    walk=PrefixWalk(unet_walk.predictions, unet_walk.state_bytes),
)
