"""Depth, width and both, at equal multiply-adds and at equal measured latency, on both shipped models; with controls.

`python -m benchmarks.width --work DIR --out reports/width` takes hours on two cores and resumes. At each budget stand
the best plan of whole blocks, of widths and of both by their scores, widths by magnitude and by chance, and blocks by
chance; each is distilled with one seed, those of the middle budget with three. Then the plans of widths and of both
that take as long as the plan of whole blocks, measured in turns. The page says what was found.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from benchmarks.rows import rows_of
from prune_lab.blocks import Architecture
from prune_lab.config import RunConfig, with_settings
from prune_lab.errors import BudgetError
from prune_lab.families import Site
from prune_lab.importance import score_units
from prune_lab.importance.intervals import Floats
from prune_lab.plans import PruningPlan, plan_of, read_plans
from prune_lab.profiling import CostTable, Service, cost_table, time_plans
from prune_lab.runs import open_run
from prune_lab.runtime import write_frame, write_json, write_text
from prune_lab.search import (
    ANY_PLAN,
    Budget,
    depth_and_width,
    narrowed_to,
    parse_budget,
    random_median,
    search_plans,
)
from prune_lab.session import Session, run_scoring_context
from prune_lab.workflow import ensure_scores, run_all, start_run

MODELS = ("reference", "transformer")
BUDGETS = (80, 65, 50)  # percent of the multiply-adds
REPEATED, SEEDS = 65, (0, 1, 2)
WAYS = ("depth", "width", "both", "width-magnitude", "width-random", "depth-random")
TIMED = ("width", "both")  # that are also brought to the latency of depth
COLUMNS = (
    *("model", "seed", "way", "equal", "budget", "plan_id", "macs", "params", "latency_change"),
    *("impact", "loss_before", "loss_after", "teacher_loss", "steps"),
)


def settings(model: str, seed: int, steps: int, plans: Sequence[Path]) -> RunConfig:
    """Those of one run, as in the demo of the reference model, but for the number of steps."""
    return with_settings(
        RunConfig(model=model),
        {
            "probe.samples": 96,
            "score.groups": ("block",),
            "search.budgets": (),
            "search.controls": tuple(map(str, plans)) or ("auto",),
            "distill.steps": steps,
            "distill.learning_rate": 2e-4,
            "distill.warmup": min(20, steps),
            "distill.ema_decay": 0.98,
            "distill.seed": seed,
            "distill.checkpoint_every": 50,
            "distill.validate_every": max(1, steps // 3),
            "evaluate.prompts": ("fluent emoji, fox", "twemoji emoji, green salad"),
            "evaluate.steps": 20,
        },
    )


# Plans ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Bench:
    """The scores and costs of one model, from which all plans are made."""

    session: Session
    costs: CostTable
    units: Mapping[str, Mapping[Site, Floats]]  # by criterion

    @property
    def architecture(self) -> Architecture:
        return self.session.architecture

    def plan(self, way: str, percent: float) -> PruningPlan:
        """The plan of one way with at most ``percent`` of the multiply-adds. Raises BudgetError where there is none."""
        costs, importance = self.costs, ensure_scores(self.session)
        budget: Budget = parse_budget(f"macs<={percent:g}%", self.architecture, costs)
        if way == "depth":
            found = search_plans(self.architecture, importance, costs, (budget,), constraints=ANY_PLAN)[0]
        elif way == "depth-random":
            found = random_median(self.architecture, importance, costs, (budget,), ANY_PLAN)
        elif way == "both":
            found = depth_and_width(costs, importance.block_impacts(), self.units["gate-fisher"], [budget])
        else:
            units = self.units[way.removeprefix("width").removeprefix("-") or "gate-fisher"]
            found = narrowed_to(costs, plan_of(self.architecture, ()), units, "macs", budget.limit)
        return found.built("own")

    def latency(self, plan: PruningPlan, rounds: int) -> float:
        """Time of a forward pass over the teacher's: the median of the ratios within a round."""
        turns = time_plans(
            self.architecture,
            {plan.id: plan},
            Service("cpu", "float32"),
            rounds=rounds,
            model=self.session.model,
        )
        change = turns.compared()[plan.id].change
        assert change is not None
        return 1 + change.change

    def as_fast(self, way: str, wanted: float, rounds: int) -> PruningPlan:
        """The plan of ``way`` that takes ``wanted`` of the teacher's time, found by halving the budget six times."""
        low, high, best = 5.0, 100.0, (np.inf, self.plan(way, 50))
        for _ in range(6):
            percent = (low + high) / 2
            try:
                plan = self.plan(way, percent)
            except BudgetError:
                low = percent
                continue
            found = self.latency(plan, rounds)
            best = min(best, (abs(found - wanted), plan), key=lambda one: one[0])
            low, high = (low, percent) if found > wanted else (percent, high)
        return best[1]


def bench_of(model: str, folder: Path, steps: int) -> Bench:
    """The scores of ``model``, kept in ``folder``."""
    session = Session(start_run(settings(model, 0, steps, ()), folder))
    ensure_scores(session)
    context = run_scoring_context(session)
    units = {
        name: score_units(context, criterion=name).impacts for name in ("gate-fisher", "magnitude", "random")
    }
    return Bench(session, cost_table(session.architecture, tokens=session.source.tokens), units)


def plans_of(model: str, work: Path, steps: int, rounds: int) -> dict[str, Path]:
    """The files of all plans of ``model`` by name, such as ``both-macs-65``; those that are there already stay."""
    folder = work / model / "plans"
    done = folder / "done.json"
    if not done.is_file():
        bench = bench_of(model, work / model / "scores", steps)
        left_out: dict[str, str] = {}

        def keep(name: str, make: Callable[[], PruningPlan]) -> None:
            path = folder / f"{name}.json"
            if not path.is_file():
                try:
                    write_json(path, make().named(name).to_json())
                except BudgetError as error:
                    left_out[name] = str(error)

        for percent in BUDGETS:
            for way in WAYS:
                keep(f"{way}-macs-{percent}", functools.partial(bench.plan, way, percent))
            first = folder / f"depth-macs-{percent}.json"
            if first.is_file():
                (depth,) = read_plans(str(first), bench.architecture)
                wanted = bench.latency(depth, rounds)
                for way in TIMED:
                    keep(f"{way}-latency-{percent}", functools.partial(bench.as_fast, way, wanted, rounds))
        write_json(done, left_out)
    return {path.stem: path for path in sorted(folder.glob("*.json")) if path != done}


# Outcomes ------------------------------------------------------------------------------------------------------------


def outcomes(model: str, seed: int, folder: Path, names: Sequence[str]) -> pd.DataFrame:
    """One row per plan of a finished run, columns COLUMNS; plans that are the same have a row each."""
    ranking = pd.read_csv(open_run(folder, must_exist=True).ranking)
    teacher, students = ranking.iloc[0], ranking.iloc[1:].set_index("plan_id")
    rows = []
    for path in sorted((folder / "plans").glob("*.json")):
        plan = json.loads(path.read_text())
        for name in plan.get("names", []):
            if name in names and plan["id"] in students.index:
                way, equal, budget = name.rsplit("-", 2)
                row = students.loc[plan["id"]]
                costs = (
                    row["macs"] / teacher["macs"],
                    row["params"] / teacher["params"],
                    row["latency_change"],
                )
                losses = (
                    row["impact_one_shot"],
                    row["loss_before"],
                    row["loss_after"],
                    teacher["loss_after"],
                )
                rows.append((model, seed, way, equal, int(budget), plan["id"], *costs, *losses, row["steps"]))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def study(work: Path, steps: int, rounds: int, models: Sequence[str]) -> pd.DataFrame:
    """All outcomes; every run is gone on with where it was stopped."""
    found = []
    for model in models:
        plans = plans_of(model, work, steps, rounds)
        for seed in SEEDS:
            names = [name for name in plans if seed == SEEDS[0] or name.endswith(f"-{REPEATED}")]
            folder = work / model / f"seed-{seed}"
            run_all(settings(model, seed, steps, [plans[name] for name in names]), folder)
            found.append(outcomes(model, seed, folder, names))
    return pd.concat(found, ignore_index=True)


# The page ------------------------------------------------------------------------------------------------------------


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds by model, equal cost, budget and way, with the spread of the distilled loss."""
    by = frame.groupby(["model", "equal", "budget", "way"], sort=False)
    columns = ["macs", "params", "latency_change", "impact", "loss_before", "loss_after", "teacher_loss"]
    table = by[columns].mean()
    table["spread"], table["seeds"] = by["loss_after"].agg(np.ptp), by["seed"].nunique()
    return table.reset_index().sort_values(
        ["model", "equal", "budget"], ascending=[True, False, False], kind="stable"
    )


def verdicts(table: pd.DataFrame) -> list[str]:
    """Which way has the least loss after distillation at each budget, in words."""
    lines = []
    for (model, equal, budget), rows in table.groupby(["model", "equal", "budget"], sort=False):
        ranked = rows.sort_values("loss_after")
        if len(ranked) > 1:
            best, second = ranked.iloc[0], ranked.iloc[1]
            lines.append(
                f"- {model}, equal {equal}, {budget} %: {best['way']} ({best['loss_after']:.4f}), then {second['way']} "
                f"({second['loss_after']:.4f}); the teacher has {best['teacher_loss']:.4f}."
            )
    return lines


def page(frame: pd.DataFrame, steps: int) -> str:
    """The report in Markdown."""
    table = summary(frame)
    lines = [
        "# Depth, width or both",
        "",
        f"Made by `python -m benchmarks.width`: {steps} steps of distillation, float32 on the CPU "
        f"({torch.get_num_threads()} threads), means over seeds where there are several. Equal macs: each plan leaves "
        "at most that share of the multiply-adds. Equal latency: plans that take as long as the plan of whole blocks.",
        "",
        *verdicts(table),
        "",
        "| model | equal | budget | way | MACs | params | time | impact | loss, pruned | distilled | seeds (spread) |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row.model} | {row.equal} | {row.budget} % | {row.way} | {row.macs:.3f} | {row.params:.3f} | "
        f"{1 + row.latency_change:.3f} | {row.impact:.4f} | {row.loss_before:.4f} | {row.loss_after:.4f} | "
        f"{row.seeds} ({row.spread:.4f}) |"
        for row in rows_of(table)
    ]
    return "\n".join([*lines, "", "![Distilled loss against multiply-adds and against time](fronts.png)", ""])


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Distilled loss over the teacher's against multiply-adds, and against measured time; a line for each way."""
    models = list(dict.fromkeys(frame["model"]))
    figure = Figure(figsize=(9, 3.6 * len(models)), layout="constrained")
    axes = np.atleast_2d(figure.subplots(len(models), 2))
    rows = frame.assign(time=1 + frame["latency_change"], more=frame["loss_after"] - frame["teacher_loss"])
    for line, model in zip(axes, models, strict=True):
        for axis, column in zip(line, ("macs", "time"), strict=True):
            ordered = rows[rows["model"] == model].sort_values(column)
            for way, points in ordered.groupby("way", sort=False):
                axis.plot(points[column], points["more"], "o-", label=way, linewidth=1, markersize=4)
            axis.set_xlabel(f"{column} left, of the teacher's")
            axis.set_ylabel("distilled loss over the teacher's")
            axis.set_title(model, fontsize=9)
        line[0].legend(fontsize=7)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs; resumable")
    parser.add_argument("--out", type=Path, help="folder of width.csv, README.md and fronts.png")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=20, help="of the measurements of latency")
    parser.add_argument("--models", default=",".join(MODELS))
    arguments = parser.parse_args()
    frame = study(arguments.work, arguments.steps, arguments.rounds, arguments.models.split(","))
    print(page(frame, arguments.steps))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_frame(arguments.out / "width.csv", frame)
        write_text(arguments.out / "README.md", page(frame, arguments.steps))
        draw(frame, arguments.out / "fronts.png")


if __name__ == "__main__":
    main()
