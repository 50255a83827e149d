"""Images in a folder, with their captions as people keep them: in a table, or in a file beside each image.

Tables are metadata.csv, .tsv, .jsonl or .parquet as `datasets` reads them, or, where there is none of these, any table
with a column of files and one of captions. Files beside an image are .txt, .caption or .json, as kohya's scripts and
img2dataset write them; kohya's folders ``10_name`` say how often their images count.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyarrow import ArrowException
from pyarrow.parquet import read_schema

from prune_lab.config import DataConfig
from prune_lab.distill.decoding import MOST_BYTES
from prune_lab.distill.image_source import (
    CAPTION_COLUMNS,
    MOST_CAPTION_BYTES,
    ImageSource,
    file_stamps,
    pick_column,
    source_digest,
    texts_in,
)
from prune_lab.distill.listing import FolderFiles
from prune_lab.errors import DataError, StorageError
from prune_lab.runtime import decode_text, parse_json, read_bytes
from prune_lab.text_tables import TABLE_SUFFIXES, find_column, one_line, read_rows

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
class _Found:
    """Images with their captions, and what was left out, with the reason."""

    rows: list[tuple[Path, str]] = field(
        default_factory=list
    )  # an image may have several captions, one a row
    left_out: list[str] = field(default_factory=list)


# Tables ----------------------------------------------------------------------------------------------------------


def _columns_of(path: Path) -> list[str]:
    """The names of the columns of a table; none where it cannot be read."""
    try:
        if path.suffix.lower() == ".parquet":
            return list(read_schema(path).names)
        return [str(name) for name in read_rows(path)[0].columns]
    except (OSError, ValueError, ArrowException):
        return []


def _names_files(path: Path, settings: DataConfig) -> bool:
    """Whether a table has a column of files and one of captions, by the names that are asked for or usual ones."""
    files = (settings.image_column,) if settings.image_column else FILE_COLUMNS
    captions = (settings.caption_column,) if settings.caption_column else CAPTION_COLUMNS
    columns = _columns_of(path)
    try:
        return find_column(columns, files) is not None and find_column(columns, captions) is not None
    except ValueError:
        return True  # one of them twice, which is told where it is read


def _cells(path: Path, settings: DataConfig) -> tuple[list[tuple[str, Any]], list[str]]:
    """Name of the file, and caption, of every row of a table; and of each line that is no row, why not.

    Raises StorageError or DataError when it cannot be read, or has no such columns.
    """
    try:
        frame, left_out = read_rows(path)
    except StorageError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(
            f"asked for the captions in {path}, cannot read it ({one_line(str(error))}); write it again with the "
            "columns file_name and caption"
        ) from None
    if frame.empty and left_out:
        raise DataError(
            f"asked for the captions in {path}, cannot read it ({one_line(left_out[0])}); write it again with the "
            "columns file_name and caption"
        )
    columns = list(frame.columns)
    files = pick_column(columns, settings.image_column, FILE_COLUMNS, "image_column", str(path))
    captions = pick_column(columns, settings.caption_column, CAPTION_COLUMNS, "caption_column", str(path))
    names = ("" if cell is None or cell != cell else str(cell) for cell in frame[files])
    return list(zip(names, frame[captions], strict=True)), left_out


def _from_tables(tables: Sequence[Path], files: FolderFiles, settings: DataConfig) -> _Found:
    """Raises the error of the first table where none can be read."""
    found = _Found()
    by_image: dict[Path, set[str]] = {}
    entries: list[tuple[str, str, Path, bool, tuple[str, ...]]] = []
    errors: list[DataError | StorageError] = []
    for table in tables:
        title = Path(os.path.relpath(table, files.root)).as_posix()
        try:
            cells, no_rows = _cells(table, settings)
        except (DataError, StorageError) as error:
            errors.append(error)
            found.left_out.append(f"{title}: {error}")
            continue
        found.left_out.extend(f"{title}: {text}" for text in no_rows)
        here = Path(os.path.abspath(table)).parent  # noqa: PTH100
        folders = list(map(str, (here, *here.parents)))
        for name, cell in cells:
            image, shortened = files.find(folders, name)
            texts = texts_in(cell)
            if image is None:
                lies = files.lies_outside(folders[0], name)
                why = (
                    f"lies outside of {files.root}; data.outside = true reads it" if lies else "is not there"
                )
                found.left_out.append(f"{title} names {name or 'nothing'}, which {why}")
            elif texts is None:
                number = isinstance(cell, (int, float)) and cell == cell
                found.left_out.append(
                    f"{title} has no caption for {name}" + (f": {cell} is no text" if number else "")
                )
            else:
                by_image.setdefault(image, set()).add(name)
                entries.append((title, name, image, shortened, texts))
    if len(errors) == len(tables):
        raise errors[0]
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

    Raises ValueError that names a file that cannot be read, or holds other bytes than UTF-8.
    """
    for ending in _BESIDE:
        path = beside.get(ending)
        if path is None:
            continue
        content = read_bytes(path, most=MOST_CAPTION_BYTES)
        try:
            if ending != ".json":
                return (decode_text(content).strip(),)
            values = parse_json(content)
        except UnicodeDecodeError:
            raise ValueError(f"asked for the caption in {path}, found other bytes than UTF-8 text") from None
        except ValueError as error:
            raise ValueError(f"no caption in {path.name}, which is no JSON ({error})") from None
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


def _from_neighbours(files: FolderFiles, settings: DataConfig) -> _Found:
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


def bare_images(settings: DataConfig, images: Sequence[Path], skipped: Sequence[str] = ()) -> ImageSource:
    """``images`` without captions, for a model that reads no text; ``skipped`` was left out before."""
    return ImageSource(
        settings.source,
        ("",) * len(images),
        source_digest("bare", file_stamps(images)),
        lambda row: str(images[row]),
        lambda row: read_bytes(images[row], most=MOST_BYTES),
        tuple(skipped),
    )


def folder_source(settings: DataConfig, paths: Sequence[Path], skipped: Sequence[str] = ()) -> ImageSource:
    """The images in ``paths`` whose captions a table says, or a file beside each.

    Images without a caption, and captions without an image, are left out and named, after those ``skipped`` before; so
    are lines of a table that are no rows. Raises DataError, with the first reason, when nothing is left.
    """
    files = FolderFiles.of(paths, outside=settings.outside)
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
    left_out = [*skipped, *found.left_out]
    if tables:
        captioned_images = {image for image, _ in found.rows}
        left_out += [
            f"{image}: no caption" for image in files.images.values() if image not in captioned_images
        ]
    if not found.rows:
        reasons = [*_near_misses(paths), *_other_columns(paths, settings, tables), *left_out]
        first = f" ({one_line(reasons[0])})" if reasons else ""
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
        lambda row: read_bytes(images[row], most=MOST_BYTES),
        tuple(left_out),
    )
