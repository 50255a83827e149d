"""Training data: images as latents and captions as text embeddings, N rows that batches are drawn from.

They lie in memory (``LatentData``), in a folder of files (``cache.LatentCache``), or are encoded when they are asked
for (``encoding.LiveData``). A ``Subset`` holds some of the rows of another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from prune_lab.errors import DataError
from prune_lab.runs.tensor_files import read_entry, read_tensors
from prune_lab.runtime import atomic_write, seeded, tensors_digest

_FORMAT = "prune_lab latents 1"
_TENSORS = ("latents", "embeddings", "empty_embedding")


@dataclass(frozen=True, slots=True, eq=False)
class EncodedBatch:
    """B images and their captions as the model gets them, before any noise; float32 on the CPU."""

    mean: Tensor  # (B, C, H, W) of the VAE's distribution, times its scaling factor
    log_variance: Tensor | None  # (B, C, H, W) of the scaled latents; None: train on the means
    embeddings: Tensor  # (B, L, D) of the captions
    added: Mapping[
        str, Tensor
    ]  # what the model takes beside, such as SDXL: text_embeds (B, P), time_ids (B, 6)


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
    def captions(self) -> Sequence[str]:
        """Caption of each row."""

    @property
    def pictures(self) -> Sequence[str]:
        """Name of the image of each row, the same for the same image; see ``split_rows``."""

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
    def pictures(self) -> tuple[str, ...]:
        """Digest of the latents of each row."""
        return tuple(tensors_digest({"latents": row}) for row in self.latents)

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
        asked = "read cached latents from"
        metadata, tensors = read_tensors(path, _FORMAT, asked, remedy)
        captions = read_entry(path, metadata, "captions", tuple[str, ...], asked, remedy)
        return cls(
            **{name: tensors[name] for name in _TENSORS},
            captions=captions,
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

    @property
    def captions(self) -> tuple[str, ...]:
        """Caption of each row of this subset."""
        captions = self.data.captions
        return tuple(captions[row] for row in self.indices.tolist())

    @property
    def pictures(self) -> tuple[str, ...]:
        """Name of the image of each row of this subset."""
        pictures = self.data.pictures
        return tuple(pictures[row] for row in self.indices.tolist())

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


# Disjoint parts ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Rows of training data by what they are used for, int64 in rising order; no two parts share an image.

    Nor do they share a caption, unless ``shared_captions``: there were fewer than three different ones.
    """

    train: Tensor
    probe: Tensor
    validate: Tensor
    unused: Tensor  # of the same image or caption as a row of probe or validate
    shared_captions: bool


def _row_groups(*keys: Sequence[str]) -> list[list[int]]:
    """Rows that share a key with each other, directly or over other rows; rows with an empty key do not share it."""
    parent = list(range(len(keys[0])))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    for column in keys:
        first: dict[str, int] = {}
        for row, key in enumerate(column):
            if key:
                parent[root(row)] = root(first.setdefault(key, row))
    groups: dict[int, list[int]] = {}
    for row in range(len(parent)):
        groups.setdefault(root(row), []).append(row)
    return list(groups.values())


def split_rows(
    captions: Sequence[str],
    pictures: Sequence[str] | None = None,
    *,
    probe: int,
    validate: int,
    seed: int = 0,
) -> Split:
    """The rows of training data in three disjoint parts: ``probe`` rows, ``validate`` rows, and the others to train on.

    Give it ``data.captions`` and ``data.pictures``; ``Subset.of(data, split.train)`` is the part. ``None`` for
    ``pictures`` takes each row for an image of its own. The same captions give the same parts, wherever the rows lie.
    Captions count as the same whatever their case and spaces; an empty one is nobody's.
    Probe and validate get one row of an image or caption, and other rows of it are used for nothing; so images and
    captions that stand alone are taken first. With few rows a part is smaller than asked for: each of the two gets a
    quarter at most, and one at least.

    Raises DataError for fewer than three different images.
    """
    named = list(map(str, range(len(captions)))) if pictures is None else list(pictures)
    assert len(named) == len(captions)
    plain = [" ".join(caption.lower().split()) for caption in captions]
    groups, shared = _row_groups(named, plain), False
    if len(groups) < 3:
        groups, shared = _row_groups(named), True
    if len(groups) < 3:
        raise DataError(
            f"asked to divide {len(captions)} rows of {len(groups)} different images into rows for the probe, for "
            "validation and for training; give at least three images, better a dozen"
        )

    def place(group: Sequence[int]) -> tuple[int, str]:
        # not the names of images where captions tell rows apart: the same prompts are the same parts for any model
        keys = sorted(plain[row] or named[row] for row in group)
        return len(group), hashlib.sha256(json.dumps([seed, keys]).encode()).hexdigest()

    quarter = max(1, len(groups) // 4)
    counts = min(probe, quarter), min(validate, quarter)
    in_order = sorted(groups, key=place)
    chosen, rest = in_order[: sum(counts)], in_order[sum(counts) :]

    def rows(found: Iterable[int]) -> Tensor:
        return torch.tensor(sorted(found), dtype=torch.int64)

    return Split(
        train=rows(row for group in rest for row in group),
        probe=rows(group[0] for group in chosen[: counts[0]]),
        validate=rows(group[0] for group in chosen[counts[0] :]),
        unused=rows(row for group in chosen for row in group[1:]),
        shared_captions=shared,
    )
