"""Tables on stdout: by rich for a person, as a JSON list of objects for a script."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from prune_lab.schemas import INTEGER_COLUMNS

if TYPE_CHECKING:
    import pandas as pd


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of ``frame`` as plain dictionaries: whole numbers as int, missing values as None."""
    return [
        {str(column): _plain(str(column), value) for column, value in row.items()}
        for row in frame.to_dict(orient="records")
    ]


def emit(rows: Sequence[Mapping[str, Any]], *, as_json: bool, title: str = "") -> None:
    """Print ``rows`` on stdout; with ``as_json`` nothing else is printed there."""
    if as_json:
        typer.echo(json.dumps([dict(row) for row in rows], indent=2, ensure_ascii=False, allow_nan=False))
        return
    from rich.console import Console
    from rich.table import Table

    columns = list(rows[0]) if rows else []
    table = Table(title=title or None, title_justify="left", header_style="bold")
    for column in columns:
        numeric = any(
            isinstance(row[column], (int, float)) and not isinstance(row[column], bool) for row in rows
        )
        table.add_column(column.replace("_", " "), justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_cell(column, row[column]) for column in columns))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 240  # a file has no width: do not fold numbers to fit one
    console.print(table)


def _plain(column: str, value: Any) -> Any:
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()  # numpy scalars are not JSON
    if isinstance(value, (list, tuple)):
        return [_plain(column, item) for item in value]
    if value is None or (isinstance(value, float) and not math.isfinite(value)) or str(value) == "<NA>":
        return None
    if column in INTEGER_COLUMNS and isinstance(value, float):
        return int(value)
    return value


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value / 1e9:.4g} G" if column.endswith("macs") else f"{value:,}"
    if isinstance(value, float):
        return (
            f"{value:+.1%}"
            if column.endswith("_change")
            else f"{value:.1%}"
            if column == "share"
            else f"{value:.4g}"
        )
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return str(value)
