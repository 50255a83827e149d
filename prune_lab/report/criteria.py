"""Criteria compared: their part of the report, and a page of their own with figures: agreement, impacts on parts,
stability and additivity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from prune_lab.orders import criteria_in, orders_agreement, side_by_side
from prune_lab.report.document import SectionItem, Text, table_of
from prune_lab.report.figures import (
    LIGHT,
    Theme,
    freeze_layout,
    impact_bar,
    impact_colors,
    impact_scale,
    log_axis,
    new_figure,
    save_png,
    style_axes,
)
from prune_lab.report.format import UNKNOWN, correlation, count, is_missing, short_number, text
from prune_lab.runtime import write_text
from prune_lab.schemas import RANK

_PART_TITLES = {"timesteps": "By timestep", "prompts": "By kind of prompt"}
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


# The part of the report ------------------------------------------------------------------------------------------

_ORDERS = (
    ("Criterion", "criterion", text),
    ("and", "other", text),
    ("Spearman", "spearman", correlation),
    ("Kendall (tau-b)", "kendall", correlation),
    ("over", "over", text),
    ("Number", "count", count),
)


def criteria_parts(scores: pd.DataFrame | None) -> tuple[SectionItem, ...]:
    """Impacts and ranks by every criterion in ``scores``, and how the orders agree; nothing of one criterion alone."""
    if scores is None or len(names := criteria_in(scores)) < 2:
        return ()
    words = (
        f"{len(names)} criteria were measured; `{names[0]}` leads: maps and searches go by it. Criteria have units of "
        "their own, so their ranks are compared and not their numbers. Rank 1 has the least impact among the groups of "
        "its kind; a correlation of 1 is the same order, 0 an unrelated one."
    )
    beside = side_by_side(scores)
    for name in names:
        beside[name] = beside[name].map(short_number) + " (" + beside[f"{name}{RANK}"].map(count) + ")"
    columns = (("Group", "group", text), ("Kind", "kind", text), *((name, name, text) for name in names))
    caption = "Impact by every criterion, and its rank"
    return (
        Text((words,)),
        table_of(orders_agreement(scores), _ORDERS, "How every two criteria agree", left=2),
        table_of(beside, columns, caption, "criteria.csv", left=2, folded=True),
    )


# Figures ---------------------------------------------------------------------------------------------------------


def draw_parts(parts: pd.DataFrame, theme: Theme) -> Figure:
    """Blocks in order of execution against timesteps and kinds of prompt, coloured by impact on one log scale."""
    blocks = parts[parts["kind"] == "block"]
    blocks = blocks[blocks["part"].isin(_PART_TITLES)]
    kinds = [part for part in _PART_TITLES if part in set(blocks["part"])]
    widths = [max(1, blocks.loc[blocks["part"] == part, "of"].nunique()) for part in kinds]
    names = list(dict.fromkeys(blocks["group"]))
    figure = new_figure(theme, 11, 1.6 + 0.19 * len(names))
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True, width_ratios=widths)[0]
    norm = impact_scale(blocks["impact"])
    for axes, part in zip(panels, kinds, strict=True):
        table = blocks[blocks["part"] == part].pivot_table(
            index="group", columns="of", values="impact", sort=False
        )
        style_axes(axes, theme, title=_PART_TITLES[part], grid="")
        # An impact of zero or less has no place on a log scale: its cell stays blank.
        positive = table.loc[names].where(table > 0)
        axes.imshow(positive, norm=norm, cmap=impact_colors(theme), aspect="auto", interpolation="nearest")
        axes.set_xticks(range(table.shape[1]), list(table.columns), rotation=45, ha="right", fontsize=7.5)
        axes.spines["bottom"].set_visible(False)
    panels[0].set_yticks(range(len(names)), names, fontsize=7.5)
    layout = {"ax": list(panels), "fraction": 0.03, "aspect": 40, "pad": 0.01}
    impact_bar(figure, norm, theme, "impact (log scale)", layout)
    return figure


def draw_agreement(correlations: pd.DataFrame, theme: Theme) -> Figure:
    """Spearman between all criteria over blocks, and between each criterion and measured outcomes of plans."""
    blocks = correlations[correlations["over"] == "blocks"]
    names = list(dict.fromkeys(blocks["criterion"]))
    measured = correlations[correlations["other"] == "measured"]
    overs = list(dict.fromkeys(measured["over"]))
    figure = new_figure(theme, 11, 1.4 + 0.34 * len(names))
    widths = [2.2, *[1] * len(overs)]
    left, *others = figure.subplots(1, 1 + len(overs), squeeze=False, width_ratios=widths)[0]
    table = blocks.pivot_table(index="criterion", columns="other", values="spearman", sort=False)
    table = table.loc[names, names]
    style_axes(left, theme, title="Spearman over blocks", grid="")
    left.imshow(table, vmin=-1, vmax=1, cmap="RdBu", aspect="auto")
    left.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    left.set_yticks(range(len(names)), names, fontsize=8)
    for row, values in enumerate(table.to_numpy()):
        for column, value in enumerate(values):
            ink = "#ffffff" if abs(value) > 0.6 else "#1c2127"
            left.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6.5, color=ink)
    for axes, over in zip(others, overs, strict=True):
        rows = measured[measured["over"] == over].set_index("criterion").loc[names]
        style_axes(axes, theme, title=f"with {over}", grid="x")
        positions = np.arange(len(names))
        axes.hlines(positions, rows["spearman_low"], rows["spearman_high"], color=theme.muted, lw=1.5)
        axes.scatter(rows["spearman"], positions, color=_COLORS[0], s=28, zorder=3)
        axes.axvline(0, color=theme.muted, lw=0.8)
        axes.set_yticks(positions, [])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(-1.05, 1.05)
        axes.set_xlabel(f"Spearman, {int(rows['count'].iloc[0])} plans")
    return figure


def draw_stability(table: pd.DataFrame, theme: Theme) -> Figure:
    """Share of the least important groups that are the same with fewer samples, by the number of samples."""
    rows = table[table["part"] == "samples"]
    figure = new_figure(theme, 6, 3.2)
    axes = figure.subplots()
    style_axes(axes, theme, title="Share of the least important blocks that is the same", grid="both")
    for color, (top, line) in zip(_COLORS, rows.groupby("top"), strict=False):
        axes.plot(line["samples"], line["overlap"], color=color, marker="o", ms=4, label=f"the {top} least")
        interval = line["overlap_low"], line["overlap_high"]
        axes.fill_between(line["samples"], *interval, color=color, alpha=0.12, lw=0)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("samples")
    sizes = sorted(set(rows["samples"]))
    axes.set_xticks(sizes, list(map(str, sizes)))
    axes.legend(frameon=False, fontsize=8.5, labelcolor=theme.text)
    return figure


def draw_additivity(sums: pd.DataFrame, theme: Theme) -> Figure:
    """The measured impact of each plan against the sum of its blocks' impacts, on log axes."""
    figure = new_figure(theme, 5, 3.6)
    axes = figure.subplots()
    style_axes(axes, theme, title="Additivity of impacts", grid="both")
    known = sums[(sums["added"] > 0) & (sums["measured"] > 0)]
    values = known[["added", "measured"]].to_numpy(dtype=float)
    low, high = values.min(), values.max()
    axes.plot([low, high], [low, high], color=theme.muted, lw=1, ls="--")
    axes.scatter(values[:, 0], values[:, 1], c=known["count"], cmap=impact_colors(theme), s=24, zorder=3)
    log_axis(axes, "x", low, high)
    log_axis(axes, "y", low, high)
    axes.set_xlabel("sum of the single blocks' impacts")
    axes.set_ylabel("measured impact of the plan")
    return figure


# The page --------------------------------------------------------------------------------------------------------


def _cells(row: Mapping[object, object], outcome: bool) -> list[str]:
    cells = [f"`{row['criterion']}`", count(row["samples"]), count(row["forwards"])]
    for name in ("leader", "impact", *(["outcome"] if outcome else [])):
        value, low, high = (row[f"{name}_spearman{end}"] for end in ("", "_low", "_high"))
        interval = "" if is_missing(low) else f" [{low:.2f}, {high:.2f}]"
        cells.append(UNKNOWN if is_missing(value) else f"{value:.2f}{interval}")
    return cells


def write_agreement(
    folder: Path, *, model: str, lines: Sequence[str], frames: Mapping[str, pd.DataFrame]
) -> Path:
    """The path of the page, written to ``folder``: the sentences ``lines``, a row per criterion, and figures.

    ``frames`` holds the tables summary, agreement, parts, additivity and stability.
    """
    summary, parts = frames["summary"], frames["parts"]
    leader = str(summary["criterion"].iloc[0])
    figures = {
        "agreement.png": draw_agreement(frames["agreement"], LIGHT),
        "additivity.png": draw_additivity(frames["additivity"], LIGHT),
    }
    if (frames["stability"]["part"] == "samples").any():
        figures["stability.png"] = draw_stability(frames["stability"], LIGHT)
    leading = parts[parts["criterion"] == leader]
    if len(leading):
        figures["parts.png"] = draw_parts(leading, LIGHT)
    for name, figure in figures.items():
        save_png(figure, folder / name, freeze_layout(figure))
    outcome = bool(summary["outcome_spearman"].notna().any())
    header = ["Criterion", "Samples", "Forward-equivalents", f"with {leader}", "with impact of plans"]
    header += ["with loss after distillation"] if outcome else []
    table = [
        f"| {' | '.join(header)} |",
        "| --- | ---: | ---: |" + " ---: |" * (len(header) - 3),
        *(f"| {' | '.join(_cells(row, outcome))} |" for row in summary.to_dict("records")),
    ]
    page = [
        f"# Criteria compared, {model}",
        "",
        *(f"- {line}" for line in lines),
        "",
        "Spearman's rank correlation with its 95 % interval. Intervals over blocks resample the samples, intervals "
        "over plans resample the plans. A criterion without samples has no interval over blocks. Forward-equivalents "
        "are those of all blocks together.",
        "",
        *table,
        "",
        *(f"![{name.removesuffix('.png').capitalize()}]({name})\n" for name in figures),
    ]
    write_text(folder / "README.md", "\n".join(page))
    return folder / "README.md"
