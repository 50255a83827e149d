"""What the configs of diffusers models say without being built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def picture_scale(vae: Mapping[str, Any]) -> int | None:
    """Pixels of a picture's side behind one of the latent's, by the config of a VAE; None where it does not say."""
    levels = vae.get("block_out_channels")
    return int(2 ** (len(levels) - 1)) if isinstance(levels, (list, tuple)) and levels else None


def looks_like_a_unet(config: Mapping[str, Any]) -> bool:
    """Whether ``config`` has settings that a U-Net has, whatever class it names."""
    return "down_block_types" in config or "block_out_channels" in config
