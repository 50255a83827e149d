"""Figures about the scores themselves: where on the schedule they come from, and how far they can be trusted."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from prune_lab.report.figures import Theme, impact_colors, impact_scale, log_ticks, new_figure, style_axes

_PART_TITLES = {"timesteps": "By timestep", "prompts": "By kind of prompt"}
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


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
        _draw_heat(axes, table.loc[names], theme, norm, _PART_TITLES[part])
    panels[0].set_yticks(range(len(names)), names, fontsize=7.5)
    bar = figure.colorbar(
        ScalarMappable(norm, impact_colors(theme)), ax=list(panels), fraction=0.03, aspect=40, pad=0.01
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=theme.muted, labelsize=8, length=0, which="both")
    bar.set_label("impact (log scale)", color=theme.text, fontsize=9)
    return figure


def _draw_heat(axes: Axes, table: pd.DataFrame, theme: Theme, norm: LogNorm, title: str) -> None:
    style_axes(axes, theme, title=title, grid="")
    # A change that is no damage has no place on a log scale: it is left blank.
    values = np.where(table.to_numpy() > 0, table.to_numpy(), np.nan)
    axes.imshow(values, norm=norm, cmap=impact_colors(theme), aspect="auto", interpolation="nearest")
    axes.set_xticks(range(table.shape[1]), list(table.columns), rotation=45, ha="right", fontsize=7.5)
    axes.spines["bottom"].set_visible(False)


def draw_agreement(found: pd.DataFrame, theme: Theme) -> Figure:
    """Spearman between all criteria over blocks, and of each criterion with what was measured of plans."""
    blocks = found[found["over"] == "blocks"]
    names = list(dict.fromkeys(blocks["criterion"]))
    measured = found[found["other"] == "measured"]
    overs = list(dict.fromkeys(measured["over"]))
    figure = new_figure(theme, 11, 1.4 + 0.34 * len(names))
    left, *others = figure.subplots(1, 1 + len(overs), squeeze=False, width_ratios=[2.2, *[1] * len(overs)])[
        0
    ]
    table = blocks.pivot_table(index="criterion", columns="other", values="spearman", sort=False).loc[
        names, names
    ]
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
        place = np.arange(len(names))
        axes.hlines(place, rows["spearman_low"], rows["spearman_high"], color=theme.muted, lw=1.5)
        axes.scatter(rows["spearman"], place, color=_COLORS[0], s=28, zorder=3)
        axes.axvline(0, color=theme.muted, lw=0.8)
        axes.set_yticks(place, [])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(-1.05, 1.05)
        axes.set_xlabel(f"Spearman, {int(rows['count'].iloc[0])} plans")
    return figure


def draw_stability(table: pd.DataFrame, theme: Theme) -> Figure:
    """Share of the least important groups that is found again, by the number of samples."""
    rows = table[table["part"] == "samples"]
    figure = new_figure(theme, 6, 3.2)
    axes = figure.subplots()
    style_axes(axes, theme, title="Least important blocks found again", grid="both")
    for color, (top, line) in zip(_COLORS, rows.groupby("top"), strict=False):
        axes.plot(line["samples"], line["overlap"], color=color, marker="o", ms=4, label=f"the {top} least")
        axes.fill_between(
            line["samples"], line["overlap_low"], line["overlap_high"], color=color, alpha=0.12, lw=0
        )
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("samples")
    axes.set_xticks(sorted(set(rows["samples"])), [str(size) for size in sorted(set(rows["samples"]))])
    axes.legend(frameon=False, fontsize=8.5, labelcolor=theme.text)
    return figure


def draw_additivity(sums: pd.DataFrame, theme: Theme) -> Figure:
    """The measured impact of each plan against the sum of its blocks' impacts, on log axes."""
    figure = new_figure(theme, 5, 3.6)
    axes = figure.subplots()
    style_axes(axes, theme, title="Do scores add up?", grid="both")
    known = sums[(sums["added"] > 0) & (sums["measured"] > 0)]
    low, high = (
        float(known[["added", "measured"]].min().min()),
        float(known[["added", "measured"]].max().max()),
    )
    axes.plot([low, high], [low, high], color=theme.muted, lw=1, ls="--")
    axes.scatter(
        known["added"], known["measured"], c=known["count"], cmap=impact_colors(theme), s=24, zorder=3
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    log_ticks(axes.xaxis, low, high)
    log_ticks(axes.yaxis, low, high)
    axes.set_xlabel("sum of the single blocks' impacts")
    axes.set_ylabel("measured impact of the plan")
    return figure
