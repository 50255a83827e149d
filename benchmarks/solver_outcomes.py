"""What the plans of all solvers are worth after the same short distillation, and the page on it.

    python -m benchmarks.solver_plans --model reference --budget "macs<=bk-small" --seeds 0 1 2 --out DIR
    python -m benchmarks.solver_outcomes --out reports/solvers --plans DIR --jobs jobs.json
    python -m benchmarks.outcomes jobs.json --work WORK --out outcomes.jsonl --workers 1
    python -m benchmarks.solver_outcomes --out reports/solvers --lines outcomes.jsonl

The second command puts the rows of ``DIR/solver_plans.csv`` into plans.csv and writes the plans that have no outcome
as jobs, each plan once, whichever solvers found it; the last puts what they found into outcomes.csv (a row per plan,
training seed and look) and rows.parquet (the losses of all held-out rows at the last look), and draws the page.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.outcome_tables import append_tables, frames_of_study, in_parts, merged, read_tables
from benchmarks.outcomes import Job, read_lines
from benchmarks.solver_outcomes_page import write_page
from prune_lab.runtime import write_frame, write_json

TOGETHER = 4  # plans of one job
ASKED = ["model", "budget", "forwards", "solver", "seed"]  # what tells rows of plans.csv from each other
UNIT = ["model", "plan_id", "seed"]
SAID = ("teacher", "seconds", "device", "torch", "diffusers")
SETTINGS: Mapping[str, Any] = {"repair.kind": "best"}  # as a run trains a plan by itself


def read_plans_of(out: Path) -> pd.DataFrame:
    """plans.csv of ``out``, a row per solver, budget, compute and seed; empty where it is not there."""
    path = out / "plans.csv"
    return pd.read_csv(path, dtype={"plan_id": str}) if path.is_file() else pd.DataFrame(columns=ASKED)


def add_plans(out: Path, folders: Sequence[Path]) -> pd.DataFrame:
    """plans.csv of ``out`` with the rows of solver_plans.csv in ``folders``."""
    table = read_plans_of(out)
    for folder in folders:
        more = pd.read_csv(folder / "solver_plans.csv", dtype={"plan_id": str})
        table = merged(table, more, ASKED)
    write_frame(out / "plans.csv", table)
    return table


def jobs_of(plans: pd.DataFrame, done: pd.DataFrame, seeds: Sequence[int], steps: int) -> list[Job]:
    """The distinct ``plans`` that are not in ``done``, some at a time, all with one seed before the next."""
    found: list[Job] = []
    for seed in seeds:
        for model, own in plans.drop_duplicates(["model", "plan_id"]).groupby("model", sort=False):
            same = (done["model"] == model) & (done["seed"] == seed) & (done["step"] >= steps)
            missing = own[~own["plan_id"].isin(set(done["plan_id"][same]))]
            named = {
                name: "-" + text.replace(" ", " -")
                for name, text in zip(missing["plan_id"], missing["plan"], strict=True)
            }
            looks = max(1, steps // 3)
            found += [
                Job(f"solvers {model}", str(model), some, seed, steps, looks, SETTINGS)
                for some in in_parts(named, TOGETHER)
            ]
    return found


def frames_of(lines: Sequence[Mapping[str, Any]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(a row per plan, seed and look, a row per plan, seed and held-out row at the last look) of ``lines``."""
    return frames_of_study(lines, "solvers", lambda line: {name: line[name] for name in UNIT}, SAID)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--plans", type=Path, nargs="+", default=[], help="folders of benchmarks.solver_plans"
    )
    parser.add_argument("--jobs", type=Path, help="write what is missing as jobs of benchmarks.outcomes")
    parser.add_argument("--lines", type=Path, help="read what benchmarks.outcomes wrote")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the distillation")
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    plans = add_plans(arguments.out, arguments.plans)
    if arguments.jobs:
        done, _ = read_tables(arguments.out, UNIT)
        jobs = jobs_of(plans, done, arguments.seeds, arguments.steps)
        write_json(arguments.jobs, [dataclasses.asdict(job) for job in jobs])
        return
    if arguments.lines:
        append_tables(arguments.out, UNIT, *frames_of(read_lines(arguments.lines)))
    write_page(arguments.out)


if __name__ == "__main__":
    main()
