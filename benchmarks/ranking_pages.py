"""Figures and README of the ranking benchmark, from its tables; nothing is computed here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator
from numpy.typing import NDArray

from benchmarks.rows import rows_of
from prune_lab.config import RunConfig
from prune_lab.ranking import Difference
from prune_lab.report import LIGHT, PlanRow
from prune_lab.report.figures import (
    PlanStyle,
    freeze_layout,
    log_scale_if_wide,
    new_figure,
    save_png,
    style_axes,
)
from prune_lab.report.format import enumeration
from prune_lab.report.tournament import space_labels

Floats = NDArray[np.float64]
_SCORES = ("added-up scores", "one-shot impact", "repaired loss")
_SCORE_DASHES = ((0, (1, 1.5)), (0, (5, 2)), (0, (6, 1.5, 1, 1.5)))


@dataclass(frozen=True, slots=True, eq=False)
class Trajectories:
    """The held-out losses of plans that came to the end: (plans, steps, rows), the same rows for all."""

    plans: tuple[PlanRow, ...]
    steps: NDArray[np.int64]
    losses: Floats

    def mean(self, step: int) -> Floats:
        """(plans,) mean held-out loss after ``step`` steps."""
        found: Floats = self.losses[:, list(self.steps).index(step)].mean(axis=1)
        return found


# Figures ---------------------------------------------------------------------------------------------------------


def _step_axis(axes: Axes, steps: Sequence[int]) -> dict[int, float]:
    """Make the x axis logarithmic in steps, with step 0 at half of the first; where each step stands."""
    places = {step: float(step) if step else min(one for one in steps if one) / 2 for step in steps}
    axes.set_xscale("log")
    shown: list[int] = []
    for step in sorted(steps):
        if shown and step == max(steps) and places[step] < 1.25 * places[shown[-1]]:
            shown.pop()
        if not shown or places[step] > 1.4 * places[shown[-1]] or step == max(steps):
            shown.append(step)
    axes.xaxis.set_major_locator(FixedLocator([places[step] for step in shown]))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{step:,}" for step in shown]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("distillation steps (log scale; 0 is before the training)")
    return places


def draw_curves(told: Trajectories, styles: Mapping[str, PlanStyle], folder: Path) -> None:
    """Write curves.png: the held-out loss of every plan over the steps, the plans named in order at the end."""
    figure = new_figure(LIGHT, 10.5, max(5.0, 0.25 * len(told.plans) + 1.5))
    axes = figure.subplots()
    style_axes(axes, LIGHT, title="Held-out denoising loss of the averaged weights", grid="y")
    places = _step_axis(axes, [int(step) for step in told.steps])
    means = told.losses.mean(axis=2)
    xs = [places[int(step)] for step in told.steps]
    for plan, line in zip(told.plans, means, strict=True):
        style = styles[plan.id]
        axes.plot(xs, line, color=style.color, ls=style.dash, lw=1.3, marker=style.marker, ms=3.5)
    is_log = log_scale_if_wide(axes, "y", means)
    axes.set_ylabel("held-out loss" + (" (log scale)" if is_log else ""))
    ends = np.log(means[:, -1]) if is_log else means[:, -1]
    low, high = (np.log(axes.get_ylim()) if is_log else np.array(axes.get_ylim())).tolist()
    heights = space_labels(ends.tolist(), (high - low) / 27)
    # Half of what they were moved up they are moved down again, but not below the axis.
    heights = heights - min(float(heights.mean() - ends.mean()), float(heights.min()) - low)
    x = xs[-1] * (xs[-1] / xs[0]) ** 0.05
    for plan, end, height in zip(told.plans, means[:, -1], heights, strict=True):
        y, color = float(np.exp(height)) if is_log else float(height), styles[plan.id].color
        axes.plot([xs[-1] * 1.02, x * 0.99], [end, y], color=color, lw=0.6, clip_on=False)
        axes.text(x, y, plan.label, fontsize=8, va="center", color=color)
    axes.set_xlim(right=xs[-1] * 1.02)
    axes.set_ylim(*(np.exp((low, high)) if is_log else (low, high)))
    save_png(figure, folder / "curves.png", freeze_layout(figure))


def draw_tau(over_steps: pd.DataFrame, agreement: pd.DataFrame, folder: Path) -> None:
    """Write tau.png: Kendall's tau-b of the loss at each step with the outcome, with bands, and of the scores."""
    figure = new_figure(LIGHT, 9, 4.6)
    axes = figure.subplots()
    style_axes(axes, LIGHT, title="Agreement with the order at the end (Kendall's tau-b)", grid="y")
    places = _step_axis(axes, over_steps["step"].astype(int).tolist())
    xs = over_steps["step"].map(places)
    shade = "#33608c"
    axes.fill_between(
        xs,
        over_steps["plans_low"],
        over_steps["plans_high"],
        color=shade,
        alpha=0.12,
        lw=0,
        label="95 %, over plans",
    )
    axes.fill_between(
        xs,
        over_steps["rows_low"],
        over_steps["rows_high"],
        color=shade,
        alpha=0.35,
        lw=0,
        label="95 %, over rows",
    )
    axes.plot(
        xs, over_steps["tau"], color=shade, marker="o", ms=4, lw=1.5, label="held-out loss at that step"
    )
    known = agreement[agreement["forecast"].isin(_SCORES)]
    for row, dash, color in zip(
        rows_of(known), _SCORE_DASHES, ("#D55E00", "#009E73", "#882255"), strict=False
    ):
        axes.axhline(row.tau, color=color, ls=dash, lw=1.4, label=f"{row.forecast}, without training")
    axes.axhline(0, color=LIGHT.muted, lw=0.8)
    axes.set_ylim(min(-0.1, float(over_steps["plans_low"].min()) - 0.05), 1.03)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    save_png(figure, folder / "tau.png", freeze_layout(figure))


def draw_flow(
    outcomes: pd.DataFrame, forecasts: Sequence[str], styles: Mapping[str, PlanStyle], folder: Path
) -> None:
    """Write flow.png: the rank of every plan by each forecast, and at the end, where tie groups are bracketed."""
    columns = [*forecasts, "outcome"]
    ranks = outcomes[columns].rank(method="first")
    figure = new_figure(LIGHT, 11, 0.32 * len(outcomes) + 1.4)
    axes = figure.subplots()
    style_axes(axes, LIGHT, title="Rank by each forecast, and after the long distillation", grid="")
    for place, row in enumerate(rows_of(outcomes)):
        style, line = styles[row.plan_id], ranks.iloc[place]
        axes.plot(
            range(len(columns)), line, color=style.color, ls=style.dash, lw=1.6, marker=style.marker, ms=6
        )
        axes.text(len(columns) - 0.78, line.iloc[-1], row.plan, fontsize=8.5, va="center", color=style.color)
    for _, group in outcomes.groupby("tie_group"):
        low, high = group["rank"].min(), group["rank"].max()
        axes.plot([len(columns) - 0.86] * 2, [low - 0.25, high + 0.25], color=LIGHT.text, lw=2, clip_on=False)
    axes.set_xticks(range(len(columns)), [name.replace(" at ", "\nat ") for name in columns])
    axes.set_yticks(range(1, len(outcomes) + 1))
    axes.set_ylim(len(outcomes) + 0.5, 0.5)
    axes.set_xlim(-0.2, len(columns) - 0.8)
    axes.set_ylabel("rank (bars at the right: tie groups)")
    save_png(figure, folder / "flow.png", freeze_layout(figure))


# Words -----------------------------------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return ["", *(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)), ""]


def _conditions(told: Trajectories, config: RunConfig, environment: Mapping[str, Any]) -> str:
    settings = config.distill
    where = environment.get("device_name") or environment.get("device", "an unnamed device")
    versions = enumeration(
        f"{name} {environment[name]}" for name in ("python", "torch", "diffusers") if name in environment
    )
    return (
        f"{len(told.plans)} plans of `{config.model}`, all distilled for {told.steps[-1]} steps of batch "
        f"{settings.batch} with seed {settings.seed}, on {where} in {environment.get('dtype', config.dtype)} "
        f"({versions}); losses on {told.losses.shape[2]} held-out rows (picture, noise and timestep), the same for "
        "every plan and step. One training seed: intervals are over rows or over plans, and none covers another "
        "seed. Everything else about the machine: environment.json."
    )


def _foretold(agreement: pd.DataFrame, over_steps: pd.DataFrame, reliable: float) -> list[str]:
    untrained = agreement[agreement["forecast"].isin((*_SCORES, "loss at step 0"))]
    best = untrained.iloc[int(untrained["tau"].argmax())]
    says = [
        f"Before any training `{best['forecast']}` foretells the order best: tau-b {best['tau']:.2f} (over rows "
        f"[{best['rows_low']:.2f}, {best['rows_high']:.2f}], over plans [{best['plans_low']:.2f}, "
        f"{best['plans_high']:.2f}])."
    ]
    after = over_steps[over_steps["step"] > 0]
    better = after[after["tau"] > best["tau"]]
    if len(better):
        row = better.iloc[0]
        says.append(f"The first look that agrees better is at {row['step']} steps: tau-b {row['tau']:.2f}.")
    else:
        says.append("No look at the loss on the way agrees better.")
    ties = after[after["regret_tie"]]
    if len(ties):
        row = ties.iloc[0]
        says.append(
            f"From {row['step']} steps on the first by held-out loss ties with the best at the end, or is it."
        )
        later = after[(after["step"] > row["step"]) & ~after["regret_tie"]]
        if len(later):
            says[-1] = (
                f"At {row['step']} steps the first by held-out loss ties with the best at the end, or is it; at "
                f"{len(later)} of the later looks it does not."
            )
    says.append(
        f"The order at the end, from one half of the rows and from the other, agrees with tau-b {reliable:.2f}: about "
        "as much as half of these rows can show."
    )
    return says


def _tournament_words(played: pd.DataFrame) -> list[str]:
    says = []
    ours = played[played["ties_go_on"]]
    good = ours[ours["tie"]]
    says.append(f"Of {len(ours)} tournaments {len(good)} end with the best plan or one that ties with it.")
    if len(good):
        row = good.iloc[int(good["share"].argmin())]
        says.append(
            f"The cheapest of these (eta {row['eta']}, rungs {row['rungs'].replace(' ', ', ')}) takes "
            f"{row['share']:.0%} of the steps of distilling everyone to the end, and ends with {row['winner']}."
        )
    strict = played[~played["ties_go_on"]]
    kept, kept_strict = int(ours["best_survived"].sum()), int(strict["best_survived"].sum())
    says.append(
        f"The best plan comes to the end in {kept} of {len(ours)} where ties go on, and in {kept_strict} of "
        f"{len(strict)} where the means alone decide. The replays decide by loss alone, without pictures."
    )
    return says


def page(
    told: Trajectories,
    outcomes: pd.DataFrame,
    agreement: pd.DataFrame,
    over_steps: pd.DataFrame,
    played: pd.DataFrame,
    pairs: pd.DataFrame,
    reliable: float,
    config: RunConfig,
    environment: Mapping[str, Any],
) -> str:
    """README.md."""
    header = (
        "Forecast",
        "first by it",
        "tau-b",
        "95 % over rows",
        "95 % over plans",
        "decided pairs in order",
        "regret",
    )
    rows = [
        (
            one.forecast,
            f"{one.first}{', a tie with the best' if one.regret_tie and one.regret else ''}",
            f"{one.tau:.2f}",
            f"[{one.rows_low:.2f}, {one.rows_high:.2f}]",
            f"[{one.plans_low:.2f}, {one.plans_high:.2f}]",
            f"{one.right_order:.0%} of {one.decided_pairs}",
            str(Difference(one.regret, one.regret_low, one.regret_high)) if one.regret else "0",
        )
        for one in rows_of(agreement)
    ]
    lines = [
        "# What foretells the order after a long distillation",
        "",
        _conditions(told, config, environment),
    ]
    lines += ["", " ".join(_foretold(agreement, over_steps, reliable)), ""]
    lines += _table(header, rows, left=2)
    lines += [
        f"A pair is decided when the 95 % interval of the paired difference at the end does not hold zero "
        f"({agreement['decided_pairs'].iloc[0]} of {agreement['pairs'].iloc[0]}). Regret: the loss at the end of the "
        "forecast's first plan, less that of the best.",
        *("", "![Agreement over steps](tau.png)", "", "![Losses](curves.png)", "", "![Ranks](flow.png)", ""),
        *("## The plans", ""),
    ]
    shown = [
        name for name in outcomes.columns if name not in ("rank", "plan_id", "plan", "origin", "tie_group")
    ]
    lines += _table(
        ("Plan", "origin", "rank", "tie group", *shown),
        [
            (
                row["plan"],
                row["origin"],
                str(row["rank"]),
                str(row["tie_group"]),
                *(f"{row[name]:.4g}" for name in shown),
            )
            for row in outcomes.to_dict("records")
        ],
        left=2,
    )
    if len(played):
        words = " ".join(_tournament_words(played))
        lines += ["## Tournaments, replayed on the recorded losses", "", words, ""]
        lines += _table(
            (
                "Winner",
                "rungs",
                "ties go on",
                "eta",
                "share of the cost",
                "survivors",
                "loss at the end, less the best",
            ),
            [
                (
                    f"{one.winner}{', a tie with the best' if one.tie and one.difference else ''}",
                    one.rungs.replace(" ", ", "),
                    "yes" if one.ties_go_on else "no",
                    str(one.eta),
                    f"{one.share:.0%}",
                    str(one.survivors),
                    str(Difference(one.difference, one.low, one.high)) if one.difference else "0",
                )
                for one in rows_of(played)
            ],
            left=3,
        )
    end = pairs.iloc[-1]
    lines += [
        *("## What common rows are worth", ""),
        f"At the end the standard error of a difference between two plans is {end['paired_se']:.2g} with common rows "
        f"and {end['unpaired_se']:.2g} with rows of each one's own (medians over {end['pairs']:.0f} pairs); to be as "
        f"sure with rows of their own would take {end['rows_factor']:.0f} times as many.",
    ]
    lines += _table(
        ("Step", "common rows", "rows of their own", "rows it would take"),
        [
            (str(one.step), f"{one.paired_se:.2g}", f"{one.unpaired_se:.2g}", f"x {one.rows_factor:.0f}")
            for one in rows_of(pairs)
        ],
    )
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))
