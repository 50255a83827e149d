"""Text files and tables as people write them: marks at their start, other separators, names of columns in any case.

Text is text: ``NA``, ``null``, ``007``, ``1e5`` and ``true`` in a table stay as they stand there. Only JSON and Parquet
have values of other types; these keep their type.
"""

from __future__ import annotations

import csv
import io
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune_lab.errors import DataError
from prune_lab.runtime import decode_text, parse_json, path_text, read_bytes, text_of

if TYPE_CHECKING:  # pandas takes a second to import
    import pandas as pd
    from pyarrow.parquet import ParquetFile

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
_STEPS = (16, 4096)  # rows of a Parquet file that are decoded at a time, at least and at most
_LONGEST_LINE = 2**24  # characters of JSON in a line
_SEPARATORS = (",", ";", "\t", "|")
# More would fill the memory: of each text Python makes an object of its own, however small it is in the file.
MOST_ROWS = 2_000_000
_MOST_BYTES = 2**27  # of a file, or unpacked from it
_LINE_ENDS = re.compile("\r\n|\n|\r")  # str.splitlines also parts at characters that are no end of a line
_HALF_CHARACTERS = re.compile("[\ud800-\udfff]")
_NO_TEXT = "holds other bytes than UTF-8; save it as UTF-8"


# Text ------------------------------------------------------------------------------------------------------------


def lines_of(text: str) -> list[str]:
    """The lines of ``text``, which end in a newline, a carriage return or both, without these."""
    return _LINE_ENDS.split(text)


def whole_characters(text: str) -> str:
    """``text``, in which half a character (a lone surrogate, which no encoding can store) is U+FFFD."""
    return _HALF_CHARACTERS.sub("\ufffd", text)


def one_line(text: str) -> str:
    """``text`` as a message shows it: in one line, whatever a name or a caption in it holds."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def table_kind(path: Path) -> str:
    """The ending that says what ``path`` holds, in lower case: .csv also of table.csv.gz."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def check_size(path: Path, rows: int, size: int = 0) -> None:
    """Raise DataError for more than ``MOST_ROWS`` rows in ``path``, or more bytes or characters than are read."""
    for found, most, what in ((rows, MOST_ROWS, "rows"), (size, _MOST_BYTES, "bytes")):
        if found > most:
            raise DataError(
                f"asked for the text in {path_text(path)}, found more than {most:,} {what}; divide it, or give a part"
            )


def _content(path: Path) -> bytes:
    """The bytes of ``path``, those of a .gz unpacked.

    Raises StorageError when it cannot be read, DataError for a damaged .gz, or one that unpacks to too much.
    """
    content = read_bytes(path, most=_MOST_BYTES)
    if path.suffix.lower() != ".gz":
        return content
    parts, left, size = [], content, 0
    try:
        while left.strip(b"\0"):  # a .gz may be several, one after the other
            unpacking = zlib.decompressobj(zlib.MAX_WBITS | 16)
            parts.append(unpacking.decompress(left, _MOST_BYTES + 1 - size))
            size += len(parts[-1])
            check_size(path, 0, size)
            if not unpacking.eof:
                raise zlib.error("it is cut off")
            left = unpacking.unused_data
    except zlib.error as error:
        raise DataError(
            f"asked for the text in {path_text(path)}, cannot unpack it ({error}); fetch it again"
        ) from None
    return b"".join(parts)


def _bounded(path: Path) -> bytes:
    """``_content`` of a text, whose lines are counted."""
    content = _content(path)
    check_size(path, content.count(b"\n") + content.count(b"\r"))
    return content


def read_text(path: Path) -> str:
    """The text in ``path``, also of a .gz (see ``decode_text``).

    Raises StorageError when it cannot be read, DataError for other bytes than text, and for too much of it.
    """
    return text_of(_bounded(path), path)


# Tables ----------------------------------------------------------------------------------------------------------


def _separator(header: str) -> str:
    """What separates the columns of a table: what cuts its first line into the most."""

    def width(mark: str) -> int:
        return len(next(csv.reader([header], delimiter=mark), []))

    mark = max(_SEPARATORS, key=width)
    return mark if width(mark) > 1 else "\x1f"  # of one column, whose texts may hold any separator


def _separated(text: str) -> Iterator[tuple[int, list[str] | str]]:
    """The number of the first line of each row of a table with its cells, or why it has none.

    A row with more or fewer cells than the first is none: a caption with a comma in it would else move into the next
    column. Nor is one with text after a closing quote, or a quote that is never closed: the lines below it, which it
    would swallow, are read again.
    """
    lines = list(io.StringIO(text, newline=""))  # an end of a line inside quotes is part of the text
    place = 1 if text.startswith("sep=") else 0  # as Excel writes it
    mark = _separator(lines_of(lines[place])[0]) if place < len(lines) else ","
    columns = 0

    def rest() -> Iterator[str]:
        nonlocal place
        while place < len(lines):
            place += 1
            yield lines[place - 1]

    while place < len(lines):
        begin, reader = place, csv.reader(rest(), delimiter=mark, skipinitialspace=True, strict=True)
        try:
            for row in reader:
                number, begin = begin + 1, place
                columns = columns or len(row)
                if row and len(row) != columns:
                    more = f"has {len(row)} columns and the first line {columns}"
                    yield number, f"{more}; put quotes around a text with {mark!r} in it"
                elif row:
                    yield number, row
        except csv.Error as error:
            open_ = "unexpected end" in str(error)
            yield (
                begin + 1,
                f"has a quote that {'is never closed' if open_ else f'ends before its cell ({error})'}",
            )
            place = begin + 1


def _json_rows(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if _HALF_CHARACTERS.search(line):  # bytes that are no text; what JSON escapes is no character yet
            yield number, _NO_TEXT
            continue
        if len(line) > _LONGEST_LINE:
            yield number, f"has {len(line):,} characters; at most {_LONGEST_LINE:,} are read"
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            yield number, f"is no JSON ({error})"
            continue
        yield number, row if isinstance(row, dict) else f"holds no object but {line.strip()[:40]}"


def parquet_cells(path: Path, file: ParquetFile, columns: Sequence[str] | None = None) -> list[list[Any]]:
    """The cells of each of ``columns`` (None: all) of the Parquet ``file``, which lies at ``path``.

    Decoded step by step: a text that is packed once may be there millions of times. Raises DataError for too many rows
    or characters.
    """
    head = file.metadata
    check_size(path, head.num_rows)
    groups = [head.row_group(number) for number in range(head.num_row_groups)]
    packed = max(
        (group.column(one).total_uncompressed_size for group in groups for one in range(head.num_columns)),
        default=1,
    )
    step = min(max(_STEPS[0], _MOST_BYTES // max(1, packed)), _STEPS[1])
    found: list[list[Any]] = [[] for _ in columns or file.schema_arrow.names]
    size = 0
    for batch in file.iter_batches(step, columns=columns):
        decoded = [column.to_pylist() for column in batch.columns]
        for cells, more in zip(found, decoded, strict=True):
            cells.extend(more)
        size += sum(len(cell) for more in decoded for cell in more if isinstance(cell, (str, bytes, list)))
        check_size(path, 0, size)
    return found


def _parquet_columns(path: Path) -> tuple[list[str], list[list[Any]]]:
    """The names of the columns of a Parquet file, and the cells of each."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    with io.BytesIO(_content(path)) as content:
        try:
            file = ParquetFile(content)
            return [name.strip() for name in file.schema_arrow.names], parquet_cells(path, file)
        except ArrowException as error:
            raise ValueError(str(error)) from None


def read_rows(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """The rows of a table in ``path``, .csv, .tsv, .jsonl or .parquet, and those left out: a line and the reason each.

    Cells are as they stand there, names of columns stripped. Columns of .csv and .tsv may be separated by commas,
    semicolons, tabs or bars. Raises StorageError when the file cannot be read, ValueError when it is no table.
    """
    import pandas as pd

    kind, left_out = table_kind(path), list[str]()
    if kind == ".parquet":
        names, columns = _parquet_columns(path)
        frame = pd.DataFrame(dict(enumerate(columns)), dtype=object)
    elif kind == ".jsonl":
        rows = []
        for number, found in _json_rows(decode_text(_bounded(path), "surrogateescape")):
            if isinstance(found, str):
                left_out.append(f"line {number} {found}")
            else:
                rows.append(found)
        frame = pd.DataFrame(rows, dtype=object)
        names = [str(name).strip() for name in frame.columns]
    else:
        cells: list[list[str]] = []
        before = csv.field_size_limit(_MOST_BYTES)  # of the whole process
        try:
            for number, line in _separated(decode_text(_bounded(path), "surrogateescape")):
                if isinstance(line, str):
                    left_out.append(f"line {number} {line}")
                elif any(map(_HALF_CHARACTERS.search, line)):
                    left_out.append(f"line {number} {_NO_TEXT}")
                else:
                    cells.append(line)
        finally:
            csv.field_size_limit(before)
        names = [name.strip() for name in cells[0]] if cells else []
        frame = pd.DataFrame(cells[1:], columns=range(len(names)), dtype=object)
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"two columns are called {twice!r}")
    return frame.set_axis(names, axis=1), left_out


def read_table(path: Path) -> pd.DataFrame:
    """The rows of a table, as ``read_rows`` reads them. Raises ValueError that names the first line that is no row."""
    frame, left_out = read_rows(path)
    if left_out:
        raise ValueError(left_out[0])
    return frame


def find_column(columns: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The first of ``wanted`` among ``columns``, as it is written there; a name in another case counts, too.

    Raises ValueError where several differ from it in nothing but their case; a name that is the only one wanted may
    be one of them.
    """
    for name in wanted:
        same = [column for column in columns if column.lower() == name.lower()]
        if name in same and len(wanted) == 1:
            return name
        if len(same) > 1:
            raise ValueError(f"{' and '.join(map(repr, same))} are both there; keep one of them")
        if same:
            return same[0]
    return None
