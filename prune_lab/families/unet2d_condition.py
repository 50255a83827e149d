"""Stable Diffusion's U-Net: how it is built without weights, and what its forward pass takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from prune_lab.errors import UnsupportedModelError

CLIP_TOKENS = 77  # the context length of every CLIP text encoder that Stable Diffusion uses
SDXL_TIME_IDS = 6  # original size, crop corner and target size, two numbers each


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a U-Net without diffusers' own bookkeeping (names that begin with ``_``)."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def meta_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """The U-Net of ``config`` on the ``meta`` device: every shape, no memory, in evaluation mode."""
    with torch.device("meta"):
        unet: UNet2DConditionModel = UNet2DConditionModel.from_config(plain_config(config))
    return unet.eval()


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


def _added_conditioning(
    config: Mapping[str, Any], batch: int, device: torch.device | str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What SDXL adds to the time embedding: a pooled text embedding and six numbers about the picture."""
    kind = config.get("addition_embed_type")
    if kind is None:
        return {}
    if kind != "text_time":
        raise UnsupportedModelError(
            f"asked for inputs of a U-Net with addition_embed_type {kind!r}; inputs are known for none and "
            "for 'text_time' (SDXL)"
        )
    pooled = (
        config["projection_class_embeddings_input_dim"] - SDXL_TIME_IDS * config["addition_time_embed_dim"]
    )
    return {
        "text_embeds": torch.zeros(batch, pooled, device=device, dtype=dtype),
        "time_ids": torch.zeros(batch, SDXL_TIME_IDS, device=device, dtype=dtype),
    }


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

    sample (B, C, H, W), timestep (B,), encoder_hidden_states (B, L, D) and, for SDXL, added_cond_kwargs with
    text_embeds (B, P) and time_ids (B, 6). None for ``latent`` and ``tokens`` means the model's size and 77.
    """
    height, width = latent_shape(config, latent)
    length = CLIP_TOKENS if tokens is None else tokens
    made = {"device": device, "dtype": dtype}
    inputs: dict[str, Any] = {
        "sample": torch.zeros(batch, config["in_channels"], height, width, **made),  # type: ignore[call-overload]
        "timestep": torch.zeros(batch, device=device, dtype=torch.long),
        "encoder_hidden_states": torch.zeros(batch, length, embedding_width(config), **made),  # type: ignore[call-overload]
    }
    if added := _added_conditioning(config, batch, device, dtype):
        inputs["added_cond_kwargs"] = added
    return inputs
