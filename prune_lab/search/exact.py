"""The best plans under budgets and constraints: an exact 0-1 program over what can be removed.

Assumption, as in BK-SDM's block ranking and LAPTOP-Diff (arXiv:2404.11098): the impact of a plan is the sum of the
impacts of its blocks, each measured alone. It is a model, not a measurement: blocks that stand in for each other cost
more together than apart, so a plan found here is a candidate to build and measure. ``Effects`` with interactions
(see ``fit_interactions``) weaken the assumption to pairs.

Costs are no assumption: removing blocks saves parameters and multiply-adds exactly additively. The answer is the best
plan of all, to 2e-10 of the largest effect; among plans equal in that sense the cheapest comes first.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal

from prune_lab.blocks import Architecture
from prune_lab.errors import BudgetError, ConfigError
from prune_lab.plans import PruningPlan
from prune_lab.profiling import COUNTED, CostTable, Metric
from prune_lab.search.budgets import Budget, number_text, unreachable
from prune_lab.search.constraints import Constraints
from prune_lab.search.effects import Effects, Scores, effects_from
from prune_lab.search.program import LinearBound, Program
from prune_lab.search.results import FrontPoint, undominated
from prune_lab.search.space import Removed, spaces_of

NATIVE = Constraints()


def search_plans(
    architecture: Architecture,
    importance: Scores,
    costs: CostTable,
    budgets: Sequence[Budget],
    *,
    count: int = 1,
    diverse: int = 1,
    constraints: Constraints = NATIVE,
) -> tuple[PruningPlan, ...]:
    """The ``count`` plans of least predicted impact within all ``budgets`` and ``constraints``, best first.

    Any two of them differ in at least ``diverse`` blocks (removed by one and not the other): each is the best of those
    that are so far from the ones before it. Of plans with equal impact the one with the lower cost (the first budget's
    metric, MACs without budgets) comes first. Fewer plans come back when fewer exist. Plans are named after the
    budget, as in ``search-params-bk-small-1``. Raises BudgetError with the smallest reachable cost and the rule that
    binds when no plan meets the budgets, DataError when a block has no score, and what bad constraints raise.
    """
    if count < 1 or diverse < 1:
        raise ConfigError(
            f"asked for {count} plans that differ in {diverse} blocks; give at least 1 for both"
        )
    effects = effects_from(importance)
    _check_known(architecture, effects)
    programs = [Program(space, effects) for space in spaces_of(architecture, costs, budgets, constraints)]
    metric = budgets[0].metric if budgets else "macs"
    plans: list[PruningPlan] = []
    while len(plans) < count:
        cuts = [LinearBound(frozenset(plan.removed), diverse) for plan in plans]
        best = _best(programs, effects, budgets, metric, cuts)
        if best is None:
            break
        plans.append(best.named(_plan_name(budgets, len(plans) + 1)))
    if not plans:
        raise _explain_impossible(architecture, costs, budgets, constraints)
    assert all(constraints.allow(architecture, plan) for plan in plans), "a level has options that are none"
    return tuple(plans)


def sweep_plans(
    architecture: Architecture,
    importance: Scores,
    costs: CostTable,
    shares: Sequence[float],
    *,
    metric: Metric = "macs",
    budgets: Sequence[Budget] = (),
    constraints: Constraints = NATIVE,
) -> tuple[FrontPoint, ...]:
    """The best plans for a series of budgets from one set of scores, cheapest first, without the dominated ones.

    ``shares`` are limits of ``metric`` relative to the teacher's (0.66 is 66 %); ``budgets`` hold besides at all of
    them. Shares that no plan reaches are skipped, plans found twice listed once. Raises BudgetError when no share
    can be reached, and what ``search_plans`` raises.
    """
    if not shares or not all(math.isfinite(share) and share > 0 for share in shares):
        raise ConfigError(
            f"asked for a sweep over the shares {list(shares)}; give numbers above 0, as in 0.5, 0.6, 0.7"
        )
    effects = effects_from(importance)
    _check_known(architecture, effects)
    programs = [Program(space, effects) for space in spaces_of(architecture, costs, budgets, constraints)]
    total = costs.total.amount(metric)
    points = []
    swept = [_share_of(total, share, metric) for share in sorted(set(shares))]
    for budget in swept:
        best = _best(programs, effects, [budget, *budgets], metric, ())
        if best is not None:
            plan = best.named(_plan_name([budget, *budgets]))
            points.append(FrontPoint(plan, effects.of(plan.removed), costs.of(plan).amounts()))
    if not points:
        raise _explain_impossible(architecture, costs, [swept[-1], *budgets], constraints)
    return undominated(points, [metric])


def check_reachable(
    architecture: Architecture,
    costs: CostTable,
    budgets: Sequence[Budget],
    *,
    constraints: Constraints = NATIVE,
) -> None:
    """Raise BudgetError, with the smallest reachable cost, when no plan meets all ``budgets`` and ``constraints``.

    Needs no scores: which plans exist and what they cost does not depend on them.
    """
    if not _reaches(_scoreless(architecture, costs, constraints), budgets):
        raise _explain_impossible(architecture, costs, budgets, constraints)


def _best(
    programs: Sequence[Program],
    effects: Effects,
    budgets: Sequence[Budget],
    metric: Metric,
    cuts: Sequence[LinearBound],
) -> PruningPlan | None:
    """The plan of least impact in any of the programs, and of its equals the cheapest; None when there is none."""
    best: tuple[Program, Removed] | None = None
    for program in programs:
        found = _best_in(program, effects, budgets, metric, cuts)
        if found is not None and (best is None or _beats(program, found, *best, effects, metric)):
            best = program, found
    return None if best is None else best[0].space.plan(best[1])


def _beats(
    program: Program, found: Removed, other: Program, best: Removed, effects: Effects, metric: Metric
) -> bool:
    """Whether ``found`` has less impact than ``best``, or as much at a lower cost."""
    less = effects.of(best) - effects.of(found)
    if abs(less) <= min(program.resolution, other.resolution):
        return program.amount(found, metric) < other.amount(best, metric)
    return less > 0


def _best_in(
    program: Program, effects: Effects, budgets: Sequence[Budget], metric: Metric, cuts: Sequence[LinearBound]
) -> Removed | None:
    """The plan of least impact of one program, and of its equals the cheapest."""
    best = program.least(program.objective, budgets, cuts)
    if best is None:
        return None
    other = program.cheapest(metric, budgets, cuts, [program.ceiling(best)])
    if other is None or program.amount(other, metric) >= program.amount(best, metric):
        return best
    return other if effects.of(other) <= effects.of(best) + program.resolution else best


def _check_known(architecture: Architecture, effects: Effects) -> None:
    for pair in effects.interactions:
        for block in pair:
            architecture.block(block)


def _share_of(total: float, share: float, metric: Metric) -> Budget:
    percent = f"{100 * share:.6g}"
    limit = Decimal(percent) * Decimal(total) / 100
    return Budget(metric, math.floor(limit) if metric in COUNTED else float(limit), f"{metric}<={percent}%")


def _plan_name(budgets: Sequence[Budget], number: int | None = None) -> str:
    asked = [re.sub(r"[^\w.]+", "-", budget.text.replace("%", "pct")).strip("-") for budget in budgets]
    return "-".join(["search", *asked, *([] if number is None else [str(number)])])


# Why there is none --------------------------------------------------------------------------------------------


def _scoreless(architecture: Architecture, costs: CostTable, constraints: Constraints) -> list[Program]:
    zero = Effects({block.name: 0.0 for block in architecture.named})
    return [Program(space, zero) for space in spaces_of(architecture, costs, (), constraints)]


def _reaches(programs: Sequence[Program], budgets: Sequence[Budget]) -> bool:
    """Whether there is a plan within the budgets."""
    return any(program.least(program.objective, budgets) is not None for program in programs)


def _without(name: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(other for other in names if other != name)


def _relaxed(constraints: Constraints) -> Iterator[tuple[str, Constraints]]:
    """The constraints with one rule less, and that rule in words."""
    for name in constraints.keep:
        yield f"keep {name}", dataclasses.replace(constraints, keep=_without(name, constraints.keep))
    for name in constraints.remove:
        yield f"remove {name}", dataclasses.replace(constraints, remove=_without(name, constraints.remove))
    for quota in constraints.quotas:
        fewer = tuple(other for other in constraints.quotas if other != quota)
        yield f"quota {quota.text}", dataclasses.replace(constraints, quotas=fewer)
    if constraints.least_resnets:
        yield f"least_resnets {constraints.least_resnets}", dataclasses.replace(constraints, least_resnets=0)
    if constraints.longest_run is not None:
        yield f"longest_run {constraints.longest_run}", dataclasses.replace(constraints, longest_run=None)
    if constraints.form != "own":
        yield f"form {constraints.form}", dataclasses.replace(constraints, form="own")


def _smallest(
    architecture: Architecture,
    costs: CostTable,
    constraints: Constraints,
    metric: Metric,
    others: Sequence[Budget],
) -> int | float | None:
    """The least of ``metric`` that a plan within ``others`` reaches, None when there is no such plan."""
    found = [
        program.amount(removed, metric)
        for program in _scoreless(architecture, costs, constraints)
        if (removed := program.cheapest(metric, others)) is not None
    ]
    return min(found, default=None)


def _binding(
    architecture: Architecture,
    costs: CostTable,
    constraints: Constraints,
    budget: Budget,
    others: Sequence[Budget],
    reached: float | None,
) -> str:
    """The one rule whose absence helps most, in words; empty when no single rule does."""
    helped: list[tuple[bool, float, str]] = []
    for text, fewer in _relaxed(constraints):
        less = _smallest(architecture, costs, fewer, budget.metric, others)
        if less is not None and (reached is None or less < reached):
            helped.append((less > budget.limit, less, text))
    if not helped:
        return ""
    _, less, text = min(helped)
    return f"; {text} binds: without it {budget.metric} {number_text(less)} could be reached"


def _explain_impossible(
    architecture: Architecture, costs: CostTable, budgets: Sequence[Budget], constraints: Constraints
) -> BudgetError:
    """What was asked, the smallest that can be reached, which rule binds, and what would work."""
    kind = "native plan" if constraints.form == "native" else "plan"
    programs = _scoreless(architecture, costs, constraints)
    if not _reaches(programs, ()):
        return _contradiction(architecture, costs, constraints, kind)
    index = next(i for i in range(len(budgets)) if not _reaches(programs, budgets[: i + 1]))
    budget, others = budgets[index], budgets[:index]
    reached = _smallest(architecture, costs, constraints, budget.metric, others)
    assert reached is not None  # the budgets before this one can be met together
    total = costs.total.amount(budget.metric)
    among = f" within {' and '.join(other.text for other in others)}" if others else ""
    binds = _binding(architecture, costs, constraints, budget, others, reached)
    return unreachable(budget, kind, among, reached, total, binds)


def _contradiction(
    architecture: Architecture, costs: CostTable, constraints: Constraints, kind: str
) -> BudgetError:
    """No plan keeps to the rules, whatever it costs."""
    alone = []
    for text, fewer in _relaxed(constraints):
        if _reaches(_scoreless(architecture, costs, fewer), ()):
            alone.append(text)
    rules = " and ".join(text for text, _ in _relaxed(constraints))
    remedy = f"leave out {' or '.join(alone)}" if alone else "give fewer rules"
    return BudgetError(f"asked for a {kind} with {rules}, found none, whatever it costs; {remedy}")
