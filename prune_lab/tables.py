"""Tables that show themselves: in a terminal, as JSON, and in a notebook, where figures and pictures stand beside them.

Imports neither torch, pandas nor matplotlib before a table is shown, so that the command line stays light.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune_lab.errors import ConfigError, RunError
from prune_lab.runtime import atomic_write, bytes_text, duration_text
from prune_lab.schemas import INTEGER_COLUMNS, RANK

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from prune_lab.report import Column, Theme

# The columns that a decision needs, the most needed first: of each table the first six that have values are shown.
_MOST = 6
# Shown only where it is not zero throughout: most plans leave all widths as they are. Nor is it counted among these, as
# what a plan removes is not: both say what the plan is.
_WHERE_ANY = "narrower"
_UNCOUNTED = frozenset((_WHERE_ANY, "removed"))
DECISIVE_COLUMNS: dict[str, tuple[str, ...]] = {
    "personal": (
        "trained",
        "prompt",
        "pictures",
        "loss_before",
        "loss_after",
        "steps_per_second",
        "peak_bytes",
    ),
    "sweep": ("model", "strength", "clip", "likeness", "pixel_error", "from_first"),
    "sweep means": ("model", "strength", "clip", "likeness", "pixel_error", "from_first"),
    "blocks": ("name", "kind", "params", "macs", "removable", "reason"),
    "reductions": (
        *("plan", "form", "params", "params_change", "macs_change", "latency_change", "latency_verdict"),
        *("macs", "median_ms", "paper_macs"),
    ),
    "runtimes": ("backend", "plan", "median_ms", "cpu_ms", "latency_change", "macs_change", "peak_bytes"),
    "block costs": ("name", "kind", "params", "macs", "median_ms", "share", "paper_macs", "attention_macs"),
    "pipeline": ("part", "calls", "params", "macs", "median_ms", "share"),
    "scores": ("group", "impact", "low", "high", "samples", "criterion"),
    "width scores": ("site", "unit", "score", "channels", "criterion", "samples"),
    "site scores": ("site", "units", "least", "median", "largest", "samples"),
    "parts": ("group", "part", "of", "impact", "samples"),
    "orders": ("criterion", "other", "spearman", "kendall", "count", "over"),
    "agreement": (
        *("criterion", "leader_spearman", "impact_spearman", "outcome_spearman", "forwards"),
        *("samples", "impact_kendall"),
    ),
    "plans": (
        *("plan", "removed", "narrower", "params_change", "macs_change", "latency_change", "measured_change"),
        *("predicted_impact", "form", "blocks_removed"),
    ),
    "comparison": (
        *("name", "params_change", "macs_change", "loss_after", "clip_after", "median_ms"),
        *("blocks_removed", "native"),
    ),
    "plans compared": (
        *("name", "params_change", "macs_change", "impact", "predicted_impact", "loss_after"),
        "blocks_removed",
    ),
    "pruned": (
        "plan",
        "form",
        "folder",
        "written",
        "blocks_removed",
        "narrower",
        "params_change",
        "macs_change",
    ),
    "levels": ("stages", "channels", "step", "fewer"),
    "narrowed": (
        *("channels", "params_change", "macs_change", "impact", "loss_before", "loss_after"),
        *("teacher_loss", "folder"),
    ),
    "exported": ("model", "format", "file", "tensors", "bytes"),
    "converted": ("kind", "file", "parts", "kept", "renamed", "dropped"),
    "compatibility": ("what", "fits", "kept", "of", "renamed", "note"),
    "pushed": ("file", "bytes"),
    "data": ("data", "folder", "rows", "left_out", "bytes", "seconds"),
    "recovery": ("plan", "status", "steps", "loss_before", "loss_after", "reason", "seconds"),
    "few steps": ("model", "scheduler", "steps", "reuse", "median_ms", "clip", "psnr_teacher", "lever"),
    "few steps work": (
        "model",
        "scheduler",
        "steps",
        "reuse",
        "pictures",
        "timed",
        "state",
        "estimate_seconds",
    ),
    "levers": ("lever", "model", "scheduler", "steps", "reuse", "median_ms", "clip", "psnr_teacher"),
    "consistency": ("student", "steps", "guidance", "loss_first", "loss_last", "seconds"),
    "losses": ("plan", "step", "part", "value"),
    "rungs": ("rung", "steps", "name", "loss", "place", "fate", "reason"),
    "learned gates": ("budget", "block", "stays", "sure", "removed", "value", "logit_spread"),
    "choices": ("block", "removed", "impact", "extra_impact", "reason", "params"),
    "wider budgets": (
        *("budget", "predicted_impact", "wider_impact", "impact_change", "come_back", "go"),
        "params_change",
    ),
    "surprises": (
        *("plan", "impact_one_shot", "loss_after", "place_by_impact", "place_by_loss", "places_lost"),
    ),
    "picture changes": ("prompt", "plan", "weights", "difference", "seed"),
    "pictures": ("plan", "weights", "pictures", "clip", "clip_low"),
    "grid": ("plan", "weights", "prompt", "seed"),
    "metrics": ("model", "metric", "value", "difference", "floor", "verdict"),
    "kinds": ("kind", "prompts", "model", "clip", "difference", "verdict"),
    "gates": ("gate", "model", "value", "bound", "verdict", "reason"),
    "quality": ("model", "pictures", "loss", "clip", "clip_low", "not_measured"),
    "ranking": ("rank", "plan", "form", "macs", "loss_after", "reason", "params", "clip_after"),
    "steps": ("step", "state", "does", "estimate_seconds"),
    "doctor": ("step", "of", "state", "why"),
    "recipes": ("recipe", "about"),
    "seconds": ("step", "seconds"),
    "settings": ("setting", "value", "default", "read_by", "meaning"),
}

# What --wide shows of a table whose columns are too many for any screen; without an entry all of them.
WIDE_COLUMNS: dict[str, tuple[str, ...]] = {
    "blocks": (
        "name",
        "kind",
        "widths",
        "in_channels",
        "out_channels",
        "params",
        "macs",
        "removable",
    ),
}


# Cells ---------------------------------------------------------------------------------------------------------------


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of ``frame`` as plain dictionaries: whole numbers as int, missing values as None."""
    return [
        {str(column): _plain(str(column), value) for column, value in row.items()}
        for row in frame.to_dict(orient="records")
    ]


def shown_columns(kind: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of a table of this ``kind`` that a person is shown at first."""

    def said(name: str, row: Mapping[str, Any]) -> bool:
        value = row.get(name)
        return bool(value) if name == _WHERE_ANY else value not in (None, "", [], ())

    filled = [name for name in DECISIVE_COLUMNS[kind] if any(said(name, row) for row in rows)]
    if kind == "reductions" and len(rows) == 1:  # a change from itself says nothing
        filled = [name for name in filled if not name.endswith(("_change", "_verdict"))]
    return filled[: _MOST + len(_UNCOUNTED.intersection(filled))]


def is_numeric(column: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether ``column`` holds numbers, which stand on the right, and nothing else."""
    return all(row[column] is None or _is_number(row[column]) for row in rows)


def cell_text(column: str, value: Any) -> str:
    """One cell for a person: rounded, with its unit; a dash where nothing was measured."""
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


NOT_TOLD_APART = "~"  # beside a mean whose difference to another is not told apart from none

_LONG, _FIRST = 100, 3  # characters of a plan in writing that are shown whole; entries of a longer one


def short_plan(text: str) -> str:
    """A plan in writing whose line would be too long: its first entries, and how many there are more. Other texts as
    they are.
    """
    items = text.split()
    if len(text) <= _LONG or len(items) < 2 or not all(item[0] in "-+~" for item in items[1:]):
        return text
    return _first([item.partition("@")[0] for item in items])  # which units stay is longer than how many


def _first(items: Sequence[str]) -> str:
    more = len(items) - _FIRST
    return " ".join([*items[:_FIRST], f"... {more} more"]) if more > 0 else " ".join(items)


def shown_cell(column: str, row: Mapping[str, Any]) -> str:
    """The cell of ``row`` in ``column`` for a person, as ``cell_text`` has it; a long plan is cut, and called by its id
    where the row has that. A mean stands with its spread, where there is one, and marked where it is not told apart; a
    number that has a rank among those of its column stands before it.
    """
    value = row[column]
    if isinstance(value, float) and row.get(f"{column}_spread") is not None:
        same = f" {NOT_TOLD_APART}" if row.get(f"{column}_verdict") == "not told apart" else ""
        return f"{cell_text(column, value)} \u00b1 {row[f'{column}_spread']:.2g}{same}"
    if (rank := row.get(f"{column}{RANK}")) is not None:
        return f"{cell_text(column, value)} ({rank})"
    if isinstance(value, str):
        if column in ("plan", "name", "student") and (short := short_plan(value)) != value:
            return f"{short} ({row['plan_id']})" if row.get("plan_id") else short
        if column == "removed" and value and "blocks_removed" in row:
            return f"{row['blocks_removed']}: {_first(value.split())}"
        if column == "widths" and "narrower" in row:
            return _first(value.split())
    return cell_text(column, value)


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


# Figures -------------------------------------------------------------------------------------------------------------


def _theme(name: str) -> Theme:
    from prune_lab.report import DARK, LIGHT

    themes = {one.name: one for one in (LIGHT, DARK)}
    if name not in themes:
        raise ConfigError(f"asked for a figure in the theme {name!r}; give {' or '.join(themes)}")
    return themes[name]


def _on_surface(draw: Callable[[Theme], Figure], name: str) -> Figure:
    """The figure on the opaque surface of its theme, so that it can be read on any page."""
    theme = _theme(name)
    figure = draw(theme)
    figure.patch.set(alpha=1.0, facecolor=theme.surface)
    return figure


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Plot:
    """A figure of the report: in a notebook it follows the light or dark theme of the reader's browser."""

    draw: Callable[[Theme], Figure]
    alt: str = ""

    def figure(self, theme: str = "light") -> Figure:
        """The figure in ``theme``, light or dark, as a matplotlib ``Figure`` with a transparent background.

        Raises ConfigError for another theme.
        """
        return self.draw(_theme(theme))

    def save(self, path: str | Path, theme: str = "light") -> Path:
        """Write the figure in ``theme`` to ``path``, a .png, .svg or .pdf, whole or not at all.

        Raises ConfigError for another theme or kind of file, StorageError when the file cannot be written.
        """
        path = Path(path)
        kind = path.suffix.lower().removeprefix(".")
        if kind not in ("png", "svg", "pdf"):
            raise ConfigError(
                f"asked to write a figure to {path}; give a name that ends in .png, .svg or .pdf"
            )
        from prune_lab.report import plain_texts

        figure = _on_surface(self.draw, theme)
        with atomic_write(path) as temporary, plain_texts(figure):
            figure.savefig(temporary, format=kind, dpi=130, bbox_inches="tight")
        return path

    def __repr__(self) -> str:
        return f"{self.alt} (a figure: save(path) writes it)"

    def _repr_html_(self) -> str:
        light, dark = (_png_uri(_on_surface(self.draw, theme)) for theme in ("light", "dark"))
        return (
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
            f'<img alt="{html.escape(self.alt)}" src="{light}" style="max-width: 100%"></picture>'
        )


def _png_uri(figure: Figure) -> str:
    """``figure`` as a data URI; 64 colours are enough for it and a third of the bytes."""
    from PIL import Image

    from prune_lab.report import plain_texts

    drawn, small = io.BytesIO(), io.BytesIO()
    with plain_texts(figure):
        figure.savefig(drawn, format="png", dpi=80, bbox_inches="tight", metadata={"Software": None})
    Image.open(drawn).convert("RGB").quantize(64).save(small, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(small.getvalue()).decode("ascii")


# Tables --------------------------------------------------------------------------------------------------------------

_ROWS = 40  # of a table that are shown in a notebook
# No colours of its own: the table is readable on a light and on a dark page.
_STYLE = "border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6em 0"
_CELL = (
    "padding: .2em .8em .2em 0; border-bottom: 1px solid rgba(128, 128, 128, .35); vertical-align: baseline"
)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Table:
    """A table of results: the columns that decide in a notebook or a terminal, all of them in ``frame()``.

    ``kind`` says which columns decide, or ``shown`` does where these hang on what was asked; ``draw`` is the report's
    figure of the table, if it has one, and ``notes`` are sentences about it.
    """

    kind: str
    data: pd.DataFrame
    title: str = ""
    draw: Callable[[Theme], Figure] | None = None
    notes: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()

    def frame(self) -> pd.DataFrame:
        """All rows and columns, as a pandas frame that may be changed."""
        return self.data.copy()

    def records(self) -> list[dict[str, Any]]:
        """The rows as plain dictionaries, ready for JSON: missing values are None."""
        return records(self.data)

    def plot(self) -> Plot:
        """The report's figure of this table. Raises RunError for a table that has none."""
        if self.draw is None:
            raise RunError(f"asked to plot the table {self.kind!r}, which has no figure; use its frame()")
        return Plot(self.draw, self.title)

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        rows = self.records()[:_ROWS]
        columns = self._columns(rows)
        lines = [columns] + [[shown_cell(name, row) for name in columns] for row in rows]
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        numeric = [is_numeric(name, rows) for name in columns]
        drawn = [
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(cells, widths, numeric, strict=True)
            ).rstrip()
            for cells in lines
        ]
        return "\n".join(filter(None, (self.title, *drawn, self._rest(columns), *self.notes)))

    def _repr_html_(self) -> str:
        rows = self.records()[:_ROWS]
        columns = self._columns(rows)
        looks = {
            name: f"{_CELL}; text-align: {'right' if is_numeric(name, rows) else 'left'}" for name in columns
        }
        head = "".join(
            f'<th style="{looks[name]}; font-weight: 600">{html.escape(name.replace("_", " "))}</th>'
            for name in columns
        )
        body = "".join(
            "<tr>"
            + "".join(
                f'<td style="{looks[name]}">{html.escape(shown_cell(name, row))}</td>' for name in columns
            )
            + "</tr>"
            for row in rows
        )
        title = (
            f'<caption style="text-align: left"><b>{html.escape(self.title)}</b></caption>'
            if self.title
            else ""
        )
        below = "<br>".join(map(html.escape, filter(None, (self._rest(columns), *self.notes))))
        return (
            f'<div style="max-height: 28em; overflow: auto"><table style="{_STYLE}">{title}'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div><small>{below}</small>"
        )

    def _columns(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        return list(self.shown) or shown_columns(self.kind, rows)

    def _rest(self, columns: Sequence[str]) -> str:
        """What is not shown, in words."""
        parts = []
        if len(self.data) > _ROWS:
            parts.append(f"{_ROWS} of {len(self.data)} rows")
        if len(columns) < len(self.data.columns):
            parts.append(f"{len(columns)} of {len(self.data.columns)} columns")
        return f"{', '.join(parts)}; frame() has all" if parts else ""


# Pictures ------------------------------------------------------------------------------------------------------------

_SIDE = 112  # pixels of a picture in a grid


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Pictures(Table):
    """Pictures side by side, a row for each prompt and seed and a column for each model; ``frame()`` lists them.

    ``columns`` hold the pictures themselves, (H, W, 3) uint8, one for each of ``labels``.
    """

    columns: tuple[Column, ...] = ()
    labels: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        cell = "padding: 2px 4px 2px 0; text-align: left; vertical-align: middle; font-size: 85%"
        titles = (html.escape(" ".join(filter(None, (one.title, one.state)))) for one in self.columns)
        head = "".join(f'<th style="{cell}; max-width: {_SIDE}px">{title}</th>' for title in titles)
        body = "".join(
            f'<tr><td style="{cell}; max-width: 14em">{html.escape(label)}</td>'
            + "".join(f'<td style="{cell}">{_thumbnail(one.pictures[row])}</td>' for one in self.columns)
            + "</tr>"
            for row, label in enumerate(self.labels)
        )
        return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def _thumbnail(pixels: NDArray[np.uint8]) -> str:
    from PIL import Image

    picture, written = Image.fromarray(pixels), io.BytesIO()
    picture.thumbnail((_SIDE, _SIDE))
    picture.save(written, format="JPEG", quality=88, subsampling=0)
    uri = base64.b64encode(written.getvalue()).decode("ascii")
    return f'<img alt="" src="data:image/jpeg;base64,{uri}">'
