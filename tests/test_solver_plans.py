"""The entry point of the comparison of solvers: every solver answers, within budget and compute."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import BuiltOnce

from benchmarks.solver_plans import SOLVERS, Metered, Spent, plan_by
from prune_lab.config import RunConfig
from prune_lab.plans import is_native
from prune_lab.profiling import cost_table
from prune_lab.runs import open_run
from prune_lab.workflow import Session, ensure_scores, start_run


@pytest.fixture(scope="session")
def scored(built_once: BuiltOnce, small_run_config: Callable[..., RunConfig]) -> Path:
    config = small_run_config(probe={"samples": 6, "timesteps": 3}, score={"groups": ("block",)})
    return built_once("scored-alone", lambda folder: ensure_scores(Session(start_run(config, folder))))


QUICK = ("added-up", "random-median")


@pytest.mark.parametrize(
    "solver", [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in SOLVERS]
)
def test_every_solver_answers_within_budget_and_compute(solver: str, scored: Path, tmp_path: Path) -> None:
    shutil.copytree(scored, tmp_path / "run")
    session = Session(open_run(tmp_path / "run", must_exist=True))
    plan, used = plan_by(solver, session, "macs<=75%", 12, seed=1)
    costs = cost_table(session.architecture)
    assert costs.of(plan).macs <= 0.75 * costs.total.macs
    assert is_native(session.architecture, plan)
    assert plan.name == solver.replace(" ", "-")
    assert (used == 0) == (solver in ("added-up", "random-median"))
    assert used < 12 + 8  # a few sets may be begun before it is seen that they take too much
    again, _ = plan_by(solver, session, "macs<=75%", 12, seed=1)
    assert again.id == plan.id


class Counting:
    """Each set costs one forward-equivalent."""

    def __init__(self) -> None:
        self.forwards = 0.0

    def __call__(self, sets: list[frozenset[str]]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        self.forwards += len(sets)
        return np.arange(float(len(sets)))


def test_measuring_stops_when_the_compute_is_used_up() -> None:
    objective = Counting()
    measure = Metered(objective, 10)  # type: ignore[arg-type]
    sets = [frozenset([str(number)]) for number in range(14)]
    assert len(measure(sets[:6])) == 6
    assert len(measure(sets[:6])) == 6
    assert measure.used == 6
    with pytest.raises(Spent):
        measure(sets)
    assert measure.used == len(measure.known) == 10
