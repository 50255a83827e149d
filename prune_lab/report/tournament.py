"""The ranking as tables, and the tournament as a table and a figure."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator
from numpy.typing import NDArray

from prune_lab.ranking import Difference
from prune_lab.report.charts import plan_legend
from prune_lab.report.document import Chart, SectionItem, Table, Text
from prune_lab.report.figures import PlanStyle, Theme, log_scale_if_wide, new_figure, plan_styles, style_axes
from prune_lab.report.format import (
    UNKNOWN,
    amount,
    count,
    is_missing,
    loss_or_score,
    milliseconds,
    short_number,
)
from prune_lab.report.tables import PlanRow, RunTables, dropped, unranked

_END = {"kept": "", "dropped": "x", "failed": "X"}
Record = Mapping[Hashable, Any]


# Tables ----------------------------------------------------------------------------------------------------------


def _yes_or_no(cell: object) -> str:
    if is_missing(cell):
        return UNKNOWN
    return "yes" if str(cell) in ("True", "1.0", "1") else "no"


def _ranking_row(row: Record) -> tuple[str, ...]:
    return (
        count(row["rank"]),
        count(row["tie_group"]),
        str(row["plan"]),
        str(row["origin"]),
        count(row["blocks_removed"]),
        amount(row["params"]),
        amount(row["macs"]),
        milliseconds(row["median_ms"]),
        short_number(row["impact_one_shot"]),
        count(row["steps"]),
        *(
            loss_or_score(row[column])
            for column in ("loss_before", "loss_after", "clip_before", "clip_after")
        ),
        _yes_or_no(row["pareto"]),
        str(row["status"]),
    )


def ranking_tables(ranking: pd.DataFrame) -> tuple[SectionItem, ...]:
    """The ranking, a note on its tie groups, and the dropped and unranked candidates with the reasons."""
    header = (
        *(
            "Rank",
            "Tie group",
            "Plan",
            "Origin",
            "Blocks removed",
            "Parameters",
            "MACs (whole)",
            "Median time",
        ),
        *("Impact in one shot", "Steps", "Loss before", "Loss after", "CLIP before", "CLIP after"),
        *("On the front", "Status"),
    )
    rows = tuple(_ranking_row(row) for row in ranking.to_dict("records"))
    parts: list[SectionItem] = [Table("Ranking", header, rows, "ranking.csv", left=4)]
    if ranking["tie_group"].notna().any():
        parts.append(
            Text(
                (
                    "Candidates of one tie group are tied with the first of the group: the 95 % interval of the paired "
                    "differences of their held-out losses contains zero. Their order within the group means nothing.",
                )
            )
        )
    reasons = tuple(
        (str(row.plan), str(row.reason), count(row.rung), count(row.steps))
        for row in dropped(ranking).itertuples()
    )
    if reasons:
        columns = ("Plan", "Reason", "Rung", "Steps")
        parts.append(Table("Dropped candidates", columns, reasons, "ranking.csv", left=2))
    rest = tuple((str(row.plan), str(row.status), str(row.reason)) for row in unranked(ranking).itertuples())
    if rest:
        parts.append(Table("Candidates without a rank", ("Plan", "Status", "Reason"), rest, left=3))
    else:
        parts.append(Text(("All candidates are ranked.",)))
    return tuple(parts)


def _verdict_row(row: Record, labels: Mapping[str, str]) -> tuple[str, ...]:
    gap, against = UNKNOWN, UNKNOWN
    if not is_missing(row["difference"]):
        gap = str(Difference(row["difference"], row["low"], row["high"]))
        against = labels.get(str(row["against"]), str(row["against"]))
    return (
        labels.get(str(row["name"]), str(row["name"])),
        str(row["fate"]),
        UNKNOWN if is_missing(row["reason"]) else str(row["reason"]),
        against,
        count(row["rung"]),
        count(row["steps"]),
        count(row["place"]),
        loss_or_score(row["loss"]),
        gap,
        _yes_or_no(row["tied"]),
        loss_or_score(row["clip"]),
    )


def tournament_parts(tables: RunTables) -> tuple[SectionItem, ...]:
    """The figure and the table of verdicts of the tournament; empty if there was none."""
    tournament = tables.tournament
    if tournament is None:
        return ()
    labels = {plan.id: plan.label for plan in tables.plans}
    styles = plan_styles(tables.plans)
    header = (
        *("Plan", "Verdict", "Reason", "Compared with", "Rung", "Steps", "Place", "Held-out loss"),
        *("Difference", "Tied", "CLIP score"),
    )
    rows = tuple(_verdict_row(row, labels) for row in tournament.to_dict("records"))
    return (
        Chart(
            "tournament",
            "Held-out loss of every candidate over the rungs of the tournament, ending where it was dropped.",
            "Vertical lines are the rungs, where the better part goes on, and candidates tied with the last of them. A "
            "cross marks where a candidate was dropped or failed; candidates named at the right reached the end.",
            lambda theme: draw_tournament(tournament, tables.plans, styles, theme),
        ),
        Table("Every verdict of the tournament", header, rows, "tournament.csv", left=4, folded=True),
    )


# Figure ----------------------------------------------------------------------------------------------------------


def space_labels(values: Sequence[float], gap: float) -> NDArray[np.float64]:
    """(N,) label positions ``values``, shifted up so that neighbours are at least ``gap`` apart."""
    order = np.argsort(values, kind="stable")
    positions = np.array(values, dtype=np.float64)
    for lower, upper in pairwise(order):
        positions[upper] = max(positions[upper], positions[lower] + gap)
    return positions


def draw_tournament(
    tournament: pd.DataFrame, plans: Sequence[PlanRow], styles: Mapping[str, PlanStyle], theme: Theme
) -> Figure:
    """Held-out loss over steps (log scale), a line per candidate up to its last rung; survivors are labelled.

    Names in ``tournament`` are plan ids.
    """
    known = tournament.dropna(subset="loss")
    figure = new_figure(theme, 11, 4.6)
    axes = figure.subplots()
    style_axes(axes, theme, title="Held-out denoising loss at each rung", grid="y")
    rungs = sorted(set(tournament["steps"].astype(int)))
    for rung in rungs:
        axes.axvline(rung, color=theme.grid, lw=0.8, zorder=0)
    labels = {plan.id: plan.label for plan in plans}
    survivors = []
    for name, verdicts in tournament.groupby("name", sort=False):
        line = known[known["name"] == name].sort_values("steps")
        fate, style = str(verdicts["fate"].iloc[-1]), styles[str(name)]
        if line.empty:
            continue  # it failed before its first rung, as the table shows
        axes.plot(
            line["steps"], line["loss"], color=style.color, ls=style.dash, lw=1.5, marker=style.marker, ms=5
        )
        end = (float(line["steps"].iloc[-1]), float(line["loss"].iloc[-1]))
        if _END[fate]:
            axes.scatter(*end, s=110, marker=_END[fate], color=style.color, linewidths=2, zorder=4)
        else:
            survivors.append((str(name), *end))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(rungs))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{rung:,}" for rung in rungs]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("distillation steps (log scale)")
    is_log = log_scale_if_wide(axes, "y", known["loss"].to_numpy(dtype=float))
    axes.set_ylabel("held-out loss" + (" (log scale)" if is_log else ""))
    if survivors:
        # Spaced in drawing units (log if the axis is); a label is about a twentieth of the axis high.
        ends, limits = np.array([loss for _, _, loss in survivors]), np.array(axes.get_ylim())
        if is_log:
            ends, limits = np.log10(ends), np.log10(limits)
        heights = space_labels(ends.tolist(), float(limits[1] - limits[0]) / 20)
        if is_log:
            heights = 10.0**heights
        for (name, step, loss), height in zip(survivors, heights, strict=True):
            axes.annotate(
                labels.get(name, name),
                (step, loss),
                xytext=(step * (rungs[-1] / rungs[0]) ** 0.03 * 1.02, float(height)),
                fontsize=8.5,
                va="center",
                color=styles[name].color,
                arrowprops={"arrowstyle": "-", "color": styles[name].color, "lw": 0.6},
                annotation_clip=False,
            )
    mark = Line2D([], [], color=theme.muted, ls="none", marker="x", ms=8, label="dropped or failed here")
    shown = pd.DataFrame({"plan_id": list(labels), "plan": list(labels.values())})
    plan_legend(figure, shown[shown["plan_id"].isin(known["name"])], styles, theme, [mark])
    return figure
