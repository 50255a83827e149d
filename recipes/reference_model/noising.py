"""Rows of a training step of a denoiser: latents with noise at many levels, and the velocity that is the answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recipes.reference_model.captions import CaptionedLatents
from recipes.reference_model.denoiser import noise_levels


@dataclass(frozen=True, slots=True)
class NoisyRows:
    """N latents with noise, their timesteps, the numbers of their captions, and the answer."""

    noisy: torch.Tensor  # (N, C, h, w)
    times: torch.Tensor  # (N,)
    caption: torch.Tensor  # (N,)
    velocity: torch.Tensor  # (N, C, h, w), arXiv:2202.00512


def with_noise(
    latents: torch.Tensor, times: torch.Tensor, caption: torch.Tensor, generator: torch.Generator
) -> NoisyRows:
    """Latents (N, C, h, w) with noise of their timesteps (N,)."""
    signal, spread = noise_levels()
    noise = torch.randn(latents.shape, generator=generator)
    kept, added = signal[times, None, None, None], spread[times, None, None, None]
    return NoisyRows(
        noisy=kept * latents + added * noise,
        times=times,
        caption=caption,
        velocity=kept * noise - added * latents,
    )


def draw_noisy(data: CaptionedLatents, size: int, noisier: float, generator: torch.Generator) -> NoisyRows:
    """`size` rows that spread evenly over the noise levels, drawn as 1000 (1 - u^noisier), u uniform."""
    length = len(noise_levels()[0])
    rows, caption = data.draw(size, generator)
    place = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    times = (length * (1 - (1 - place) ** noisier)).long().clamp(max=length - 1)
    return with_noise(data.latents[rows], times, caption, generator)
