"""Prompts from files, and the pictures and captions that ship with the package."""

from __future__ import annotations

import dataclasses
from pathlib import Path

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


@dataclasses.dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts and the kind of each, by which damage is broken down; kinds may be empty."""

    texts: tuple[str, ...]
    kinds: tuple[str, ...]


def read_prompts(path: Path) -> Prompts:
    """The prompts in a text file, one a line, or in the columns prompt (or caption) and kind (or group) of a table.

    Tables are .csv or .parquet; without a column of kinds all prompts are of one kind. Raises DataError when the file
    cannot be read or holds none.
    """
    remedy = "give a .txt file with one prompt a line, or a .csv or .parquet file with a column prompt"
    if path.suffix not in (".txt", ".csv", ".parquet"):
        raise DataError(f"asked for the prompts in {path}, found a name ending in {path.suffix!r}; {remedy}")
    try:
        if path.suffix == ".txt":
            lines = path.read_text(encoding="utf-8").splitlines()
            frame = pd.DataFrame({"prompt": [line.strip() for line in lines if line.strip()]})
        else:
            frame = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pandas raises kinds of ValueError
        raise DataError(f"asked for the prompts in {path}, cannot read it ({error}); {remedy}") from None
    texts = next((name for name in ("prompt", "caption") if name in frame), "")
    if not texts or frame.empty:
        found = f"columns {', '.join(map(str, frame.columns))}" if not frame.empty else "no prompts"
        raise DataError(f"asked for the prompts in {path}, found {found}; {remedy}")
    kinds = next((name for name in ("kind", "group") if name in frame), "")
    return Prompts(
        tuple(frame[texts].astype(str)),
        tuple(frame[kinds].fillna("").astype(str)) if kinds else ("",) * len(frame),
    )


def shipped_rows(split: str, count: int, seed: int) -> pd.DataFrame:
    """The first ``count`` rows of a shipped split in an order drawn with ``seed``; DataError when it has fewer."""
    frame = load_pictures(split)
    if count > len(frame):
        raise DataError(f"asked for {count} {split} pictures, the package ships {len(frame)}; ask for fewer")
    order = torch.randperm(len(frame), generator=seeded(seed))[:count]
    return frame.iloc[order.tolist()]
