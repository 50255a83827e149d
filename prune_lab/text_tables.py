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

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
_SEPARATORS = (",", ";", "\t", "|")
_MOST_BYTES = 2**31  # of a table: some ten million captions
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
            if size > _MOST_BYTES:
                raise DataError(
                    f"asked for the text in {path_text(path)}, found more than {_MOST_BYTES:,} bytes packed in it; "
                    "divide it"
                )
            if not unpacking.eof:
                raise zlib.error("it is cut off")
            left = unpacking.unused_data
    except zlib.error as error:
        raise DataError(
            f"asked for the text in {path_text(path)}, cannot unpack it ({error}); fetch it again"
        ) from None
    return b"".join(parts)


def read_text(path: Path) -> str:
    """The text in ``path``, also of a .gz (see ``decode_text``).

    Raises StorageError when it cannot be read, DataError for other bytes than text.
    """
    return text_of(_content(path), path)


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
        try:
            row = parse_json(line)
        except ValueError as error:
            yield number, f"is no JSON ({error})"
            continue
        yield number, row if isinstance(row, dict) else f"holds no object but {line.strip()[:40]}"


def read_rows(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """The rows of a table in ``path``, .csv, .tsv, .jsonl or .parquet, and those left out: a line and the reason each.

    Cells are as they stand there, names of columns stripped. Columns of .csv and .tsv may be separated by commas,
    semicolons, tabs or bars. Raises StorageError when the file cannot be read, ValueError when it is no table.
    """
    import pandas as pd

    kind, left_out = table_kind(path), list[str]()
    if kind == ".parquet":
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table as read_parquet

        with io.BytesIO(_content(path)) as content:
            try:
                table = read_parquet(content)
            except ArrowException as error:
                raise ValueError(str(error)) from None
        names = [name.strip() for name in table.column_names]
        columns = {number: column.to_pylist() for number, column in enumerate(table.columns)}
        frame = pd.DataFrame(columns, dtype=object)
    elif kind == ".jsonl":
        rows = []
        for number, found in _json_rows(decode_text(_content(path), "surrogateescape")):
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
            for number, line in _separated(decode_text(_content(path), "surrogateescape")):
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
    """The first of ``wanted`` among ``columns``, as it is written there; a name in another case counts, too."""
    for name in wanted:
        if name in columns:
            return name
        same = [column for column in columns if column.lower() == name.lower()]
        if same:
            return same[0]
    return None
