"""Some of the rows of training data, so that others can be held out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prune_lab.distill.data import EncodedBatch, TrainingData
from prune_lab.errors import DataError
from prune_lab.runtime import seeded


@dataclass(frozen=True, slots=True, eq=False)
class Subset:
    """The rows ``chosen`` (N,) int64 of ``whole``, which satisfy ``TrainingData`` as the whole does."""

    whole: TrainingData
    chosen: Tensor

    def __len__(self) -> int:
        return len(self.chosen)

    def rows(self, chosen: Tensor, variants: Tensor) -> EncodedBatch:
        """The rows ``chosen`` of this part."""
        return self.whole.rows(self.chosen[chosen], variants)

    @property
    def variants(self) -> int:
        """Encodings of each picture."""
        return self.whole.variants

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.whole.channels

    @property
    def width(self) -> int:
        """Width of the text embeddings."""
        return self.whole.width

    @property
    def key(self) -> str:
        """Names what the whole was made from."""
        return self.whole.key

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that change with the whole and with the choice of rows."""
        content = f"{self.whole.digest}/{self.chosen.tolist()}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def empty_embedding(self) -> Tensor:
        """(L, D) of the empty caption."""
        return self.whole.empty_embedding

    @property
    def empty_added(self) -> Mapping[str, Tensor]:
        """SDXL: text_embeds (P,) of the empty caption."""
        return self.whole.empty_added


def held_out(data: TrainingData, count: int, seed: int) -> tuple[Subset, Subset]:
    """(what is trained on, ``count`` rows that are not), drawn with ``seed`` from ``data``.

    Raises DataError when that would leave less than half to train on.
    """
    if 2 * count > len(data):
        raise DataError(
            f"asked to hold out {count} pictures for validation, found {len(data)} in all; give more pictures, or a "
            "smaller probe.samples"
        )
    order = torch.randperm(len(data), generator=seeded(seed))
    return Subset(data, order[count:].sort().values), Subset(data, order[:count])
