"""Making probes: of pictures, of latents, or of noise where there is nothing to encode them with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prune_lab.errors import DataError, UnsupportedModelError
from prune_lab.families import known_conditions, latent_channels, latent_form, model_of, text_form
from prune_lab.probes.conditions import (
    drawn_rows,
    noise_rows,
    picture_names,
    picture_rows,
    pipeline_conditions,
    rows_of_size,
)
from prune_lab.probes.encoding import encode_captions
from prune_lab.probes.latents import decode_latents, encode_pictures, pixels_per_latent
from prune_lab.probes.probe import Probe
from prune_lab.probes.schedules import schedule_of
from prune_lab.runtime import generator_for, note_once, seeded

# All of SD 1, 2, XL.
_SD_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_VAE_FACTOR = (
    8  # pixels per latent pixel, where there is no VAE to tell; what a model is told of its size reads it
)


def _spread_order(count: int) -> list[int]:
    """0..count-1 in an order whose every prefix is spread over the range (golden-ratio stride)."""
    golden = (math.sqrt(5) - 1) / 2
    strides = (stride for stride in range(1, count + 1) if math.gcd(stride, count) == 1)
    stride = min(strides, key=lambda stride: abs(stride - golden * count))
    return [index * stride % count for index in range(count)]


def _assign_timesteps(
    groups: Sequence[str], *, strata: int, per_picture: int, length: int, generator: torch.Generator
) -> Tensor:
    """(pictures, per_picture) timesteps: middles of equal strata of the schedule, used equally often (+-1).

    Pictures are taken group by group, so every group meets every part of the schedule as evenly as it can.
    """
    shuffled = torch.randperm(len(groups), generator=generator).tolist()
    order = sorted(shuffled, key=lambda picture: groups[picture])
    middles = [int((stratum + 0.5) * length / strata) for stratum in _spread_order(strata)]
    timesteps = torch.empty(len(groups), per_picture, dtype=torch.int64)
    for place, picture in enumerate(order):
        for repeat in range(per_picture):
            timesteps[picture, repeat] = middles[(place * per_picture + repeat) % strata]
    return timesteps


def _note_controlnet(pipeline: Any) -> None:
    if getattr(pipeline, "controlnet", None) is not None:
        note_once(
            "the ControlNet of this pipeline is left out: the model is scored and trained on captions alone"
        )


def make_probe(
    pipeline: Any,
    pictures: Tensor,
    captions: Sequence[str],
    groups: Sequence[str],
    *,
    timesteps: int,
    seed: int,
    per_picture: int = 1,
) -> Probe:
    """A probe of ``len(pictures) * per_picture`` rows on the schedule of ``pipeline``'s scheduler.

    ``pictures`` (N, 3, H, W) uint8 with a caption and a group each. The schedule is cut into ``timesteps``
    equal strata and every row sits in the middle of one. By default a picture is used at one timestep, which
    makes all rows independent; ``per_picture`` uses it at that many different ones. Raises DataError for
    lengths that do not agree, UnsupportedModelError for a model that takes something of which no rows are made here.
    """
    pipeline_conditions(pipeline)  # before any work
    latents = encode_pictures(pipeline, pictures) if len(pictures) else torch.empty(0)
    return probe_of_latents(
        pipeline,
        latents,
        captions,
        groups,
        timesteps=timesteps,
        seed=seed,
        per_picture=per_picture,
        size=(int(pictures.shape[-2]), int(pictures.shape[-1])),
        pictures=pictures,
    )


def probe_of_latents(
    pipeline: Any,
    latents: Tensor,
    captions: Sequence[str],
    groups: Sequence[str],
    *,
    timesteps: int,
    seed: int,
    per_picture: int = 1,
    size: tuple[int, int] | None = None,
    text: tuple[Tensor, Mapping[str, Tensor]] | None = None,
    pictures: Tensor | None = None,
) -> Probe:
    """``make_probe`` of scaled latents (N, C, h, w), such as the model's own; ``size`` in pixels is told to
    models that ask for it (SDXL, PixArt); None: that of what the VAE makes of the latents.

    ``text`` holds embeddings (N, L, D) and added conditioning where they are known, and are not made of the captions.
    ``pictures`` (N, 3, H, W) uint8 are those of the latents, which are decoded without them where the model is shown
    something of the picture.
    """
    conditions = pipeline_conditions(pipeline)
    if not len(latents) == len(captions) == len(groups) or not len(latents):
        raise DataError(
            f"asked for a probe of {len(latents)} pictures, found {len(captions)} captions and {len(groups)} groups; "
            "give every picture one of each"
        )
    schedule = schedule_of(pipeline.scheduler.config)
    length = schedule.length
    if not 1 <= per_picture <= timesteps <= length:
        raise DataError(
            f"asked for {timesteps} timesteps and {per_picture} of them per picture; the schedule has {length} steps; "
            "give 1 <= per_picture <= timesteps <= that"
        )
    model = model_of(pipeline)
    if latents.shape[1] != latent_channels(model):
        raise UnsupportedModelError(
            f"the model takes {latent_channels(model)} channels of latents, the VAE gives {latents.shape[1]}; "
            "give the VAE of this model"
        )
    _note_controlnet(pipeline)
    embeddings, known = encode_captions(pipeline, captions) if text is None else text
    wanted = {condition.name for condition in conditions}
    added = {name: tensor for name, tensor in known.items() if name in wanted}
    height, width = (pixels_per_latent(pipeline) * side for side in latents.shape[-2:])
    size = size or (height, width)
    added = rows_of_size(model, added, len(latents), size) | added
    if set(picture_names(conditions)) - added.keys():
        shown = decode_latents(pipeline, latents) if pictures is None else pictures
        draws = [generator_for(seed, "mask", number) for number in range(len(latents))]
        added |= picture_rows(pipeline, conditions, shown, draws)
    generator = seeded(seed)
    places = _assign_timesteps(
        groups, strata=timesteps, per_picture=per_picture, length=length, generator=generator
    )
    steps = schedule.timesteps[places.flatten()]
    index = torch.arange(len(latents)).repeat_interleave(per_picture)
    latents = latents[index]
    noise = torch.randn(latents.shape, generator=generator)
    return Probe(
        noisy=schedule.add_noise(latents, noise, steps),
        noise=noise,
        timesteps=steps,
        embeddings=embeddings[index],
        captions=tuple(captions[picture] for picture in index.tolist()),
        groups=tuple(groups[picture] for picture in index.tolist()),
        target=schedule.target(latents, noise, steps),
        added=drawn_rows(conditions, len(index), generator_for(seed, "guidance", 0), length=length)
        | {name: tensor[index] for name, tensor in added.items()},
        pictures=index,
    )


def random_probe(
    config: Mapping[str, Any], *, samples: int, seed: int, timesteps: int = 10, latent: int | None = None
) -> Probe:
    """A probe of normal noise for the model of ``config``, where there is no VAE, text encoder or picture.

    Good for checks of machinery and speed; impacts measured on it say nothing about pictures. ``latent`` is the side of
    the latents; None means the size that the model is meant for. Raises UnsupportedModelError for a model that takes
    something of which no rows are made here, or whose size is not known.
    """
    conditions = known_conditions(config)
    generator = seeded(seed)
    latents = torch.randn(samples, *latent_form(config, latent), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    schedule = schedule_of(_SD_SCHEDULE)
    places = _assign_timesteps(
        [""] * samples, strata=timesteps, per_picture=1, length=schedule.length, generator=generator
    )
    steps = schedule.timesteps[places.flatten()]
    added: dict[str, Tensor] = {
        one.name: torch.randn(samples, *one.shape, generator=generator)
        for one in conditions
        if one.place == "added_cond_kwargs"
    }
    height, width = (_VAE_FACTOR * side for side in latents.shape[-2:])
    sized = rows_of_size(config, added, samples, (height, width))
    words, across = text_form(config)
    draws = generator_for(seed, "conditions", 0)
    rows = noise_rows(conditions, latents.shape[-2:], words, samples, draws)
    return Probe(
        noisy=schedule.add_noise(latents, noise, steps),
        noise=noise,
        timesteps=steps,
        embeddings=torch.randn(samples, words, across, generator=generator),
        captions=("",) * samples,
        groups=("random",) * samples,
        target=noise,
        added=rows | added | sized,
    )
