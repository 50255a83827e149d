"""Images with captions, wherever they lie; and the names that columns of images and captions usually have."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_lab.errors import DataError
from prune_lab.runtime import note_once
from prune_lab.text_tables import find_column, one_line

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "picture", "img")
CAPTION_COLUMNS = ("caption", "text", "txt", "prompt", "captions")
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".jpe", ".avif", ".ppm"),
)
MOST_CAPTION_BYTES = 2**24  # of a file with one caption
_NO_DATA = (
    "__macosx",
    "thumbs.db",
    "desktop.ini",
    "@eadir",
    "$recycle.bin",
)  # what systems lay beside people's files
_REASONS = {  # by what the text of something left out holds; the first counts
    "no caption": r": no caption|has no caption for",
    "no such picture": r"which is not there",
    "outside of the folder": r"which lies outside of",
    "no text": r"other bytes than UTF-8",
    "no row": r": line \d+ |, cannot read it",
    "no image": r": no image",
    "counted 0 times": r"counts 0 times",
    "of a name twice": r" twice; the first counts",
}


@dataclass(frozen=True, slots=True, eq=False)
class ImageSource:
    """N images with a caption each.

    ``digest`` changes with the captions and with the names, sizes and times of change of the files (of a data set on
    the hub: with its revision). That is cheap for millions of images; it misses a file that changed under its old time.
    """

    title: str
    captions: tuple[str, ...]
    digest: str  # 16 hexadecimal digits
    name: Callable[[int], str]  # of the image of a row, for messages; the same for the same image
    content: Callable[[int], bytes]  # of its file, compressed as it is there
    left_out: tuple[str, ...] = ()  # names with the reason

    def __len__(self) -> int:
        return len(self.captions)


def is_hidden(name: str) -> bool:
    """Whether a path below a folder of data leads to what people do not see there, which is no data.

    Files and folders whose names begin with a dot (``.ipynb_checkpoints``, AppleDouble's ``._0.png``), and what systems
    add (``__MACOSX``, ``Thumbs.db``).
    """
    parts = name.replace("\\", "/").split("/")
    return any(
        (part[:1] == "." and part not in (".", "..")) or part.lower() in _NO_DATA for part in parts if part
    )


def left_out_text(left_out: Iterable[str], listed: Path | None = None) -> str:
    """How many ``left_out`` tells of, by reason, the first, and the file where all are ``listed``; empty for none."""
    texts = list(left_out)
    if not texts:
        return ""
    reasons = Counter(
        next((reason for reason, found in _REASONS.items() if re.search(found, text)), "not readable")
        for text in texts
    )
    by_reason = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
    counted = f" ({by_reason})" if len(reasons) > 1 else ""
    place = f"; all are listed in {one_line(str(listed))}" if listed is not None and len(texts) > 1 else ""
    return f"left out {len(texts):,}{counted}; the first: {one_line(texts[0])}{place}"


def note_left_out(title: str, left_out: Iterable[str], listed: Path | None = None) -> None:
    """Say once what was left out of the source of this ``title``, if anything was; see ``left_out_text``."""
    if text := left_out_text(left_out, listed):
        note_once(f"of {title} are {text}")


def note_empty(source: ImageSource) -> None:
    """Say once how many captions of ``source`` are empty, if any are: they may be meant, so they are kept."""
    empty = [row for row, caption in enumerate(source.captions) if not caption.strip()]
    if empty:
        note_once(
            f"of {source.title} {len(empty):,} of {len(source):,} captions are empty; these images are kept, to be "
            f"learned without words; the first: {source.name(empty[0])}"
        )


def source_digest(*parts: object) -> str:
    """16 hexadecimal digits that change with any of ``parts``."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def file_stamps(paths: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Name below the folder that holds all, size in bytes and time of change of every file."""
    root = os.path.commonpath([path.parent for path in paths])
    found = ((path, path.stat()) for path in paths)
    return [(path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns) for path, stat in found]


def pick_column(columns: Sequence[str], asked: str, usual: Sequence[str], setting: str, title: str) -> str:
    """The column called ``asked``, or else the first with a usual name; case does not count.

    Raises DataError that names ``data.{setting}``.
    """
    try:
        found = find_column(columns, (asked,) if asked else usual)
    except ValueError as error:
        raise DataError(
            f"asked for the {setting} of {title}, found that {error}, or say which with data.{setting}"
        ) from None
    if found is None:
        wanted = repr(asked) if asked else f"any of {', '.join(usual)}"
        raise DataError(
            f"asked for the {setting} {wanted} of {title}, found {one_line(', '.join(columns[:30])) or 'none'}; "
            f"say which with data.{setting}"
        )
    return found


def texts_in(cell: Any) -> tuple[str, ...] | None:
    """The captions in a cell, which is a text or a list of texts; None where it holds anything else."""
    if isinstance(cell, str):
        return (cell,)
    if isinstance(cell, (bytes, dict)) or not hasattr(cell, "__iter__"):
        return None
    texts = tuple(cell)
    return texts if texts and all(isinstance(text, str) for text in texts) else None
