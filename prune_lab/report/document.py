"""What a page is made of: sections of sentences, tables and figures, before any HTML or Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from prune_lab.report.figures import Theme


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph, or a list with one sentence per entry; `backticks` mark code."""

    sentences: tuple[str, ...]
    bullets: bool = False
    note: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table with rounded numbers; the exact numbers are in ``source``, a CSV beside the page."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    source: str = ""
    left: int = 1  # number of columns with text, which are aligned left
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure that can be drawn in any theme."""

    name: str
    alt: str
    caption: str
    draw: Callable[[Theme], Figure]


@dataclass(frozen=True, slots=True)
class LiveCell:
    """A block on the live map: a button. Positions and sizes in percent of the map; colours are (cell, letters)."""

    name: str
    stage: str
    short: str
    number: str  # its impact in a few characters
    spoken: str  # what a screen reader says of it
    removable: bool
    round: bool
    left: float
    top: float
    width: float
    height: float
    light: tuple[str, str]
    dark: tuple[str, str]


@dataclass(frozen=True, slots=True)
class LiveLayer:
    """A layer inside a block: a small button below the live map; colours are (cell, letters)."""

    name: str
    stage: str
    short: str
    scored: bool
    spoken: str  # what a screen reader says of it
    removable: bool
    light: tuple[str, str]
    dark: tuple[str, str]


@dataclass(frozen=True, slots=True)
class LiveLabel:
    """The name of a stage on the live map, in percent of the map: a button for all its blocks."""

    stage: str
    x: float
    y: float
    ends: bool  # whether x is where the name ends


@dataclass(frozen=True, slots=True)
class LiveMap:
    """A map whose blocks a reader removes by clicking; ``data`` is what the page looks numbers up in."""

    shape: str  # how the blocks stand, in words
    width: float  # of the map, in cells
    aspect: float  # its width by its height
    cells: tuple[LiveCell, ...]
    labels: tuple[LiveLabel, ...]
    layers: tuple[tuple[str, tuple[LiveLayer, ...]], ...]  # by block, those inside it
    metrics: tuple[tuple[str, str, str], ...]  # name in ``data``, in words, what the teacher takes
    budgets: tuple[tuple[str, str], ...]  # name in ``data`` and in words
    data: Mapping[str, Any]


SectionItem = Text | Table | Chart | LiveMap


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with its content; ``key`` is the anchor in the page."""

    key: str
    title: str
    parts: tuple[SectionItem, ...]


def table_of(
    frame: pd.DataFrame,
    columns: Sequence[tuple[str, str, Callable[[object], str]]],
    caption: str,
    source: str = "",
    *,
    left: int = 1,
    folded: bool = False,
) -> Table:
    """The table of ``frame``; ``columns`` are (heading, name in the frame, how its cells are written)."""
    rows = tuple(
        tuple(written(row[name]) for _, name, written in columns) for row in frame.to_dict("records")
    )
    return Table(caption, tuple(heading for heading, _, _ in columns), rows, source, left, folded)


def not_run(missing: str, verb: str) -> Text:
    """The note in place of the result of a step that has not been run: what is ``missing`` and the command to run."""
    return Text((f"Not run yet: {missing}. `prune-lab {verb} --run DIR` does it.",), note=True)
