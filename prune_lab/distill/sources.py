"""Images with captions from wherever they lie: all are found at once, each is read when it is asked for.

A source is the shipped images, a folder of images, Parquet files, webdataset tars, or a data set on the hub. An image
without a caption, or a caption without an image, is left out and named in ``ImageSource.left_out``.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from prune_lab.config import SHIPPED, DataConfig
from prune_lab.distill.archives import LazyTable, TarMember, parquet_table, tar_samples
from prune_lab.errors import DataError
from prune_lab.models.sources import HUB_ID
from prune_lab.runtime import seeded

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "picture", "img")
CAPTION_COLUMNS = ("caption", "text", "txt", "prompt", "captions")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # as `datasets` image folders have them
_READABLE = (*IMAGE_SUFFIXES, ".tar", ".parquet", ".csv", ".jsonl", ".txt")
_KINDS = "give reference, a folder of images, .parquet or .tar files (also as a glob), or a hub id"


@dataclass(frozen=True, slots=True, eq=False)
class ImageSource:
    """N images with a caption each.

    ``digest`` changes with the captions and with the names, sizes and times of change of the files (of a data set on
    the hub: with its revision). That is cheap for millions of images; it misses a file that changed under its old time.
    """

    title: str
    captions: tuple[str, ...]
    digest: str  # 16 hexadecimal digits
    name: Callable[[int], str]  # of the image of a row, for messages
    content: Callable[[int], bytes]  # of its file, compressed as it is there
    left_out: tuple[str, ...] = ()  # names with the reason

    def __len__(self) -> int:
        return len(self.captions)


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def _file_stamps(paths: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Name below the folder that holds all, size in bytes and time of change of every file."""
    root = os.path.commonpath([path.parent for path in paths])
    found = ((path, path.stat()) for path in paths)
    return [(path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns) for path, stat in found]


def _pick_column(columns: Sequence[str], asked: str, usual: Sequence[str], setting: str, title: str) -> str:
    """The column called ``asked``, or else the first with a usual name."""
    found = next((name for name in ((asked,) if asked else usual) if name in columns), "")
    if not found:
        wanted = repr(asked) if asked else f"any of {', '.join(usual)}"
        raise DataError(
            f"asked for the {setting} {wanted} of {title}, found {', '.join(columns) or 'none'}; "
            f"say which with data.{setting}"
        )
    return found


# Folders of images -----------------------------------------------------------------------------------------------


def _read_metadata(path: Path) -> pd.DataFrame:
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


def _metadata_rows(path: Path, settings: DataConfig) -> Iterator[tuple[Path, Any]]:
    """Image file and caption of every row of a metadata file."""
    frame = _read_metadata(path)
    columns = [str(name) for name in frame.columns]
    files = _pick_column(columns, "", ("file_name",), "file_name", str(path))
    captions = _pick_column(columns, settings.caption_column, CAPTION_COLUMNS, "caption_column", str(path))
    for name, caption in zip(frame[files], frame[captions], strict=True):
        yield path.parent / str(name), caption


def _text_beside(image: Path) -> str | None:
    try:
        return image.with_suffix(".txt").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    except UnicodeDecodeError:
        raise DataError(
            f"asked for the caption in {image.with_suffix('.txt')}, found other bytes than UTF-8 text; write it again"
        ) from None


def _from_folder(settings: DataConfig, files: Sequence[Path]) -> ImageSource:
    """Images named in metadata files, or else with a .txt file of the same name beside each."""
    captioned = {path: False for path in files if path.suffix.lower() in IMAGE_SUFFIXES}
    metadata = [path for path in files if path.name in _METADATA]
    rows: Iterable[tuple[Path, Any]] = (
        (row for path in metadata for row in _metadata_rows(path, settings))
        if metadata
        else ((path, _text_beside(path)) for path in captioned)
    )
    kept: list[tuple[Path, str]] = []  # an image may have several captions, one a row
    left_out = []
    for path, caption in rows:
        if path not in captioned:
            left_out.append(f"{path}: no such image")
        elif isinstance(caption, str):
            kept.append((path, caption))
            captioned[path] = True
    left_out += [f"{path}: no caption" for path, has_caption in captioned.items() if not has_caption]
    if not kept:
        raise DataError(
            f"asked for images with captions in {settings.source}, found {len(captioned):,} images and no caption "
            "for any; give a metadata.csv with the columns file_name and caption, or a .txt file beside each image"
        )
    paths, captions = zip(*kept, strict=True)
    return ImageSource(
        settings.source,
        captions,
        _digest(captions, _file_stamps(paths)),
        lambda row: str(paths[row]),
        lambda row: paths[row].read_bytes(),
        tuple(left_out),
    )


# Tars and tables -------------------------------------------------------------------------------------------------


def _from_tars(settings: DataConfig, paths: Sequence[Path]) -> ImageSource:
    images: list[TarMember] = []
    captions: list[str] = []
    left_out, kinds = [], set()
    image_names = (settings.image_column,) if settings.image_column else IMAGE_COLUMNS
    caption_names = (settings.caption_column,) if settings.caption_column else CAPTION_COLUMNS
    for path in paths:
        for name, sample in tar_samples(path, caption_names).items():
            kinds |= sample.members.keys() | sample.texts.keys()
            image = next((sample.members[kind] for kind in image_names if kind in sample.members), None)
            caption = next((sample.texts[kind] for kind in caption_names if kind in sample.texts), None)
            if image is not None and caption is not None:
                images.append(image)
                captions.append(caption)
            elif image is not None or caption is not None:
                left_out.append(f"{path.name}/{name}: no {'caption' if image is not None else 'image'}")
    if not images:
        raise DataError(
            f"asked for images with captions in {settings.source}, found samples of "
            f"{', '.join(sorted(kinds)) or 'nothing'}; samples need an image such as .jpg and a .txt or .json of the "
            "same name, or other names in data.image_column and data.caption_column"
        )
    return ImageSource(
        settings.source,
        tuple(captions),
        _digest(captions, [image.name for image in images], _file_stamps(paths)),
        lambda row: f"{images[row].name} in {images[row].tar}",
        lambda row: images[row].read(),
        tuple(left_out),
    )


def _image_bytes(cell: Any) -> bytes:
    """The compressed image in a cell: bytes, a path, or a dictionary of both as `datasets` and `pandas` give them."""
    if isinstance(cell, Mapping):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str):
        return Path(cell).read_bytes()
    if not isinstance(cell, bytes):
        raise ValueError(f"no image but {type(cell).__name__}")
    return cell


@contextlib.contextmanager
def _loading(title: str, library_error: type[Exception] = OSError) -> Iterator[None]:
    """Turns OSError, ValueError and ``library_error`` into DataError."""
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, library_error) as error:
        reason = str(error.__cause__ or error) or type(error).__name__
        raise DataError(f"asked for the images in {title}, cannot load them ({reason}); {_KINDS}") from None


def _from_table(settings: DataConfig, table: LazyTable, origin: object) -> ImageSource:
    columns, title = table.columns, settings.source
    image_column = _pick_column(columns, settings.image_column, IMAGE_COLUMNS, "image_column", title)
    caption_column = _pick_column(columns, settings.caption_column, CAPTION_COLUMNS, "caption_column", title)
    captions, read_image = table.column(caption_column), table.cells(image_column)
    other = next((text for text in captions if text is not None and not isinstance(text, str)), None)
    if other is not None:
        raise DataError(
            f"asked for the captions in column {caption_column} of {title}, found {type(other).__name__} there; "
            "say which column holds one text per image with data.caption_column"
        )
    kept = [row for row, text in enumerate(captions) if text is not None]
    if not kept:
        raise DataError(
            f"asked for the captions of {title}, found none in its {len(captions):,} rows; fill them in"
        )
    return ImageSource(
        title,
        tuple(captions[row] for row in kept),
        _digest(origin, image_column, captions),
        lambda row: f"row {kept[row]} of {title}",
        lambda row: _image_bytes(read_image(kept[row])),
        tuple(f"row {row}: no caption" for row, text in enumerate(captions) if text is None),
    )


def _from_files(settings: DataConfig, files: Sequence[Path]) -> ImageSource:
    """The images in ``files``, which are tars, a folder of images with their captions, or Parquet files."""
    tars = [path for path in files if path.suffix == ".tar"]
    if tars:  # first: tools that write tars lay a .parquet with their log beside each
        return _from_tars(settings, tars)
    if any(path.suffix.lower() in IMAGE_SUFFIXES for path in files):
        return _from_folder(settings, files)
    tables = [path for path in files if path.suffix == ".parquet" and path.name not in _METADATA]
    if tables:
        with _loading(settings.source):
            return _from_table(settings, parquet_table(tables), _file_stamps(tables))
    kinds = sorted({path.suffix or path.name for path in files})
    raise DataError(
        f"asked for the images in {settings.source}, found {', '.join(kinds[:8]) or 'nothing'} there; {_KINDS}"
    )


# The hub, and what is shipped --------------------------------------------------------------------------------------


def _converted_table(dataset: Any) -> LazyTable:
    """The rows of a map-style data set of `datasets`, images as they were compressed."""
    import datasets

    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))

    def cells(name: str) -> Callable[[int], Any]:
        column = dataset.select_columns([name])
        return lambda row: column[row][name]

    return LazyTable(tuple(dataset.column_names), lambda name: dataset.select_columns([name])[:][name], cells)


def _from_hub(settings: DataConfig) -> ImageSource:
    """The train split of a data set on the hub; `datasets` says which files that is.

    They are downloaded once, into the hub's own cache, and read there. Files in other formats, such as .zip, are
    converted by `datasets`, which writes a second copy.
    """
    import datasets

    title, shown = settings.source, datasets.is_progress_bar_enabled()
    try:
        datasets.disable_progress_bars()
        with _loading(title, datasets.exceptions.DatasetsError):
            files = (datasets.load_dataset_builder(title).config.data_files or {}).get("train")
            if not files or not all(Path(url).suffix.lower() in _READABLE for url in files):
                table = datasets.load_dataset(title, split="train")
                return _from_table(settings, _converted_table(table), table._fingerprint)
            paths = [Path(path) for path in datasets.DownloadManager().download(list(files))]
    finally:
        if shown:
            datasets.enable_progress_bars()
    source = _from_files(settings, paths)
    # of the revision: names and times of the files differ from machine to machine
    return dataclasses.replace(
        source, digest=_digest(files.origin_metadata, settings.image_column, source.captions)
    )


def _from_package() -> ImageSource:
    frame = load_pictures("train")
    images, captions = list(frame["picture"]), tuple(frame["caption"])
    digest = hashlib.sha256(b"".join(images)).hexdigest()  # a few MB, and a new install changes their times
    name = "shipped image {}".format
    return ImageSource("reference", captions, _digest(digest, captions), name, images.__getitem__)


# All -------------------------------------------------------------------------------------------------------------


def _find(settings: DataConfig) -> ImageSource:
    text, path = settings.source, Path(settings.source).expanduser()
    if text in ("reference", SHIPPED):
        return _from_package()
    if path.is_dir():
        files = sorted(Path(at, name) for at, _, names in os.walk(path) for name in names if name[0] != ".")
    elif path.is_file():
        files = [path]
    else:
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207, an absolute glob
        if not files and HUB_ID.fullmatch(text) and not Path(text).parent.is_dir():
            return _from_hub(settings)
        if not files:
            raise DataError(f"asked for the images in {text}, found no such file or folder; {_KINDS}")
    return _from_files(settings, files)


def source_of(settings: DataConfig) -> ImageSource:
    """The images that ``settings.source`` names: ``reference``, a folder, .parquet or .tar files, a glob, or a hub id.

    With ``settings.limit`` that many of them, in an order drawn with ``settings.seed``. Raises DataError when there are
    none, when a file cannot be read, or when no column has a usual name and none is given.
    """
    source, limit = _find(settings), settings.limit
    if not limit or limit >= len(source):
        return source
    order = torch.randperm(len(source), generator=seeded(settings.seed))[:limit].tolist()
    return dataclasses.replace(
        source,
        captions=tuple(source.captions[row] for row in order),
        digest=_digest(source.digest, order),
        name=lambda row: source.name(order[row]),
        content=lambda row: source.content(order[row]),
    )
