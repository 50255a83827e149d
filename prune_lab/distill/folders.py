"""Images in a folder, with their captions as people keep them: in a table, or in a file beside each image.

Tables are metadata.csv, .tsv, .jsonl or .parquet as `datasets` reads them, or, where there is none of these, any table
with a column of files and one of captions. Files beside an image are .txt, .caption or .json, as kohya's scripts and
img2dataset write them; kohya's folders ``10_name`` say how often their images count.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd
from pyarrow import ArrowException
from pyarrow.parquet import read_schema

from prune_lab.config import DataConfig
from prune_lab.distill.image_source import (
    CAPTION_COLUMNS,
    IMAGE_SUFFIXES,
    ImageSource,
    file_stamps,
    pick_column,
    source_digest,
    texts_in,
)
from prune_lab.errors import DataError
from prune_lab.text_tables import TABLE_SUFFIXES, decode_text, find_column, read_table

FILE_COLUMNS = (
    *("file_name", "filename", "file", "file_path", "filepath", "image_path", "path"),
    *("image", "img", "picture", "jpg", "png"),
)
METADATA = tuple(f"metadata{suffix}" for suffix in TABLE_SUFFIXES)
_BESIDE = (".txt", ".caption", ".json")  # the first that an image has counts
_REPEATS = re.compile(r"(\d{1,3})_.+")
_REMEDY = (
    "give a metadata.csv with the columns file_name and caption, or a .txt file beside each image (.caption and .json "
    "are read, too)"
)


@dataclass(frozen=True, slots=True)
class _Files:
    """The files of a folder, to be found by the names that tables give them."""

    every: Sequence[Path]
    images: dict[str, Path] = field(default_factory=dict)  # by absolute name
    stems: dict[str, list[Path]] = field(default_factory=dict)  # images by absolute name without its ending
    others: dict[str, dict[str, Path]] = field(
        default_factory=dict
    )  # ending -> file, by absolute name without it

    def __post_init__(self) -> None:
        for path in self.every:
            name = os.path.abspath(path)  # noqa: PTH100, links stay as they are
            stem, ending = os.path.splitext(name)  # noqa: PTH122
            if ending.lower() in IMAGE_SUFFIXES:
                self.images[name] = path
                self.stems.setdefault(stem, []).append(path)
            else:
                self.others.setdefault(stem, {}).setdefault(ending.lower(), path)

    def _at(self, name: str) -> Path | None:
        name = os.path.normpath(name)
        alike = self.stems.get(name, [])  # a table may leave the ending away
        found = self.images.get(name) or (alike[0] if len(alike) == 1 else None)
        if found is None and name.lower().endswith(IMAGE_SUFFIXES) and os.path.isfile(name):  # noqa: PTH113
            return Path(name)  # elsewhere
        return found

    def find(self, table: Path, text: str) -> tuple[Path | None, bool]:
        """The image that ``table`` calls ``text``, and whether folders of that name had to be left away."""
        here = Path(os.path.abspath(table)).parent  # noqa: PTH100
        names = dict.fromkeys((text.strip(), text.strip().replace("\\", "/")))
        for name in filter(None, names):
            for folder in (here, *here.parents):
                found = self._at(os.path.join(folder, name))  # noqa: PTH118
                if found is not None:
                    return found, False
        for name in names:
            parts = PurePosixPath(name).parts
            for first in range(1, len(parts)):
                found = self._at(os.path.join(here, *parts[first:]))  # noqa: PTH118
                if found is not None:
                    return found, True
        return None, False

    def beside(self, image: Path) -> dict[str, Path]:
        """Other files of the name of ``image``, with its ending or without, by their own ending."""
        name = os.path.abspath(image)  # noqa: PTH100
        return {**self.others.get(name, {}), **self.others.get(os.path.splitext(name)[0], {})}  # noqa: PTH122


@dataclass(frozen=True, slots=True)
class _Found:
    """Images with their captions, and what was left out, with the reason."""

    rows: list[tuple[Path, str]] = field(
        default_factory=list
    )  # an image may have several captions, one a row
    left_out: list[str] = field(default_factory=list)


# Tables ----------------------------------------------------------------------------------------------------------


def _read_metadata(path: Path) -> pd.DataFrame:
    """The rows of a metadata file, text as it stands there."""
    try:
        return read_table(path)
    except (OSError, ValueError, ArrowException) as error:
        raise DataError(
            f"asked for the captions in {path}, cannot read it ({error}); write it again with the columns "
            "file_name and caption"
        ) from None


def _columns_of(path: Path) -> list[str]:
    """The names of the columns of a table; none where it cannot be read."""
    try:
        if path.suffix.lower() == ".parquet":
            return list(read_schema(path).names)
        return [str(name) for name in read_table(path).columns]
    except (OSError, ValueError, ArrowException, DataError):
        return []


def _names_files(path: Path, settings: DataConfig) -> bool:
    """Whether a table has a column of files and one of captions, by the names that are asked for or usual ones."""
    files = (settings.image_column,) if settings.image_column else FILE_COLUMNS
    captions = (settings.caption_column,) if settings.caption_column else CAPTION_COLUMNS
    columns = _columns_of(path)
    return find_column(columns, files) is not None and find_column(columns, captions) is not None


def _cells(path: Path, settings: DataConfig) -> Iterator[tuple[str, Any]]:
    """Name of the file, and caption, of every row of a table."""
    frame = _read_metadata(path)
    columns = list(frame.columns)
    files = pick_column(columns, settings.image_column, FILE_COLUMNS, "image_column", str(path))
    captions = pick_column(columns, settings.caption_column, CAPTION_COLUMNS, "caption_column", str(path))
    yield from zip(frame[files].astype(str), frame[captions], strict=True)


def _from_tables(tables: Sequence[Path], files: _Files, settings: DataConfig) -> _Found:
    found = _Found()
    root = os.path.commonpath([path.parent for path in files.every])
    by_image: dict[Path, set[str]] = {}
    entries: list[tuple[str, str, Path, bool, tuple[str, ...]]] = []
    for table in tables:
        title = table.relative_to(root).as_posix()
        for name, cell in _cells(table, settings):
            image, shortened = files.find(table, name)
            texts = texts_in(cell)
            if image is None:
                found.left_out.append(f"{title} names {name}, which is not there")
            elif texts is None:
                found.left_out.append(f"{title} has no caption for {name}")
            else:
                by_image.setdefault(image, set()).add(name)
                entries.append((title, name, image, shortened, texts))
    for title, name, image, shortened, texts in entries:
        if shortened and len(by_image[image]) > 1:  # train/0.png and test/0.png, and one 0.png is there
            others = ", ".join(sorted(by_image[image]))
            found.left_out.append(
                f"{title} names {name}, which is not there; {image.name} may be any of {others}"
            )
        else:
            found.rows.extend((image, text) for text in texts)
    return found


# Files beside the images -----------------------------------------------------------------------------------------


def _text_beside(beside: Mapping[str, Path], settings: DataConfig) -> tuple[str, ...] | None:
    """The captions of an image in the files ``beside`` it; None where there are none.

    Raises ValueError that names a file of other bytes than UTF-8.
    """
    for ending in _BESIDE:
        path = beside.get(ending)
        if path is None:
            continue
        try:
            text = decode_text(path.read_bytes())
        except UnicodeDecodeError:
            raise ValueError(f"asked for the caption in {path}, found other bytes than UTF-8 text") from None
        if ending != ".json":
            return (text.strip(),)
        try:
            values = json.loads(text)
        except ValueError:
            continue
        known = values if isinstance(values, dict) else {}
        names = (settings.caption_column,) if settings.caption_column else CAPTION_COLUMNS
        column = find_column(list(known), names)
        texts = texts_in(known[column]) if column is not None else None
        if texts is not None:
            return texts
    return None


def _repeats(images: Sequence[Path]) -> dict[Path, int]:
    """How often each image counts, by kohya's names of folders (``10_name``), divided by what they share.

    Once each where not all images lie in such folders.
    """
    counts = {image: _REPEATS.fullmatch(image.parent.name) for image in images}
    if not all(counts.values()):
        return dict.fromkeys(images, 1)
    numbers = {image: int(match[1]) for image, match in counts.items() if match}
    shared = math.gcd(*numbers.values()) or 1
    return {image: number // shared for image, number in numbers.items()}


def _from_neighbours(files: _Files, settings: DataConfig) -> _Found:
    found = _Found()
    repeats = _repeats(list(files.images.values()))
    for image in files.images.values():
        beside = files.beside(image)
        try:
            texts = _text_beside(beside, settings)
        except ValueError as error:
            found.left_out.append(f"{image}: {error}")
            continue
        if texts is None:
            odd = next((path.name for path in beside.values()), "")
            found.left_out.append(
                f"{image}: no caption"
                + (f" in {odd} beside it; {', '.join(_BESIDE)} are read" if odd else "")
            )
        elif not repeats[image]:
            found.left_out.append(f"{image}: its folder {image.parent.name} says that it counts 0 times")
        else:
            found.rows.extend((image, text) for text in texts * repeats[image])
    return found


# All -------------------------------------------------------------------------------------------------------------


def _near_misses(files: Sequence[Path]) -> list[str]:
    """What files are called that may have been meant as metadata."""
    found = []
    for path in files:
        close = difflib.get_close_matches(path.name.lower(), METADATA, n=1, cutoff=0.85)
        if close and path.suffix.lower() not in TABLE_SUFFIXES:
            found.append(f"{path.name} is not read; should it be called {close[0]}?")
    return found


def folder_source(settings: DataConfig, paths: Sequence[Path]) -> ImageSource:
    """The images in ``paths`` whose captions a table says, or a file beside each.

    Images without a caption, and captions without an image, are left out and named. Raises DataError, with the first
    reason, when nothing is left.
    """
    files = _Files(paths)
    tables = [path for path in paths if path.name.lower() in METADATA]
    if not tables:
        asked = bool(settings.image_column)
        captioned = any(
            _BESIDE[0] in (near := files.beside(one)) or _BESIDE[1] in near for one in files.images.values()
        )
        if asked or not captioned:
            others = (path for path in paths if path.suffix.lower() in TABLE_SUFFIXES)
            tables = [path for path in others if _names_files(path, settings)]
    found = _from_tables(tables, files, settings) if tables else _from_neighbours(files, settings)
    left_out = list(found.left_out)
    if tables:
        captioned_images = {image for image, _ in found.rows}
        left_out += [
            f"{image}: no caption" for image in files.images.values() if image not in captioned_images
        ]
    if not found.rows:
        reasons = [*_near_misses(paths), *_other_columns(paths, settings, tables), *left_out]
        first = f" ({reasons[0]})" if reasons else ""
        raise DataError(
            f"asked for images with captions in {settings.source}, found {len(files.images):,} images and no caption "
            f"for any{first}; {_REMEDY}"
        )
    images, captions = zip(*found.rows, strict=True)
    return ImageSource(
        settings.source,
        captions,
        source_digest(captions, file_stamps(images)),
        lambda row: str(images[row]),
        lambda row: images[row].read_bytes(),
        tuple(left_out),
    )


def _other_columns(paths: Sequence[Path], settings: DataConfig, used: Sequence[Path]) -> list[str]:
    """The columns of tables that were not used, because others were wanted."""
    wanted = [name for name in (settings.image_column, settings.caption_column) if name]
    return [
        f"{path.name} has the columns {', '.join(columns)}"
        + (
            f" and not {' and '.join(wanted)}"
            if wanted
            else "; say which with --image-column and --caption-column"
        )
        for path in paths
        if path.suffix.lower() in (".csv", ".tsv", ".jsonl") and path not in used
        if (columns := _columns_of(path))
    ]
