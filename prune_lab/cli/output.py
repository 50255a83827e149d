"""Tables on stdout: by rich for a person, as a JSON list of objects for a script."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from prune_lab.tables import WIDE_COLUMNS, Table, is_numeric, records, shown_cell, shown_columns

__all__ = ["emit", "left_beside", "records", "show"]

_SCREEN = 120  # characters of a line that a screen holds


def emit(
    kind: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    as_json: bool,
    wide: bool,
    title: str,
    shown: Sequence[str] = (),
) -> None:
    """Print a table of this ``kind`` on stdout: its six columns that decide, or those ``shown``, or all of them if it
    is ``wide`` (of some tables those that a screen holds).

    With ``as_json`` it is a list of objects with all columns, and nothing else is printed there.
    """
    if as_json:
        typer.echo(json.dumps([dict(row) for row in rows], indent=2, ensure_ascii=False, allow_nan=False))
        return
    from rich.console import Console
    from rich.table import Table as RichTable

    everything = list(rows[0]) if rows else []
    every = [name for name in WIDE_COLUMNS.get(kind, everything) if name in everything]
    columns = every if wide else list(shown) or shown_columns(kind, rows)

    def filled(between: str) -> RichTable:
        """The table, with ``between`` the words of a column's name."""
        table = RichTable(title=title, title_justify="left", header_style="bold")
        for column in columns:
            numeric = is_numeric(column, rows)
            # A name that is too long goes on in the next line; nothing is cut.
            table.add_column(
                column.replace("_", between),
                justify="right" if numeric else "left",
                no_wrap=numeric,
                overflow="fold",
            )
        for row in rows:
            table.add_row(*(shown_cell(column, row) for column in columns))
        return table

    console = Console(highlight=False)
    if wide or not console.is_terminal:
        console.width = 1000  # a file has no width, and what was asked for whole is not folded to fit one
    table = filled(" ")
    if not wide and not console.is_terminal and console.measure(table).maximum > _SCREEN:
        table = filled("\n")
    if len(columns) < len(everything):
        more = "all" if every == everything else "more, --json all"
        hint = "what a screen holds; --json has all" if wide else f"--wide shows {more}"
        table.caption = f"{len(columns)} of {len(everything)} columns; {hint}"
        table.caption_justify = "left"
    console.print(table)


def show(table: Table, *, as_json: bool, wide: bool) -> None:
    """Print ``table``, which a call from Python returns too, as ``emit`` does; its notes go to stderr."""
    rows = table.records()
    emit(table.kind, rows, as_json=as_json, wide=wide, title=table.title, shown=table.shown)
    for line in table.notes:
        typer.echo(f"note: {line}", err=True)


def left_beside(folder: Path, *, shown: bool = False) -> str:
    """A line on the run ``folder`` that a student was distilled in, which nobody asked for by name; ``shown``: whether
    it is a run that ``report`` shows.
    """
    from prune_lab.runtime import bytes_text

    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    called = shlex.quote(str(folder))
    report = f"prune-lab report {called} shows it; " if shown else ""
    return (
        f"note: state, curves and tables lie in {called} ({bytes_text(size)}): the same command goes on from it, "
        f"{report}the student does not need it, rm -r {called} removes it"
    )
