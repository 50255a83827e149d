"""The ranking as tables, and the tournament as a table and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator
from numpy.typing import NDArray

from prune_lab.ranking import Difference
from prune_lab.report import format as fmt
from prune_lab.report.charts import legend_height, plan_legend
from prune_lab.report.document import Chart, SectionItem, Text, table_of
from prune_lab.report.figures import PlanStyle, Theme, log_scale_if_wide, new_figure, plan_styles, style_axes
from prune_lab.report.tables import PlanRow, RunTables, dropped, unranked

_NAMED = 12  # as many names fit beside the axes
_END = {"kept": "", "dropped": "x", "failed": "X"}


# Tables ----------------------------------------------------------------------------------------------------------


_RANKING = (
    ("Rank", "rank", fmt.count),
    ("Tie group", "tie_group", fmt.count),
    ("Plan", "plan", fmt.text),
    ("Origin", "origin", fmt.text),
    ("Form", "form", fmt.text),
    ("Blocks removed", "blocks_removed", fmt.count),
    ("Parameters", "params", fmt.amount),
    ("MACs (whole)", "macs", fmt.amount),
    ("Median time", "median_ms", fmt.milliseconds),
    ("Change of time", "latency", fmt.text),
    ("Impact in one shot", "impact_one_shot", fmt.short_number),
    ("Steps", "steps", fmt.count),
    ("Loss before", "loss_before", fmt.loss_or_score),
    ("Loss after", "loss_after", fmt.loss_or_score),
    ("CLIP before", "clip_before", fmt.loss_or_score),
    ("CLIP after", "clip_after", fmt.loss_or_score),
    ("On the front", "pareto", fmt.yes_or_no),
    ("Status", "status", fmt.text),
)
_DROPPED = (
    ("Plan", "plan", fmt.text),
    ("Reason", "reason", fmt.text),
    ("Rung", "rung", fmt.count),
    ("Steps", "steps", fmt.count),
)
_UNRANKED = (("Plan", "plan", fmt.text), ("Status", "status", fmt.text), ("Reason", "reason", fmt.text))
_VERDICTS = (
    ("Plan", "name", fmt.text),
    ("Verdict", "fate", fmt.text),
    ("Reason", "reason", fmt.text),
    ("Compared with", "against", fmt.text),
    ("Rung", "rung", fmt.count),
    ("Steps", "steps", fmt.count),
    ("Place", "place", fmt.count),
    ("Held-out loss", "loss", fmt.loss_or_score),
    ("Difference", "gap", fmt.text),
    ("Tied", "tied", fmt.yes_or_no),
    ("CLIP score", "clip", fmt.loss_or_score),
)


_FORMS = {
    "native": "*native* is a smaller config of the plain class",
    "own": "*own* is one small model file in the student's folder, which plain diffusers runs with "
    "`trust_remote_code=True`",
    "neutral": "*neutral* is the plain class, in which removed blocks stay and do nothing",
}


def form_words(plans: Sequence[PlanRow]) -> list[SectionItem]:
    """What the forms of the students are; nothing where all are native, as they are where nobody asks otherwise."""
    found = [form for form in _FORMS if form in {plan.form for plan in plans}]
    return (
        [Text((f"Forms: {'; '.join(_FORMS[form] for form in found)}.",))] if set(found) - {"native"} else []
    )


def ranking_tables(ranking: pd.DataFrame, plans: Sequence[PlanRow]) -> tuple[SectionItem, ...]:
    """The ranking with the forms of the ``plans``, a note on its tie groups, and the dropped and unranked candidates
    with the reasons.
    """
    columns = ["latency_change", "latency_low", "latency_high"]
    changes = [fmt.change_with_interval(*row) for row in ranking[columns].itertuples(index=False, name=None)]
    teacher = ranking["origin"] == "teacher"
    ranking = ranking.assign(latency=pd.Series(changes, index=ranking.index, dtype=object).mask(teacher, ""))
    forms = {plan.id: plan.form for plan in plans}
    ranking = ranking.assign(form=[forms.get(plan_id, "") for plan_id in ranking["plan_id"]])
    # CLIP scores that nobody has take no room.
    shown = [one for one in _RANKING if not one[1].startswith("clip_") or ranking[one[1]].notna().any()]
    parts: list[SectionItem] = [table_of(ranking, shown, "Ranking", "ranking.csv", left=5)]
    parts += form_words(plans)
    if ranking["latency_change"][~teacher].notna().any():
        times = (
            "Times of candidates are the teacher's median with the change that was measured in turns with it, in "
            "brackets its 95 % interval: undecided where that contains no change, or is not known."
        )
        parts.append(Text((times,)))
    if ranking["tie_group"].notna().any():
        ties = (
            "Candidates of one tie group are tied with the first of the group: the 95 % interval of the paired "
            "differences of their held-out losses contains zero. Their order within the group means nothing."
        )
        parts.append(Text((ties,)))
    if len(dropped(ranking)):
        parts.append(table_of(dropped(ranking), _DROPPED, "Dropped candidates", "ranking.csv", left=2))
    if len(unranked(ranking)):
        parts.append(table_of(unranked(ranking), _UNRANKED, "Candidates without a rank", left=3))
    else:
        parts.append(Text(("All candidates are ranked.",)))
    return tuple(parts)


def tournament_parts(tables: RunTables, drawn: RunTables) -> tuple[SectionItem, ...]:
    """The figure, of the candidates in ``drawn``, and the table of all verdicts; empty without a tournament."""
    tournament = tables.tournament
    if tournament is None:
        return ()
    labels = {plan.id: plan.label for plan in tables.plans}
    styles = plan_styles(drawn.plans)
    gaps = tournament[["difference", "low", "high"]].itertuples(index=False, name=None)
    named = {key: tournament[key].map(lambda one: labels.get(one, one)) for key in ("name", "against")}
    verdicts = tournament.assign(
        **named,
        gap=[fmt.UNKNOWN if fmt.is_missing(gap[0]) else str(Difference(*gap)) for gap in gaps],
    )
    caption = "Every verdict of the tournament"
    return (
        Chart(
            "tournament",
            "Held-out loss of every candidate over the rungs of the tournament, ending where it was dropped.",
            "Vertical lines are the rungs, where the better part goes on, and candidates tied with the last of them. A "
            "cross marks where a candidate was dropped or failed; candidates named at the right reached the end.",
            lambda theme: draw_tournament(tournament, drawn.plans, styles, theme),
        ),
        table_of(verdicts, _VERDICTS, caption, "tournament.csv", left=4, folded=True),
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
    """Held-out loss over steps (log scale), a line per candidate up to its last rung; the best survivors are labelled.

    Names in ``tournament`` are plan ids.
    """
    tournament = tournament[tournament["name"].isin(list(styles))]
    known = tournament.dropna(subset="loss")
    figure = new_figure(theme, 11, 4.6 + legend_height(len(styles)))
    axes = figure.subplots()
    style_axes(axes, theme, title="Held-out denoising loss at each rung", grid="y")
    rungs = sorted(set(tournament["steps"].astype(int)))
    for rung in rungs:
        axes.axvline(rung, color=theme.grid, lw=0.8, zorder=0)
    labels = {plan.id: plan.label for plan in plans}
    survivors = []
    for name, verdicts in tournament.groupby("name", sort=False):
        line = known[known["name"] == name].sort_values("steps")
        if line.empty:
            continue  # it failed before its first rung, as the table shows
        style, cross = styles[str(name)], _END[verdicts["fate"].iloc[-1]]
        look: dict[str, Any] = {"color": style.color, "ls": style.dash, "marker": style.marker}
        axes.plot(line["steps"], line["loss"], lw=1.5, ms=5, **look)
        end = (float(line["steps"].iloc[-1]), float(line["loss"].iloc[-1]))
        if cross:
            axes.scatter(*end, s=110, marker=cross, color=style.color, linewidths=2, zorder=4)
        else:
            survivors.append((str(name), *end))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(rungs))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{rung:,}" for rung in rungs]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("distillation steps (log scale)")
    is_log = log_scale_if_wide(axes, "y", known["loss"].to_numpy(dtype=float))
    axes.set_ylabel("held-out loss" + (" (log scale)" if is_log else ""))
    if len(survivors) > _NAMED:
        survivors = sorted(survivors, key=lambda one: one[2])[:_NAMED]
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
    shown = {plan_id: label for plan_id, label in labels.items() if plan_id in set(known["name"])}
    plan_legend(figure, shown, styles, theme, [mark])
    return figure
