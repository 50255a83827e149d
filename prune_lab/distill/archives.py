"""Single images out of tars and Parquet files, which are read where they lie: nothing is unpacked, converted or copied.

`datasets` reads both formats as well, but reads single rows at random only after it has written all of them to a second
copy in Arrow format. Its reader of tars also takes a tar that is cut off between two files for a whole one.
"""

from __future__ import annotations

import json
import tarfile
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyarrow import Array
from pyarrow.parquet import ParquetFile, read_metadata

from prune_lab.distill.image_source import texts_in
from prune_lab.errors import DataError
from prune_lab.text_tables import decode_text

# Webdataset tars -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file in a tar."""

    tar: Path
    name: str
    start: int  # byte of the tar
    size: int  # bytes

    def read(self) -> bytes:
        """The content of the file."""
        with self.tar.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


@dataclass(frozen=True, slots=True)
class TarSample:
    """The files of one sample; keys are what follows the first dot of their names, in lower case."""

    members: dict[str, TarMember] = field(default_factory=dict)
    # Captions in text files, and those among the values of .json files: one, or a list of them.
    texts: dict[str, tuple[str, ...]] = field(default_factory=dict)


def tar_samples(path: Path, texts: Collection[str]) -> dict[str, TarSample]:
    """Samples by name, in the order of the tar: files that share their name up to its first dot (webdataset's rule).

    ``texts`` names the files, and the values of .json files, that are read as text. Raises DataError for a tar that is
    damaged, cut off or compressed.
    """
    samples: dict[str, TarSample] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for entry in archive:
                folder, _, base = entry.name.rpartition("/")
                stem, _, kind = base.partition(".")
                if not entry.isfile() or not stem or not kind:
                    continue
                sample = samples.setdefault(f"{folder}/{stem}".removeprefix("/"), TarSample())
                kind = kind.lower()
                member = TarMember(path, entry.name, entry.offset_data, entry.size)
                sample.members[kind] = member
                if kind in texts:
                    sample.texts[kind] = (decode_text(member.read()).strip(),)
                elif kind == "json":
                    values = json.loads(member.read())
                    known = values if isinstance(values, dict) else {}
                    found = {str(name).lower(): texts_in(value) for name, value in known.items()}
                    sample.texts.update({name: found[name] or () for name in texts if found.get(name)})
            end = archive.offset
        with path.open("rb") as file:  # tarfile takes a damaged header for the end
            file.seek(end)
            if file.read(512).strip(b"\0") or file.tell() < end + 512:
                raise tarfile.ReadError(f"it breaks off after {end:,} bytes")
    except (OSError, tarfile.TarError, ValueError) as error:
        raise DataError(
            f"asked for the images in {path}, cannot read them ({error}); fetch it again, and give a tar that is not "
            "compressed, with texts in UTF-8"
        ) from None
    return samples


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
            first, cells = next(here, None) or self._decode(row)
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
                found += file.read(columns=[name])[name].to_pylist()
        return found

    return LazyTable(common, column, lambda name: _ParquetCells(groups, starts, name).read)
