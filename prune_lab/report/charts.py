"""The charts of the report: importance, costs, quality against cost, predicted against measured loss, loss curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from prune_lab.report.figures import (
    PlanStyle,
    Theme,
    impact_colors,
    impact_scale,
    log_axis,
    log_scale_if_wide,
    new_figure,
    style_axes,
)
from prune_lab.report.tables import PlanRow, importance_frame, measured, not_dropped, teacher_row

_KIND_TITLES = {
    "block": "Single blocks",
    "pair": "Residual-attention pairs",
    "triplet": "Triplets",
    "stage": "Whole stages",
    "inner": "Inner stages together",
    "plan": "Plans",
}
_PART_TITLES = {
    "validation": "Held-out denoising loss, averaged weights",
    "task": "Task loss in training",
    "output": "Output loss in training",
    "feature": "Feature loss in training",
}
_LEGEND_COLUMNS = 4
_PALE = 0.35  # opacity of the mark of a dropped candidate


# Importance ------------------------------------------------------------------------------------------------------


def draw_importance(importance: pd.DataFrame, theme: Theme) -> Figure:
    """Impact of every scored group with its interval on a log axis, largest on top; one panel per kind of group."""
    frames = {kind: importance_frame(importance, kind) for kind in _KIND_TITLES}
    frames = {kind: frame for kind, frame in frames.items() if len(frame)}
    stacked = {kind: len(frame) + 3 for kind, frame in frames.items() if kind != "block"}
    rows = max(len(frames.get("block", ())) + 3, sum(stacked.values()))
    figure = new_figure(theme, 11, 0.9 + 0.2 * rows)
    columns = figure.add_gridspec(1, 2 if "block" in frames and stacked else 1)
    places = {"block": columns[0]} if "block" in frames else {}
    if stacked:
        stack = columns[-1].subgridspec(len(stacked), 1, height_ratios=list(stacked.values()))
        places |= {kind: stack[index] for index, kind in enumerate(stacked)}
    limits = _impact_limits(importance)
    # The colour scale of single blocks, as in the block map, so that a value has one colour in all figures.
    scale = impact_scale(frames.get("block", importance)["impact"])
    for kind, place in places.items():
        axes = figure.add_subplot(place)
        _draw_impacts(axes, frames[kind], theme, limits, scale, title=_KIND_TITLES[kind])
    return figure


def _impact_limits(importance: pd.DataFrame) -> tuple[float, float]:
    scale = impact_scale(importance["impact"])
    assert scale.vmin is not None
    assert scale.vmax is not None
    return scale.vmin / 2, max(scale.vmax, float(importance["high"].max()) * 1.5)


def _draw_impacts(
    axes: Axes, frame: pd.DataFrame, theme: Theme, limits: tuple[float, float], scale: LogNorm, *, title: str
) -> None:
    """A point per group with its interval; the line from the edge only leads the eye, as a log axis has no zero."""
    style_axes(axes, theme, title=title)
    positions = np.arange(len(frame))[::-1]
    colors = impact_colors(theme)(scale(frame["impact"]))
    shown = frame["impact"].clip(lower=limits[0])
    axes.hlines(positions, limits[0], shown, color=theme.grid, linewidth=5)
    low, high = (frame[side].clip(lower=limits[0]) for side in ("low", "high"))
    axes.hlines(positions, low, high, color=theme.text, lw=1.2)
    axes.scatter(shown, positions, s=26, c=colors, edgecolors=theme.text, linewidths=0.8, zorder=3)
    for position, impact in zip(positions, frame["impact"], strict=True):
        if impact <= 0:
            axes.text(limits[0] * 1.3, position, "≤ 0", fontsize=7, va="center", color=theme.text)
    axes.set_xlim(*limits)
    log_axis(axes, "x", *limits)
    starred = frame["starred"].astype(bool)
    names = [f"{name}*" if star else str(name) for name, star in zip(frame["group"], starred, strict=True)]
    axes.set_yticks(positions, names)
    axes.set_ylim(-0.7, len(frame) - 0.3)
    axes.set_xlabel("impact of removal (log scale)")
    axes.tick_params(axis="y", colors=theme.text, labelsize=8)


# Costs -----------------------------------------------------------------------------------------------------------


def draw_costs(costs: pd.DataFrame, importance: pd.DataFrame | None, theme: Theme) -> Figure:
    """Parameters and multiply-adds of every part in the order of the table, beside the impact of its removal."""
    order = np.arange(len(costs))[::-1]
    scores = None if importance is None else importance[importance["kind"] == "block"].set_index("group")
    figure = new_figure(theme, 11, 1.0 + 0.19 * len(costs))
    panels = figure.subplots(1, 2 if scores is None else 3, sharey=True)
    plain, light = ("#33608c", "#a9c3dc") if theme.name == "light" else ("#86b0d8", "#3d5f80")
    panels[0].barh(order, costs["params"], height=0.7, color=plain)
    products = {"left": costs["paper_macs"], "color": light, "label": "attention products"}
    panels[1].barh(order, costs["paper_macs"], height=0.7, color=plain, label="without attention products")
    panels[1].barh(order, costs["attention_macs"], height=0.7, **products)
    style_axes(panels[0], theme, title="Parameters")
    style_axes(panels[1], theme, title="Multiply-adds of one forward pass")
    for axes in panels[:2]:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.03), "ncols": 2}
    panels[1].legend(frameon=False, fontsize=8, labelcolor=theme.text, **below)
    if scores is not None:
        joined = scores.reindex(costs["name"])
        limits = _impact_limits(scores)
        scored = joined["impact"].notna().to_numpy()
        style_axes(panels[2], theme, title="Impact of removal (log scale)")
        panels[2].set_xlim(*limits)
        log_axis(panels[2], "x", *limits)
        joined = joined[["low", "high", "impact"]].clip(lower=limits[0])[scored]
        panels[2].hlines(order[scored], joined["low"], joined["high"], color=theme.text, lw=1.2)
        panels[2].scatter(joined["impact"], order[scored], s=18, color=theme.text, zorder=3)
    panels[0].set_yticks(order, costs["name"])
    panels[0].tick_params(axis="y", colors=theme.text, labelsize=8)
    panels[0].set_ylim(-0.7, len(costs) - 0.3)
    return figure


# Cost against quality --------------------------------------------------------------------------------------------


def legend_height(plans: int) -> float:
    """Inches that a legend of so many plans takes beyond its first lines, for which every figure has room."""
    return 0.19 * max(0, -(-plans // _LEGEND_COLUMNS) - 3)


def draw_quality_plane(ranking: pd.DataFrame, styles: Mapping[str, PlanStyle], theme: Theme) -> Figure:
    """Held-out loss and CLIP score against multiply-adds and parameters, before (hollow) and after distillation.

    Candidates without a style are dots, after distillation alone.
    Candidates that the tournament dropped are pale, at the loss of their last rung, and are not part of the front.
    """
    rows = measured(ranking)
    teacher = teacher_row(ranking)
    qualities = [("loss", "held-out denoising loss, lower is better")]
    if ranking[["clip_before", "clip_after"]].notna().any(axis=None):
        qualities.append(("clip", "CLIP score of the scorer, higher is better"))
    figure = new_figure(theme, 11, 0.7 + 3.5 * len(qualities) + legend_height(len(styles)))
    others, rows = _without_style(rows, styles)
    grid = figure.subplots(len(qualities), 2, sharex="col", sharey="row", squeeze=False)
    costs = [("macs", "multiply-adds of one forward pass (whole)"), ("params", "parameters")]
    for line, (quality, quality_label) in zip(grid, qualities, strict=True):
        for axes, (cost, cost_label) in zip(line, costs, strict=True):
            style_axes(axes, theme, grid="both")
            _draw_front(axes, not_dropped(ranking), cost, quality, theme)
            _draw_others(axes, not_dropped(others), cost, f"{quality}_after", theme)
            _draw_outcomes(axes, rows, cost, quality, styles, theme)
            if teacher is not None and pd.notna(level := teacher[f"{quality}_after"]):
                axes.axhline(level, color=theme.muted, lw=1, ls=(0, (4, 3)))
                axes.scatter([teacher[cost]], [level], s=64, marker="s", color=theme.text)
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            if quality == qualities[-1][0]:
                axes.set_xlabel(cost_label)
        line[0].set_ylabel(quality_label)
        # Losses before training can be many times those after it; a log axis keeps both readable.
        values = rows[[f"{quality}_before", f"{quality}_after"]].to_numpy(dtype=float)
        if quality == "loss" and log_scale_if_wide(line[0], "y", values):
            line[0].set_ylabel(f"{quality_label} (log)")
    extra = [
        _legend_mark("hollow: before distillation", "o", theme.surface, theme.muted),
        Line2D([], [], color=theme.muted, lw=5, alpha=0.3, label="Pareto front of each panel"),
    ]
    if teacher is not None:
        extra.insert(0, _legend_mark("teacher", "s", theme.text, theme.text))
    extra += _others_mark(others, theme)
    if len(not_dropped(rows)) < len(rows):
        pale = _legend_mark("pale: dropped before the end", "o", theme.muted, theme.muted)
        pale.set_alpha(_PALE)
        extra.append(pale)
    plan_legend(figure, dict(zip(rows["plan_id"], rows["plan"], strict=True)), styles, theme, extra)
    return figure


def _without_style(rows: pd.DataFrame, styles: Mapping[str, PlanStyle]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of candidates without a style, and the others."""
    known = rows["plan_id"].isin(list(styles))
    return rows[~known], rows[known]


def _draw_others(axes: Axes, rows: pd.DataFrame, x: str, y: str, theme: Theme) -> None:
    if len(rows):
        axes.scatter(rows[x], rows[y], s=9, color=theme.muted, alpha=0.5, linewidths=0, zorder=2)


def _others_mark(rows: pd.DataFrame, theme: Theme) -> list[Line2D]:
    """The mark of a legend for candidates that are dots; none where there are none."""
    return [_legend_mark("dots: other candidates", ".", theme.muted, theme.muted)] if len(rows) else []


def _draw_outcomes(
    axes: Axes, rows: pd.DataFrame, cost: str, quality: str, styles: Mapping[str, PlanStyle], theme: Theme
) -> None:
    for row in rows.to_dict("records"):
        style = styles[str(row["plan_id"])]
        before, after = row[f"{quality}_before"], row[f"{quality}_after"]
        if pd.notna(before) and pd.notna(after):
            axes.plot([row[cost]] * 2, [before, after], color=style.color, lw=1, alpha=0.6)
        alpha = _PALE if row["status"] == "dropped" else None
        shape: dict[str, Any] = {"s": 52, "marker": style.marker, "linewidths": 1.4, "zorder": 3}
        shape |= {"edgecolors": style.color, "alpha": alpha}
        axes.scatter([row[cost]], [before], facecolors=theme.surface, **shape)
        axes.scatter([row[cost]], [after], facecolors=style.color, **shape)


def _draw_front(axes: Axes, ranking: pd.DataFrame, cost: str, quality: str, theme: Theme) -> None:
    """The Pareto front as a staircase: at each cost, the best quality of all models that cost no more."""
    column = f"{quality}_after"
    points = ranking.dropna(subset=[cost, column]).sort_values(cost)
    best = points[column].cummin() if quality == "loss" else points[column].cummax()
    axes.step(points[cost], best, where="post", color=theme.muted, lw=5, alpha=0.3, zorder=1)


def plan_legend(
    figure: Figure,
    labels: Mapping[str, str],
    styles: Mapping[str, PlanStyle],
    theme: Theme,
    extra: Sequence[Line2D] = (),
) -> None:
    """Add a legend under ``figure``: the marks of the plans in ``labels`` (by plan id) and the marks ``extra``."""
    marks = [
        _legend_mark(labels[plan_id], style.marker, style.color, style.color)
        for plan_id, style in styles.items()
        if plan_id in labels
    ]
    _legend_below(figure, [*marks, *extra], theme)


def _legend_below(figure: Figure, handles: Sequence[Line2D], theme: Theme) -> None:
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(_LEGEND_COLUMNS, len(handles)),
        frameon=False,
        fontsize=8.5,
        labelcolor=theme.text,
    )


def _legend_mark(label: str, marker: str, face: str, edge: str) -> Line2D:
    shape = {"marker": marker, "markersize": 7, "markerfacecolor": face, "markeredgecolor": edge}
    return Line2D([], [], linestyle="none", label=label, **shape)  # type: ignore[arg-type]


def draw_prediction(ranking: pd.DataFrame, styles: Mapping[str, PlanStyle], theme: Theme) -> Figure:
    """The candidates' impact in one shot against their held-out loss before and after distillation.

    The panel after distillation shows no dropped candidates: losses after fewer steps cannot be compared.
    """
    rows = measured(ranking)
    rows = rows[rows["impact_one_shot"] > 0]
    others, _ = _without_style(rows, styles)
    figure = new_figure(theme, 11, 3.6 + legend_height(len(styles)))
    panels = figure.subplots(1, 2)
    for axes, state, known in zip(panels, ("before", "after"), (rows, not_dropped(rows)), strict=True):
        style_axes(axes, theme, title=f"{state.capitalize()} distillation", grid="both")
        dots, shown = _without_style(known, styles)
        _draw_others(axes, dots, "impact_one_shot", f"loss_{state}", theme)
        for row in shown.to_dict("records"):
            style, point = styles[row["plan_id"]], (row["impact_one_shot"], row[f"loss_{state}"])
            axes.scatter(*point, s=52, marker=style.marker, color=style.color)
        is_log = log_scale_if_wide(axes, "x", rows["impact_one_shot"].to_numpy(dtype=float))
        axes.set_xlabel("impact in one shot, before any training" + (" (log scale)" if is_log else ""))
    panels[0].set_ylabel("held-out denoising loss")
    labels = dict(zip(rows["plan_id"], rows["plan"], strict=True))
    plan_legend(figure, labels, styles, theme, _others_mark(others, theme))
    return figure


# Distillation ----------------------------------------------------------------------------------------------------


def draw_curves(
    curves: pd.DataFrame, plans: Sequence[PlanRow], styles: Mapping[str, PlanStyle], theme: Theme
) -> Figure:
    """The held-out loss and the three training losses of every candidate, step by step."""
    parts = [part for part in _PART_TITLES if part in set(curves["part"])]
    figure = new_figure(theme, 11, 0.6 + 2.9 * -(-len(parts) // 2) + legend_height(len(plans)))
    grid = figure.subplots(-(-len(parts) // 2), min(2, len(parts)), squeeze=False)
    for axes in grid.flat[len(parts) :]:
        axes.set_visible(False)
    lines = dict(iter(curves.groupby(["plan_id", "part"])))
    known = set(curves["plan_id"])
    shown = [plan for plan in plans if plan.id in known]
    for axes, part in zip(grid.flat, parts, strict=False):
        for plan in shown:
            line = lines.get((plan.id, part), curves[:0]).sort_values("step")
            style = styles[plan.id]
            marker = style.marker if part == "validation" else None
            axes.plot(line["step"], line["value"], style.dash, color=style.color, lw=1.4, marker=marker, ms=4)
        values = curves.loc[curves["part"] == part, "value"].to_numpy(dtype=float)
        is_log = log_scale_if_wide(axes, "y", values)
        style_axes(axes, theme, title=_PART_TITLES[part] + (" (log)" if is_log else ""), grid="y")
        axes.set_xlabel("distillation step")
    handles = [
        Line2D([], [], color=style.color, ls=style.dash, marker=style.marker, ms=5, label=plan.label)
        for plan in shown
        for style in [styles[plan.id]]
    ]
    _legend_below(figure, handles, theme)
    return figure
