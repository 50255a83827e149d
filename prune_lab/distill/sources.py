"""Images with captions from wherever they lie: all are found at once, each is read when it is asked for.

A source is the shipped images, a folder of images, Parquet files, webdataset tars, zips like them, or a data set on the
hub. An image without a caption, a caption without an image, and what cannot be read is left out and named in
``ImageSource.left_out``; only a source of which nothing is left is an error, which says the first reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pyarrow import ArrowException
from pyarrow.parquet import read_metadata

from prune_lab.assets import load_pictures
from prune_lab.config import SHIPPED, DataConfig
from prune_lab.distill.archives import LazyTable, Member, parquet_table, tar_samples, zip_samples
from prune_lab.distill.decoding import MOST_BYTES
from prune_lab.distill.folders import METADATA, bare_images, folder_source
from prune_lab.distill.image_source import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    IMAGE_SUFFIXES,
    ImageSource,
    file_stamps,
    is_hidden,
    note_empty,
    note_left_out,
    pick_column,
    source_digest,
    texts_in,
)
from prune_lab.distill.listing import files_below
from prune_lab.errors import DataError
from prune_lab.models.hub import HUB_ID, is_the_hubs
from prune_lab.runtime import read_bytes, seeded
from prune_lab.text_tables import TABLE_SUFFIXES, one_line, whole_characters

_READABLE = (*IMAGE_SUFFIXES, *TABLE_SUFFIXES, ".tar", ".txt", ".caption", ".json")
# in archives names end as those of files do
_IMAGE_NAMES = tuple(dict.fromkeys((*IMAGE_COLUMNS, *(suffix[1:] for suffix in IMAGE_SUFFIXES))))
_KINDS = "give reference, a folder of images, .parquet, .tar or .zip files (also as a glob), or a hub id"


# Archives and tables ---------------------------------------------------------------------------------------------


def _from_archives(settings: DataConfig, paths: Sequence[Path], skipped: Sequence[str]) -> ImageSource:
    """The samples of images and captions in tars, or in zips."""
    images: list[Member] = []
    captions: list[str] = []
    left_out, kinds = list(skipped), set()
    image_names = (settings.image_column.lower(),) if settings.image_column else _IMAGE_NAMES
    caption_names = (settings.caption_column.lower(),) if settings.caption_column else CAPTION_COLUMNS
    for path in paths:
        samples = (zip_samples if path.suffix.lower() == ".zip" else tar_samples)(path, caption_names)
        for name, sample in samples.items():
            kinds |= sample.members.keys() | sample.texts.keys()
            left_out += [f"{path.name} has {one} twice; the first counts" for one in sample.twice]
            image = next((sample.members[kind] for kind in image_names if kind in sample.members), None)
            texts = next((sample.texts[kind] for kind in caption_names if kind in sample.texts), None)
            if image is not None and texts is not None:
                images += [image] * len(texts)
                captions += texts
            elif image is not None:
                left_out.append(
                    f"{path.name}/{name}: no caption" + "".join(f", {one}" for one in sample.damaged)
                )
            elif texts is not None:
                left_out.append(f"{path.name}/{name}: no image")
    if not images:
        first = f" ({one_line(left_out[0])})" if left_out else ""
        raise DataError(
            f"asked for images with captions in {settings.source}, found samples of "
            f"{one_line(', '.join(sorted(kinds)[:20])) or 'nothing'}{first}; samples need an image such as .jpg and a "
            ".txt or .json of the same name, or other names in data.image_column and data.caption_column"
        )
    return ImageSource(
        settings.source,
        tuple(captions),
        source_digest(captions, [image.name for image in images], file_stamps(paths)),
        lambda row: f"{images[row].name} in {images[row].archive}",
        lambda row: images[row].read(),
        tuple(left_out),
    )


def _image_bytes(cell: Any, folders: Sequence[Path], *, outside: bool) -> bytes:
    """The compressed image in a cell: bytes, a path, or a dictionary of both as `datasets` and `pandas` give them.

    A path is read inside ``folders`` alone unless ``outside``; where it is not absolute, from the first of them. Raises
    OSError or ValueError.
    """
    if isinstance(cell, Mapping):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str):
        path = (folders[0] / cell).resolve()
        if not outside and not any(path.is_relative_to(folder.resolve()) for folder in folders):
            raise ValueError(f"{cell}, which lies outside of {folders[0]}; data.outside = true reads it")
        return read_bytes(path, most=MOST_BYTES)
    if not isinstance(cell, bytes):
        raise ValueError(f"no image but {type(cell).__name__}")
    return cell


def _empty(cell: Any) -> bool:
    """Whether a cell holds no caption at all, rather than something else."""
    return cell is None or (isinstance(cell, float) and cell != cell) or cell in ([], ())


@contextlib.contextmanager
def _loading(title: str, library_error: type[Exception]) -> Iterator[None]:
    """Turns OSError, ValueError, ``library_error`` and what a hub or the way to it answers into DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        if not (isinstance(error, (OSError, ValueError, library_error)) or is_the_hubs(error)):
            raise
        reason = one_line(str(error.__cause__ or error)) or type(error).__name__
        raise DataError(f"asked for the images in {title}, cannot load them ({reason}); {_KINDS}") from None


def _from_table(
    settings: DataConfig, table: LazyTable, origin: object, folders: Sequence[Path], skipped: Sequence[str]
) -> ImageSource:
    """The rows of a table that holds images, or names those in ``folders`` (see ``_image_bytes``)."""
    columns, title = table.columns, settings.source
    image_column = pick_column(columns, settings.image_column, IMAGE_COLUMNS, "image_column", title)
    caption_column = pick_column(columns, settings.caption_column, CAPTION_COLUMNS, "caption_column", title)
    cells, read_image = table.column(caption_column), table.cells(image_column)
    texts = [None if cell is None else texts_in(cell) for cell in cells]
    kept = [(row, text) for row, found in enumerate(texts) for text in found or ()]
    other = next(
        (cell for cell, found in zip(cells, texts, strict=True) if found is None and not _empty(cell)), None
    )
    if not kept and other is not None:
        raise DataError(
            f"asked for the captions in column {caption_column} of {title}, found {type(other).__name__} there; "
            "say which column holds one text per image, or a list of texts, with data.caption_column"
        )
    if not kept:
        raise DataError(
            f"asked for the captions of {title}, found none in its {len(cells):,} rows; fill them in"
        )
    left_out = [
        f"row {row}: no caption" + ("" if _empty(cell) else f" but {type(cell).__name__}")
        for row, (cell, found) in enumerate(zip(cells, texts, strict=True))
        if found is None
    ]
    return ImageSource(
        title,
        tuple(text for _, text in kept),
        source_digest(origin, image_column, cells),
        lambda place: f"row {kept[place][0]} of {title}",
        lambda place: _image_bytes(read_image(kept[place][0]), folders, outside=settings.outside),
        (*skipped, *left_out),
    )


def _from_parquet(settings: DataConfig, paths: Sequence[Path], skipped: Sequence[str]) -> ImageSource:
    whole, left_out, errors = list[Path](), list(skipped), list[Exception]()
    with _loading(settings.source, ArrowException):
        for path in paths:
            try:
                read_metadata(path)
                whole.append(path)
            except (OSError, ArrowException) as error:
                errors.append(error)
                left_out.append(f"{path.name}: {one_line(str(error))}")
        if not whole:
            raise errors[0]
        folder = Path(os.path.commonpath([path.parent for path in whole]))
        return _from_table(settings, parquet_table(whole), file_stamps(whole), (folder,), left_out)


def _from_files(
    settings: DataConfig, files: Sequence[Path], skipped: Sequence[str] = (), *, captioned: bool = True
) -> ImageSource:
    """The images in ``files``: tars, a folder of images with their captions, Parquet files, or zips.

    Images in a folder need no captions unless they must be ``captioned``. ``skipped`` are files that were left out
    before, with the reason.
    """
    found = {
        suffix: [path for path in files if path.suffix.lower() == suffix]
        for suffix in (".tar", ".zip", ".parquet")
    }
    if found[".tar"]:  # first: tools that write tars lay a .parquet with their log beside each
        return _from_archives(settings, found[".tar"], skipped)
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if images and not captioned:
        return bare_images(settings, images, skipped)
    if images:
        return folder_source(settings, files, skipped)
    tables = [path for path in found[".parquet"] if path.name.lower() not in METADATA]
    if tables:
        return _from_parquet(settings, tables, skipped)
    if found[".zip"]:
        return _from_archives(settings, found[".zip"], skipped)
    if any(
        path.suffix.lower() in TABLE_SUFFIXES for path in files
    ):  # which may name images that lie elsewhere
        return folder_source(settings, files, skipped)
    kinds = sorted({path.suffix or path.name for path in files})
    first = f" ({one_line(skipped[0])})" if skipped else ""
    raise DataError(
        f"asked for the images in {settings.source}, found {one_line(', '.join(kinds[:8])) or 'nothing'} "
        f"there{first}; {_KINDS}"
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
                unpacked = (Path(datasets.config.HF_CACHE_HOME), Path(datasets.config.HF_DATASETS_CACHE))
                return _from_table(settings, _converted_table(table), table._fingerprint, unpacked, ())
            paths = [Path(path) for path in datasets.DownloadManager().download(list(files))]
    finally:
        if shown:
            datasets.enable_progress_bars()
    source = _from_files(settings, paths)
    # of the revision: names and times of the files differ from machine to machine
    return dataclasses.replace(
        source, digest=source_digest(files.origin_metadata, settings.image_column, source.captions)
    )


def _from_package() -> ImageSource:
    frame = load_pictures("train")
    images, captions = list(frame["picture"]), tuple(frame["caption"])
    digest = hashlib.sha256(b"".join(images)).hexdigest()  # a few MB, and a new install changes their times
    name = "shipped image {}".format
    return ImageSource("reference", captions, source_digest(digest, captions), name, images.__getitem__)


# All -------------------------------------------------------------------------------------------------------------


def _find(settings: DataConfig, captioned: bool) -> ImageSource:
    text, path = settings.source, Path(settings.source).expanduser()
    if text in ("reference", SHIPPED):
        return _from_package()
    if path.is_dir():
        return _from_files(settings, *files_below(path), captioned=captioned)
    if path.is_file():
        return _from_files(settings, [path], captioned=captioned)
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207, an absolute glob
    if not found and HUB_ID.fullmatch(text) and not Path(text).parent.is_dir():
        return _from_hub(settings)
    if not found:
        raise DataError(f"asked for the images in {text}, found no such file or folder; {_KINDS}")
    below = os.path.commonpath([one.parent for one in found])
    shown = [one for one in found if not is_hidden(os.path.relpath(one, below))]
    odd = [f"{one}: no regular file" for one in shown if not one.is_file() and not one.is_dir()]
    files = [one for one in shown if one.is_file()]
    return _from_files(settings, files, odd, captioned=captioned)


def source_of(settings: DataConfig, *, captioned: bool = True) -> ImageSource:
    """The images that ``settings.source`` names: ``reference``, a folder, .parquet, .tar or .zip, a glob, or a hub id.

    Where they need not be ``captioned``, for a model that reads no text, every image counts once, without a caption.
    With ``settings.limit`` that many of them, in an order drawn with ``settings.seed``. Notes count what is left out
    and captions that are empty. Raises DataError when nothing is left, when a tar or a zip is damaged, or when no
    column has a usual name and none is given.
    """
    found, limit = _find(settings, captioned), settings.limit
    source = dataclasses.replace(
        found,
        captions=tuple(map(whole_characters, found.captions)),
        left_out=tuple(map(one_line, found.left_out)),
        name=lambda row: one_line(found.name(row)),
    )
    note_left_out(source.title, source.left_out)
    kept = source
    if limit and limit < len(source):
        order = torch.randperm(len(source), generator=seeded(settings.seed))[:limit].tolist()
        kept = dataclasses.replace(
            source,
            captions=tuple(source.captions[row] for row in order),
            digest=source_digest(source.digest, order),
            name=lambda row: source.name(order[row]),
            content=lambda row: source.content(order[row]),
        )
    if captioned:
        note_empty(kept)
    return kept
