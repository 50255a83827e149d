"""How far forecasts of the order after distillation can be trusted: more plans, budgets, seeds and steps, two models.

    python -m benchmarks.evidence_plans --out reports/evidence
    python -m benchmarks.evidence --out reports/evidence --jobs jobs.json --model reference --budget small --seeds 0,1,2
    python -m benchmarks.outcomes jobs.json --work DIR --out outcomes.jsonl --device cuda --workers 4
    python -m benchmarks.evidence --out reports/evidence --lines outcomes.jsonl

The second command writes what is missing as jobs; the last appends what they found to outcomes.csv (a row per plan,
seed and look) and to rows.parquet (the losses of all held-out rows at the looks that are compared), and draws the page.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.evidence_page import write_page
from benchmarks.outcomes import Job, read_lines
from prune_lab.runtime import write_frame, write_json

STEPS = {"small": 2000, "base": 800, "tiny": 800}
TOGETHER = 4  # plans of one job
COMPARED = (0, 100, 300, 800, 2000)  # steps at which the losses of all rows are kept
UNIT = ["model", "budget", "plan_id", "seed"]


def study(model: str, budget: str) -> str:
    """What the lines of these jobs are known by."""
    return f"evidence {model} {budget}"


def jobs_of(plans: pd.DataFrame, done: pd.DataFrame, seeds: Sequence[int], steps: int) -> list[Job]:
    """What is not in ``done``, of the ``plans`` of one model and budget, four plans at a time."""
    (model,), (budget,) = plans["model"].unique(), plans["budget"].unique()
    found: list[Job] = []
    for seed in seeds:
        there = set(done.loc[(done["seed"] == seed) & (done["step"] >= steps), "plan_id"])
        missing = plans[~plans["plan_id"].isin(there)]
        named = dict(zip(missing["plan"], missing["removed"], strict=True))
        names = list(named)
        for first in range(0, len(names), TOGETHER):
            some = {name: named[name] for name in names[first : first + TOGETHER]}
            found.append(Job(study(model, budget), model, some, seed, steps))
    return found


def read_outcomes(out: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(outcomes.csv, rows.parquet) of ``out``; empty ones where they are not there."""
    table, rows = out / "outcomes.csv", out / "rows.parquet"
    empty = pd.DataFrame(columns=[*UNIT, "step"])
    return (
        pd.read_csv(table, dtype={"plan_id": str}) if table.is_file() else empty,
        pd.read_parquet(rows) if rows.is_file() else empty,
    )


def frames_of(lines: Sequence[Mapping[str, Any]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(a row per plan, seed and look; a row per plan, seed, look that is compared and held-out row) of ``lines``."""
    looks, rows = [], []
    for line in lines:
        kind, *rest = line["study"].split()
        if kind != "evidence" or line["status"] == "failed":
            continue
        model, budget = rest
        unit = {"model": model, "budget": budget, "plan_id": line["plan_id"], "seed": line["seed"]}
        said = {name: line[name] for name in ("plan", "teacher", "device", "torch")}
        for text, losses in line["losses"].items():
            step = int(text)
            looks.append(unit | {"step": step, "loss": sum(losses) / len(losses)} | said)
            if step in COMPARED:
                rows += [unit | {"step": step, "row": row, "loss": loss} for row, loss in enumerate(losses)]
    return pd.DataFrame(looks), pd.DataFrame(rows)


def merged(before: pd.DataFrame, more: pd.DataFrame, key: Sequence[str]) -> pd.DataFrame:
    """Both, in a fixed order; of rows with the same key the later one."""
    parts = [one for one in (before, more) if len(one)]
    if not parts:
        return before
    every = pd.concat(parts, ignore_index=True).drop_duplicates(list(key), keep="last")
    return every.sort_values(list(key), ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=Path)
    parser.add_argument("--lines", type=Path)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--budget", default="small")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=0, help="default: 2,000 of small, 800 of the others")
    arguments = parser.parse_args()
    outcomes, rows = read_outcomes(arguments.out)
    if arguments.jobs:
        plans = pd.read_csv(arguments.out / "plans.csv", dtype={"plan_id": str})
        chosen = (plans["model"] == arguments.model) & (plans["budget"] == arguments.budget)
        same = (outcomes["model"] == arguments.model) & (outcomes["budget"] == arguments.budget)
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
        steps = arguments.steps or STEPS[arguments.budget]
        jobs = jobs_of(plans[chosen], outcomes[same], seeds, steps)
        write_json(arguments.jobs, [dataclasses.asdict(job) for job in jobs])
        return
    if arguments.lines:
        looks, own = frames_of(read_lines(arguments.lines))
        outcomes, rows = merged(outcomes, looks, [*UNIT, "step"]), merged(rows, own, [*UNIT, "step", "row"])
        write_frame(arguments.out / "outcomes.csv", outcomes)
        rows.astype({"loss": "float32", "row": "int16", "step": "int16", "seed": "int16"}).to_parquet(
            arguments.out / "rows.parquet", index=False
        )
    write_page(arguments.out)


if __name__ == "__main__":
    main()
