"""What a search gains over the hand design: one comparison over several runs that differ in the distillation's seed.

    prune-lab run --config seed0.toml --run RUN0    # and so on; same plans, other [distill] seed
    python -m benchmarks.search_outcomes RUN0 RUN1 RUN2 --out reports/search

Reads the runs' tables alone and computes nothing anew. Writes outcomes.csv (a row per plan: costs, impact, loss before
and after, the mean over the seeds with its 95 % t interval), paired.csv (each plan against the BK plan of its budget,
paired by seed), figures, and README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy.stats import kendalltau, spearmanr
from scipy.stats import t as student_t

from benchmarks.rows import rows_of
from prune_lab.blocks import Architecture
from prune_lab.config import load_config
from prune_lab.importance import importance_from_frame
from prune_lab.models import resolve_model
from prune_lab.plans import PruningPlan, plan_from_json
from prune_lab.profiling import cost_table
from prune_lab.report import LIGHT, PlanRow, block_map_frame, draw_plan_maps, plan_styles
from prune_lab.report.figures import PlanStyle, freeze_layout, new_figure, save_png, style_axes
from prune_lab.runs import Run, open_run
from prune_lab.runtime import read_json, write_frame, write_text
from prune_lab.search import FrontPoint, predicted_impact, sweep_plans

SHARES = np.linspace(0.35, 0.98, 22)
COSTS = (("macs", "multiply-adds"), ("params", "parameters"), ("latency_ms", "latency (ms), as measured"))


def interval(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, float, float]:
    """Mean and 95 % t interval; no interval for a single value."""
    mean = float(values.mean())
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    half = float(student_t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
    return mean, mean - half, mean + half


def budget_of(plans: pd.DataFrame, plan_id: str) -> str:
    """The BK plan whose budget a plan was found for, or which it is."""
    rows = plans[plans["plan_id"] == plan_id]
    for text in [*rows["budget"], *rows["name"]]:
        for name in ("bk-base", "bk-small", "bk-tiny"):
            if name in str(text):
                return name
    return ""


def outcomes(runs: list[Run]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(a row per plan, a row per plan and seed)."""
    rankings = []
    for run in runs:
        frame = pd.read_csv(run.ranking)
        rankings.append(frame.assign(seed=load_config(run.config).distill.seed))
    every = pd.concat(rankings, ignore_index=True)
    searched = pd.read_csv(runs[0].searched, dtype=str, keep_default_na=False)
    rows = []
    for plan_id, group in every[every["origin"] != "teacher"].groupby("plan_id", sort=False):
        first = group.iloc[0]
        after = interval(group["loss_after"].to_numpy())
        rows.append(
            {
                "plan": first["plan"],
                "plan_id": plan_id,
                "origin": first["origin"],
                "budget": budget_of(searched, str(plan_id)),
                "blocks_removed": int(first["blocks_removed"]),
                "params": int(first["params"]),
                "macs": int(first["macs"]),
                "latency_ms": float(group["median_ms"].median()),
                "impact": float(first["impact_one_shot"]),
                "loss_before": float(first["loss_before"]),
                "seeds": len(group),
                **dict(zip(("loss_after", "loss_low", "loss_high"), after, strict=True)),
            }
        )
    return pd.DataFrame(rows), every


def paired(table: pd.DataFrame, every: pd.DataFrame) -> pd.DataFrame:
    """Each plan's loss after distillation less that of the BK plan of its budget, paired by seed."""
    by_seed = every.pivot_table(index="seed", columns="plan_id", values="loss_after")
    rows = []
    for budget, group in table.groupby("budget", sort=False):
        names = {row.plan_id: row.plan.split(" = ") for row in rows_of(group)}
        control = next((plan_id for plan_id, parts in names.items() if budget in parts), None)
        if control is None:
            continue
        own = group.set_index("plan_id")
        for plan_id in group["plan_id"]:
            if plan_id == control:
                continue
            mean, low, high = interval((by_seed[plan_id] - by_seed[control]).to_numpy())
            verdict = "tie"
            if high < 0 or low > 0:
                verdict = "better" if high < 0 else "worse"
            rows.append(
                {
                    "budget": budget,
                    "plan": own.loc[plan_id, "plan"],
                    "plan_id": plan_id,
                    "params_of_control": own.loc[plan_id, "params"] / own.loc[control, "params"],
                    "macs_of_control": own.loc[plan_id, "macs"] / own.loc[control, "macs"],
                    "difference": mean,
                    "low": low,
                    "high": high,
                    "verdict": verdict,
                }
            )
    return pd.DataFrame(rows)


def draw_fronts(
    table: pd.DataFrame,
    fronts: dict[str, tuple[FrontPoint, ...]],
    styles: dict[str, PlanStyle],
    folder: Path,
) -> None:
    """Impact and loss after distillation against each cost; the line is the additive front of that cost alone."""
    figure = new_figure(LIGHT, 12, 7)
    axes = figure.subplots(2, len(COSTS))
    for column, (cost, label) in enumerate(COSTS):
        for row, (quality, name) in enumerate(
            (("impact", "measured impact"), ("loss_after", "loss after distillation"))
        ):
            panel: Axes = axes[row, column]
            style_axes(panel, LIGHT, title=name if column == 0 else "", grid="both")
            if quality == "impact" and cost in fronts:
                points = [(float(point.costs[cost]), point.impact) for point in fronts[cost]]  # type: ignore[index]
                panel.plot(
                    *zip(*points, strict=True), color=LIGHT.muted, lw=1, label="additive front, predicted"
                )
            for one in rows_of(table):
                style = styles[one.plan_id]
                x, y = getattr(one, cost), getattr(one, quality)
                if quality == "loss_after":
                    panel.vlines(x, one.loss_low, one.loss_high, color=style.color, lw=1.5)
                panel.scatter(x, y, color=style.color, marker=style.marker, s=36, zorder=3, label=one.plan)
            if quality == "impact":
                panel.set_yscale("log")
            panel.set_xlabel(label)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    save_png(figure, folder / "fronts.png", freeze_layout(figure))


def draw_additivity(
    table: pd.DataFrame, predicted: list[float], styles: dict[str, PlanStyle], folder: Path
) -> None:
    """The measured impact of each plan over the sum of its blocks' scores."""
    figure = new_figure(LIGHT, 6, 3.4)
    axes = figure.subplots()
    style_axes(axes, LIGHT, title="Measured over added-up impact", grid="y")
    for place, (one, added) in enumerate(zip(rows_of(table), predicted, strict=True)):
        style = styles[one.plan_id]
        axes.scatter(place, one.impact / added, color=style.color, marker=style.marker, s=40)
    axes.axhline(1, color=LIGHT.muted, lw=1, ls="--")
    axes.set_xticks(
        range(len(table)), table["plan"].str.split(" = ").str[0], rotation=40, ha="right", fontsize=7.5
    )
    save_png(figure, folder / "additivity.png", freeze_layout(figure))


def page(
    table: pd.DataFrame, pairs: pd.DataFrame, searches: pd.DataFrame, model: str, steps: int, seeds: list[int]
) -> str:
    """README.md."""
    lines = [
        f"# Searched plans against BK-SDM's, {model}",
        "",
        f"Every plan was distilled for {steps} steps with the seeds {', '.join(map(str, seeds))}; losses are on "
        "held-out rows that neither scores nor searches have seen. Intervals are 95 % t intervals over the seeds; "
        "differences are paired by seed. Device, format and versions: environment.json.",
        "",
        "| Plan | for the budget of | parameters | multiply-adds | impact | loss before | after |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in rows_of(table):
        spread = "" if np.isnan(one.loss_low) else f" [{one.loss_low:.4f}, {one.loss_high:.4f}]"
        lines.append(
            f"| {one.plan} | {one.budget} | {one.params:,} | {one.macs:,} | {one.impact:.4f} | {one.loss_before:.4f} | "
            f"{one.loss_after:.4f}{spread} |"
        )
    lines += [
        "",
        "| Budget | Plan | parameters / BK's | multiply-adds / BK's | loss after, less BK's | verdict |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    lines += [
        f"| {one.budget} | {one.plan} | {one.params_of_control:.3f} | {one.macs_of_control:.3f} | "
        f"{one.difference:+.4f} [{one.low:+.4f}, {one.high:+.4f}] | {one.verdict} |"
        for one in rows_of(pairs)
    ]
    known = searches.dropna(subset=["r2"])
    for one in rows_of(known):
        lines += [
            "",
            f"For {one.budget} the solver `{one.solver}` measured {one.sets_measured} plans in {one.seconds:.0f} s. "
            f"Effects with {one.pairs:.0f} pairs predict held-out plans with R2 {one.r2:.2f} and rank correlation "
            f"{one.rank_correlation:.2f}; added-up scores alone {one.additive_r2:.2f} and "
            f"{one.additive_rank_correlation:.2f}.",
        ]
    rank = spearmanr(table["impact"], table["loss_after"]).statistic
    lines += [
        "",
        f"Over these {len(table)} plans the impact before training orders the loss after it with Spearman {rank:.2f}.",
        "",
        "![Fronts](fronts.png)",
        "",
        "![Plans](plans.png)",
        "",
        "![Additivity](additivity.png)",
        "",
    ]
    return "\n".join(lines)


def repaired(plain: Run, mended: Run, architecture: Architecture) -> pd.DataFrame:
    """A row per plan of both runs: impact on the rows that judged the repair, and losses with and without it."""
    one, other = (pd.read_csv(run.ranking).set_index("plan_id") for run in (plain, mended))
    rows = []
    for plan_id in (name for name in one.index if name in other.index and name != "teacher"):
        tried = pd.read_csv(mended.candidate(plan_id).repair)
        kept = tried[tried["applied"]]
        before = float(tried["impact_before"].dropna().iloc[0])
        rows.append(
            {
                "plan": str(one["plan"][plan_id]),
                "plan_id": plan_id,
                "repairs": len(kept),
                "impact_before": before,
                "impact_after": float(kept["impact_after"].iloc[-1]) if len(kept) else before,
                "loss_pruned": float(one["loss_before"][plan_id]),
                "loss_repaired": float(other["loss_before"][plan_id]),
                "after_plain": float(one["loss_after"][plan_id]),
                "after_repaired": float(other["loss_after"][plan_id]),
            }
        )
    return pd.DataFrame(rows)


def repair_page(mended: pd.DataFrame) -> str:
    """What repair does before and after the distillation, in words and a table."""
    after = kendalltau(mended["after_plain"], mended["after_repaired"]).statistic
    forecasts = [
        kendalltau(mended[name], mended["after_plain"]).statistic for name in ("loss_pruned", "loss_repaired")
    ]
    lines = [
        "",
        "## Repair of the cuts before the distillation",
        "",
        "The first seed again, with the cuts repaired in closed form first. Impacts are on rows that were not fitted "
        "but chose what to keep; losses are on other rows.",
        "",
        "| Plan | impact | repaired | loss, pruned | repaired | after distillation | from the repaired |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {one.plan} | {one.impact_before:.4f} | {one.impact_after:.4f} | {one.loss_pruned:.4f} | "
            f"{one.loss_repaired:.4f} | {one.after_plain:.4f} | {one.after_repaired:.4f} |"
            for one in rows_of(mended)
        ),
        "",
        f"Kendall's tau between the orders after distillation, with and without repair: {after:.2f}. With the order "
        f"after plain distillation the loss of the pruned models agrees by {forecasts[0]:.2f}, that of the repaired "
        f"ones by {forecasts[1]:.2f}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--repaired", type=Path, help="a run like the first, with repair of the cuts")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    runs = [open_run(folder, must_exist=True) for folder in arguments.runs]
    config = load_config(runs[0].config)
    architecture = resolve_model(config.model).architecture
    table, every = outcomes(runs)
    pairs = paired(table, every)
    importance = importance_from_frame(pd.read_csv(runs[0].importance, dtype={"probe": str, "model": str}))
    plans: dict[str, PruningPlan] = {
        plan_id: plan_from_json(read_json(runs[0].plan(plan_id)), architecture)
        for plan_id in table["plan_id"]
    }
    rows = [
        PlanRow(one.plan_id, one.plan.split(" = ")[0], one.origin, plans[one.plan_id].removed)
        for one in rows_of(table)
    ]
    styles = plan_styles(rows)
    arguments.out.mkdir(parents=True, exist_ok=True)
    costs, metrics = cost_table(architecture), ("macs", "params")
    fronts: dict[str, tuple[FrontPoint, ...]] = {
        metric: sweep_plans(architecture, importance, costs, list(SHARES), metric=metric)  # type: ignore[arg-type]
        for metric in metrics
    }
    draw_fronts(table, fronts, styles, arguments.out)
    predicted = [predicted_impact(plans[plan_id], importance) for plan_id in table["plan_id"]]
    draw_additivity(table, predicted, styles, arguments.out)
    frame = block_map_frame(pd.read_csv(runs[0].blocks), importance.frame())
    figure = draw_plan_maps(frame, rows, styles, LIGHT)
    save_png(figure, arguments.out / "plans.png", freeze_layout(figure))
    searches = pd.read_csv(runs[0].searches)
    write_frame(arguments.out / "outcomes.csv", table)
    write_frame(arguments.out / "paired.csv", pairs)
    write_frame(arguments.out / "searches.csv", searches)
    (arguments.out / "environment.json").write_bytes(runs[0].environment.read_bytes())
    seeds = sorted(every["seed"].unique().tolist())
    text = page(table, pairs, searches, config.model, config.distill.steps, seeds)
    if arguments.repaired:
        mended = repaired(runs[0], open_run(arguments.repaired, must_exist=True), architecture)
        write_frame(arguments.out / "repaired.csv", mended)
        text += repair_page(mended)
    write_text(arguments.out / "README.md", text)


if __name__ == "__main__":
    main()
