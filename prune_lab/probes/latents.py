"""From pictures to latents and back: by the VAE of a pipeline, or as they are where its model draws pixels.

Latents are scaled as the model sees them, and never packed: (N, C, h, w), of a model of videos (N, C, 1, h, w), since a
picture is one frame.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.errors import DataError, UnsupportedModelError
from prune_lab.families import (
    conditions_of,
    family_of,
    latent_channels,
    latent_form,
    model_of,
    picture_scale,
    plain_config,
)
from prune_lab.families.drawing import has_own_size, latents_per_patch

# Brightness of red, green and blue, as ITU-R 601-2 and Pillow weigh them.
_GREY = (0.299, 0.587, 0.114)


def finite(tensor: Tensor, what: str) -> Tensor:
    """``tensor``. Raises DataError where a value, which are ``what``, is not finite."""
    if not tensor.isfinite().all():
        raise DataError(f"asked for {what}, found values that are not finite; load the pipeline in float32")
    return tensor


def to_uint8(pictures: Tensor) -> Tensor:
    """Pictures of floats from 0 to 1 as uint8 on the CPU."""
    return (pictures * 255).round().clamp(0, 255).to("cpu", torch.uint8)


# The VAE -------------------------------------------------------------------------------------------------------------


def vae_of(pipeline: Any) -> Any | None:
    """The VAE of ``pipeline``; None where its model draws pixels.

    Raises UnsupportedModelError for one whose latents are not those of the model.
    """
    vae = getattr(pipeline, "vae", None)
    parts = getattr(pipeline, "components", {}) if vae is None else {}
    for name, part in parts.items():
        if isinstance(part, nn.Module) and hasattr(part, "decode"):
            raise UnsupportedModelError(
                f"asked for latents of a {type(pipeline).__name__}, found that its {name} makes them; known are "
                "pipelines with a vae, or without one, of models that draw pixels"
            )
    if vae is not None and hasattr(
        vae, "bn"
    ):  # FLUX.2 packs latents and normalises them by stored statistics
        raise UnsupportedModelError(
            f"asked for latents of pictures, found a {type(vae).__name__}, which normalises packed latents; pictures "
            "are encoded by VAEs with a scaling factor, or with a mean and deviation of each channel"
        )
    return vae


def _of_frames(vae: nn.Module) -> bool:
    """Whether ``vae`` takes videos (N, 3, frames, H, W)."""
    return any(isinstance(module, nn.Conv3d) for module in vae.modules())


def scaling_of(vae: Any) -> tuple[Any, Any]:
    """(scale, shift) of ``vae``: what the model sees is (latents - shift) * scale. Numbers, or (C, 1, 1) tensors."""
    config = vae.config
    scale = getattr(config, "scaling_factor", None)
    shift = getattr(config, "shift_factor", None)
    mean, deviation = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    scale, shift = 1.0 if scale is None else float(scale), float(shift or 0.0)
    if mean is None or deviation is None:
        return scale, shift
    shape = (-1, 1, 1, 1) if _of_frames(vae) else (-1, 1, 1)
    return scale / torch.tensor(deviation).reshape(shape), torch.tensor(mean).reshape(shape)


def pixels_per_latent(pipeline: Any) -> int:
    """Pixels of a picture's side behind one of the latent's; 1 where the model draws pixels."""
    vae = vae_of(pipeline)
    if vae is None:
        return 1
    for name in ("vae_scale_factor", "vae_scale_factor_spatial"):  # as the pipeline itself reads it
        if isinstance(found := getattr(pipeline, name, None), int):
            return found
    return picture_scale(vae.config) or 1


def takes_frames(model: nn.Module) -> bool:
    """Whether ``model`` takes latents of videos (N, C, frames, h, w)."""
    return len(latent_form(plain_config(model), 16)) == 4


def class_count(pipeline: Any) -> int:
    """Classes that the model of ``pipeline`` is told by number; 0 where it takes none."""
    return next((one.classes for one in conditions_of(model_of(pipeline)) if one.classes), 0)


def picture_side(pipeline: Any) -> int:
    """Pixels per side of the pictures that ``pipeline`` draws where nobody says, and that its model is trained on."""
    size = getattr(pipeline, "default_sample_size", None)
    if not isinstance(size, int):
        model = model_of(pipeline)
        size = min(family_of(model).size(plain_config(model)))
    return size * pixels_per_latent(pipeline)


def check_side(pipeline: Any, side: int) -> None:
    """Raise DataError where ``pipeline`` cannot draw pictures of ``side`` pixels."""
    step = pixels_per_latent(pipeline) * latents_per_patch(pipeline)
    check_side_of(side, picture_side(pipeline), step, alone=has_own_size(pipeline))


def check_side_of(side: int, own: int, step: int, *, alone: bool) -> None:
    """Raise DataError where pictures of ``side`` pixels are no multiple of ``step``, or a model draws its ``own`` size
    ``alone``.
    """
    if side != own and alone:
        raise DataError(
            f"asked for pictures of {side} pixels per side, the model draws {own} alone; leave the size out "
            "(data.resolution = 0)"
        )
    if side % step:
        raise DataError(
            f"asked for pictures of {side} pixels per side, the model draws multiples of {step}; "
            f"give {max(1, round(side / step)) * step}"
        )


def draw_at(pipeline: Any, side: int) -> None:
    """Let ``pipeline`` draw pictures ``side`` pixels high and wide where its model has no size of its own (FLUX, Wan);
    0 changes nothing.

    Raises DataError for a size that its patches do not make up.
    """
    if not side or "sample_size" in model_of(pipeline).config:
        return
    check_side(pipeline, side)
    pipeline.default_sample_size = side // pixels_per_latent(pipeline)


def channels_of(pipeline: Any) -> int:
    """Channels of the latents."""
    vae = vae_of(pipeline)
    if vae is None:
        return latent_channels(model_of(pipeline))
    return int(getattr(vae.config, "latent_channels", None) or vae.config.z_dim)


# In ------------------------------------------------------------------------------------------------------------------


def _as_pixels(pixels: Tensor, channels: int) -> Tensor:
    """``pixels`` (N, 3, H, W) with the channels of a model that draws pixels: as they are, or grey."""
    if channels == 3:
        return pixels
    if channels != 1:
        raise UnsupportedModelError(
            f"asked to show pictures to a model of {channels} channels without a VAE; known are 3 (red, green, blue) "
            "and 1 (grey)"
        )
    return (pixels * torch.tensor(_GREY, device=pixels.device)[:, None, None]).sum(dim=1, keepdim=True)


def _encoded(vae: Any, pixels: Tensor, *, frames: bool) -> tuple[Tensor, Tensor | None]:
    """Mean and log-variance (N, C, h, w), float32 on the CPU, of what ``vae`` makes of ``pixels`` (N, 3, H, W); None
    where it knows no variance. With ``frames`` (N, C, 1, h, w).
    """
    video = _of_frames(vae)
    found = vae.encode(pixels[:, :, None] if video else pixels)
    if hasattr(found, "latent_dist"):
        parts = [found.latent_dist.mean, found.latent_dist.logvar]
    elif hasattr(found, "latent"):
        parts = [found.latent]
    else:
        raise UnsupportedModelError(
            f"asked for latents of pictures, found a {type(vae).__name__}, which gives none; give a pipeline whose VAE "
            "gives latents or their distribution"
        )
    plain = [part.float().cpu() for part in parts]
    if video and not frames:
        plain = [part[:, :, 0] for part in plain]
    return plain[0], plain[1] if len(plain) > 1 else None


def encode_pixels(pipeline: Any, pixels: Tensor, *, batch: int = 16, scaled: bool = True) -> Tensor:
    """Latents (N, C, h, w), float32 on the CPU, of ``pixels`` (N, 3, H, W): uint8, or floats from -1 to 1.

    The mode of the VAE's distribution, ``scaled`` as the model sees it or as it is; without a VAE the pixels
    themselves. Raises DataError for latents that are not finite (an SDXL VAE in float16), UnsupportedModelError for a
    VAE that is not known.
    """
    mean, _ = _distributions(pipeline, pixels, batch, scaled=scaled)
    return finite(mean, "latents of pictures")


def encode_distributions(pipeline: Any, images: Tensor, *, batch: int = 16) -> tuple[Tensor, Tensor | None]:
    """Mean and log-variance of the scaled latents of ``images`` (N, 3, H, W) in uint8; (N, C, h, w) float32 each.

    Latents are drawn as mean + exp(log_variance / 2) * noise; None where there is one latent of a picture, and nothing
    to draw. Raises DataError for values that are not finite.
    """
    mean, log_variance = _distributions(pipeline, images, batch, scaled=True)
    finite(mean, "latents of images")
    return mean, None if log_variance is None else finite(log_variance, "latents of images")


def _distributions(
    pipeline: Any, pixels: Tensor, batch: int, *, scaled: bool
) -> tuple[Tensor, Tensor | None]:
    vae, model = vae_of(pipeline), model_of(pipeline)
    if vae is None:
        values = pixels.float() / 127.5 - 1 if pixels.dtype == torch.uint8 else pixels.float()
        return _as_pixels(values, channels_of(pipeline)).cpu(), None
    frames, (scale, shift) = takes_frames(model), scaling_of(vae)
    means, log_variances = [], []
    with torch.no_grad():  # not inference_mode: a training loop may take gradients through these later
        for chunk in torch.split(pixels, batch):
            values = chunk.to(vae.device).to(vae.dtype)
            values = values / 127.5 - 1 if chunk.dtype == torch.uint8 else values
            mean, log_variance = _encoded(vae, values, frames=frames)
            means.append((mean - shift) * scale if scaled else mean)
            if log_variance is not None:
                log_variances.append(log_variance + 2 * _logarithm(scale) if scaled else log_variance)
    return torch.cat(means), torch.cat(log_variances) if log_variances else None


def _logarithm(scale: Any) -> Any:
    return scale.log() if isinstance(scale, Tensor) else math.log(scale)


def encode_pictures(pipeline: Any, pictures: Tensor, *, batch: int = 16) -> Tensor:
    """Scaled latents (N, C, h, w), float32 on the CPU, of ``pictures`` (N, 3, H, W) in uint8.

    The mode of the VAE's distribution, not a draw from it, so the same picture always gives the same latent.
    Raises DataError for pictures of another form, or latents that are not finite (an SDXL VAE in float16).
    """
    if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
        raise DataError(
            f"asked to encode pictures, found {pictures.dtype} of shape {tuple(pictures.shape)}; "
            "give uint8 of shape (N, 3, height, width)"
        )
    return encode_pixels(pipeline, pictures, batch=batch)


# Out -----------------------------------------------------------------------------------------------------------------


def decode_latents(pipeline: Any, latents: Tensor, *, batch: int = 8) -> Tensor:
    """Pictures uint8 (N, 3, H, W) on the CPU of scaled latents (N, C, h, w), decoded as the pipeline does it.

    Of latents (N, C, 1, h, w) of a model of videos the one frame.
    """
    vae = vae_of(pipeline)
    if vae is None:
        return to_uint8((latents.float() / 2 + 0.5).clamp(0, 1)).expand(-1, 3, -1, -1).contiguous()
    video, (scale, shift) = _of_frames(vae), scaling_of(vae)
    pictures = []
    with torch.inference_mode():
        for chunk in torch.split(latents, batch):
            whole = chunk[:, :, None] if video and chunk.ndim == 4 else chunk
            values = whole.to(vae.device, vae.dtype) / _placed(scale, vae) + _placed(shift, vae)
            found = vae.decode(values).sample.float()
            pictures.append(to_uint8(((found[:, :, 0] if video else found) / 2 + 0.5).clamp(0, 1)))
    return torch.cat(pictures)


def _placed(value: Any, vae: Any) -> Any:
    return value.to(vae.device, vae.dtype) if isinstance(value, Tensor) else value
