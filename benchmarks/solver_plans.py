"""A plan by every solver at equal compute, for any model and budget: what the comparison of solvers starts from.

    python -m benchmarks.solver_plans --model reference --budget "macs<=bk-small" --forwards 200 1000 --out plans

Compute is counted in forward-equivalents: multiply-adds over those of a pass of the whole model over the whole probe. A
backward pass counts as two, the fits of a repair count by their own multiply-adds, and what was measured before is
measured again for every solver. The scores of single blocks (about 22 for a U-Net), which all but random-median read,
are not in it. A solver that has used up its compute gives the best plan that it has measured; one that is at its end
before does not go on. Writes a JSON file for each plan and solver_plans.csv, a row for each when it is done; rows that
are there are not made again.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from prune_lab.blocks import Architecture, BlockGroup
from prune_lab.config import ProbeConfig, RunConfig, ScoreConfig
from prune_lab.errors import BudgetError, PruneLabError
from prune_lab.importance import ImportanceTable, ScoringContext, score
from prune_lab.plans import PruningPlan, plan_of
from prune_lab.profiling import CostTable
from prune_lab.repair import SharedRepair
from prune_lab.runtime import write_frame, write_json
from prune_lab.search import (
    Budget,
    Constraints,
    evolve_plans,
    fit_interactions,
    greedy_plan,
    learned_gates,
    local_search,
    parse_budget,
    random_median,
    sample_near,
    search_plans,
    split_budgets,
    within,
)
from prune_lab.session import Session, ensure_probe, probe_of
from prune_lab.workflow import ensure_scores, start_run
from prune_lab.workflow.objectives import Objective, OneShot, Repaired, repair_in_search
from prune_lab.workflow.searching import costs_of

COLUMNS = (
    *("model", "solver", "budget", "forwards", "seed", "plan_id", "plan", "forwards_used", "seconds"),
    *("one_shot", "repaired"),
)
_LEARNED = 0.6  # share of the compute for the plans that interactions are learnt from
_BATCH = 8  # rows of a step of learned gates
_RESTARTS = 100


class Spent(Exception):  # noqa: N818 - no error: the solver has used up its compute
    """The compute is used up."""


@dataclass(slots=True)
class Metered:
    """An ``ImpactOf`` that measures no set twice, and stops once ``limit`` forward-equivalents are used."""

    objective: Objective
    limit: float
    known: dict[frozenset[str], float] = field(default_factory=dict)

    @property
    def used(self) -> float:
        """Forward-equivalents so far."""
        return self.objective.forwards

    def __call__(self, sets: Sequence[frozenset[str]]) -> NDArray[np.float64]:
        """(sets,) impacts; raises Spent before it would go beyond the limit by more than a few sets."""
        new = [removed for removed in dict.fromkeys(sets) if removed not in self.known]
        while new:
            if self.used >= self.limit:
                raise Spent
            each = self.used / len(self.known) if self.known else self.limit / 8
            some = max(1, min(len(new), int((self.limit - self.used) / each)))
            part, new = new[:some], new[some:]
            self.known |= zip(part, self.objective(part).tolist(), strict=True)
        return np.array([self.known[removed] for removed in sets])


@dataclass(frozen=True, slots=True)
class Problem:
    """What a solver is asked."""

    session: Session
    scores: ImportanceTable
    costs: CostTable
    budgets: tuple[Budget, ...]
    forwards: float
    seed: int
    rules: Constraints = field(default_factory=Constraints)

    @property
    def architecture(self) -> Architecture:
        """The model's inventory."""
        return self.session.architecture

    @property
    def place(self) -> tuple[Architecture, CostTable, tuple[Budget, ...]]:
        """The arguments that every search takes first."""
        return self.architecture, self.costs, self.budgets

    def added_up(self, count: int = 1, diverse: int = 1) -> tuple[PruningPlan, ...]:
        """The best plans by added-up scores."""
        return search_plans(
            self.architecture, self.scores, self.costs, self.budgets, count=count, diverse=diverse
        )

    def allows(self, plan: PruningPlan) -> bool:
        """Whether the plan keeps to budgets and rules."""
        return within(plan, self.budgets, self.costs) and self.rules.allow(self.architecture, plan)


def _greedy(problem: Problem, measure: Metered) -> PruningPlan:
    return greedy_plan(*problem.place, measure).plan


def _interactions(problem: Problem, measure: Metered) -> PruningPlan:
    """As the solver of that name, with as many plans to learn from as the compute allows."""
    most = int(min(600, max(40, 8 * problem.forwards)))
    near = problem.added_up(min(48, most // 4), 2)
    drawn = sample_near(*problem.place, most - len(near), problem.seed)
    # a quarter are good ones, also where not all are measured
    mixed = [*near, *drawn]
    order = np.random.default_rng(problem.seed).permutation(len(mixed))
    learned = list({mixed[place].id: mixed[place] for place in order}.values())
    count, impacts = 0, [math.nan]
    while count < len(learned) and (count < 24 or measure.used < _LEARNED * problem.forwards):
        some = learned[: count + 8]
        impacts = measure([frozenset(plan.removed) for plan in some]).tolist()
        count = len(some)
    fit = fit_interactions(learned[:count], impacts, prior=problem.scores.block_impacts(), seed=problem.seed)
    plans = search_plans(
        problem.architecture, fit.effects, problem.costs, problem.budgets, count=4, diverse=2
    )
    again = measure([frozenset(plan.removed) for plan in plans]).tolist()
    tried = sorted(zip((*impacts, *again), (*learned[:count], *plans), strict=True), key=lambda one: one[0])
    return local_search(*problem.place, measure, tried[0][1]).plan


def _descent(problem: Problem, measure: Metered) -> PruningPlan:
    """From the best plan by added-up scores, then from random ones as long as the compute lasts."""
    found = local_search(*problem.place, measure, problem.added_up()[0])
    for start in sample_near(*problem.place, _RESTARTS, problem.seed):
        other = local_search(*problem.place, measure, start)
        found = min(found, other, key=lambda one: one.impact)
    return found.plan


def _evolution(problem: Problem, measure: Metered) -> PruningPlan:
    trials = 40 * math.ceil(min(4000, 4 * problem.forwards) / 40)
    with tempfile.TemporaryDirectory() as folder:
        points = evolve_plans(*problem.place, measure, folder=Path(folder), trials=trials, seed=problem.seed)
    return min(points, key=lambda point: point.impact).plan


MEASURING: dict[str, Callable[[Problem, Metered], PruningPlan]] = {
    "greedy": _greedy,
    "interactions": _interactions,
    "descent": _descent,
    "evolution": _evolution,
}
SOLVERS = (
    *("added-up", "random-median", "learned-gates"),
    *(f"{solver}{objective}" for solver in MEASURING for objective in ("", " repaired")),
)


def _best_so_far(problem: Problem, measure: Metered) -> PruningPlan:
    """The best measured plan within the budgets; where none is, the best way to go on from the furthest one."""
    plan_of_set = {removed: plan_of(problem.architecture, removed) for removed in measure.known}
    fitting = [(measure.known[one], plan) for one, plan in plan_of_set.items() if problem.allows(plan)]
    if fitting:
        return min(fitting, key=lambda one: one[0])[1]
    furthest = sorted(measure.known, key=lambda removed: (-len(removed), measure.known[removed]))
    for removed in furthest:
        rules = Constraints(remove=tuple(removed))
        try:
            return search_plans(
                problem.architecture, problem.scores, problem.costs, problem.budgets, constraints=rules
            )[0]
        except BudgetError:
            continue
    return problem.added_up()[0]


def _objective(session: Session, *, repaired: bool) -> Objective:
    """A fresh one: nothing that another solver has measured comes for free."""
    probe = ensure_probe(session)
    if not repaired:
        return OneShot(lambda: ScoringContext(session.model, probe))
    kind = repair_in_search(session.architecture, session.config.search.repair)
    return Repaired(lambda: SharedRepair(session.model, probe, kind=kind))


def plan_by(
    solver: str, session: Session, budget: str, forwards: float, seed: int
) -> tuple[PruningPlan, float]:
    """(the plan that ``solver`` of SOLVERS finds within ``budget``, the forward-equivalents that it used).

    ``budget`` is text, of several budgets with commas between them. The scores of the run are read, or made.
    """
    costs, architecture = costs_of(session), session.architecture
    budgets = tuple(parse_budget(text, architecture, costs) for text in split_budgets(budget))
    problem = Problem(session, ensure_scores(session), costs, budgets, forwards, seed)
    if solver == "added-up":
        return problem.added_up()[0].named(solver), 0.0
    if solver == "random-median":
        return random_median(architecture, problem.scores, costs, budgets, seed=seed), 0.0
    if solver == "learned-gates":
        _, used = _by_gates(problem, 2)  # to see what the update costs beside the model
        plan, used = _by_gates(problem, max(2, int(2 * (forwards - 1) / (used - 1))))
        return plan.named(solver), used
    name, _, objective = solver.partition(" ")
    measure = Metered(_objective(session, repaired=objective == "repaired"), forwards)
    try:
        plan = MEASURING[name](problem, measure)
    except Spent:
        plan = _best_so_far(problem, measure)
    return plan.named(solver.replace(" ", "-")), measure.used


def _by_gates(problem: Problem, steps: int) -> tuple[PruningPlan, float]:
    probe = ensure_probe(problem.session)
    found = learned_gates(
        problem.session.model,
        probe,
        problem.costs,
        problem.budgets,
        scores=problem.scores.block_impacts(),
        steps=steps,
        batch=min(_BATCH, len(probe)),
        seed=problem.seed,
    )
    return found.plans[0], found.compute.forwards / len(probe)


def judged(session: Session, plan: PruningPlan) -> dict[str, float]:
    """The impact of the plan as it is cut and after its repair, on a probe with other noise than the search's.

    The repair is fitted on the probe of the search; the other one decides what is kept of it.
    """
    probe = probe_of(session, session.config.probe.seed + 1)
    group = BlockGroup(plan.label, "plan", plan.removed)
    table = score(ScoringContext(session.model, probe), [group], bootstrap=0)
    kind = repair_in_search(session.architecture, session.config.search.repair)
    return {
        "one_shot": float(table.impacts[0]),
        "repaired": SharedRepair(session.model, ensure_probe(session), kind=kind, heldout=probe).impact(
            plan.removed
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--budget", nargs="+", default=["macs<=bk-small"])
    parser.add_argument("--forwards", nargs="+", type=float, default=[200.0, 1000.0, 5000.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS), choices=SOLVERS)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    config = RunConfig(
        model=arguments.model,
        probe=ProbeConfig(samples=arguments.samples, timesteps=8),
        score=ScoreConfig(groups=("block",), bootstrap=1),
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "solver_plans.csv"
    before = pd.read_csv(path).to_dict("records") if path.is_file() else []
    rows: list[dict[str, Any]] = [{str(name): value for name, value in row.items()} for row in before]
    session = Session(start_run(config, arguments.out / f"run-{Path(arguments.model).name}"))
    for budget in arguments.budget:
        for forwards in arguments.forwards:
            for seed in arguments.seeds:
                for solver in arguments.solvers:
                    key = {
                        "model": arguments.model,
                        "solver": solver,
                        "budget": budget,
                        "forwards": forwards,
                        "seed": seed,
                    }
                    if any(all(row[name] == value for name, value in key.items()) for row in rows):
                        continue
                    start = time.perf_counter()
                    try:
                        plan, used = plan_by(solver, session, budget, forwards, seed)
                    except PruneLabError as error:
                        print(f"{solver}, {budget}: {error}", flush=True)
                        continue
                    seconds = time.perf_counter() - start
                    found = {"plan_id": plan.id, "plan": " ".join(plan.removed), "forwards_used": used}
                    row = {**key, **found, "seconds": seconds, **judged(session, plan)}
                    name = f"{Path(arguments.model).name}-{solver}-{budget}-{forwards:g}-{seed}"
                    name = "".join(sign if sign.isalnum() or sign in "-." else "-" for sign in name)
                    write_json(arguments.out / f"{name}.json", plan.to_json())
                    rows.append(row)
                    write_frame(path, pd.DataFrame(rows, columns=list(COLUMNS)))
                    print(
                        f"{solver:<24} {budget:<18} {forwards:>6g} used {used:>7.1f} in {seconds:>6.1f} s   "
                        f"one-shot {row['one_shot']:.4f}   repaired {row['repaired']:.4f}   -{row['plan']}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
