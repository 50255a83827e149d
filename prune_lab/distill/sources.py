"""Pictures with captions from wherever they lie: found by name at once, read one by one when they are asked for.

A source is the shipped pictures, a folder of pictures, Parquet files, webdataset tars, or a data set on the hub. A
picture without a caption, or a caption without a picture, is left out and named in ``PictureSource.left_out``.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from prune_lab.assets import load_pictures
from prune_lab.distill.tars import Span, samples_in
from prune_lab.errors import DataError
from prune_lab.models.sources import HUB_ID
from prune_lab.runtime import seeded

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "picture", "img")
CAPTION_COLUMNS = ("caption", "text", "txt", "prompt", "captions")
PICTURE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # as `datasets` image folders have them
_KINDS = "give reference, a folder of pictures, .parquet or .tar files (also as a glob), or a hub id"


@dataclass(frozen=True, slots=True, eq=False)
class PictureSource:
    """N pictures with a caption each.

    ``digest`` covers the captions, and of the pictures the names, sizes and times of change of their files (of a data
    set on the hub its fingerprint): cheap for millions, and blind to a file that was changed under its old time.
    """

    title: str
    captions: tuple[str, ...]
    digest: str  # 16 hexadecimal digits
    name: Callable[[int], str]  # what to call the picture of a row
    content: Callable[[int], bytes]  # its file, as it was compressed
    left_out: tuple[str, ...] = ()  # names with the reason

    def __len__(self) -> int:
        return len(self.captions)


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def _stamps(paths: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Name below the folder that holds all, size and time of change of every file."""
    root = os.path.commonpath([path.parent for path in paths])
    found = ((path, path.stat()) for path in paths)
    return [(path.relative_to(root).as_posix(), one.st_size, one.st_mtime_ns) for path, one in found]


def _column(columns: Sequence[str], asked: str, usual: Sequence[str], setting: str, title: str) -> str:
    """The column called ``asked``, or else the first with a usual name."""
    found = next((name for name in ((asked,) if asked else usual) if name in columns), "")
    if not found:
        wanted = repr(asked) if asked else f"any of {', '.join(usual)}"
        raise DataError(
            f"asked for the {setting} {wanted} of {title}, found {', '.join(columns) or 'none'}; "
            f"say which with data.{setting}"
        )
    return found


# Folders of pictures ---------------------------------------------------------------------------------------------


def _table(path: Path) -> pd.DataFrame:
    """The rows of a metadata file, text as it stands there."""
    try:
        if path.suffix == ".csv":
            return pd.read_csv(path, dtype=str, keep_default_na=False)
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        lines = path.read_text(encoding="utf-8").splitlines()
        return pd.DataFrame([json.loads(line) for line in lines if line.strip()])
    except (OSError, ValueError, pd.errors.ParserError) as error:
        raise DataError(
            f"asked for the captions in {path}, cannot read it ({error}); write it again with the columns "
            "file_name and caption"
        ) from None


def _described(table: Path, captions: str) -> Iterator[tuple[Path, Any]]:
    """Picture and caption of every row of a metadata file."""
    frame = _table(table)
    columns = [str(name) for name in frame.columns]
    files = _column(columns, "", ("file_name",), "file_name", str(table))
    texts = _column(columns, captions, CAPTION_COLUMNS, "caption_column", str(table))
    yield from (
        (table.parent / str(name), text) for name, text in zip(frame[files], frame[texts], strict=True)
    )


def _text_beside(picture: Path) -> str | None:
    try:
        return picture.with_suffix(".txt").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    except UnicodeDecodeError:
        raise DataError(
            f"asked for the caption in {picture.with_suffix('.txt')}, found other bytes than UTF-8 text; write it again"
        ) from None


def _folder(title: str, files: Sequence[Path], captions: str) -> PictureSource:
    """Pictures named in metadata files, or else with a .txt file of the same name beside each."""
    pictures = {path: False for path in files if path.suffix.lower() in PICTURE_FILES}  # whether told of
    tables = [path for path in files if path.name in _METADATA]
    pairs: Iterable[tuple[Path, Any]] = (
        (pair for table in tables for pair in _described(table, captions))
        if tables
        else ((path, _text_beside(path)) for path in pictures)
    )
    kept: list[tuple[Path, str]] = []  # a picture may have several captions, one a row
    left_out = []
    for path, caption in pairs:
        if path not in pictures:
            left_out.append(f"{path}: no such picture")
        elif isinstance(caption, str):
            kept.append((path, caption))
            pictures[path] = True
    left_out += [f"{path}: no caption" for path, told in pictures.items() if not told]
    if not kept:
        raise DataError(
            f"asked for pictures with captions in {title}, found {len(pictures):,} pictures and no caption for any; "
            "give a metadata.csv with the columns file_name and caption, or a .txt file beside each picture"
        )
    paths, texts = zip(*kept, strict=True)
    return PictureSource(
        title,
        texts,
        _digest(texts, _stamps(paths)),
        lambda row: str(paths[row]),
        lambda row: paths[row].read_bytes(),
        tuple(left_out),
    )


# Tars ------------------------------------------------------------------------------------------------------------


def _tars(title: str, paths: Sequence[Path], image: str, captions: str) -> PictureSource:
    spans: list[Span] = []
    texts: list[str] = []
    left_out, kinds = [], set()
    images, names = (image,) if image else IMAGE_COLUMNS, (captions,) if captions else CAPTION_COLUMNS
    for path in paths:
        for name, sample in samples_in(path, names).items():
            kinds |= sample.spans.keys() | sample.texts.keys()
            picture = next((kind for kind in images if kind in sample.spans), "")
            text = next((kind for kind in names if kind in sample.texts), "")
            if picture and text:
                spans.append(sample.spans[picture])
                texts.append(sample.texts[text])
            elif picture or text:
                left_out.append(f"{path.name}/{name}: no {'caption' if picture else 'picture'}")
    if not spans:
        raise DataError(
            f"asked for pictures with captions in {title}, found samples of {', '.join(sorted(kinds)) or 'nothing'}; "
            "samples need a picture such as .jpg and a .txt or .json of the same name, or other names in "
            "data.image_column and data.caption_column"
        )
    return PictureSource(
        title,
        tuple(texts),
        _digest(texts, [span.name for span in spans], _stamps(paths)),
        lambda row: f"{spans[row].name} in {spans[row].tar}",
        lambda row: spans[row].read(),
        tuple(left_out),
    )


# Tables of `datasets` --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _datasets(title: str) -> Iterator[Any]:
    """The library, without its progress bars; what it raises is told as DataError."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    try:
        datasets.disable_progress_bars()
        yield datasets
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        reason = str(error.__cause__ or error) or type(error).__name__
        raise DataError(f"asked for the pictures in {title}, cannot load them ({reason}); {_KINDS}") from None
    finally:
        if shown:
            datasets.enable_progress_bars()


def _file_of(value: Any) -> bytes:
    """The compressed picture in a cell: bytes, a path, or a dictionary of both as `datasets` and `pandas` give them."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return Path(value).read_bytes()
    if not isinstance(value, bytes):
        raise ValueError(f"no picture but {type(value).__name__}")
    return value


def _rows(title: str, table: Any, image: str, captions: str, origin: object) -> PictureSource:
    with _datasets(title) as datasets:
        image = _column(table.column_names, image, IMAGE_COLUMNS, "image_column", title)
        captions = _column(table.column_names, captions, CAPTION_COLUMNS, "caption_column", title)
        if isinstance(table.features[image], datasets.Image):
            table = table.cast_column(image, datasets.Image(decode=False))
        pictures, texts = table.select_columns([image]), table.select_columns([captions])[:][captions]
    strange = next((text for text in texts if text is not None and not isinstance(text, str)), None)
    if strange is not None:
        raise DataError(
            f"asked for the captions in column {captions} of {title}, found {type(strange).__name__} there; "
            "say which column holds one text per picture with data.caption_column"
        )
    kept = [row for row, text in enumerate(texts) if text is not None]
    if not kept:
        raise DataError(
            f"asked for the captions of {title}, found none in its {len(texts):,} rows; fill them in"
        )
    return PictureSource(
        title,
        tuple(texts[row] for row in kept),
        _digest(origin, image, texts),
        lambda row: f"row {kept[row]} of {title}",
        lambda row: _file_of(pictures[kept[row]][image]),
        tuple(f"row {row}: no caption" for row, text in enumerate(texts) if text is None),
    )


def _parquet(title: str, paths: Sequence[Path], image: str, captions: str) -> PictureSource:
    with _datasets(title) as datasets:
        table = datasets.load_dataset("parquet", data_files=[str(path) for path in paths], split="train")
    return _rows(title, table, image, captions, _stamps(paths))


def _hub(title: str, image: str, captions: str) -> PictureSource:
    with _datasets(title) as datasets:
        table = datasets.load_dataset(title, split="train")
    return _rows(
        title, table, image, captions, table._fingerprint
    )  # of the files' revisions, not of this machine


def _shipped() -> PictureSource:
    frame = load_pictures("train")
    pictures, captions = list(frame["picture"]), tuple(frame["caption"])
    digest = hashlib.sha256(b"".join(pictures)).hexdigest()  # a few MB, and a new install changes their times
    return PictureSource(
        "reference",
        captions,
        _digest(digest, captions),
        lambda row: f"shipped picture {row}",
        pictures.__getitem__,
    )


# All -------------------------------------------------------------------------------------------------------------


def _opened(text: str, image: str, captions: str) -> PictureSource:
    path = Path(text).expanduser()
    if text == "reference":
        return _shipped()
    if path.is_dir():
        found = sorted(Path(at, name) for at, _, names in os.walk(path) for name in names if name[0] != ".")
    elif path.is_file():
        found = [path]
    else:
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207, an absolute glob
        if not found and HUB_ID.fullmatch(text) and not Path(text).parent.is_dir():
            return _hub(text, image, captions)
        if not found:
            raise DataError(f"asked for the pictures in {text}, found no such file or folder; {_KINDS}")
    tars = [one for one in found if one.suffix == ".tar"]
    tables = [one for one in found if one.suffix == ".parquet" and one.name not in _METADATA]
    if tars:  # first: tools that write tars lay a .parquet with their log beside each
        return _tars(text, tars, image, captions)
    if path.is_dir() and any(one.suffix.lower() in PICTURE_FILES for one in found):
        return _folder(text, found, captions)
    if tables:
        return _parquet(text, tables, image, captions)
    kinds = sorted({one.suffix or one.name for one in found})
    raise DataError(
        f"asked for the pictures in {text}, found {', '.join(kinds[:8]) or 'nothing'} there; {_KINDS}"
    )


def open_source(
    text: str, *, image_column: str = "", caption_column: str = "", limit: int = 0, seed: int = 0
) -> PictureSource:
    """The pictures that ``text`` names: ``reference``, a folder, .parquet or .tar files or a glob of them, or a hub id.

    With ``limit`` that many of them, in an order drawn with ``seed``. Raises DataError when there are none, when a file
    cannot be read, or when no column has a usual name and none is given.
    """
    source = _opened(text, image_column, caption_column)
    if not limit or limit >= len(source):
        return source
    order = torch.randperm(len(source), generator=seeded(seed))[:limit].tolist()
    return PictureSource(
        text,
        tuple(source.captions[row] for row in order),
        _digest(source.digest, order),
        lambda row: source.name(order[row]),
        lambda row: source.content(order[row]),
        source.left_out,
    )
