"""What the plans of solvers are worth after distillation: jobs without a plan twice, and a page that says who wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import solver_outcomes_page
from benchmarks.outcome_tables import append_tables, read_tables
from benchmarks.solver_outcomes import UNIT, add_plans, frames_of, jobs_of
from benchmarks.solver_outcomes_page import completed, differences, page
from benchmarks.solver_plans import COLUMNS
from prune_lab.models import resolve_model
from prune_lab.plans import read_plans

NONE = pd.DataFrame(columns=[*UNIT, "step"])
REPORTS = Path(__file__).parent.parent / "reports"


def _plan(model: str, solver: str, seed: int, plan: str, forwards: float = 200.0) -> dict[str, Any]:
    values = (model, solver, "macs<=65%", forwards, seed, f"id-{plan}", plan, 190.0, 9.0, 0.3, 0.2)
    return dict(zip(COLUMNS, values, strict=True))


PLANS = pd.DataFrame(
    [
        _plan(model, solver, seed, plan)
        for model in ("reference", "transformer")
        for solver, seed, plan in (
            ("added-up", 0, "A1"),
            ("greedy", 0, "A2"),
            ("greedy", 1, "A3"),
            ("descent", 0, "A1"),
            ("descent", 1, "A4"),
        )
    ]
)


def _line(model: str, plan: str, losses: list[float]) -> dict[str, Any]:
    told = {"teacher": 0.3, "seconds": 9.0, "device": "cpu", "torch": "2.13", "diffusers": "0.42"}
    unit = {"study": f"solvers {model}", "model": model, "plan_id": f"id-{plan}", "seed": 0}
    return {**unit, "status": "done", "steps": 150, "losses": {"0": [1.0] * 3, "150": losses}, **told}


LOSSES = {  # of three rows; less A1's: A2 -0.02, -0.03, -0.01; A3 -0.04, -0.05, -0.03; A4 0.5
    "A1": [0.4, 0.5, 0.6],
    "A2": [0.38, 0.47, 0.59],
    "A3": [0.36, 0.45, 0.57],
    "A4": [0.9, 1.0, 1.1],
}


def _lines(
    models: tuple[str, ...] = ("reference", "transformer"), plans: str = "1234"
) -> list[dict[str, Any]]:
    return [_line(model, f"A{plan}", LOSSES[f"A{plan}"]) for model in models for plan in plans]


def test_a_plan_is_distilled_once_whoever_found_it_and_not_again(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        PLANS.to_csv(tmp_path / name / "solver_plans.csv", index=False)
    table = add_plans(tmp_path, [tmp_path / "one", tmp_path / "other"])
    assert len(table) == len(PLANS) == len(pd.read_csv(tmp_path / "plans.csv"))
    jobs = jobs_of(table, NONE, (0,), 150)
    assert [(job.study, len(job.plans)) for job in jobs] == [
        ("solvers reference", 4),
        ("solvers transformer", 4),
    ]
    assert jobs[0].plans["id-A1"] == "-A1"
    assert jobs[0].settings == {"repair.kind": "best"}
    append_tables(tmp_path, UNIT, *frames_of(_lines(("reference",), "12")))
    done, _ = read_tables(tmp_path, UNIT)
    found = jobs_of(table, done, (0,), 150)
    assert [sorted(job.plans) for job in found] == [["id-A3", "id-A4"], ["id-A1", "id-A2", "id-A3", "id-A4"]]
    assert [len(job.plans) for job in jobs_of(table, done, (0,), 300)] == [4, 4]


def test_the_plan_of_a_job_is_that_of_its_row() -> None:
    ranked = pd.read_csv(REPORTS / "ranking" / "plans.csv").rename(columns={"name": "solver"})
    ranked["plan"] = ranked["plan"].str.replace("-", "")  # as solver_plans.csv has it
    architecture = resolve_model("reference").architecture
    for job in jobs_of(ranked.assign(model="reference"), NONE, (0,), 150):
        for plan_id, text in job.plans.items():
            (plan,) = read_plans(text, architecture)
            assert plan.id == plan_id


def test_solvers_are_compared_with_the_default_by_their_seeds() -> None:
    _, rows = frames_of(_lines())
    table = differences(PLANS, rows)
    own = table[table["model"] == "reference"].set_index("name")
    assert own["seeds"].to_dict() == {"added-up": 2, "greedy": 2, "descent": 2}
    assert own["plans"].to_dict() == {"added-up": 1, "greedy": 2, "descent": 2}
    # greedy: means of rows -0.03, -0.04, -0.02, of seeds -0.02 and -0.04: variance 0.0001/3 + 0.0002/2, 1.75 degrees
    assert abs(own.loc["greedy", "difference"] + 0.03) < 1e-6
    assert own.loc["greedy", "direction"] == "tie"
    assert abs(own.loc["descent", "difference"] - 0.25) < 1e-6
    assert own["rank"].to_dict() == {"added-up": 2, "greedy": 1, "descent": 3}


def test_the_default_stands_at_every_compute_and_seed() -> None:
    more = pd.DataFrame([_plan("reference", "greedy", 3, "A2", 1000.0)])
    own = completed(pd.concat([PLANS, more], ignore_index=True))
    own = own[(own["model"] == "reference") & (own["solver"] == "added-up")]
    assert sorted(zip(own["forwards"], own["seed"], strict=True)) == [(200.0, 0), (200.0, 1), (1000.0, 3)]


def test_the_page_says_who_wins_on_both_models(tmp_path: Path) -> None:
    same = PLANS.replace({"plan_id": {"id-A2": "id-A3"}})  # greedy finds one plan with every seed
    outcomes, rows = frames_of(_lines())
    text = page(same, outcomes, rows)
    assert (
        "**`greedy` ends below `added-up` beyond its interval in all 2 cases of reference and transformer.**"
        in text
    )
    # the variance is over rows alone: 0.0001 / 3, 2 degrees of freedom, 4.302653 * 0.0057735 = 0.0248
    assert "| greedy | 190 | 1 (2) | 0.3000 | 0.2000 | 0.4600 | **-0.0400 [-0.0648, -0.0152]** | 1 |" in text
    assert "| greedy | 2 | 0 | 0 | -0.0400 |" in text
    assert "**No solver ends below `added-up`" in page(PLANS, outcomes, rows)
    solver_outcomes_page.write_page(tmp_path)  # no outcome, no page
    append_tables(tmp_path, UNIT, outcomes, rows)
    assert not (tmp_path / "README.md").is_file()
    PLANS.to_csv(tmp_path / "plans.csv", index=False)
    solver_outcomes_page.write_page(tmp_path)
    assert (tmp_path / "solvers.png").is_file()


def test_a_solver_whose_plans_are_not_all_distilled_is_left_out() -> None:
    outcomes, rows = frames_of(_lines(plans="124"))
    text = page(PLANS, outcomes, rows)
    assert "greedy" not in text
    assert "Not distilled yet: 2 of 8 plans; solvers that found them are left out." in text
    assert json.dumps(sorted(differences(PLANS, rows)["name"].unique())) == '["added-up", "descent"]'


def test_one_model_decides_nothing() -> None:
    outcomes, rows = frames_of(_lines(("reference",)))
    assert "No solver is decided on: only reference was compared so far." in page(PLANS, outcomes, rows)
