"""The blocks of a model drawn where its family places them: a U-Net as a U, a transformer as a chain in rows.

Layers inside a block are drawn as slices of its cell, where a score or a plan names one of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from prune_lab.report.figures import PlanStyle, Theme, impact_bar, impact_colors, impact_scale, new_figure
from prune_lab.report.format import MINUS, plural, short_number
from prune_lab.report.tables import LAYER_COLUMNS, PlanRow

WIDTH, HEIGHT = 0.92, 0.66  # of a cell
_STEP, _INDENT = 1.0, 0.55
_LONGEST_ROW = 14  # cells of a chain side by side: as wide as a U of Stable Diffusion
_ROW, _BETWEEN_LISTS = (
    0.8,
    0.35,
)  # from a row of a chain to the next; more room between two lists of a chain than between rows of one
_INSET = 0.1  # of the slices from the sides of a cell, whose corners are round
_UNDER_NUMBERS, _INSTEAD_OF_NUMBERS = (
    (0.07, 0.14),
    (0.12, 0.42),
)  # lower edge and height of the slices in a cell
_ROUNDING = {"attention": 0.26, "transformer": 0.1}  # of the corners of a cell
_NOTHING = pd.DataFrame(columns=list(LAYER_COLUMNS))

Corners = dict[str, tuple[float, float]]  # by name of a block, the lower left corner of its cell
Label = tuple[str, float, float, str]  # text, x, y, alignment


@dataclass(frozen=True, slots=True)
class Cell:
    """The position of a block on the map: ``x`` and ``y`` of its lower left corner, ``y`` upwards."""

    name: str
    x: float
    y: float

    def slices(self, count: int) -> tuple[tuple[float, float], ...]:
        """Left edge and width of each of ``count`` slices of the cell, for the layers inside the block."""
        width = (WIDTH - 2 * _INSET) / count
        return tuple((self.x + _INSET + place * width, width) for place in range(count))


def is_chain(frame: pd.DataFrame) -> bool:
    """Whether the blocks of ``frame`` run one after the other, without sides that face each other."""
    return bool((frame["lane"] == "middle").all())


def _u_shape(frame: pd.DataFrame) -> tuple[Corners, list[Label]]:
    """Stages of one row stand in lanes; the left and right lanes are drawn in towards the middle by a step for each
    row, which makes the U.
    """
    stages = frame.groupby("stage", sort=False).agg(
        count=("name", "size"), lane=("lane", "first"), row=("row", "first")
    )
    left_width = max(stages.loc[stages["lane"] == "left", "count"], default=0)
    depth = max(stages.loc[stages["lane"] != "middle", "row"], default=0) + 1
    gap = depth * _INDENT + 0.6
    right_edge = left_width + 2 * gap  # where the innermost up stage would begin without its indent
    corner: Corners = {}
    labels: list[Label] = []
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
    cells = {
        name: (corner[stage][0] + position * _STEP, corner[stage][1])
        for name, stage, position in zip(frame["name"], frame["stage"], frame["position"], strict=True)
    }
    return cells, labels


def _chain_shape(frame: pd.DataFrame) -> tuple[Corners, list[Label]]:
    """Each list of blocks in rows of equal length, the same for all lists, read as a text is; lists that take turns
    have their rows in turns.
    """
    lists = {stage: list(names) for stage, names in frame.groupby("stage", sort=False)["name"]}
    longest = max(map(len, lists.values()))
    length = -(-longest // -(-longest // _LONGEST_ROW))
    rows = [
        (start // length, stage, names[start : start + length])
        for stage, names in lists.items()
        for start in range(0, len(names), length)
    ]
    changes = int((frame["stage"] != frame["stage"].shift()).sum())
    if taking_turns := changes > len(lists):
        rows.sort(key=lambda row: row[0])
    cells: Corners = {}
    labels: list[Label] = []
    y = 0.0
    for (number, stage, names), (earlier, above, _) in zip(rows, [rows[0], *rows], strict=False):
        if cells:
            y -= _ROW + _BETWEEN_LISTS * (number != earlier if taking_turns else stage != above)
        cells |= {name: (place * _STEP, y) for place, name in enumerate(names)}
        if number == 0:
            labels.append((str(stage), -0.18, y + HEIGHT / 2, "right"))
    return cells, labels


def map_cells(frame: pd.DataFrame) -> tuple[tuple[Cell, ...], tuple[Label, ...]]:
    """The cells of the blocks in ``frame`` (see ``block_map_frame``) and the stage labels (text, x, y, alignment)."""
    corners, labels = _chain_shape(frame) if is_chain(frame) else _u_shape(frame)
    return tuple(Cell(name, *corners[name]) for name in frame["name"]), tuple(labels)


def map_bounds(frame: pd.DataFrame) -> tuple[float, float, float, float]:
    """Left, bottom, right and top edge of the map of ``frame``, with room for the labels."""
    cells, _ = map_cells(frame)
    x, y = [cell.x for cell in cells], [cell.y for cell in cells]
    beside = 0.1 if is_chain(frame) else 0.9  # a chain has its labels on the left alone
    return min(x) - 0.9, min(y) - 0.1, max(x) + WIDTH + beside, max(y) + HEIGHT + 0.1


def _height(frame: pd.DataFrame, width: float) -> float:
    """Inches that the map of ``frame`` is high where there are ``width`` inches for it; no cell is as wide as one."""
    left, bottom, right, top = map_bounds(frame)
    return min(width / (right - left), 0.75) * (top - bottom)


def shape_words(frame: pd.DataFrame) -> str:
    """How the cells of ``frame`` stand: the end of "the blocks of the model"."""
    return "in order of execution, row by row" if is_chain(frame) else "in the shape of a U"


def map_scale(frame: pd.DataFrame, layers: pd.DataFrame) -> LogNorm:
    """The colour scale of all blocks and layers: a value has one colour in all figures."""
    return impact_scale(pd.concat([frame["impact"], layers["impact"].astype(float)]))


def draw_block_map(frame: pd.DataFrame, theme: Theme, layers: pd.DataFrame = _NOTHING) -> Figure:
    """Every block as a cell coloured by impact on a log scale; attention blocks have round corners.

    ``layers`` (see ``layer_map_frame``) are slices of their blocks' cells.
    """
    norm = map_scale(frame, layers)
    figure = new_figure(theme, 11, 1.8 + _height(frame, 11))
    axes = figure.add_subplot()
    _draw_cells(axes, frame, layers, theme, norm, (), outline=theme.text, numbers=True)
    if frame["impact"].notna().any():
        layout = {"ax": axes, "orientation": "horizontal", "fraction": 0.045, "aspect": 50, "pad": 0.02}
        impact_bar(figure, norm, theme, "impact of removing the block (log scale)", layout)
    return figure


def draw_plan_maps(
    frame: pd.DataFrame,
    plans: Sequence[PlanRow],
    styles: Mapping[str, PlanStyle],
    theme: Theme,
    layers: pd.DataFrame = _NOTHING,
    *,
    named: bool = False,
) -> Figure:
    """One small map per plan: blocks that stay have the colour of their impact, removed blocks are outlines, and a bar
    shows what stays of the inside of a narrower one; with ``named`` each says its name. A line says what marks mean.

    Of ``layers`` those are shown whose block loses one by the plan.
    """
    columns = min(3, len(plans))
    rows = -(-len(plans) // columns)
    norm = map_scale(frame, layers)
    legend = _marks(frame, plans)
    figure = new_figure(theme, 11, (0.77 + _height(frame, 10.5 / columns)) * rows + (0.3 if legend else 0))
    if legend:
        figure.supxlabel(legend, fontsize=8, color=theme.muted)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(plans) :]:
        axes.set_visible(False)
    blocks = set(frame["name"])
    titles = {
        plan.id: f"{plan.label}  {_counted(len(blocks & {*plan.removed}), len({*plan.removed} - blocks), plan)}"
        for plan in plans
    }
    # The longest title fits over a third of the figure.
    size = min(10.0, 350 / max(map(len, titles.values())))
    for axes, plan in zip(grid.flat, plans, strict=False):
        color = styles[plan.id].color
        parted = layers[layers["name"].isin(plan.removed)]["inside"]
        opened = layers[layers["inside"].isin(parted)]
        _draw_cells(axes, frame, opened, theme, norm, plan.removed, outline=color, numbers=False)
        _draw_bars(axes, frame, plan, theme, color)
        if named:
            _write_names(axes, frame, theme)
        axes.set_title(titles[plan.id], loc="left", fontsize=size, fontweight="bold", color=color)
    return figure


def _counted(blocks: int, layers: int, plan: PlanRow) -> str:
    """What a plan does: −3 blocks; −3 blocks and 10 layers; 32 widths narrower; −3 blocks, 32 widths narrower."""
    found = [plural(number, noun) for number, noun in ((blocks, "block"), (layers, "layer")) if number]
    removed = [f"{MINUS}{' and '.join(found)}"] if found else []
    count = len(plan.stays) or len(plan.widths)
    narrower = [f"{plural(count, 'width')} narrower"] if count else []
    return ", ".join([*removed, *narrower]) or f"{MINUS}0 blocks"


def _marks(frame: pd.DataFrame, plans: Sequence[PlanRow]) -> str:
    """What dashes, bars and hatching mean on the maps of ``plans``, as far as they are there; empty where each block
    that stays has its colour.
    """
    if not any(plan.stays for plan in plans) and not frame["impact"].isna().all():
        return ""
    marks = {
        "dashed: removed": any(plan.removed for plan in plans),
        "bar: what stays of the inside of a narrower block": any(plan.stays for plan in plans),
        "hatched: not scored": bool(frame["impact"].isna().any()),
    }
    return "; ".join(words for words, there in marks.items() if there)


def _draw_bars(axes: Axes, frame: pd.DataFrame, plan: PlanRow, theme: Theme, color: str) -> None:
    """In each block that is narrower a bar near its upper edge, filled as far as its sites keep units in the mean."""
    for cell in map_cells(frame)[0]:
        # A site of a layer inside a block is drawn with the block: its name goes on with a dot.
        shares = [share for site, share in plan.stays if site.startswith(f"{cell.name}.")]
        if shares and cell.name not in plan.removed:
            left, width, height = cell.x + _INSET, WIDTH - 2 * _INSET, 0.08
            for part, face in ((1.0, theme.surface), (sum(shares) / len(shares), color)):
                place = (left, cell.y + HEIGHT - 0.14)
                axes.add_patch(
                    Rectangle(place, width * part, height, facecolor=face, edgecolor=color, linewidth=0.6)
                )


def _draw_cells(
    axes: Axes,
    frame: pd.DataFrame,
    layers: pd.DataFrame,
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
    inside = {str(name): rows for name, rows in layers.groupby("inside", sort=False)}
    for cell, row in zip(cells, frame.to_dict("records"), strict=True):
        scored = pd.notna(row["impact"])
        gone = cell.name in removed
        face = colors(norm(float(row["impact"]))) if scored and not gone else "none"
        rounding = _ROUNDING.get(str(row["kind"]), 0.02)
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
        opened = cell.name in inside and not gone
        if opened:
            strip = _UNDER_NUMBERS if numbers else _INSTEAD_OF_NUMBERS
            _draw_layers(axes, cell, inside[cell.name], strip, theme, norm, removed, outline)
        if not numbers:
            continue
        ink = ink_on(face, theme) if scored else theme.text
        local = str(row["name"]).removeprefix(f"{row['stage']}.")
        short = local + ("" if row["removable"] else "*")
        middle = cell.x + WIDTH / 2
        axes.text(
            middle,
            cell.y + (0.5 if opened else 0.45),
            short,
            ha="center",
            va="center",
            fontsize=9,
            weight="bold",
            color=ink,
        )
        number = short_number(row["impact"]) if scored else "not scored"
        size = 7.5 if scored else 5.5
        axes.text(
            middle,
            cell.y + (0.3 if opened else 0.19),
            number,
            ha="center",
            va="center",
            fontsize=size,
            color=ink,
        )
    for text, x, y, align in labels:
        size = 10 if numbers else 7
        axes.text(x, y, text, ha=align, va="center", fontsize=size, weight="bold", color=theme.muted)
    axes.set_aspect("equal")
    axes.axis("off")
    left, bottom, right, top = map_bounds(frame)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)


def _write_names(axes: Axes, frame: pd.DataFrame, theme: Theme) -> None:
    """The name of each block without its stage, in the middle of its cell."""
    for cell, stage in zip(map_cells(frame)[0], frame["stage"], strict=True):
        short = cell.name.removeprefix(f"{stage}.")
        paper = {"boxstyle": "round,pad=0.15", "facecolor": theme.surface, "edgecolor": "none"}
        place = (cell.x + WIDTH / 2, cell.y + HEIGHT / 2)
        axes.text(*place, short, ha="center", va="center", fontsize=8, color=theme.text, bbox=paper)


def _draw_layers(
    axes: Axes,
    cell: Cell,
    layers: pd.DataFrame,
    strip: tuple[float, float],
    theme: Theme,
    norm: LogNorm,
    removed: Collection[str],
    outline: str,
) -> None:
    """A slice for each layer inside a block: coloured as blocks are, hollow where it is removed, grey if not scored."""
    bottom, height = strip
    for (left, width), row in zip(cell.slices(len(layers)), layers.to_dict("records"), strict=True):
        gone = row["name"] in removed
        scored = pd.notna(row["impact"])
        face = impact_colors(theme)(norm(float(row["impact"]))) if scored else theme.grid
        axes.add_patch(
            Rectangle(
                (left, cell.y + bottom),
                width,
                height,
                facecolor=theme.surface if gone else face,
                edgecolor=outline if gone else theme.surface,
                linewidth=0.7,
            )
        )


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
