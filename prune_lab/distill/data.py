"""What students are trained on, and the batch of every step drawn from it by seed and step alone.

Training data are in memory (``LatentData``), in a folder of shards (``cache.LatentCache``) or encoded when they are
asked for (``encoding.LiveData``). A batch depends on nothing but the data, the settings and the number of the step. So
all candidates see the same pictures, noise and timesteps, and a run that was stopped goes on exactly as it would have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prune_lab.config import DistillConfig
from prune_lab.errors import DataError
from prune_lab.probes import encode_captions, encode_pictures, noise_schedule, training_target
from prune_lab.runtime import atomic_write, seeded, tensors_digest

_FORMAT = "prune_lab latents 1"
_TENSORS = ("latents", "embeddings", "empty_embedding")


@dataclass(frozen=True, slots=True, eq=False)
class EncodedBatch:
    """B pictures as the U-Net sees them before any noise, float32 on the CPU."""

    mean: Tensor  # (B, C, H, W) of the VAE's distribution, scaled by its scaling factor
    log_variance: Tensor | None  # (B, C, H, W) of the scaled latents; None: the means are the latents
    embeddings: Tensor  # (B, L, D) of the captions
    added: Mapping[str, Tensor]  # SDXL: text_embeds (B, P), time_ids (B, 6)


class TrainingData(Protocol):
    """N pictures with captions, each in one or more variants such as crops and flips."""

    def __len__(self) -> int: ...

    @property
    def variants(self) -> int:
        """Encodings of each picture."""

    @property
    def channels(self) -> int:
        """Channels of the latents."""

    @property
    def width(self) -> int:
        """Width of the text embeddings."""

    @property
    def key(self) -> str:
        """Names what the data were made from: encoders, pictures, captions and settings."""

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that change with anything that is trained on."""

    @property
    def empty_embedding(self) -> Tensor:
        """(L, D) of the empty caption, for caption dropout."""

    @property
    def empty_added(self) -> Mapping[str, Tensor]:
        """SDXL: text_embeds (P,) of the empty caption."""

    def rows(self, chosen: Tensor, variants: Tensor) -> EncodedBatch:
        """The pictures ``chosen`` (B,) int64, each in its variant of ``variants`` (B,) int64; free to be changed."""


@dataclass(frozen=True, slots=True, eq=False)
class LatentData:
    """N training pictures as the U-Net sees them, float32 on the CPU.

    ``key`` names what the tensors were made from: encoders, pictures and captions (see ``data_key``).
    """

    latents: Tensor  # (N, C, H, W), scaled by the VAE's scaling factor
    embeddings: Tensor  # (N, L, D) of the captions
    empty_embedding: Tensor  # (L, D) of the empty caption, for caption dropout
    captions: tuple[str, ...]
    added: Mapping[str, Tensor] = field(default_factory=dict)  # SDXL: text_embeds (N, P), time_ids (N, 6)
    empty_added: Mapping[str, Tensor] = field(default_factory=dict)  # SDXL: text_embeds (P,)
    key: str = ""

    def __post_init__(self) -> None:
        lengths = {
            len(self.latents),
            len(self.embeddings),
            len(self.captions),
            *map(len, self.added.values()),
        }
        if len(lengths) != 1 or not self.captions:
            raise DataError(
                f"training data need as many of everything, found {len(self.latents)} latents, "
                f"{len(self.embeddings)} embeddings and {len(self.captions)} captions; give one caption per picture"
            )

    def __len__(self) -> int:
        return len(self.latents)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, added conditioning as ``added.<name>`` and ``empty_added.<name>``."""
        named: dict[str, Tensor] = {name: getattr(self, name) for name in _TENSORS}
        named |= {f"added.{name}": tensor for name, tensor in self.added.items()}
        return named | {f"empty_added.{name}": tensor for name, tensor in self.empty_added.items()}

    def rows(self, chosen: Tensor, variants: Tensor | None = None) -> EncodedBatch:
        """These rows with their modes as latents; there is one variant of each."""
        added = {name: tensor[chosen] for name, tensor in self.added.items()}
        return EncodedBatch(self.latents[chosen], None, self.embeddings[chosen], added)

    @property
    def variants(self) -> int:
        """One: every picture as it is."""
        return 1

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.latents.shape[1]

    @property
    def width(self) -> int:
        """Width of the text embeddings."""
        return self.embeddings.shape[-1]

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that change with any bit of any tensor."""
        return tensors_digest(self.tensors())

    def save(self, path: Path) -> None:
        """Write everything as one safetensors file, whole or not at all. Raises StorageError."""
        metadata = {
            "format": _FORMAT,
            "key": self.key,
            "captions": json.dumps(self.captions, ensure_ascii=False),
        }
        with atomic_write(path) as temporary:
            save_file(
                {name: tensor.contiguous() for name, tensor in self.tensors().items()}, temporary, metadata
            )

    @classmethod
    def load(cls, path: Path) -> LatentData:
        """What ``save`` wrote to ``path``; DataError when it is missing, damaged or something else."""
        remedy = "remove it and run the step again"
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise DataError(f"asked to read cached latents from {path}, found {error}; {remedy}") from None
        if metadata.get("format") != _FORMAT or not set(_TENSORS) <= tensors.keys():
            raise DataError(f"asked to read cached latents from {path}, found another kind of file; {remedy}")
        return cls(
            **{name: tensors[name] for name in _TENSORS},
            captions=tuple(json.loads(metadata["captions"])),
            added=_below("added.", tensors),
            empty_added=_below("empty_added.", tensors),
            key=metadata["key"],
        )


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def encoder_weights(pipeline: Any) -> dict[str, Tensor]:
    """The weights of the VAE and the text encoders of ``pipeline`` by name."""
    return {
        f"{part}.{name}": tensor
        for part in ("vae", "text_encoder", "text_encoder_2")
        if getattr(pipeline, part, None) is not None
        for name, tensor in getattr(pipeline, part).state_dict().items()
    }


def data_key(pipeline: Any, pictures: Tensor, captions: Sequence[str]) -> str:
    """16 hexadecimal digits that change with the encoders' weights, the pictures or the captions."""
    tensors = encoder_weights(pipeline) | {"pictures": pictures}
    digest = hashlib.sha256(tensors_digest(tensors).encode())
    digest.update(json.dumps(list(captions)).encode())
    return digest.hexdigest()[:16]


def size_ids(height: int, width: int, rows: int) -> Tensor:
    """SDXL's (rows, 6) original size, corner of the crop and size, of pictures that were taken whole."""
    return torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32).repeat(rows, 1)


def encode_data(pipeline: Any, pictures: Tensor, captions: Sequence[str], *, batch: int = 32) -> LatentData:
    """Latents and text embeddings of ``pictures`` (N, 3, H, W) in uint8 with one caption each.

    Latents are the mode of the VAE's distribution times its scaling factor. Raises DataError when the numbers of
    pictures and captions differ, or for pictures of another form.
    """
    if len(pictures) != len(captions) or not len(captions):
        raise DataError(
            f"asked to encode {len(pictures)} pictures with {len(captions)} captions; give one caption per picture"
        )
    latents = encode_pictures(pipeline, pictures, batch=batch)
    embeddings, added = encode_captions(pipeline, captions, batch=batch)
    empty, empty_added = encode_captions(pipeline, [""])
    if added:
        height, width = pictures.shape[-2:]
        added = added | {"time_ids": size_ids(height, width, len(captions))}
    return LatentData(
        latents=latents,
        embeddings=embeddings,
        empty_embedding=empty[0],
        captions=tuple(captions),
        added=added,
        empty_added={name: tensor[0] for name, tensor in empty_added.items()},
        key=data_key(pipeline, pictures, captions),
    )


def cached_data(
    path: Path, pipeline: Any, pictures: Tensor, captions: Sequence[str], *, batch: int = 32
) -> LatentData:
    """``encode_data``, read from ``path`` when that holds the same pictures by the same encoders.

    Otherwise they are encoded and written to ``path``.
    """
    if path.exists():
        data = LatentData.load(path)
        if data.key == data_key(pipeline, pictures, captions):
            return data
    data = encode_data(pipeline, pictures, captions, batch=batch)
    data.save(path)
    return data


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One training step's input and answer: B noisy latents with their timesteps and text."""

    noisy: Tensor  # (B, C, H, W)
    target: Tensor  # (B, C, H, W) the noise, or the velocity
    weights: Tensor  # (B,) float32, of each sample's task loss; ones unless distill.min_snr asks for others
    timesteps: Tensor  # (B,) int64
    embeddings: Tensor  # (B, L, D)
    added: Mapping[str, Tensor]


def stream(seed: int, purpose: str, number: int) -> torch.Generator:
    """A generator of its own for every purpose and number: streams of neighbouring seeds or steps never overlap."""
    content = hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()
    return seeded(int.from_bytes(content[:8], "big") >> 1)


def batch_rows(count: int, batch: int, seed: int, step: int) -> list[int]:
    """Which of ``count`` pictures step ``step`` (from 1) trains on; every epoch is a new permutation of all."""
    places = range((step - 1) * batch, step * batch)
    orders = {
        epoch: torch.randperm(count, generator=stream(seed, "epoch", epoch)).tolist()
        for epoch in {place // count for place in places}
    }
    return [orders[place // count][place % count] for place in places]


def min_snr_weights(schedule: Any, timesteps: Tensor, gamma: float) -> Tensor:
    """Weights (B,) that cap the say of nearly clean samples at a signal-to-noise ratio of ``gamma``; 0 gives ones.

    min(SNR, gamma) / SNR for a model that predicts the noise and / (SNR + 1) for the velocity: equal weights
    in the space of clean latents (arXiv:2303.09556, section 3.4).
    """
    if not gamma:
        return torch.ones(len(timesteps))
    kept = schedule.alphas_cumprod[timesteps].float()
    ratio = kept / (1 - kept)
    scale = ratio + 1 if schedule.config.prediction_type == "v_prediction" else ratio
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
) -> Batch:
    """The batch of step ``step`` (from 1) on ``device``, drawn on the CPU from the seed and the step alone.

    ``scheduler`` is any diffusers scheduler of the teacher: its noise schedule and prediction type count. Timesteps
    are uniform over the training range. A share of ``settings.caption_dropout`` of the captions becomes empty. With
    ``settings.noise_offset`` every channel of the noise is shifted by as much times a normal number of its own, so that
    overall brightness is learnt too. Where the data have the VAE's variance, latents are drawn from its distribution.
    With ``part`` only these places of the batch are read and returned, equal to the same places of the whole.
    """
    schedule = noise_schedule(scheduler.config)
    size, seed = settings.batch, settings.seed
    chosen = torch.tensor(batch_rows(len(data), size, seed, step))
    variants = torch.randint(0, data.variants, (size,), generator=stream(seed, "variant", step))
    rows = data.rows(chosen[part], variants[part])
    # A VAE may hand out channels-last latents, which a file does not keep: the layout would decide how sums are
    # rounded, and a run that goes on from the file would differ in the last bit.
    latents = rows.mean.contiguous()
    shape = (size, *latents.shape[1:])
    if rows.log_variance is not None:
        draws = torch.randn(shape, generator=stream(seed, "vae", step))[part]
        latents = latents + (rows.log_variance / 2).exp() * draws
    generator = stream(seed, "step", step)
    noise = torch.randn(shape, generator=generator)
    timesteps = torch.randint(0, schedule.config.num_train_timesteps, (size,), generator=generator)[part]
    dropped = (torch.rand(size, generator=generator) < settings.caption_dropout)[part]
    if settings.noise_offset:
        noise = noise + settings.noise_offset * torch.randn((*shape[:2], 1, 1), generator=generator)
    noise = noise[part]
    embeddings = torch.where(dropped[:, None, None], data.empty_embedding, rows.embeddings)
    added = dict(rows.added)
    for name, empty in data.empty_added.items():
        added[name][dropped] = empty
    return Batch(
        noisy=schedule.add_noise(latents, noise, timesteps).to(device),
        target=training_target(schedule, latents, noise, timesteps).to(device),
        weights=min_snr_weights(schedule, timesteps, settings.min_snr).to(device),
        timesteps=timesteps.to(device),
        embeddings=embeddings.to(device),
        added={name: tensor.to(device) for name, tensor in added.items()},
    )
