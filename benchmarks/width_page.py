"""The page and the figure of ``benchmarks.width``, from its two tables alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.rows import rows_of
from prune_lab.runtime import write_text

COLOURS = {
    "depth": "tab:blue",
    "width": "tab:orange",
    "both": "tab:green",
    "width-magnitude": "tab:red",
    "width-random": "tab:purple",
    "depth-random": "tab:gray",
}
_OF_PLAN = ["model", "equal", "budget", "way"]


def summary(plans: pd.DataFrame, outcomes: pd.DataFrame) -> pd.DataFrame:
    """A row per plan that was distilled: its costs, the means of its losses over seeds, and what it lost.

    ``more`` is the distilled loss over the teacher's; ``spread`` the largest less the least of the seeds.
    """
    found = outcomes.assign(more=outcomes["loss_after"] - outcomes["teacher_loss"])
    by = found.groupby(["model", "plan"], sort=False)
    table = by[["loss_before", "loss_after", "teacher_loss", "more", "steps", "batch"]].mean()
    table["spread"], table["seeds"] = by["loss_after"].agg(np.ptp), by["seed"].nunique()
    joined = table.reset_index().merge(plans, on=["model", "plan"], validate="one_to_one")
    order = ["model", "equal", "budget", "more"]
    return joined.sort_values(order, ascending=[True, False, False, True], kind="stable", ignore_index=True)


def verdicts(table: pd.DataFrame) -> Iterator[str]:
    """Which way has the least loss after distillation at each budget, in words."""
    for (model, equal, budget), rows in table.groupby(_OF_PLAN[:3], sort=False):
        # at equal latency the plan of whole blocks is that of equal multiply-adds
        depth = table[(table["model"] == model) & (table["plan"] == f"depth-macs-{budget}")]
        ranked = rows if equal == "macs" else pd.concat([rows, depth]).sort_values("more")
        if len(ranked) < 2:
            continue
        first, *others = [
            f"{row.way} {row.more:.4f}" + (f" (spread {row.spread:.4f})" if row.seeds > 1 else "")
            for row in rows_of(ranked)
        ]
        cost = "multiply-adds" if equal == "macs" else "measured time of depth"
        yield f"- {model}, {budget} % of the multiply-adds, equal {cost}: **{first}**, then {', '.join(others)}."


def page(plans: pd.DataFrame, outcomes: pd.DataFrame) -> str:
    """The report in Markdown."""
    table = summary(plans, outcomes)
    devices = " and ".join(
        "the CPU" if one == "cpu" else f"one {one}" for one in sorted(set(outcomes["device"]))
    )
    steps, batch = (sorted({int(value) for value in table[name]}) for name in ("steps", "batch"))
    lines = [
        "# Depth, width or both",
        "",
        f"Made by `python -m benchmarks.width`: {_some(steps)} steps of distillation with {_some(batch)} samples each, "
        f"float32 on {devices}. What is said of a plan is its held-out loss after distillation over its teacher's. "
        "Depth is the best plan of whole blocks that leaves at most so many multiply-adds; equal multiply-adds: the "
        "others leave at most as many as it does; equal time: they take as long as it does, eager, measured in turns. "
        "Controls: widths by magnitude and by chance, blocks by chance.",
        "",
        *verdicts(table),
        "",
        "![Distilled loss over the teacher's, against multiply-adds and against time](fronts.png)",
        "",
        "| model | equal | budget | way | MACs | params | time | blocks gone | loss, pruned | distilled | more than "
        "the teacher's | seeds (spread) |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row.model} | {row.equal} | {row.budget} % | {row.way} | {row.macs:.3f} | {row.params:.3f} | "
        f"{row.time:.3f} | {row.blocks_removed} | {row.loss_before:.4f} | {row.loss_after:.4f} | {row.more:.4f} | "
        f"{row.seeds} ({row.spread:.4f}) |"
        for row in rows_of(table)
    ]
    return "\n".join([*lines, ""])


def _some(values: list[int]) -> str:
    return " or ".join(map(str, values))


def figure(plans: pd.DataFrame, outcomes: pd.DataFrame) -> Figure:
    """Distilled loss over the teacher's against multiply-adds, and against measured time; a line for each way."""
    table = summary(plans, outcomes)
    models = list(dict.fromkeys(table["model"]))
    drawn = Figure(figsize=(9, 3.6 * len(models)), layout="constrained")
    axes = drawn.subplots(len(models), 2, squeeze=False)
    for line, model in zip(axes, models, strict=True):
        for axis, (column, label) in zip(line, (("macs", "multiply-adds"), ("time", "time")), strict=True):
            of_model = table[table["model"] == model].sort_values(column)
            for way, colour in COLOURS.items():
                points = of_model[of_model["way"] == way]
                axis.plot(
                    points[column], points["more"], "o-", color=colour, label=way, linewidth=1, markersize=4
                )
            axis.set_xlabel(f"{label}, share of the teacher's")
            axis.set_ylabel("distilled loss over the teacher's")
            axis.set_yscale("symlog", linthresh=0.01)
            axis.set_title(model, fontsize=9)
        line[0].legend(fontsize=7)
    return drawn


def write_page(out: Path) -> None:
    """Write README.md and fronts.png of the tables in ``out``; nothing while there is no outcome."""
    if (out / "outcomes.csv").is_file():
        plans, outcomes = pd.read_csv(out / "plans.csv"), pd.read_csv(out / "outcomes.csv")
        write_text(out / "README.md", page(plans, outcomes))
        figure(plans, outcomes).savefig(out / "fronts.png", dpi=100)
