"""The blocks of a model drawn where its family places them: a U-Net as a U, with the mid stage at the bottom."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from prune_lab.report.figures import PlanStyle, Theme, impact_bar, impact_colors, impact_scale, new_figure
from prune_lab.report.format import MINUS, short_number
from prune_lab.report.tables import PlanRow

WIDTH, HEIGHT = 0.92, 0.66  # of a cell
_STEP, _INDENT = 1.0, 0.55


@dataclass(frozen=True, slots=True)
class Cell:
    """The position of a block on the map: ``x`` and ``y`` of its lower left corner, ``y`` upwards."""

    name: str
    x: float
    y: float


def map_cells(frame: pd.DataFrame) -> tuple[tuple[Cell, ...], tuple[tuple[str, float, float, str], ...]]:
    """The cells of the blocks in ``frame`` (see ``block_map_frame``) and the stage labels (text, x, y, alignment).

    Stages of one row stand in lanes; the left and right lanes are drawn in towards the middle by a step for each row,
    which makes the U.
    """
    stages = frame.groupby("stage", sort=False).agg(
        count=("name", "size"), lane=("lane", "first"), row=("row", "first")
    )
    left_width = max(stages.loc[stages["lane"] == "left", "count"], default=0)
    depth = max(stages.loc[stages["lane"] != "middle", "row"], default=0) + 1
    gap = depth * _INDENT + 0.6
    right_edge = left_width + 2 * gap  # where the innermost up stage would begin without its indent
    corner: dict[str, tuple[float, float]] = {}
    labels = []
    for stage, count, lane, row in stages.itertuples(name=None):
        x = {
            "left": left_width - count + row * _INDENT,
            "middle": (left_width + right_edge - (_STEP - WIDTH)) / 2 - count * _STEP / 2,
            "right": right_edge - row * _INDENT,
        }[lane]
        corner[stage] = (x, -row)
        right = lane == "right"
        edge = x + count - (_STEP - WIDTH) + 0.18 if right else x - 0.18
        labels.append((stage, edge, -row + HEIGHT / 2, "left" if right else "right"))
    cells = tuple(
        Cell(name, corner[stage][0] + position * _STEP, corner[stage][1])
        for name, stage, position in zip(frame["name"], frame["stage"], frame["position"], strict=True)
    )
    return cells, tuple(labels)


def map_bounds(frame: pd.DataFrame) -> tuple[float, float, float, float]:
    """Left, bottom, right and top edge of the map of ``frame``, with room for the labels."""
    cells, _ = map_cells(frame)
    x, y = [cell.x for cell in cells], [cell.y for cell in cells]
    return min(x) - 0.9, min(y) - 0.1, max(x) + WIDTH + 0.9, max(y) + HEIGHT + 0.1


def draw_block_map(frame: pd.DataFrame, theme: Theme) -> Figure:
    """Every block as a cell coloured by impact on a log scale; attention blocks have round corners."""
    norm = impact_scale(frame["impact"])
    figure = new_figure(theme, 11, 4.9)
    axes = figure.add_subplot()
    _draw_cells(axes, frame, theme, norm, (), outline=theme.text, numbers=True)
    if frame["impact"].notna().any():
        layout = {"ax": axes, "orientation": "horizontal", "fraction": 0.045, "aspect": 50, "pad": 0.02}
        impact_bar(figure, norm, theme, "impact of removing the block (log scale)", layout)
    return figure


def draw_plan_maps(
    frame: pd.DataFrame, plans: Sequence[PlanRow], styles: Mapping[str, PlanStyle], theme: Theme
) -> Figure:
    """One small map per plan: blocks that stay have the colour of their impact, removed blocks are outlines."""
    columns = min(3, len(plans))
    rows = -(-len(plans) // columns)
    norm = impact_scale(frame["impact"])
    figure = new_figure(theme, 11, 1.75 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(plans) :]:
        axes.set_visible(False)
    titles = {plan.id: f"{plan.label}  {MINUS}{len(plan.removed)} blocks" for plan in plans}
    # The longest title fits over a third of the figure.
    size = min(10.0, 350 / max(map(len, titles.values())))
    for axes, plan in zip(grid.flat, plans, strict=False):
        color = styles[plan.id].color
        _draw_cells(axes, frame, theme, norm, plan.removed, outline=color, numbers=False)
        axes.set_title(titles[plan.id], loc="left", fontsize=size, fontweight="bold", color=color)
    return figure


def _draw_cells(
    axes: Axes,
    frame: pd.DataFrame,
    theme: Theme,
    norm: LogNorm,
    removed: Collection[str],
    *,
    outline: str,
    numbers: bool,
) -> None:
    cells, labels = map_cells(frame)
    colors = impact_colors(theme)
    _draw_skips(axes, cells, frame, theme)
    for cell, row in zip(cells, frame.to_dict("records"), strict=True):
        scored = pd.notna(row["impact"])
        gone = cell.name in removed
        face = colors(norm(float(row["impact"]))) if scored and not gone else "none"
        rounding = 0.26 if row["kind"] == "attention" else 0.02
        axes.add_patch(
            FancyBboxPatch(
                (cell.x, cell.y),
                WIDTH,
                HEIGHT,
                boxstyle=f"round,pad=0,rounding_size={rounding}",
                facecolor=face,
                edgecolor=outline if gone else (theme.muted if not scored else "none"),
                linewidth=1.3 if gone else 0.8,
                linestyle=(0, (2, 1.2)) if gone else "-",
                hatch="////" if not scored and not gone else None,
            )
        )
        if not numbers:
            continue
        ink = ink_on(face, theme) if scored else theme.text
        local = str(row["name"]).removeprefix(f"{row['stage']}.")
        short = local + ("" if row["removable"] else "*")
        middle = cell.x + WIDTH / 2
        axes.text(
            middle, cell.y + 0.45, short, ha="center", va="center", fontsize=9, weight="bold", color=ink
        )
        number = short_number(row["impact"]) if scored else "not scored"
        size = 7.5 if scored else 5.5
        axes.text(middle, cell.y + 0.19, number, ha="center", va="center", fontsize=size, color=ink)
    for text, x, y, align in labels:
        size = 10 if numbers else 7
        axes.text(x, y, text, ha=align, va="center", fontsize=size, weight="bold", color=theme.muted)
    axes.set_aspect("equal")
    axes.axis("off")
    left, bottom, right, top = map_bounds(frame)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)


def _draw_skips(axes: Axes, cells: Sequence[Cell], frame: pd.DataFrame, theme: Theme) -> None:
    """A dotted line per row for the skip connections that cross from the left to the right lane."""
    lanes = list(zip(cells, frame["lane"], strict=True))
    for y in {cell.y for cell in cells}:
        ends = [cell.x + WIDTH for cell, lane in lanes if lane == "left" and cell.y == y]
        starts = [cell.x for cell, lane in lanes if lane == "right" and cell.y == y]
        if ends and starts:
            height = y + HEIGHT / 2
            axes.annotate(
                "",
                xy=(min(starts) - 0.1, height),
                xytext=(max(ends) + 0.1, height),
                arrowprops={"arrowstyle": "->", "color": theme.muted, "lw": 0.8, "ls": (0, (1, 2))},
            )


def ink_on(face: object, theme: Theme) -> str:
    """Black or white, whichever is easier to read on ``face``."""
    if face == "none":
        return theme.text
    channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(face)]  # type: ignore[arg-type]
    luminance = 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]
    return "#000000" if luminance > 0.18 else "#ffffff"
