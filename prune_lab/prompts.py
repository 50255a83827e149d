"""Prompts with their kinds: the general list that ships, or those of a file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from prune_lab.assets import prompts_path
from prune_lab.errors import DataError
from prune_lab.text_tables import TABLE_SUFFIXES, find_column, read_table, read_text, table_kind

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
    return [text.strip() for text in found if isinstance(text, str) and text.strip()]


def read_prompts(file: Path | str) -> Prompts:
    """The prompts in a text file, one a line, or in a table; ``default`` are those that ship.

    A table is .csv, .tsv, .jsonl or .parquet with a column prompt (or caption, or text), a text or a list of texts a
    row, and a column kind (or group) where there are kinds; names count in any case.

    Raises DataError when the file cannot be read or holds none.
    """
    path = prompts_path() if str(file) == DEFAULT else Path(file).expanduser()
    kind = table_kind(path)
    if kind not in (".txt", *TABLE_SUFFIXES):
        raise DataError(f"asked for the prompts in {path}, found a name ending in {path.suffix!r}; {_REMEDY}")
    try:
        if kind == ".txt":
            lines = [line.strip() for line in read_text(path).splitlines()]
            texts = tuple(line for line in lines if line)
            if not texts:
                raise DataError(f"asked for the prompts in {path}, found no prompts; {_REMEDY}")
            return Prompts(texts, ("",) * len(texts))
        frame = read_table(path)
    except DataError:  # which is a ValueError
        raise
    except OSError as error:
        raise DataError(
            f"asked for the prompts in {path}, cannot read it ({error.strerror or error}); {_REMEDY}"
        ) from None
    except ValueError as error:  # pandas raises kinds of ValueError
        raise DataError(f"asked for the prompts in {path}, cannot read it ({error}); {_REMEDY}") from None
    columns = list(frame.columns)
    texts_column, kinds_column = find_column(columns, _TEXTS), find_column(columns, _KINDS)
    if texts_column is None or frame.empty:
        found = f"columns {', '.join(columns)}" if not frame.empty else "no prompts"
        raise DataError(f"asked for the prompts in {path}, found {found}; {_REMEDY}")
    kinds = [""] * len(frame) if kinds_column is None else frame[kinds_column].fillna("").astype(str).tolist()
    rows = [
        (text, kind)
        for cell, kind in zip(frame[texts_column], kinds, strict=True)
        for text in _texts_of(cell)
    ]
    if not rows:
        raise DataError(
            f"asked for the prompts in {path}, found no prompts in column {texts_column}; {_REMEDY}"
        )
    found_texts, found_kinds = zip(*rows, strict=True)
    return Prompts(found_texts, found_kinds)
