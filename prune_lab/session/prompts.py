"""The pictures and captions that ship with the package."""

from __future__ import annotations

import dataclasses

import pandas as pd
import torch
from torch import Tensor

from prune_lab.assets import load_pictures
from prune_lab.errors import DataError
from prune_lab.runtime import seeded


@dataclasses.dataclass(frozen=True, slots=True)
class Pictures:
    """Captioned pictures, at the size at which the model works."""

    pixels: Tensor  # (N, 3, H, W) uint8
    captions: tuple[str, ...]
    groups: tuple[str, ...]


def shipped_rows(split: str, count: int, seed: int) -> pd.DataFrame:
    """The first ``count`` rows of a shipped split in an order drawn with ``seed``; DataError when it has fewer."""
    frame = load_pictures(split)
    if count > len(frame):
        raise DataError(f"asked for {count} {split} pictures, the package ships {len(frame)}; ask for fewer")
    order = torch.randperm(len(frame), generator=seeded(seed))[:count]
    return frame.iloc[order.tolist()]
