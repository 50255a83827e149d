"""What the configs of diffusers models say without being built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SCALES = ("scale_factor_spatial", "spatial_compression_ratio")
_LEVELS = ("block_out_channels", "encoder_block_out_channels", "dim_mult")


def picture_scale(vae: Mapping[str, Any]) -> int | None:
    """Pixels of a picture's side behind one of the latent's, by the config of a VAE; None where it does not say."""
    said = next((vae[name] for name in _SCALES if isinstance(vae.get(name), int)), None)
    levels = next((vae[name] for name in _LEVELS if isinstance(vae.get(name), (list, tuple))), ())
    return said or (int(2 ** (len(levels) - 1)) if levels else None)


def looks_like_a_unet(config: Mapping[str, Any]) -> bool:
    """Whether ``config`` has settings that a U-Net has, whatever class it names."""
    return "down_block_types" in config or "block_out_channels" in config
