"""Pictures of all models side by side: one row per prompt and seed, one column per model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from textwrap import wrap

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from prune_lab.report.document import Chart, SectionItem, Text, not_run
from prune_lab.report.figures import PlanStyle, Theme, new_figure, plan_styles
from prune_lab.report.format import enumeration
from prune_lab.report.tables import PlanRow, RunTables
from prune_lab.runs import read_picture

_LABEL, _LABEL_INCHES = 2.6, 1.9  # width of the prompts in pictures, and at most
_HEAD = 0.95  # height of the column titles in pictures, and in inches at most
_WIDTH, _SIDE = 11.0, 1.6  # of the figure and of a picture, in inches, at most
_LETTER = 0.075  # inches that a letter of a title takes, at most
_CANDIDATES, _ROWS = 18, 16  # as many are shown: a page has an end
_SPACE = 0.06  # between two columns of one candidate; 0.3 between two candidates


@dataclass(frozen=True, slots=True)
class Column:
    """The pictures of one model in one state (pruned or distilled), in the order of prompts and seeds."""

    plan_id: str  # empty for the teacher
    title: str
    state: str
    pictures: tuple[NDArray[np.uint8], ...]


def read_pictures(folder: Path, files: Sequence[str]) -> tuple[NDArray[np.uint8], ...]:
    """The pictures called ``files`` in ``folder``, each (H, W, 3). Raises DataError when one is missing or damaged."""
    return tuple(read_picture(folder / name) for name in files)


def _label(axes: Axes, text: str, middle: float, scale: float, theme: Theme) -> None:
    """Write ``text`` on the left of the row of pictures whose middle is at ``middle``."""
    axes.text(
        -0.1 / scale,
        middle,
        "\n".join(wrap(text, 25, max_lines=4, placeholder=" ...")),
        fontsize=_size(scale),
        color=theme.text,
        ha="right",
        va="center",
        linespacing=1.25,
    )


def _size(scale: float) -> float:
    """Of letters, in points, beside pictures of ``scale`` inches."""
    return min(8.0, 15.0 * scale)


def _shown_above(above: Column | None, room: int) -> tuple[Column | None, str]:
    """The pictures of ``above`` that fit over ``room`` columns, two over each at most, and what they are called."""
    if above is None:
        return None, ""
    count = len(above.pictures)
    shown = replace(above, pictures=above.pictures[: 2 * room])
    cut = f" ({len(shown.pictures)} of {count})" if len(shown.pictures) < count else ""
    return shown, f"{above.title}{cut}"


def draw_comparison(
    columns: Sequence[Column],
    labels: Sequence[str],
    styles: Mapping[str, PlanStyle],
    theme: Theme,
    above: Column | None = None,
) -> Figure:
    """All ``columns`` side by side, with the prompt of each row on the left and coloured plan names on top.

    Over them stands a row of its own with the pictures ``above``, which belong to none of the columns.
    """
    steps = [0.0] + [1 + (0.3 if a.plan_id != b.plan_id else _SPACE) for a, b in pairwise(columns)]
    lefts = np.cumsum(steps)
    right = float(lefts[-1]) + 1
    scale = min(_WIDTH / (_LABEL + right), _SIDE)  # inches of a picture; texts are as large whatever it is
    states = any(column.state for column in columns)
    label = min(_LABEL, _LABEL_INCHES / scale)
    head = min(_HEAD, _HEAD / scale) * (1 if states else 0.6)
    height = len(labels) * (1 + _SPACE) + head
    over, called = _shown_above(above, len(columns))
    side = min(1.0, right / len(over.pictures) - _SPACE) if over is not None else 0.0
    strip = side + _SPACE if over is not None else 0.0
    figure = new_figure(theme, (label + right) * scale, (height + strip) * scale)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.set_xlim(-label, right)
    axes.set_ylim(height - head, -head - strip)
    size = _size(scale)
    seen: set[str] = set()
    for left, column in zip(lefts, columns, strict=True):
        color = styles[column.plan_id].color if column.plan_id else theme.text
        if column.title not in seen:
            room = scale * sum(other.title == column.title for other in columns)
            title = "\n".join(wrap(column.title, max(8, int(room / _LETTER))))
            axes.text(
                left,
                -(0.4 if states else 0.1) * head,
                title,
                fontsize=size,
                weight="bold",
                color=color,
                va="bottom",
                linespacing=1.15,
            )
            seen.add(column.title)
        axes.text(left, -0.1 * head, column.state, fontsize=size, color=theme.muted, va="bottom")
        for row, picture in enumerate(column.pictures):
            top = row * (1 + _SPACE)
            axes.imshow(picture, extent=(left, left + 1, top + 1, top), interpolation="none", aspect="auto")
    for row, prompt in enumerate(labels):
        _label(axes, prompt, row * (1 + _SPACE) + 0.5, scale, theme)
    if over is not None:
        top = -head - strip
        for place, picture in enumerate(over.pictures):
            left = place * (side + _SPACE)
            axes.imshow(
                picture, extent=(left, left + side, top + side, top), interpolation="none", aspect="auto"
            )
        _label(axes, called, top + side / 2, scale, theme)
    return figure


def picture_labels(prompts: pd.DataFrame) -> list[str]:
    """What each row of a grid is called: the prompt, and the seed where there are several."""
    several = prompts["seed"].nunique() > 1
    return [f"{row.prompt} (seed {row.seed})" if several else str(row.prompt) for row in prompts.itertuples()]


def _chosen(tables: RunTables) -> tuple[tuple[PlanRow, Mapping[str, Path]], ...]:
    """The candidates whose pictures are shown: all of a few, else controls and the first of the ranking."""
    pictures, ranking = tables.pictures, tables.ranking
    if len(pictures) <= _CANDIDATES or ranking is None:
        return pictures[:_CANDIDATES]
    ranked = ranking.sort_values("rank", kind="stable", na_position="last")["plan_id"].tolist()
    controls = [plan.id for plan, _ in pictures if plan.origin == "control"][: _CANDIDATES // 2]
    drawn = {plan.id for plan, _ in pictures}
    best = [one for one in ranked if one in drawn and one not in controls]
    kept = {*controls, *best[: _CANDIDATES - len(controls)]}
    return tuple(pair for pair in pictures if pair[0].id in kept)


def _left_out(tables: RunTables, chosen: Sequence[object]) -> str:
    """What is not shown; empty where everything is."""
    assert tables.prompts is not None
    words = []
    if len(chosen) < len(tables.pictures):
        words.append("the pictures of the controls and of the best candidates are shown")
    if len(tables.prompts) > _ROWS:
        words.append(f"{_ROWS} of {len(tables.prompts)} pictures of each are shown")
    return f"{enumeration(words).capitalize()}; all lie in the folder of the run." if words else ""


def _small(folder: Path, files: Sequence[str], side: int) -> tuple[NDArray[np.uint8], ...]:
    """The pictures called ``files`` in ``folder``, none with a side beyond ``side`` pixels."""
    pictures = []
    for picture in read_pictures(folder, files):
        image = Image.fromarray(picture)
        image.thumbnail((side, side), Image.Resampling.LANCZOS)  # leaves smaller ones as they are
        pictures.append(np.asarray(image))
    return tuple(pictures)


def picture_parts(tables: RunTables) -> tuple[SectionItem, ...]:
    """The section of pictures: sheets of up to six candidates, a row for each prompt and seed.

    Of many candidates, prompts and seeds some are shown, and a note says so.
    """
    if tables.teacher_pictures is None or tables.prompts is None:
        return (not_run("no pictures have been drawn", "rank"),)
    steps, guidance = tables.setting("evaluate", "steps"), tables.setting("evaluate", "guidance")
    how = f"; {steps} sampler steps, guidance {guidance}" if steps and guidance is not None else ""
    whose = "" if tables.setting("evaluate", "prompts") else " The prompts are captions of held-out pictures."
    intro = Text((f"The same prompts and seeds for all models{how}.{whose}",))
    styles, files = plan_styles(tables.plans), tables.prompts["file"].tolist()[:_ROWS]
    labels = picture_labels(tables.prompts)[:_ROWS]
    chosen = _chosen(tables)
    parts: list[SectionItem] = [intro]
    if left_out := _left_out(tables, chosen):
        parts.append(Text((left_out,), note=True))
    # Six candidates in two states are the most columns that fit on a page with pictures that are not too small.
    sheets = max(1, -(-len(chosen) // 6))
    per_sheet = max(1, -(-len(chosen) // sheets))
    for sheet in range(sheets):
        group = chosen[sheet * per_sheet : (sheet + 1) * per_sheet]
        # No picture is larger than it is shown, on a screen of twice the usual number of dots.
        side = 2 * 1100 // (3 + sum(len(folders) for _, folders in group))
        columns = [Column("", "teacher", "", _small(tables.teacher_pictures, files, side))]
        for plan, folders in group:
            for state, folder in folders.items():
                columns.append(Column(plan.id, plan.label, state, _small(folder, files, side)))
        parts.append(
            Chart(
                f"pictures-{sheet + 1}",
                "Pictures drawn by the teacher and by every candidate as pruned and after distillation.",
                "One row per prompt and seed. Per candidate: as pruned, then after distillation.",
                partial(draw_comparison, columns, labels, styles),
            )
        )
    return tuple(parts)
