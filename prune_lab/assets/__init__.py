"""What ships inside the package: two pipelines, their scorer and the pictures that all were trained on."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    import torch

PICTURE_SIZE = 64
COLUMNS = ("picture", "caption", "style", "subject", "tone", "group", "source", "licence")
SPLITS = ("train", "heldout")


def assets_folder() -> Path:
    """Folder that holds everything shipped beside the code."""
    return Path(__file__).resolve().parent


def reference_folder() -> Path:
    """Folder of the reference pipeline, as plain `StableDiffusionPipeline.from_pretrained` reads it."""
    return assets_folder() / "reference"


def transformer_folder() -> Path:
    """Folder of the second pipeline, as plain `PixArtAlphaPipeline.from_pretrained` reads it.

    It ships without the parts that it shares with the reference pipeline, and is put together on first use in the
    user's cache. Raises StorageError when that cannot be written.
    """
    from prune_lab.assets.assembling import assembled

    return assembled(*shipped_places("transformer"))


SHIPPED_MODELS: Mapping[str, Callable[[], Path]] = {
    "reference": reference_folder,
    "transformer": transformer_folder,
}
"""The models that ship, by the names that stand for them, and the folder of each."""


def shipped_places(name: str) -> tuple[Path, ...]:
    """Where the pieces of a shipped model lie in the package: its own first, then those that it shares."""
    own = assets_folder() / name
    return (own,) if name == "reference" else (own, reference_folder())


def scorer_folder() -> Path:
    """Folder of the scorer, as plain `CLIPModel.from_pretrained` reads it."""
    return assets_folder() / "scorer"


def prompts_path() -> Path:
    """The general list of prompts, columns prompt and kind; `recipes.prompts` makes it."""
    return assets_folder() / "prompts" / "prompts.csv.gz"


def read_split(folder: Path, split: str) -> pd.DataFrame:
    """Rows of one split under `folder`, columns COLUMNS, `picture` as WebP bytes.

    Raises DataError for an unknown split or a missing file.
    """
    import pandas as pd

    from prune_lab.errors import DataError

    if split not in SPLITS:
        raise DataError(f"no split {split!r} of the pictures; there are {', '.join(SPLITS)}")
    path = folder / f"{split}.parquet"
    if not path.is_file():
        raise DataError(
            f"no pictures at {path}; install prune-lab again, or build them by recipes/reference_model"
        )
    return pd.read_parquet(path)[list(COLUMNS)]


def load_pictures(split: str) -> pd.DataFrame:
    """Rows of the shipped split "train" or "heldout", columns COLUMNS, `picture` as WebP bytes."""
    return read_split(assets_folder() / "pictures", split)


def decode_pictures(frame: pd.DataFrame) -> torch.Tensor:
    """Pictures of the rows as a uint8 tensor (N, 3, 64, 64), 0-255, sRGB on white."""
    import numpy as np
    import torch
    from PIL import Image

    pictures = np.empty((len(frame), PICTURE_SIZE, PICTURE_SIZE, 3), dtype=np.uint8)
    for slot, content in zip(pictures, frame["picture"], strict=True):
        slot[:] = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    return torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy())
