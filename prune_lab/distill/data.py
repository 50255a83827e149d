"""Training data: images as latents and captions as text embeddings, N rows that batches are drawn from.

They lie in memory (``LatentData``), in a folder of files (``cache.LatentCache``), or are encoded when they are asked
for (``encoding.LiveData``). A ``Subset`` holds some of the rows of another.
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

from prune_lab.errors import DataError
from prune_lab.probes import encode_captions, encode_pictures
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
    def width(self) -> int:
        """Width of the text embeddings."""

    @property
    def key(self) -> str:
        """16 hexadecimal digits that change with the encoders, images, captions and settings."""

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


@dataclass(frozen=True, slots=True, eq=False)
class LatentData:
    """N rows in memory, float32 on the CPU, with one variant each.

    ``key`` changes with the encoders, images and captions that they were made from (see ``data_key``).
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
        """The data that ``save`` wrote to ``path``. Raises DataError for a missing, damaged or other file."""
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
            added=with_prefix("added.", tensors),
            empty_added=with_prefix("empty_added.", tensors),
            key=metadata["key"],
        )


def encoder_weights(pipeline: Any) -> dict[str, Tensor]:
    """The weights of the VAE and the text encoders of ``pipeline`` by name."""
    return {
        f"{part}.{name}": tensor
        for part in ("vae", "text_encoder", "text_encoder_2")
        if getattr(pipeline, part, None) is not None
        for name, tensor in getattr(pipeline, part).state_dict().items()
    }


def data_key(pipeline: Any, images: Tensor, captions: Sequence[str]) -> str:
    """16 hexadecimal digits that change with the encoders' weights, the images or the captions."""
    tensors = encoder_weights(pipeline) | {"pictures": images}  # the name counts: another changes every key
    digest = hashlib.sha256(tensors_digest(tensors).encode())
    digest.update(json.dumps(list(captions)).encode())
    return digest.hexdigest()[:16]


def size_ids(height: int, width: int, rows: int) -> Tensor:
    """SDXL's (rows, 6) original size, crop corner and target size in pixels, of images that were not cropped."""
    return torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32).repeat(rows, 1)


def encode_data(pipeline: Any, images: Tensor, captions: Sequence[str], *, batch: int = 32) -> LatentData:
    """Latents and text embeddings of ``images`` (N, 3, H, W) in uint8 with one caption each.

    Latents are the mode of the VAE's distribution times its scaling factor. Raises DataError when the numbers of images
    and captions differ, or for images of another shape or type.
    """
    if len(images) != len(captions) or not len(captions):
        raise DataError(
            f"asked to encode {len(images)} images with {len(captions)} captions; give one caption per image"
        )
    latents = encode_pictures(pipeline, images, batch=batch)
    embeddings, added = encode_captions(pipeline, captions, batch=batch)
    empty, empty_added = encode_captions(pipeline, [""])
    if added:
        height, width = images.shape[-2:]
        added = added | {"time_ids": size_ids(height, width, len(captions))}
    return LatentData(
        latents=latents,
        embeddings=embeddings,
        empty_embedding=empty[0],
        captions=tuple(captions),
        added=added,
        empty_added={name: tensor[0] for name, tensor in empty_added.items()},
        key=data_key(pipeline, images, captions),
    )


def cached_data(
    path: Path, pipeline: Any, images: Tensor, captions: Sequence[str], *, batch: int = 32
) -> LatentData:
    """The result of ``encode_data``, read from ``path`` where that file holds the same images by the same encoders.

    Otherwise the images are encoded and the file is written.
    """
    if path.exists():
        data = LatentData.load(path)
        if data.key == data_key(pipeline, images, captions):
            return data
    data = encode_data(pipeline, images, captions, batch=batch)
    data.save(path)
    return data


@dataclass(frozen=True, slots=True, eq=False)
class Subset:
    """The rows ``indices`` (N,) int64 of other training data."""

    data: TrainingData
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def rows(self, indices: Tensor, variants: Tensor) -> EncodedBatch:
        """The rows ``indices`` (B,) int64 of this subset, in ``variants`` (B,) int64."""
        return self.data.rows(self.indices[indices], variants)

    @property
    def variants(self) -> int:
        """Number of variants of each image."""
        return self.data.variants

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.data.channels

    @property
    def width(self) -> int:
        """Width of the text embeddings."""
        return self.data.width

    @property
    def key(self) -> str:
        """The key of the data that the rows are taken from."""
        return self.data.key

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that change with those data and with the choice of rows."""
        content = f"{self.data.digest}/{self.indices.tolist()}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def empty_embedding(self) -> Tensor:
        """(L, D) of the empty caption."""
        return self.data.empty_embedding

    @property
    def empty_added(self) -> Mapping[str, Tensor]:
        """SDXL: text_embeds (P,) of the empty caption."""
        return self.data.empty_added


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
    return Subset(data, order[count:].sort().values), Subset(data, order[:count])
