"""Who is ranked where and why: the table of everyone, and the tournament rung by rung."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
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
from prune_lab.report.figures import PlanStyle, Theme, new_figure, plan_styles, spread, style_axes
from prune_lab.report.format import UNKNOWN, amount, count, figure3, is_missing, milliseconds, short_number
from prune_lab.report.tables import PlanRow, RunTables, dropped, left_out

_END = {"kept": "", "dropped": "x", "failed": "X"}
Row = Mapping[Hashable, Any]


# Tables ----------------------------------------------------------------------------------------------------------


def _yes_or_no(cell: object) -> str:
    if is_missing(cell):
        return UNKNOWN
    return "yes" if str(cell) in ("True", "1.0", "1") else "no"


def _ranking_row(row: Row) -> tuple[str, ...]:
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
        *(figure3(row[column]) for column in ("loss_before", "loss_after", "clip_before", "clip_after")),
        _yes_or_no(row["pareto"]),
        str(row["status"]),
    )


def ranking_tables(ranking: pd.DataFrame) -> tuple[SectionItem, ...]:
    """The table of everyone, what its tie groups mean, who was dropped and why, and who has no rank and why."""
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
                    "Candidates of one tie group cannot be told apart from its first by their held-out losses: the "
                    "95 % interval of the paired differences, row by row, holds zero. Their ranks among each other "
                    "say nothing.",
                )
            )
        )
    fell = dropped(ranking)
    if len(fell):
        said = tuple(
            (str(row.plan), str(row.reason), count(row.rung), count(row.steps)) for row in fell.itertuples()
        )
        parts.append(
            Table("Dropped, and why", ("Plan", "Reason", "Rung", "Steps"), said, "ranking.csv", left=2)
        )
    out = left_out(ranking)
    if len(out):
        excuses = tuple((str(row.plan), str(row.status), str(row.reason)) for row in out.itertuples())
        parts.append(Table("Left out, and why", ("Plan", "Status", "Reason"), excuses, left=3))
    else:
        parts.append(Text(("No candidate was left out.",)))
    return tuple(parts)


def _verdict_row(row: Row, labels: Mapping[str, str]) -> tuple[str, ...]:
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
        figure3(row["loss"]),
        gap,
        _yes_or_no(row["tied"]),
        figure3(row["clip"]),
    )


def tournament_parts(tables: RunTables) -> tuple[SectionItem, ...]:
    """The figure and the verdicts of the tournament; nothing where there was none."""
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
            "Vertical lines are the rungs, at which the better part goes on, and who ties with the last of them. "
            "A cross is where a candidate was dropped or failed; those named at the right came to the end.",
            lambda theme: draw_tournament(tournament, tables.plans, styles, theme),
        ),
        Table("Every verdict of the tournament", header, rows, "tournament.csv", left=4, folded=True),
    )


# Figure ----------------------------------------------------------------------------------------------------------


def apart(values: Sequence[float], gap: float) -> NDArray[np.float64]:
    """(N,) the ``values`` moved as little as a pass from below allows so that no two are nearer than ``gap``."""
    order = np.argsort(values, kind="stable")
    moved = np.asarray(values, dtype=np.float64)[order]
    for place in range(1, len(moved)):
        moved[place] = max(moved[place], moved[place - 1] + gap)
    found = np.empty_like(moved)
    found[order] = moved
    return found


def draw_tournament(
    tournament: pd.DataFrame, plans: Sequence[PlanRow], styles: Mapping[str, PlanStyle], theme: Theme
) -> Figure:
    """Held-out loss over steps (log scale), a line per candidate that ends where it was dropped; survivors are named.

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
            continue  # failed before its first rung: the table says so
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
    is_log = spread(axes, "y", known["loss"].to_numpy(dtype=float))
    axes.set_ylabel("held-out loss" + (" (log scale)" if is_log else ""))
    if survivors:
        # Apart as they are drawn, in the units of the axis, of which a name takes about a twentieth.
        ends, limits = np.array([loss for _, _, loss in survivors]), np.array(axes.get_ylim())
        if is_log:
            ends, limits = np.log10(ends), np.log10(limits)
        heights = apart(ends.tolist(), float(limits[1] - limits[0]) / 20)
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
