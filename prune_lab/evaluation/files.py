"""Drawn pictures as files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from prune_lab.errors import DataError
from prune_lab.runs import read_picture
from prune_lab.runtime import atomic_folder, atomic_write
from prune_lab.version import __version__


def save_pictures(folder: Path, pictures: Tensor, names: Sequence[str]) -> None:
    """Write ``pictures`` (N, 3, H, W) uint8 as PNG files called ``names`` in ``folder``, which appears whole or not.

    Raises DataError when there are not as many names, StorageError when a file cannot be written.
    """
    if len(pictures) != len(names):
        raise DataError(f"asked to save {len(pictures)} pictures under {len(names)} names; give one for each")
    with atomic_folder(folder, force=True) as temporary:
        for name, picture in zip(names, pictures, strict=True):
            Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(temporary / name)


def read_pictures(folder: Path, names: Sequence[str] | None = None) -> Tensor:
    """The PNG files called ``names`` in ``folder``, uint8 (N, 3, H, W); None: all, in the order of their names.

    Raises DataError when there are none, when one is missing or damaged, or when they differ in size.
    """
    paths = sorted(folder.glob("*.png")) if names is None else [folder / name for name in names]
    pictures = [torch.from_numpy(read_picture(path)).permute(2, 0, 1) for path in paths]
    if len({picture.shape for picture in pictures}) != 1:
        sizes = sorted({f"{picture.shape[2]} x {picture.shape[1]}" for picture in pictures})
        found = f"sizes {', '.join(sizes)}" if pictures else "no PNG files"
        raise DataError(
            f"asked to read pictures of one size in {folder}, found {found}; remove it and draw again"
        )
    return torch.stack(pictures)


def _written_here() -> PngInfo:
    """What tells later that prune-lab wrote a picture, and may replace it."""
    info = PngInfo()
    info.add_text("Software", f"prune_lab {__version__}")
    return info


def save_grid(path: Path, pictures: Tensor, *, columns: int = 4, gap: int = 2) -> None:
    """Write images ``pictures`` (N, 3, H, W) uint8 as one PNG of ``columns`` columns, filled row by row.

    ``gap`` white pixels lie between two images. The file is written completely or not at all. Raises DataError when
    there are no images, StorageError when the file cannot be written.
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3 or not len(pictures):
        raise DataError(
            f"asked for a grid of images of shape {tuple(pictures.shape)}; give uint8 (N, 3, H, W), N at least 1"
        )
    count, _, height, width = pictures.shape
    columns = max(1, min(columns, count))
    rows = math.ceil(count / columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        cell = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
        sheet.paste(cell, ((i % columns) * (width + gap), (i // columns) * (height + gap)))
    with atomic_write(path) as temporary:
        sheet.save(temporary, format="PNG", pnginfo=_written_here())
