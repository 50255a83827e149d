"""The page and figure of ``benchmarks.solver_outcomes``, from the tables of its folder alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.evidence_page import tau
from benchmarks.outcome_tables import made_on
from benchmarks.paired import INTERVAL, by_seed, compared, counts, shown, verdict
from benchmarks.rows import rows_of
from prune_lab.runtime import write_text

DEFAULT = "added-up"  # what a run searches with: the solver `exact`, by added-up scores
CASE = ["model", "budget", "forwards"]


def completed(plans: pd.DataFrame) -> pd.DataFrame:
    """``plans`` with the default's plan at every compute and seed of its model and budget: it depends on neither."""
    default = plans[plans["solver"] == DEFAULT].drop_duplicates(["model", "budget"])
    cases = plans[[*CASE, "seed"]].drop_duplicates()
    everywhere = cases.merge(default.drop(columns=["forwards", "seed"]), on=["model", "budget"])
    return pd.concat([everywhere, plans[plans["solver"] != DEFAULT]], ignore_index=True)


def differences(plans: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """A row per model, budget, compute and solver whose plans were all distilled: the loss against the default's.

    Beside it the means over the solver's seeds of both impacts and of the compute, and how many plans it found; plans
    are paired by the solver's seed, the losses of a plan are the mean over training seeds.
    """
    last = rows[rows["step"] == rows.groupby("model")["step"].transform("max")]
    losses = last.groupby(["model", "plan_id", "row"], as_index=False)["loss"].mean()
    plans, found = completed(plans), []
    for case, some in plans.groupby(CASE):
        by_solver = {}
        for solver, own in some.groupby("solver", sort=False):
            joined = own.merge(losses, on=["model", "plan_id"])
            if set(joined["seed"]) == set(own["seed"]):
                by_solver[str(solver)] = by_seed(joined)
        if DEFAULT in by_solver:
            found.append(compared(by_solver, DEFAULT, **dict(zip(CASE, case, strict=True))))
    if not found:
        return pd.DataFrame(columns=[*CASE, "name"])
    by = plans.rename(columns={"solver": "name"}).groupby([*CASE, "name"], sort=False)
    means = by[["one_shot", "repaired", "forwards_used"]].mean()
    means["plans"] = by["plan_id"].nunique()
    return pd.concat(found, ignore_index=True).merge(
        means.reset_index(), on=[*CASE, "name"], validate="one_to_one"
    )


def table_lines(table: pd.DataFrame) -> Iterator[str]:
    """A line per solver of one model, budget and compute, the best first."""
    yield "| solver | forwards | plans (seeds) | impact in one shot | repaired | loss | less the default's | rank |"
    yield "| --- |" + " ---: |" * 7
    for row in rows_of(table.sort_values("rank", kind="stable")):
        yield (
            f"| {row.name} | {row.forwards_used:.0f} | {row.plans} ({row.seeds}) | {row.one_shot:.4f} | "
            f"{row.repaired:.4f} | {row.loss:.4f} | {shown(row, DEFAULT)} | {row.rank} |"
        )


def count_lines(table: pd.DataFrame) -> Iterator[str]:
    """How often each solver ended below and above the default."""
    yield "| solver | below | no difference to be told | above | mean difference |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for row in rows_of(counts(table, DEFAULT)):
        yield f"| {row.Index} | {row.lower} | {row.tie} | {row.higher} | {row.difference:+.4f} |"


def agreement_lines(plans: pd.DataFrame, rows: pd.DataFrame) -> Iterator[str]:
    """How the impacts of the distinct plans of a model and budget agree with their losses (Kendall's tau-b)."""
    last = rows[rows["step"] == rows.groupby("model")["step"].transform("max")]
    losses = last.groupby(["model", "plan_id"], as_index=False)["loss"].mean()
    joined = plans.drop_duplicates(["model", "budget", "plan_id"]).merge(losses, on=["model", "plan_id"])
    for (model, budget), some in joined.groupby(["model", "budget"], sort=False):
        if len(some) > 4:
            found = [tau(some[name].to_numpy(), some["loss"].to_numpy()) for name in ("one_shot", "repaired")]
            yield (
                f"- {model}, {budget}, {len(some)} plans: impact in one shot {found[0]:.2f}, after the repair "
                f"{found[1]:.2f}."
            )


def page(plans: pd.DataFrame, outcomes: pd.DataFrame, rows: pd.DataFrame) -> str:
    """The report in Markdown."""
    table = differences(plans, rows)
    lasts = {str(model): int(some["step"].max()) for model, some in rows.groupby("model", sort=False)}
    steps = ", ".join(f"{model} {last} steps" for model, last in lasts.items())
    seeds = ", ".join(map(str, sorted(set(outcomes["seed"]))))
    lines = [
        "# Which solver?",
        "",
        "Made by `python -m benchmarks.solver_plans` (plans, at equal compute in forward-equivalents; impacts on a "
        f"probe that no search has seen) and `python -m benchmarks.solver_outcomes` (losses; {made_on(outcomes)}; "
        f"{steps} after the repair that a run makes by itself, training seeds {seeds}). The default of a run, `exact`, "
        f"is here `{DEFAULT}`: it needs the scores of the blocks alone, which all but `random-median` read and which "
        "are not counted. A plan is distilled once, whichever solvers found it.",
        "",
        f"Losses are held-out, {rows['row'].nunique()} rows; the means over a solver's seeds, which are the seeds of "
        f"the pairs. {INTERVAL} Bold: below the default's beyond its interval.",
        "",
        verdict(table, DEFAULT, "solver") if len(table) else "Nothing can be compared so far.",
        "",
    ]
    if table["forwards"].nunique() > 1:
        for compute, some in table.groupby("forwards"):
            lines += [f"- With {compute:g} forward-equivalents: {verdict(some, DEFAULT, 'solver')}"]
    if table["name"].nunique() > 1:
        lines += ["", *count_lines(table)]
    if agreement := list(agreement_lines(plans, rows)):
        about = "How impacts agree with the loss after the distillation (tau-b; few plans, chosen by these impacts):"
        lines += ["", about, "", *agreement]
    for (model, budget, forwards), some in table.groupby(CASE):
        lines += ["", f"## {model}, {budget}, {forwards:g} forward-equivalents", "", *table_lines(some)]
    waiting = plans[["model", "plan_id"]].drop_duplicates()
    waiting = waiting.merge(rows[["model", "plan_id"]].drop_duplicates(), how="left", indicator=True)
    left = int((waiting["_merge"] == "left_only").sum())
    if left:
        lines += [
            "",
            f"Not distilled yet: {left} of {len(waiting)} plans; solvers that found them are left out.",
        ]
    if len(table):
        lines += ["", "![Loss after the distillation less that of the default](solvers.png)"]
    return "\n".join([*lines, ""])


def draw(plans: pd.DataFrame, rows: pd.DataFrame) -> Figure:
    """The difference of each solver from the default: a panel per model and budget, a colour per compute."""
    table = differences(plans, rows)
    table = table[table["name"] != DEFAULT]
    cases = list(table.groupby(["model", "budget"], sort=False))
    solvers = table.groupby("name")["difference"].mean().sort_values(ascending=False).index
    places = {name: place for place, name in enumerate(solvers)}
    figure = Figure(figsize=(1.6 + 4.0 * len(cases), 0.32 * len(solvers) + 1.2), layout="constrained")
    panels = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    for panel, ((model, budget), own) in zip(panels, cases, strict=True):
        for shift, (forwards, some) in enumerate(own.groupby("forwards")):
            at = [places[name] + 0.2 * shift for name in some["name"]]
            ends = np.array([some["difference"] - some["low"], some["high"] - some["difference"]])
            panel.errorbar(
                some["difference"],
                at,
                xerr=ends,
                fmt="o",
                ms=4,
                lw=1,
                label=f"{forwards:g} forward-equivalents",
            )
        panel.axvline(0, color="gray", lw=0.8)
        panel.set(title=f"{model}, {budget}", xlabel=f"loss less that of {DEFAULT}, 95 %")
        panel.set_yticks(range(len(solvers)), solvers)
        panel.locator_params(axis="x", nbins=5)
        if own["forwards"].nunique() > 1:
            panel.legend(fontsize=7, loc="upper right")
    return figure


def write_page(out: Path) -> None:
    """README.md and solvers.png, from the tables in ``out``; nothing while there is no outcome."""
    if not (out / "rows.parquet").is_file():
        return
    plans, outcomes = (
        pd.read_csv(out / name, dtype={"plan_id": str}) for name in ("plans.csv", "outcomes.csv")
    )
    rows = pd.read_parquet(out / "rows.parquet")
    write_text(out / "README.md", page(plans, outcomes, rows))
    if len(differences(plans, rows)):
        draw(plans, rows).savefig(out / "solvers.png", dpi=100)
