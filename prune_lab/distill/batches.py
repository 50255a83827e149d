"""The batch of every training step, drawn by seed and step alone.

A batch depends on nothing but the data, the settings and the number of the step. So all candidates see the same images,
noise and timesteps, and a run that was stopped goes on exactly as it would have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prune_lab.config import DistillConfig
from prune_lab.distill.data import TrainingData
from prune_lab.errors import ConfigError
from prune_lab.families import Condition
from prune_lab.probes import Schedule, drawn_rows, schedule_of
from prune_lab.runtime import generator_for


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Input and target of one training step: B noisy latents with their timesteps and text embeddings."""

    noisy: Tensor  # (B, C, H, W), of a model of videos (B, C, 1, H, W)
    target: Tensor  # (B, C, H, W) the noise, the velocity, or the way from the latents to the noise
    weights: Tensor  # (B,) float32 of each sample's task loss; ones unless distill.min_snr is set
    timesteps: Tensor  # (B,) int64
    embeddings: Tensor  # (B, L, D)
    added: Mapping[str, Tensor]  # what the model takes beside (`families.conditions_of`), each (B, ...)

    def rows(self, rows: slice) -> Batch:
        """The samples ``rows`` of the batch."""
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        added = {name: tensor[rows] for name, tensor in tensors.pop("added").items()}
        return Batch(**{name: tensor[rows] for name, tensor in tensors.items()}, added=added)

    def followed_by(self, other: Batch) -> Batch:
        """The samples of this batch and then those of ``other``, of the same model."""
        assert self.added.keys() == other.added.keys()
        tensors = {
            field.name: torch.cat([getattr(self, field.name), getattr(other, field.name)])
            for field in dataclasses.fields(self)
            if field.name != "added"
        }
        return Batch(
            **tensors, added={name: torch.cat([one, other.added[name]]) for name, one in self.added.items()}
        )


def batch_rows(count: int, batch: int, seed: int, step: int) -> list[int]:
    """The ``batch`` rows, of ``count``, that step ``step`` (from 1) trains on; every epoch is a new order of all."""
    places = range((step - 1) * batch, step * batch)
    orders = {
        epoch: torch.randperm(count, generator=generator_for(seed, "epoch", epoch)).tolist()
        for epoch in {place // count for place in places}
    }
    return [orders[place // count][place % count] for place in places]


def min_snr_weights(schedule: Schedule, timesteps: Tensor, gamma: float) -> Tensor:
    """Weights (B,) of the task loss that limit the share of nearly clean samples; ones where ``gamma`` is 0.

    With the signal-to-noise ratio SNR they are min(SNR, gamma) / SNR for a model that predicts the noise, and
    min(SNR, gamma) / (SNR + 1) for one that predicts the velocity (arXiv:2303.09556, section 3.4). Raises ConfigError
    for any other model.
    """
    if not gamma:
        return torch.ones(len(timesteps))
    if schedule.kind not in ("epsilon", "v_prediction"):
        raise ConfigError(
            f"asked for distill.min_snr = {gamma:g}, found a model whose predictions are of the kind {schedule.kind}; "
            "the weights are known for the noise and the velocity: set distill.min_snr = 0"
        )
    kept = schedule.kept[timesteps].float()
    ratio = kept / (1 - kept)
    scale = ratio + 1 if schedule.kind == "v_prediction" else ratio
    weights: Tensor = ratio.clamp(max=gamma) / scale.clamp(min=torch.finfo(torch.float32).tiny)
    return weights


def draw_batch(
    data: TrainingData,
    scheduler: Any,
    settings: DistillConfig,
    step: int,
    device: torch.device | str = "cpu",
    *,
    part: slice = slice(None),
    conditions: Sequence[Condition] = (),
    among: Tensor | None = None,
) -> Batch:
    """The batch of step ``step`` (from 1) on ``device``, drawn on the CPU from the seed and the step alone.

    ``scheduler`` is any diffusers scheduler of the teacher: its noise schedule and prediction type count. Timesteps are
    uniform over the places of the schedule, or over those in ``among``. A share of ``settings.caption_dropout`` of the
    captions becomes the empty one. With ``settings.noise_offset`` each channel of the noise is shifted by that times
    one normal number, so that students learn overall brightness, too. Where the data have the VAE's variance, latents
    are drawn from its distribution. ``conditions`` are what the teacher takes beside: those that need no picture are
    drawn here unless they come with the data. With ``part`` only these places of the batch are read and returned; they
    equal the same places of the whole batch.
    """
    schedule = schedule_of(scheduler.config)
    size, seed = settings.batch, settings.seed
    indices = torch.tensor(batch_rows(len(data), size, seed, step))
    variants = torch.randint(0, data.variants, (size,), generator=generator_for(seed, "variant", step))
    encoded = data.rows(indices[part], variants[part])
    # A VAE may hand out channels-last latents, which a file does not keep: the layout would decide how sums are
    # rounded, and a run that goes on from the file would differ in the last bit.
    latents = encoded.mean.contiguous()
    shape = (size, *latents.shape[1:])
    if encoded.log_variance is not None:
        draws = torch.randn(shape, generator=generator_for(seed, "vae", step))[part]
        latents = latents + (encoded.log_variance / 2).exp() * draws
    generator = generator_for(seed, "step", step)
    noise = torch.randn(shape, generator=generator)
    drawn_from = schedule.timesteps if among is None else among
    places = torch.randint(0, len(drawn_from), (size,), generator=generator)
    timesteps = drawn_from[places][part]
    dropped = (torch.rand(size, generator=generator) < settings.caption_dropout)[part]
    if settings.noise_offset:
        offset = torch.randn((*shape[:2], *[1] * (len(shape) - 2)), generator=generator)
        noise = noise + settings.noise_offset * offset
    noise = noise[part]
    embeddings = torch.where(dropped[:, None, None], data.empty_embedding, encoded.embeddings)
    added = dict(encoded.added)
    for name, empty in data.empty_added.items():
        added[name][dropped] = empty.to(added[name].dtype)
    drawn = drawn_rows(conditions, size, generator_for(seed, "guidance", step), length=schedule.length)
    added = {name: tensor[part] for name, tensor in drawn.items()} | added
    return Batch(
        noisy=schedule.add_noise(latents, noise, timesteps).to(device),
        target=schedule.target(latents, noise, timesteps).to(device),
        weights=min_snr_weights(schedule, timesteps, settings.min_snr).to(device),
        timesteps=timesteps.to(device),
        embeddings=embeddings.to(device),
        added={name: tensor.to(device) for name, tensor in added.items()},
    )
