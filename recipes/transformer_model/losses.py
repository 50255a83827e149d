"""Held-out losses: on the same rows for every model, with other captions, and of the weights as they are stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel

from recipes.reference_model.noising import NoisyRows, with_noise
from recipes.reference_model.steps import slices, step_generator
from recipes.transformer_model.captioned import Captioned
from recipes.transformer_model.storage import as_float8, as_shipped
from recipes.transformer_model.transformer import predicted

_BATCH = 64
_LATE = 800  # timesteps from here on hide the layout, so that only the caption can tell it

Predict: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""The velocity (N, C, h, w) for noisy latents, timesteps, text states and their mask."""


def held_out_rows(captioned: Captioned, rounds: int, seed: int = 0) -> NoisyRows:
    """Every picture `rounds` times with its own caption, the timesteps spread evenly, an order fixed by `seed`."""
    data, generator = captioned.data, step_generator(seed, 0)
    rows = torch.arange(len(data.latents)).repeat(rounds)
    times = (torch.randperm(len(rows), generator=generator) + 0.5) * 1000 / len(rows)
    return with_noise(data.latents[rows], times.long(), data.full[rows], generator)


@torch.no_grad()
def errors(predict: Predict, captioned: Captioned, rows: NoisyRows) -> torch.Tensor:
    """Mean squared error of the velocity (N,), float64, one for each row."""
    found = []
    for part in slices(len(rows.times), _BATCH):
        caption = rows.caption[part]
        guess = predict(rows.noisy[part], rows.times[part], captioned.text[caption], captioned.mask[caption])
        found.append((guess - rows.velocity[part]).double().square().mean((1, 2, 3)))
    return torch.cat(found)


def by_transformer(transformer: PixArtTransformer2DModel) -> Predict:
    """What the transformer predicts."""
    return lambda noisy, times, text, mask: predicted(transformer, noisy, times, text, mask)


def by_unet(unet: UNet2DConditionModel) -> Predict:
    """What the reference U-Net predicts; it attends to all states of a caption, also those of the padding."""
    return lambda noisy, times, text, _mask: unet(noisy, times, text).sample


def losses_as_stored(
    transformer: PixArtTransformer2DModel, captioned: Captioned, rounds: int = 1
) -> dict[str, float]:
    """Loss of the float32 transformer, and of the same with its large matrices in one byte in two ways."""
    rows = held_out_rows(captioned, rounds)
    forms = {"float32": transformer, "int8": as_shipped(transformer), "float8": as_float8(transformer)}
    return {name: float(errors(by_transformer(one), captioned, rows).mean()) for name, one in forms.items()}


def caption_losses(predict: Predict, captioned: Captioned, rows: NoisyRows) -> dict[str, float]:
    """Loss at late timesteps with the right caption, with none, and with that of another row."""
    late = rows.times >= _LATE
    some = NoisyRows(rows.noisy[late], rows.times[late], rows.caption[late], rows.velocity[late])
    shown = {
        "right": some.caption,
        "none": torch.zeros_like(some.caption),
        "another": some.caption.roll(len(some.caption) // 2),
    }
    return {
        name: float(errors(predict, captioned, dataclasses.replace(some, caption=caption)).mean())
        for name, caption in shown.items()
    }
