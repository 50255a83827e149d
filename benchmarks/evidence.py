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
from benchmarks.outcome_tables import append_tables, frames_of_study, in_parts, read_tables
from benchmarks.outcomes import Job, read_lines
from prune_lab.runtime import write_json

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
        found += [Job(study(model, budget), model, some, seed, steps) for some in in_parts(named, TOGETHER)]
    return found


def _unit_of(line: Mapping[str, Any]) -> dict[str, Any]:
    _, model, budget = line["study"].split()
    return dict(zip(UNIT, (model, budget, line["plan_id"], line["seed"]), strict=True))


def frames_of(lines: Sequence[Mapping[str, Any]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(a row per plan, seed and look; a row per plan, seed, look that is compared and held-out row) of ``lines``."""
    said, ended = ("plan", "teacher", "device", "torch"), ("done", "stopped")
    return frames_of_study(lines, "evidence", _unit_of, said, COMPARED, ended)


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
    if arguments.jobs:
        outcomes, _ = read_tables(arguments.out, UNIT)
        plans = pd.read_csv(arguments.out / "plans.csv", dtype={"plan_id": str})
        chosen = (plans["model"] == arguments.model) & (plans["budget"] == arguments.budget)
        same = (outcomes["model"] == arguments.model) & (outcomes["budget"] == arguments.budget)
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
        steps = arguments.steps or STEPS[arguments.budget]
        jobs = jobs_of(plans[chosen], outcomes[same], seeds, steps)
        write_json(arguments.jobs, [dataclasses.asdict(job) for job in jobs])
        return
    if arguments.lines:
        append_tables(arguments.out, UNIT, *frames_of(read_lines(arguments.lines)))
    write_page(arguments.out)


if __name__ == "__main__":
    main()
