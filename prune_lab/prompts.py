"""Prompts with their kinds: the general list that ships, or those of a file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from prune_lab.assets import prompts_path
from prune_lab.errors import DataError, PruneLabError
from prune_lab.runtime import note_once, path_text
from prune_lab.text_tables import (
    TABLE_SUFFIXES,
    find_column,
    lines_of,
    one_line,
    read_table,
    read_text,
    table_kind,
    whole_characters,
)

DEFAULT = "default"  # names the list that ships
_TEXTS = ("prompt", "caption", "text", "prompts", "captions")
_KINDS = ("kind", "group", "category")
_REMEDY = (
    "give a .txt file with one prompt a line, or a .csv, .tsv, .jsonl or .parquet file with a column prompt"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts and the kind of each, by which damage is broken down; kinds may be empty."""

    texts: tuple[str, ...]
    kinds: tuple[str, ...]

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that change with any prompt, and with their order."""
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()[:16]


def _texts_of(cell: Any) -> list[str]:
    """The prompts in a cell: a text, or a list of texts."""
    found = [cell] if isinstance(cell, str) else list(cell) if hasattr(cell, "__iter__") else []
    return [whole_characters(text).strip() for text in found if isinstance(text, str) and text.strip()]


def _kind_of(cell: Any) -> str:
    """The kind in a cell, as text; empty where there is none."""
    return "" if cell is None or cell != cell else whole_characters(str(cell))


def _prompts_in_lines(path: Path) -> Prompts:
    texts = tuple(filter(None, (line.strip() for line in lines_of(read_text(path)))))
    if not texts:
        raise DataError(f"asked for the prompts in {path_text(path)}, found no prompts; {_REMEDY}")
    return Prompts(texts, ("",) * len(texts))


def _prompts_in_table(path: Path) -> Prompts:
    """Raises ValueError that names the first line that is no row."""
    frame, asked = read_table(path), f"asked for the prompts in {path_text(path)}, found"
    columns = list(frame.columns)
    texts_column, kinds_column = find_column(columns, _TEXTS), find_column(columns, _KINDS)
    if texts_column is None or frame.empty:
        found = f"columns {', '.join(columns[:20])}" if not frame.empty else "no prompts"
        raise DataError(f"{asked} {one_line(found)}; {_REMEDY}")
    cells = list(frame[texts_column])
    kinds = [""] * len(frame) if kinds_column is None else list(map(_kind_of, frame[kinds_column]))
    texts = list(map(_texts_of, cells))
    rows = [(text, kind) for found, kind in zip(texts, kinds, strict=True) for text in found]
    if not rows:
        raise DataError(f"{asked} no prompts in column {one_line(texts_column)}; {_REMEDY}")
    empty = [cell for cell, found in zip(cells, texts, strict=True) if not found]
    if empty:
        first = one_line(repr(empty[0]))[:40]
        note_once(
            f"{len(empty):,} of {len(cells):,} rows of {one_line(path.name)} hold no prompt and are left out; the "
            f"first holds {first} in column {one_line(texts_column)}"
        )
    found_texts, found_kinds = zip(*rows, strict=True)
    return Prompts(found_texts, found_kinds)


def read_prompts(file: Path | str) -> Prompts:
    """The prompts in a text file, one a line, or in a table; ``default`` are those that ship.

    A table is .csv, .tsv, .jsonl or .parquet with a column prompt (or caption, or text), a text or a list of texts a
    row, and a column kind (or group) where there are kinds; names count in any case. A prompt is text as it stands
    there (``NA`` and ``007``, too); null and numbers of JSON are none, and their rows are left out with a note.

    Raises DataError when the file cannot be read or holds none, StorageError for what is no regular file.
    """
    path = prompts_path() if str(file) == DEFAULT else Path(file).expanduser()
    kind, asked = table_kind(path), f"asked for the prompts in {path_text(path)}"
    if kind not in (".txt", *TABLE_SUFFIXES):
        raise DataError(f"{asked}, found a name ending in {one_line(path.suffix)!r}; {_REMEDY}")
    try:
        path.stat()
        return _prompts_in_lines(path) if kind == ".txt" else _prompts_in_table(path)
    except PruneLabError:  # which is a ValueError
        raise
    except OSError as error:
        raise DataError(f"{asked}, cannot read it ({error.strerror or error}); {_REMEDY}") from None
    except ValueError as error:
        raise DataError(f"{asked}, cannot read it ({one_line(str(error))}); {_REMEDY}") from None
