"""What is known about each class of model: how it is built, what it takes, which parts it has, what can leave it.

A family is a row of functions about one diffusers class. Everything else asks it and knows no class of model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from prune_lab.errors import UnsupportedModelError
from prune_lab.families.family import (
    CLASS_NAME,
    Family,
    Layout,
    Outline,
    PrefixWalk,
    Stage,
    Unit,
    UnitKind,
    plain_config,
)
from prune_lab.families.unet2d_condition import (
    CLIP_TOKENS,
    SDXL_TIME_IDS,
    UNET2D_CONDITION,
    embedding_width,
    latent_shape,
)

__all__ = [
    "CLASS_NAME",
    "CLIP_TOKENS",
    "FAMILIES",
    "SDXL_TIME_IDS",
    "Family",
    "Layout",
    "Outline",
    "PrefixWalk",
    "Stage",
    "Unit",
    "UnitKind",
    "embedding_width",
    "example_inputs",
    "family_of",
    "latent_shape",
    "meta_unet",
    "outline_of",
    "plain_config",
]

FAMILIES: Mapping[str, Family] = {"UNet2DConditionModel": UNET2D_CONDITION}
"""By name of the diffusers class."""


def family_of(source: nn.Module | Mapping[str, Any]) -> Family:
    """The family of a model, or of the model that a diffusers config describes.

    Raises UnsupportedModelError when its class has none, or a config does not name its class.
    """
    name = source.get(CLASS_NAME) if isinstance(source, Mapping) else type(source).__name__
    if name is None or name not in FAMILIES:
        found = f"a model of class {name}" if name else f"a config without {CLASS_NAME}"
        raise UnsupportedModelError(
            f"asked for the blocks of a model, found {found}; supported is {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]


def meta_unet(config: Mapping[str, Any]) -> Any:
    """The model of ``config`` on the ``meta`` device: every shape, no memory, in evaluation mode.

    Raises UnsupportedModelError when diffusers cannot build it.
    """
    model_class: Any = family_of(config).model_class()
    try:
        with torch.device("meta"):
            return model_class.from_config(plain_config(config)).eval()
    except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        # diffusers checks a config by building it; what it says is about the config's own keys
        raise UnsupportedModelError(
            f"asked to build a {model_class.__name__} from its config, diffusers refuses it "
            f"({type(error).__name__}: {error}); compare the config with that of a model that loads"
        ) from None


def outline_of(model: nn.Module) -> Outline:
    """The parts of ``model`` in order of execution; it may be on ``meta``."""
    return family_of(model).outline(model)


def example_inputs(
    config: Mapping[str, Any],
    *,
    batch: int = 1,
    latent: int | None = None,
    tokens: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Keyword arguments for the ``forward`` of the model of ``config``: zeros of the right shapes.

    Of a U-Net: sample (B, C, H, W), timestep (B,), encoder_hidden_states (B, L, D) and, for SDXL, added_cond_kwargs
    with text_embeds (B, P) and time_ids (B, 6). None for ``latent`` and ``tokens`` means the model's size and 77.
    """
    return family_of(config).example_inputs(
        config, batch=batch, latent=latent, tokens=tokens, device=device, dtype=dtype
    )
