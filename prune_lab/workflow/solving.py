"""The solvers by name, and the controls of a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from prune_lab.blocks import Architecture, block_groups
from prune_lab.families import Site
from prune_lab.importance import ImportanceTable, score
from prune_lab.importance.intervals import Floats
from prune_lab.plans import PruningPlan
from prune_lab.profiling import CostTable
from prune_lab.runtime import note
from prune_lab.search import (
    Budget,
    Constraints,
    Effects,
    GateResult,
    controls_at,
    depth_and_width,
    evolve_plans,
    fit_interactions,
    greedy_plan,
    learned_gates,
    local_search,
    predicted_impact,
    predicted_loss,
    sample_near,
    search_plans,
)
from prune_lab.search.interactions import LEAST_PLANS
from prune_lab.session import Session, ensure_probe, run_scoring_context
from prune_lab.workflow.objectives import Objective, one_shot
from prune_lab.workflow.timed_search import TRIES, within_time


@dataclass(frozen=True, slots=True)
class Question:
    """The input of a solver: find the best plans under these budgets and rules."""

    session: Session
    costs: CostTable
    budgets: tuple[Budget, ...]
    constraints: Constraints
    importance: ImportanceTable
    impact_of: Objective
    units: Mapping[Site, Floats] | None = None
    """What parts of blocks are worth, where blocks may become narrower."""

    @property
    def asked(self) -> str:
        """The budgets in words, with commas between them."""
        return ", ".join(budget.text for budget in self.budgets)

    @property
    def problem(self) -> tuple[Architecture, CostTable, tuple[Budget, ...]]:
        """The arguments that every solver takes first."""
        return self.session.architecture, self.costs, self.budgets


@dataclass(frozen=True, slots=True)
class SolverResult:
    """Plans, best first, the number of sets of blocks measured for them, and the solver's own statistics.

    ``forwards`` is what was run beside the measuring, in passes of the whole model over the whole probe.
    """

    plans: tuple[PruningPlan, ...]
    measured: int = 0
    forwards: float = 0.0
    statistics: Mapping[str, float] = field(default_factory=dict)
    gates: GateResult | None = None
    """What was learnt of each block, by the solver that learns gates."""


def _best(question: Question, scores: ImportanceTable | Effects) -> tuple[PruningPlan, ...]:
    """The plans of least impact by ``scores``, as many and as different as the settings ask for."""
    settings, (architecture, costs, budgets) = question.session.config.search, question.problem
    count, diverse, rules = settings.count, settings.diverse, question.constraints
    return search_plans(architecture, scores, costs, budgets, count=count, diverse=diverse, constraints=rules)


def _exact(question: Question) -> SolverResult:
    if question.units is None:
        return SolverResult(_best(question, question.importance))
    settings, blocks = question.session.config.search, question.importance.block_impacts()
    plan = depth_and_width(
        question.costs,
        blocks if "depth" in settings.axes else {},
        question.units,
        question.budgets,
        question.constraints,
        channels=settings.round_to or 1,
    )
    return SolverResult((plan,))


def _best_of_all(question: Question, plans: Sequence[PruningPlan], impacts: Floats) -> SolverResult:
    """The best of the ``plans``, which are all that there are, by their measured ``impacts``; says so."""
    settings = question.session.config.search
    number = "1 plan is" if len(plans) == 1 else f"{len(plans)} plans are"
    note(
        f"{question.asked}: {number} all that there is, too few to learn interactions from; all were measured, and the "
        "best are kept"
    )
    kept: list[PruningPlan] = []
    for place in np.argsort(impacts, kind="stable"):
        removed = set(plans[place].removed)
        if all(len(removed ^ set(one.removed)) >= settings.diverse for one in kept):
            kept.append(plans[place])
    return SolverResult(tuple(kept[: settings.count]), len(plans))


def _interactions(question: Question) -> SolverResult:
    """The exact solver with effects of pairs, learned from measured plans near the budgets; then a local search.

    A quarter of the plans that are learned from are the best additive ones: random plans alone say little about the
    good ones. The local search starts from the best plan measured so far, so it never ends worse than the additive
    optimum.
    """
    settings, (architecture, costs, budgets) = question.session.config.search, question.problem
    seed, rules = question.session.config.seed, question.constraints
    near = settings.samples // 4
    additive = search_plans(
        architecture, question.importance, costs, budgets, count=near, diverse=2, constraints=rules
    )
    drawn = sample_near(architecture, costs, budgets, settings.samples - near, seed, rules)
    learned = tuple({plan.id: plan for plan in (*additive, *drawn)}.values())
    if len(learned) < LEAST_PLANS:  # most of the best ones were drawn too, or there are no more
        drawn = sample_near(architecture, costs, budgets, settings.samples, seed, rules)
        learned = tuple({plan.id: plan for plan in (*additive, *drawn)}.values())[: settings.samples]
    impacts = question.impact_of([frozenset(plan.removed) for plan in learned])
    if len(learned) < LEAST_PLANS:
        return _best_of_all(question, learned, impacts)
    fit = fit_interactions(learned, impacts, prior=question.importance.block_impacts(), seed=seed)
    plans = _best(question, fit.effects)
    again = question.impact_of([frozenset(plan.removed) for plan in plans])
    tried = sorted(zip((*impacts, *again), (*learned, *plans), strict=True), key=lambda one: float(one[0]))
    found = local_search(architecture, costs, budgets, question.impact_of, tried[0][1], rules)
    unique = {plan.id: plan for plan in (found.plan, *plans)}
    statistics = {
        "pairs": len(fit.pairs),
        "r2": fit.r2,
        "rank_correlation": fit.rank_correlation,
        "additive_r2": fit.additive_r2,
        "additive_rank_correlation": fit.additive_rank_correlation,
    }
    kept = tuple(unique.values())[: settings.count]
    return SolverResult(kept, len(learned) + len(plans) + found.measured, statistics=statistics)


def _greedy(question: Question) -> SolverResult:
    found = greedy_plan(*question.problem, question.impact_of, question.constraints)
    return SolverResult((found.plan,), found.measured)


def _descent(question: Question) -> SolverResult:
    """A local search from the best plan by added-up scores."""
    (start,) = _best(question, question.importance)[:1]
    found = local_search(*question.problem, question.impact_of, start, question.constraints)
    return SolverResult((found.plan,), found.measured)


def _learned_gates(question: Question) -> SolverResult:
    """Gates that start from the scores of the run."""
    config, probe = question.session.config, ensure_probe(question.session)
    settings = config.search
    more: dict[str, int] = {"batch": config.score.batch} if config.score.batch else {}
    found = learned_gates(
        question.session.model,
        probe,
        question.costs,
        question.budgets,
        question.constraints,
        scores=question.importance.block_impacts(),
        steps=settings.gate_steps,
        rank=settings.gate_rank,
        rate=settings.gate_rate,
        update_rate=settings.gate_update_rate,
        count=settings.count,
        diverse=settings.diverse,
        seed=config.seed,
        **more,
    )
    return SolverResult(found.plans, forwards=found.compute.forwards / len(probe), gates=found)


def _evolution(question: Question) -> SolverResult:
    settings = question.session.config.search
    points = evolve_plans(
        *question.problem,
        question.impact_of,
        question.constraints,
        folder=question.session.run.evolution_dir,
        trials=settings.trials,
        seed=question.session.config.seed,
    )
    best = sorted(points, key=lambda point: point.impact)[: settings.count]
    return SolverResult(tuple(point.plan for point in best), settings.trials)


SOLVERS: dict[str, Callable[[Question], SolverResult]] = {
    "exact": _exact,
    "interactions": _interactions,
    "greedy": _greedy,
    "descent": _descent,
    "evolution": _evolution,
    "learned-gates": _learned_gates,
}


_MEASURES_NOTHING = "exact"  # it costs no more than the timing to ask this solver again


def tries_of(solver: str) -> int:
    """How many plans of ``solver`` are timed within a budget on latency, at most."""
    return TRIES if solver == _MEASURES_NOTHING else 1


def solved(question: Question) -> SolverResult:
    """What the solver of the settings finds; within a budget on latency its plans are timed, too (``within_time``).

    Says where these are fewer plans than the settings ask for.
    """
    settings, result = question.session.config.search, _solved(question)
    if len(result.plans) < settings.count:
        why = "; this solver gives one" if settings.solver in ("greedy", "descent") else ""
        note(
            f"{question.asked}: {settings.solver} found {len(result.plans)} of {settings.count} plans asked for{why}"
        )
    return result


def _solved(question: Question) -> SolverResult:
    name = question.session.config.search.solver
    if all(budget.metric != "latency_ms" for budget in question.budgets):
        return SOLVERS[name](question)
    found: dict[tuple[PruningPlan, ...], SolverResult] = {}

    def solve(budgets: Sequence[Budget]) -> tuple[PruningPlan, ...]:
        result = SOLVERS[name](dataclasses.replace(question, budgets=tuple(budgets)))
        return found.setdefault(result.plans, result).plans

    def loss_of(plan: PruningPlan) -> float:
        inside = 0.0 if question.units is None else predicted_loss(plan, question.units)
        return predicted_impact(plan, question.importance) + inside

    tries = tries_of(name)
    return found[within_time(question.session, question.costs, question.budgets, solve, loss_of, tries=tries)]


def controls_for(question: Question, wanted: Sequence[str]) -> list[PruningPlan]:
    """The controls named ``wanted`` for the question's budgets, named by both."""
    context = run_scoring_context(question.session)
    blocks = block_groups(question.session.architecture, "block")
    found = controls_at(
        question.session.architecture,
        question.importance,
        question.costs,
        question.budgets,
        question.constraints,
        impact_of=one_shot(question.session) if "lowest-one-shot" in wanted else None,
        similarity=score(context, blocks, "similarity", bootstrap=0) if "similarity" in wanted else None,
        seed=question.session.config.seed,
    )
    return [plan.named(f"{plan.name} {question.asked}") for plan in found if plan.name in wanted]
