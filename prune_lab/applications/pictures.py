"""Pictures that a user gives, at the size of a model, and pictures that are written."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from prune_lab.config import DataConfig
from prune_lab.distill.decoding import MOST_BYTES, UNREADABLE, decode_image
from prune_lab.distill.encoding import crop_variants
from prune_lab.distill.image_source import IMAGE_SUFFIXES, note_left_out
from prune_lab.distill.listing import files_below
from prune_lab.errors import DataError
from prune_lab.runtime import atomic_write, read_bytes

# endings of pictures, of phones and cameras too, that are not read
_UNREAD = (".heic", ".heif", ".jxl", ".jp2", ".tga", ".psd", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw")
_LABEL = "Comment"  # where a PNG says what it is a picture of


def _decoded(path: Path) -> Image.Image:
    """The picture in ``path``, in sRGB. Raises DataError that names it where it cannot be read."""
    try:
        return decode_image(read_bytes(path, most=MOST_BYTES))
    except UNREADABLE as error:
        raise DataError(
            f"asked for the picture {path}, found none that can be read ({error}); save it again, or give another"
        ) from None


def _file_of_picture(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"asked for the picture {path}, found no such file; give one of a picture")
    return path


def _refuse_black(path: Path) -> DataError:
    return DataError(
        f"asked to draw anew what is white in {path}, found nothing white in it; give a mask with a white part"
    )


def check_own_picture(path: Path, *, mask: bool = False) -> None:
    """Raise DataError for a picture that cannot be read, and for a ``mask`` without anything white, before any model is
    loaded that knows its size.
    """
    found = _decoded(_file_of_picture(path))
    if mask and not (np.asarray(found, dtype=np.float32).mean(axis=-1) > 127).any():
        raise _refuse_black(path)


def read_own_picture(path: Path, side: int) -> Tensor:
    """The picture in ``path``, (3, side, side) uint8: its short side scaled, and a square cut from the middle.

    Raises DataError where there is none that can be read.
    """
    return crop_variants(_decoded(_file_of_picture(path)), side, DataConfig(), 0, (0,))[0]


def read_own_mask(path: Path, side: int) -> Tensor:
    """The mask in ``path``, (side, side) bool, cut as a picture is: what is white is drawn anew.

    Raises DataError where there is none, and for one that is all black.
    """
    grey = read_own_picture(path, side).float().mean(dim=0)
    found: Tensor = grey > 127
    if not found.any():
        raise _refuse_black(path)
    return found


def read_own_pictures(folder: Path, side: int, what: str) -> tuple[Tensor, tuple[str, ...]]:
    """(pictures (N, 3, side, side) uint8, names) of all image files below ``folder``, in the order of their names.

    ``what`` they show is told in errors. Raises DataError where there are none, and for the first that is damaged.
    """
    if not folder.is_dir():
        raise DataError(
            f"asked for pictures of {what} in {folder}, found no such folder; give one of pictures"
        )
    every, left_out = files_below(folder)
    paths = [path for path in every if path.suffix.lower() in IMAGE_SUFFIXES]
    left_out += [f"{path}: no image by its name" for path in every if path.suffix.lower() in _UNREAD]
    if not paths:
        known = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"asked for pictures of {what} in {folder}, found none; give files of {known}")
    note_left_out(f"the pictures of {what}", left_out)
    pictures = [read_own_picture(path, side) for path in paths]
    return torch.stack(pictures), tuple(path.name for path in paths)


def save_picture(path: Path, picture: Tensor, label: str = "") -> None:
    """Write ``picture`` (3, H, W) uint8 as the PNG ``path``, whole or not at all; ``label`` is a text in it."""
    info = PngInfo()
    if label:
        info.add_text(_LABEL, label)
    with atomic_write(path) as temporary:
        Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy())).save(
            temporary, format="PNG", pnginfo=info
        )


def label_of(path: Path) -> str:
    """The text in the PNG ``path`` that it was saved with; empty where there is none."""
    with Image.open(io.BytesIO(read_bytes(path)), formats=("PNG",)) as picture:
        return str(picture.info.get(_LABEL, ""))
