"""Every solver of the search on one question, at equal compute where they measure: who finds the least impact?

The exact solver measures nothing; the evolution gets as many plans as the solver with interactions takes. Prints the
measured impact of each one's plan on the probe it searched with and with other noise, the plans measured, and seconds.
Controls at the same budget stand beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import pandas as pd

from benchmarks.rows import rows_of
from prune_lab.blocks import BlockGroup
from prune_lab.config import ProbeConfig, RunConfig, ScoreConfig, SearchConfig
from prune_lab.importance import ImportanceTable, ScoringContext, score
from prune_lab.plans import PruningPlan
from prune_lab.session import Session, ensure_probe, probe_of
from prune_lab.workflow import ensure_plans, start_run
from prune_lab.workflow.searching import searched

CONTROLS = ("bk-small", "uniform", "random-median", "lowest-one-shot", "similarity")


def found_by(session: Session) -> dict[str, PruningPlan]:
    """The run's plans by the name they were found under."""
    plans = {plan.id: plan for plan in ensure_plans(session)}
    rows = searched(session.run)
    return {row.name: plans[row.plan_id] for row in rows_of(rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--budget", default="macs<=bk-small, params<=bk-small")
    parser.add_argument("--samples", type=int, default=32)
    arguments = parser.parse_args()
    config = RunConfig(
        model=arguments.model,
        probe=ProbeConfig(samples=arguments.samples, timesteps=8),
        score=ScoreConfig(groups=("block",), bootstrap=1),
    )
    spent, names = 400, {"exact": CONTROLS, "interactions": (), "greedy": (), "evolution": ()}
    print(f"{arguments.model}, {arguments.budget}: impact on {arguments.samples} rows, and with other noise")
    with tempfile.TemporaryDirectory() as folder:
        for solver, controls in names.items():
            search = SearchConfig(
                budgets=(arguments.budget,), solver=solver, controls=controls or ("bk-small",), trials=spent
            )
            run = start_run(dataclasses.replace(config, search=search), Path(folder) / solver)
            session = Session(run)
            plans = {
                name: plan
                for name, plan in found_by(session).items()
                if controls or not name.startswith("bk-small")
            }
            (row,) = pd.read_csv(run.searches).to_dict("records")
            if solver == "interactions":
                spent = max(80, int(row["sets_measured"]))
            groups = [BlockGroup(name, "plan", plan.removed) for name, plan in plans.items()]
            tables: list[ImportanceTable] = [
                score(ScoringContext(session.model, probe), groups, bootstrap=0)
                for probe in (ensure_probe(session), probe_of(session, config.probe.seed + 1))
            ]
            for group, here, there in zip(groups, *(table.impacts for table in tables), strict=True):
                by_solver = group.name.startswith(("search-", f"{solver}-"))
                cost = (
                    f"{row['sets_measured']:>4} measured, {row['seconds']:>6.1f} s"
                    if by_solver
                    else "control"
                )
                print(f"  {group.name:<58} {here:.4f}  {there:.4f}   {cost}", flush=True)


if __name__ == "__main__":
    main()
