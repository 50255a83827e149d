"""Training data: images as latents and captions as text embeddings, N rows that batches are drawn from.

They lie in memory (``LatentData``), in a folder of files (``cache.LatentCache``), or are encoded when they are asked
for (``encoding.LiveData``). A ``Subset`` holds some of the rows of another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prune_lab.errors import DataError
from prune_lab.runtime import atomic_write, seeded, tensors_digest

_FORMAT = "prune_lab latents 1"
_TENSORS = ("latents", "embeddings", "empty_embedding")


@dataclass(frozen=True, slots=True, eq=False)
class EncodedBatch:
    """B images and their captions as the U-Net gets them, before any noise; float32 on the CPU."""

    mean: Tensor  # (B, C, H, W) of the VAE's distribution, times its scaling factor
    log_variance: Tensor | None  # (B, C, H, W) of the scaled latents; None: train on the means
    embeddings: Tensor  # (B, L, D) of the captions
    added: Mapping[str, Tensor]  # SDXL: text_embeds (B, P), time_ids (B, 6)


class TrainingData(Protocol):
    """N images with captions, each in one or more variants such as crops and flips."""

    def __len__(self) -> int: ...

    @property
    def variants(self) -> int:
        """Number of variants of each image."""

    @property
    def channels(self) -> int:
        """Channels of the latents."""

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that change with anything that is trained on."""

    @property
    def empty_embedding(self) -> Tensor:
        """(L, D) of the empty caption, for caption dropout."""

    @property
    def empty_added(self) -> Mapping[str, Tensor]:
        """SDXL: text_embeds (P,) of the empty caption."""

    def rows(self, indices: Tensor, variants: Tensor) -> EncodedBatch:
        """The rows ``indices`` (B,) int64, each in its variant of ``variants`` (B,) int64, as tensors of their own."""


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def read_tensors(path: Path, form: str, asked: str, remedy: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of the safetensors file ``path``, whose metadata give ``form`` as its format.

    Raises DataError, which says what was ``asked`` and its ``remedy``, for a missing, damaged or other file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"asked to {asked} {path}, found a damaged file ({error}); {remedy}") from None
    if metadata.get("format") != form:
        raise DataError(f"asked to {asked} {path}, found another kind of file; {remedy}")
    return metadata, tensors


@dataclass(frozen=True, slots=True, eq=False)
class LatentData:
    """N rows in memory, float32 on the CPU, with one variant each.

    ``key`` changes with the encoders, images and captions that they were made from (see ``encoding.data_key``).
    """

    latents: Tensor  # (N, C, H, W), scaled by the VAE's scaling factor
    embeddings: Tensor  # (N, L, D) of the captions
    empty_embedding: Tensor  # (L, D) of the empty caption, for caption dropout
    captions: tuple[str, ...]
    added: Mapping[str, Tensor] = field(default_factory=dict)  # SDXL: text_embeds (N, P), time_ids (N, 6)
    empty_added: Mapping[str, Tensor] = field(default_factory=dict)  # SDXL: text_embeds (P,)
    key: str = ""

    def __post_init__(self) -> None:
        tensors = (self.latents, self.embeddings, *self.added.values())
        if {len(self.captions), *map(len, tensors)} != {len(self.latents)} or not self.captions:
            raise DataError(
                f"training data need as many of everything, found {len(self.latents)} latents, "
                f"{len(self.embeddings)} embeddings and {len(self.captions)} captions; give one caption per image"
            )

    def __len__(self) -> int:
        return len(self.latents)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, added conditioning as ``added.<name>`` and ``empty_added.<name>``."""
        named: dict[str, Tensor] = {name: getattr(self, name) for name in _TENSORS}
        named |= {f"added.{name}": tensor for name, tensor in self.added.items()}
        return named | {f"empty_added.{name}": tensor for name, tensor in self.empty_added.items()}

    def rows(self, indices: Tensor, variants: Tensor | None = None) -> EncodedBatch:
        """The rows ``indices`` (B,) int64; ``variants`` count for nothing, there is one of each."""
        added = {name: tensor[indices] for name, tensor in self.added.items()}
        return EncodedBatch(self.latents[indices], None, self.embeddings[indices], added)

    @property
    def variants(self) -> int:
        """One: every image as it is."""
        return 1

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.latents.shape[1]

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that change with any bit of any tensor."""
        return tensors_digest(self.tensors())

    def save(self, path: Path) -> None:
        """Write everything as one safetensors file, whole or not at all. Raises StorageError."""
        captions = json.dumps(self.captions, ensure_ascii=False)
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors().items()}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, {"format": _FORMAT, "key": self.key, "captions": captions})

    @classmethod
    def load(cls, path: Path) -> LatentData:
        """The data that ``save`` wrote to ``path``. Raises DataError for a missing, damaged or other file."""
        remedy = "remove it and run the step again"
        metadata, tensors = read_tensors(path, _FORMAT, "read cached latents from", remedy)
        return cls(
            **{name: tensors[name] for name in _TENSORS},
            captions=tuple(json.loads(metadata["captions"])),
            added=with_prefix("added.", tensors),
            empty_added=with_prefix("empty_added.", tensors),
            key=metadata["key"],
        )


@dataclass(frozen=True, slots=True, eq=False)
class Subset:
    """The rows ``indices`` (N,) int64 of other training data."""

    data: TrainingData
    indices: Tensor
    variants: int  # of each image
    channels: int  # of the latents
    empty_embedding: Tensor  # (L, D) of the empty caption
    empty_added: Mapping[str, Tensor]  # SDXL: text_embeds (P,) of the empty caption

    @classmethod
    def of(cls, data: TrainingData, indices: Tensor) -> Subset:
        """The rows ``indices`` (N,) int64 of ``data``."""
        return cls(data, indices, data.variants, data.channels, data.empty_embedding, data.empty_added)

    def __len__(self) -> int:
        return len(self.indices)

    def rows(self, indices: Tensor, variants: Tensor) -> EncodedBatch:
        """The rows ``indices`` (B,) int64 of this subset, in ``variants`` (B,) int64."""
        return self.data.rows(self.indices[indices], variants)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that change with those data and with the choice of rows."""
        content = f"{self.data.digest}/{self.indices.tolist()}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def held_out(data: TrainingData, count: int, seed: int) -> tuple[Subset, Subset]:
    """The rows of ``data`` to train on, and ``count`` others to validate with, drawn with ``seed``.

    Raises DataError when less than half would be left to train on.
    """
    if 2 * count > len(data):
        raise DataError(
            f"asked to hold out {count} images for validation, found {len(data)} in all; give more images, or a "
            "smaller probe.samples"
        )
    order = torch.randperm(len(data), generator=seeded(seed))
    return Subset.of(data, order[count:].sort().values), Subset.of(data, order[:count])
