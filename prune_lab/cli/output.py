"""Tables on stdout: by rich for a person, as a JSON list of objects for a script."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from prune_lab.runtime import bytes_text, duration_text
from prune_lab.schemas import INTEGER_COLUMNS

if TYPE_CHECKING:
    import pandas as pd

# The columns that a decision needs, the most needed first: of each table the first six that have values are shown.
_MOST = 6
DECISIVE_COLUMNS: dict[str, tuple[str, ...]] = {
    "blocks": ("name", "kind", "params", "macs", "removable", "reason"),
    "reductions": (
        *("plan", "params", "params_change", "macs_change", "latency_change", "latency_verdict"),
        *("macs", "median_ms", "paper_macs"),
    ),
    "block costs": ("name", "kind", "params", "macs", "median_ms", "share", "paper_macs", "attention_macs"),
    "pipeline": ("part", "calls", "params", "macs", "median_ms", "share"),
    "scores": ("group", "impact", "low", "high", "samples", "criterion"),
    "agreement": (
        *("criterion", "leader_spearman", "impact_spearman", "outcome_spearman", "forwards"),
        *("samples", "impact_kendall"),
    ),
    "plans": (
        *("plan", "params_change", "macs_change", "latency_change", "predicted_impact"),
        *("blocks_removed", "native"),
    ),
    "comparison": (
        *("name", "params_change", "macs_change", "loss_after", "clip_after", "median_ms"),
        *("blocks_removed", "native"),
    ),
    "plans compared": (
        *("name", "params_change", "macs_change", "impact", "predicted_impact", "loss_after"),
        "blocks_removed",
    ),
    "pruned": ("plan", "folder", "written", "blocks_removed", "params_change", "macs_change"),
    "exported": ("model", "format", "file", "tensors", "bytes"),
    "converted": ("kind", "file", "parts", "kept", "renamed", "dropped"),
    "compatibility": ("what", "fits", "kept", "of", "renamed", "note"),
    "pushed": ("file", "bytes"),
    "data": ("data", "folder", "rows", "left_out", "bytes", "seconds"),
    "recovery": ("plan", "status", "steps", "loss_before", "loss_after", "reason", "seconds"),
    "pictures": ("plan", "weights", "pictures", "clip", "clip_low"),
    "quality": ("model", "pictures", "loss", "clip", "clip_low"),
    "ranking": ("rank", "plan", "params", "macs", "loss_after", "reason", "clip_after"),
    "steps": ("step", "state", "does", "estimate_seconds"),
    "recipes": ("recipe", "about"),
    "settings": ("setting", "value", "default", "read_by", "meaning"),
}


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of ``frame`` as plain dictionaries: whole numbers as int, missing values as None."""
    return [
        {str(column): _plain(str(column), value) for column, value in row.items()}
        for row in frame.to_dict(orient="records")
    ]


def emit(kind: str, rows: Sequence[Mapping[str, Any]], *, as_json: bool, wide: bool, title: str) -> None:
    """Print a table of this ``kind`` on stdout: its six columns that decide, or all of them if it is ``wide``.

    With ``as_json`` it is a list of objects with all columns, and nothing else is printed there.
    """
    if as_json:
        typer.echo(json.dumps([dict(row) for row in rows], indent=2, ensure_ascii=False, allow_nan=False))
        return
    from rich.console import Console
    from rich.table import Table

    everything = list(rows[0]) if rows else []
    columns = everything if wide else shown_columns(kind, rows)
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        numeric = all(row[column] is None or _is_number(row[column]) for row in rows)
        # A name that is too long goes on in the next line; nothing is cut.
        table.add_column(
            column.replace("_", " "),
            justify="right" if numeric else "left",
            no_wrap=numeric,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(_cell(column, row[column]) for column in columns))
    if len(columns) < len(everything):
        table.caption = f"{len(columns)} of {len(everything)} columns; --wide shows all"
        table.caption_justify = "left"
    console = Console(highlight=False)
    if wide or not console.is_terminal:
        console.width = 1000  # a file has no width, and what was asked for whole is not folded to fit one
    console.print(table)


def shown_columns(kind: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of a table of this ``kind`` that a person is shown at first."""
    filled = [
        name
        for name in DECISIVE_COLUMNS[kind]
        if any(name in row and row[name] not in (None, "", [], ()) for row in rows)
    ]
    return filled[:_MOST]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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
    if column == "seconds":
        return duration_text(value)
    if isinstance(value, int):
        if column.endswith("macs"):
            return f"{value / 1e9:.4g} G" if value >= 1e9 else f"{value / 1e6:.4g} M"
        return bytes_text(value) if column.endswith("bytes") else f"{value:,}"
    if isinstance(value, float):
        if column.endswith("_change"):
            return f"{value:+.1%}"
        return f"{value:.1%}" if column == "share" else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return str(value)
