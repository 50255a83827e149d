"""Text files and tables as people write them: marks at their start, other separators, names of columns in any case."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prune_lab.errors import DataError

if TYPE_CHECKING:  # pandas takes a second to import
    import pandas as pd

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
_SEPARATORS = (",", ";", "\t", "|")


def decode_text(content: bytes) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with its byte-order mark; without that mark.

    Raises ValueError for other bytes.
    """
    # the mark of UTF-32 begins with that of UTF-16
    for mark in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        if content.startswith(mark):
            return content.decode("utf-32")
    for mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        if content.startswith(mark):
            return content.decode("utf-16")
    return content.decode("utf-8-sig")


def table_kind(path: Path) -> str:
    """The ending that says what ``path`` holds, in lower case: .csv also of table.csv.gz."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def read_text(path: Path) -> str:
    """The text in ``path``, also of a .gz (see ``decode_text``).

    Raises OSError when it cannot be read, DataError for other bytes than text.
    """
    content = path.read_bytes()
    try:
        return decode_text(gzip.decompress(content) if path.suffix.lower() == ".gz" else content)
    except UnicodeDecodeError as error:
        raise DataError(
            f"asked for the text in {path}, found other bytes than UTF-8 at byte {error.start:,}; save it as UTF-8"
        ) from None


def _separated(text: str) -> list[list[str]]:
    """The cells of every line of a table whose columns are separated by whatever cuts its first line into the most.

    Raises ValueError that names a line with more or fewer cells than the first: a caption with a comma in it would
    else move into the next column.
    """
    if text.startswith("sep="):  # as Excel writes it
        text = text.partition("\n")[2]
    header = next(iter(text.splitlines()), "")
    mark = max(_SEPARATORS, key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))
    if len(next(csv.reader([header], delimiter=mark), [])) == 1:
        mark = "\x1f"  # one column, whose texts may hold any separator
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, skipinitialspace=True)
    rows: list[list[str]] = []
    try:
        for row in reader:
            if rows and row and len(row) != len(rows[0]):
                raise ValueError(
                    f"line {reader.line_num} has {len(row)} columns and the first line {len(rows[0])}; put quotes "
                    f"around a text with {mark!r} in it"
                )
            if row:
                rows.append(row)
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None
    twice = next((name for name in rows[0] if rows[0].count(name) > 1), None) if rows else None
    if twice is not None:
        raise ValueError(f"two columns are called {twice!r}")
    return rows


def read_table(path: Path) -> pd.DataFrame:
    """The rows of a table in ``path``, .csv, .tsv, .jsonl or .parquet; text as it stands there, names stripped.

    Columns of .csv and .tsv may be separated by commas, semicolons, tabs or bars. Raises OSError or ValueError when it
    cannot be read, DataError for other bytes than text.
    """
    import pandas as pd

    kind = table_kind(path)
    if kind == ".parquet":
        frame = pd.read_parquet(path)
    elif kind == ".jsonl":
        rows = []
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from None
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} holds no object but {line.strip()[:40]}")
                rows.append(row)
        frame = pd.DataFrame(rows)
    else:
        header, *cells = _separated(read_text(path)) or [[]]
        frame = pd.DataFrame(cells, columns=header, dtype=object)
    return frame.rename(columns=lambda name: str(name).strip())


def find_column(columns: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The first of ``wanted`` among ``columns``, as it is written there; a name in another case counts, too."""
    for name in wanted:
        if name in columns:
            return name
        same = [column for column in columns if column.lower() == name.lower()]
        if same:
            return same[0]
    return None
