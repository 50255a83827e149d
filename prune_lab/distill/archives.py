"""Single images out of tars, zips and Parquet files, read where they lie: nothing is unpacked, converted or copied.

`datasets` reads these formats as well, but single rows at random only after it has written all of them to a second copy
in Arrow format. Its reader of tars also takes a tar that is cut off between two files for a whole one.
"""

from __future__ import annotations

import struct
import tarfile
import threading
import zipfile
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyarrow import Array, ArrowException
from pyarrow.parquet import ParquetFile, read_metadata

from prune_lab.distill.decoding import MOST_BYTES
from prune_lab.distill.image_source import MOST_CAPTION_BYTES, is_hidden, texts_in
from prune_lab.errors import DataError
from prune_lab.runtime import decode_text, parse_json
from prune_lab.text_tables import one_line, parquet_cells

# Tars and zips ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file in a tar."""

    archive: Path
    name: str
    start: int  # byte of the tar; negative: its bytes lie apart
    size: int  # bytes

    def read(self) -> bytes:
        """The content of the file. Raises OSError, or ValueError where the tar was cut off since."""
        if self.start < 0:
            raise ValueError("a sparse file, which is not read")
        if self.size > MOST_BYTES:
            raise ValueError(f"{self.size:,} bytes; at most {MOST_BYTES:,} are read")
        with self.archive.open("rb") as file:
            file.seek(self.start)
            content = file.read(self.size)
        if len(content) < self.size:
            raise ValueError("the tar is cut off")
        return content


@dataclass(frozen=True, slots=True)
class ZipMember:
    """A file in a zip."""

    archive: Path
    name: str
    start: int  # byte of the zip at which the file's own header lies
    packed: int  # bytes
    size: int  # bytes, unpacked
    method: int  # of packing; negative: it is encrypted
    crc: int

    def read(self) -> bytes:
        """The content of the file. Raises OSError, or ValueError or zlib.error where the zip is damaged."""
        if self.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError("it is encrypted, or packed in a way that is not read")
        if max(self.size, self.packed) > MOST_BYTES:
            raise ValueError(f"{max(self.size, self.packed):,} bytes; at most {MOST_BYTES:,} are read")
        with self.archive.open("rb") as file:
            file.seek(self.start)
            header = file.read(30)
            if len(header) < 30 or header[:4] != b"PK\x03\x04":
                raise ValueError("the zip is damaged")
            file.seek(sum(struct.unpack("<HH", header[26:])), 1)  # its name and more
            content = file.read(self.packed)
        if self.method == zipfile.ZIP_DEFLATED:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, self.size + 1)
        if len(content) != self.size or zlib.crc32(content) != self.crc:
            raise ValueError("the zip is damaged")
        return content


Member = TarMember | ZipMember


@dataclass(frozen=True, slots=True)
class Sample:
    """The files of one sample; keys are what follows the first dot of their names, in lower case."""

    members: dict[str, Member] = field(default_factory=dict)
    # Captions in text files, and those among the values of .json files: one, or a list of them.
    texts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)  # files that hold no text, with the reason
    twice: list[str] = field(default_factory=list)  # files of a name that came before: the first counts


def _add_texts(sample: Sample, kind: str, member: Member, texts: Collection[str]) -> None:
    """Read the captions in ``member``, which is of this ``kind``."""
    try:
        if member.size > MOST_CAPTION_BYTES:
            raise ValueError(f"{member.size:,} bytes; at most {MOST_CAPTION_BYTES:,} are read")
        content = member.read()
        if kind in texts:
            sample.texts[kind] = (decode_text(content).strip(),)
            return
        values = parse_json(content)
    except UnicodeDecodeError:
        sample.damaged.append(f"other bytes than UTF-8 in .{kind}")
    except (ValueError, zlib.error) as error:
        sample.damaged.append(f"nothing in .{kind} that can be read ({error})")
    else:
        known = values if isinstance(values, dict) else {}
        found = {str(name).lower(): texts_in(value) for name, value in known.items()}
        sample.texts.update({name: found[name] or () for name in texts if found.get(name)})


def _samples(members: Iterator[Member], texts: Collection[str]) -> dict[str, Sample]:
    """Samples by name, in the order of the archive: files that share their name up to its first dot."""
    samples: dict[str, Sample] = {}
    for member in members:
        folder, _, base = member.name.rpartition("/")
        stem, _, kind = base.partition(".")
        kind = kind.lower()
        if stem and kind and not is_hidden(member.name):
            sample = samples.setdefault(f"{folder}/{stem}".removeprefix("/"), Sample())
            if kind in sample.members:
                sample.twice.append(member.name)
                continue
            sample.members[kind] = member
            if kind in texts or kind == "json":
                _add_texts(sample, kind, member, texts)
    return samples


def _tar_members(path: Path) -> Iterator[TarMember]:
    """Raises ValueError for a tar that is damaged, cut off or compressed."""
    try:
        with tarfile.open(path, "r:") as archive:
            for entry in archive:
                if entry.isfile():
                    start = -1 if entry.issparse() else entry.offset_data
                    yield TarMember(path, entry.name, start, entry.size)
            end = archive.offset
        with path.open("rb") as file:  # tarfile takes a damaged header for the end
            file.seek(end)
            if file.read(512).strip(b"\0") or file.tell() < end + 512:
                raise tarfile.ReadError(f"it breaks off after {end:,} bytes")
    except (tarfile.TarError, EOFError, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from None


def tar_samples(path: Path, texts: Collection[str]) -> dict[str, Sample]:
    """Samples by name, in the order of the tar: files that share their name up to its first dot (webdataset's rule).

    ``texts`` names the files, and the values of .json files, that are read as text. A text that cannot be read is told
    in its sample. Raises DataError for a tar that is damaged, cut off or compressed.
    """
    try:
        return _samples(_tar_members(path), texts)
    except (OSError, ValueError) as error:
        raise DataError(
            f"asked for the images in {path}, cannot read them ({one_line(str(error))}); fetch it again, and give a "
            "tar that is not compressed"
        ) from None


def _zip_members(path: Path) -> Iterator[ZipMember]:
    """Raises ValueError for a zip that is damaged or cut off."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if not entry.is_dir():
                    sizes = entry.compress_size, entry.file_size
                    method = -1 if entry.flag_bits & 1 else entry.compress_type
                    yield ZipMember(path, entry.filename, entry.header_offset, *sizes, method, entry.CRC)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OverflowError, struct.error) as error:
        raise ValueError(str(error)) from None


def zip_samples(path: Path, texts: Collection[str]) -> dict[str, Sample]:
    """Samples by name, in the order of the zip, by the rule of ``tar_samples``.

    Raises DataError for a zip that is damaged or cut off.
    """
    try:
        return _samples(_zip_members(path), texts)
    except (OSError, ValueError) as error:
        raise DataError(
            f"asked for the images in {path}, cannot read them ({one_line(str(error))}); fetch it again"
        ) from None


# Tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LazyTable:
    """Rows of named columns, of which single cells are read when they are asked for."""

    columns: tuple[str, ...]
    column: Callable[[str], list[Any]]  # all its cells
    cells: Callable[[str], Callable[[int], Any]]  # reads the cell of a row of this column


_STEP = 16  # rows that are decoded at a time


class _ParquetCells:
    """The cells of one column of Parquet files, by row over all files.

    A row group, often 100 MB, can only be decoded from its start. This is done in small steps up to the row that is
    asked for, and later rows go on from there. So rows in order cost one pass in all, and a row drawn at random costs
    half a row group.
    """

    def __init__(self, groups: Sequence[tuple[Path, int]], starts: Sequence[int], column: str) -> None:
        self._groups = groups  # file and number of each row group
        self._starts = starts  # first row of each
        self._column = column
        self._lock = threading.Lock()
        # Threads of one build ask for the rows of a batch in no strict order: late ones find theirs in earlier steps.
        self._decoded: deque[tuple[int, Array]] = deque(maxlen=4)  # first row and cells
        self._open = -1  # row group that ``_steps`` goes through
        self._steps: Iterator[Any] = iter(())
        self._next = 0  # first row of the next step

    def read(self, row: int) -> Any:
        """The cell of ``row``. Raises OSError or ValueError where the file is damaged."""
        with self._lock:
            here = (one for one in self._decoded if one[0] <= row < one[0] + len(one[1]))
            try:
                first, cells = next(here, None) or self._decode(row)
            except ArrowException as error:
                raise ValueError(f"the file is damaged ({error})") from None
        return cells[row - first].as_py()

    def _decode(self, row: int) -> tuple[int, Array]:
        group = bisect_right(self._starts, row) - 1
        if group != self._open or row < self._next:
            path, number = self._groups[group]
            file = ParquetFile(path, memory_map=True)
            self._steps = file.iter_batches(_STEP, row_groups=[number], columns=[self._column])
            self._open, self._next = group, self._starts[group]
        while row >= self._next:
            try:
                cells = next(self._steps).column(0)
            except BaseException:
                self._open = -1  # the steps end with an error; the next row starts anew
                raise
            self._decoded.append((self._next, cells))
            self._next += len(cells)
        return self._decoded[-1]


def parquet_table(paths: Sequence[Path]) -> LazyTable:
    """The rows of all files, one file after the other; columns that some file lacks are left away.

    Raises OSError or ValueError for a damaged file.
    """
    heads = [read_metadata(path) for path in paths]
    names = [head.schema.to_arrow_schema().names for head in heads]
    common = tuple(name for name in names[0] if all(name in others for others in names))
    groups, starts, rows = [], [], 0
    for path, head in zip(paths, heads, strict=True):
        for number in range(head.num_row_groups):
            groups.append((path, number))
            starts.append(rows)
            rows += head.row_group(number).num_rows

    def column(name: str) -> list[Any]:
        found = []
        for path in paths:
            with ParquetFile(path) as file:
                found += parquet_cells(path, file, [name])[0]
        return found

    return LazyTable(common, column, lambda name: _ParquetCells(groups, starts, name).read)
