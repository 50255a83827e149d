"""The best plans under a budget: an exact 0-1 program over what can be removed natively.

Assumption, as in BK-SDM's block ranking and LAPTOP-Diff (arXiv:2404.11098): the impact of a plan is the sum of the
impacts of its blocks, each measured alone. It is a model, not a measurement: blocks that stand in for each other cost
more together than apart, so a plan found here is a candidate to build and measure.

Costs are no assumption: removing blocks saves parameters and multiply-adds exactly additively. So with one variable
per option of each level of resolution (``plans.native_choices``) the search is a multiple-choice knapsack:

    minimise  sum impact_o x_o   with  sum_{o in level} x_o = 1,   sum saving_o x_o >= total - limit,   x_o in {0, 1}

solved by HiGHS to gap 0. Its arithmetic is floating point, so every answer is checked in exact integers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from prune_lab.blocks import Architecture
from prune_lab.errors import BudgetError, DataError, PruneLabError
from prune_lab.importance import ImportanceTable
from prune_lab.plans import PruningPlan, native_choices, parse_plan, plan_of
from prune_lab.profiling import CostTable, PlanCost

Metric = Literal["params", "macs", "paper_macs"]
METRICS: tuple[Metric, ...] = get_args(Metric)

_SUFFIXES = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_OPTIMAL, _INFEASIBLE = 0, 2  # scipy.optimize.milp's status

# HiGHS stops at an absolute gap of 1e-6: objectives are scaled to this size so that the gap is 1e-10 of the largest.
_SCALE = 1e4


# Budgets ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that a plan may leave of one cost: ``metric`` of the student <= ``limit``."""

    metric: Metric
    limit: int
    text: str  # as it was asked for

    def allows(self, cost: PlanCost) -> bool:
        """Whether a student of that cost is within the budget."""
        return int(getattr(cost, self.metric)) <= self.limit


def parse_budget(text: str, architecture: Architecture, costs: CostTable) -> Budget:
    """The budget that ``text`` describes: ``macs<=66%``, ``params<=482346884``, ``macs<=150G``, ``params<=bk-small``.

    On the left params, macs (attention products included) or paper_macs (without them); on the right a share of the
    teacher's, a number (k, M, G, T are powers of 1000), or a plan whose cost is the limit. Raises BudgetError for
    anything else.
    """
    match = re.fullmatch(r"\s*([\w-]+)\s*<=\s*(.+?)\s*", text)
    metric = match[1].replace("-", "_") if match else ""
    if not match or metric not in METRICS:
        raise BudgetError(
            f"cannot read the budget {text!r}; write {', '.join(METRICS[:-1])} or {METRICS[-1]}, then <= and a "
            "share, a number or a plan, for example 'macs<=66%', 'params<=482346884' or 'params<=bk-small'"
        )
    value = match[2]
    if share := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", value):
        total = int(getattr(costs.total, metric))
        limit = math.floor(Decimal(share[1]) * total / 100)
    elif number := re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?)\s*([kKMGT]?)", value):
        limit = math.floor(Decimal(re.sub("[_,]", "", number[1])) * _SUFFIXES[number[2]])
    else:
        try:
            plan = parse_plan(value, architecture)
        except PruneLabError as error:
            raise BudgetError(
                f"cannot read {value!r} in the budget {text!r} as a share or a number, and as a plan: {error}"
            ) from None
        limit = int(getattr(costs.of(plan), metric))
    return Budget(cast(Metric, metric), limit, f"{metric}<={value}")


# The program -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Option:
    """One set of blocks that can leave a level natively, and what that does."""

    level: int
    blocks: frozenset[str]
    impact: float
    savings: dict[Metric, int]


def _impact_of(blocks: Sequence[str], impacts: dict[str, float]) -> float:
    missing = [block for block in blocks if block not in impacts]
    if missing:
        raise DataError(
            f"asked for the impact of removing {', '.join(blocks)}, found no score of {', '.join(missing)}; "
            "score all single blocks of this model first"
        )
    # Correctly rounded, so that the order of the blocks cannot break a tie between plans.
    return math.fsum(impacts[block] for block in blocks)


def predicted_impact(plan: PruningPlan, importance: ImportanceTable) -> float:
    """The additive prediction of a plan's impact: the sum of the impacts of its blocks, each measured alone.

    Raises DataError when a block of the plan has no score.
    """
    return _impact_of(plan.removed, importance.block_impacts())


def _options(architecture: Architecture, impacts: dict[str, float], costs: CostTable) -> tuple[_Option, ...]:
    whole = costs.total
    options = []
    for level, choices in enumerate(native_choices(architecture)):
        for blocks in choices:
            if any(architecture.block(name).starred for name in blocks):
                continue  # scored by a stand-in, but the network does not close without it
            plan = plan_of(architecture, blocks)
            # The cost of the plan and not of its blocks: samplers leave with an inner stage.
            left = costs.of(plan)
            savings = {metric: int(getattr(whole, metric) - getattr(left, metric)) for metric in METRICS}
            options.append(_Option(level, blocks, _impact_of(plan.removed, impacts), savings))
    return tuple(options)


@dataclass(frozen=True, slots=True)
class _Program:
    """The knapsack: options, the teacher's costs, and what HiGHS needs of both."""

    options: tuple[_Option, ...]
    totals: dict[Metric, int]

    @classmethod
    def of(cls, architecture: Architecture, impacts: dict[str, float], costs: CostTable) -> _Program:
        whole = costs.total
        totals = {metric: int(getattr(whole, metric)) for metric in METRICS}
        return cls(_options(architecture, impacts, costs), totals)

    def blocks(self, chosen: Sequence[int]) -> list[str]:
        return [name for index in chosen for name in self.options[index].blocks]

    def cost(self, chosen: Sequence[int], metric: Metric) -> int:
        return self.totals[metric] - sum(self.options[index].savings[metric] for index in chosen)

    def impact(self, chosen: Sequence[int]) -> float:
        return math.fsum(self.options[index].impact for index in chosen)

    def meets(self, chosen: Sequence[int], budgets: Sequence[Budget]) -> bool:
        return all(self.cost(chosen, budget.metric) <= budget.limit for budget in budgets)

    def impacts(self) -> NDArray[np.float64]:
        """(options,) impacts, the largest of size _SCALE."""
        impacts = np.array([option.impact for option in self.options])
        return impacts / (np.abs(impacts).max() or 1.0) * _SCALE

    def savings(self, metric: Metric) -> NDArray[np.float64]:
        """(options,) shares of the teacher's cost that each option saves, times _SCALE."""
        saved = np.array([option.savings[metric] for option in self.options], dtype=np.float64)
        return saved * (_SCALE / self.totals[metric])


def _solve(
    program: _Program,
    objective: NDArray[np.float64],
    budgets: Sequence[Budget],
    cuts: Sequence[Sequence[int]],
    extra: Sequence[LinearConstraint] = (),
) -> tuple[int, ...] | None:
    """The choice of least ``objective``, one option per level, within the budgets and not among ``cuts``.

    None when there is none. A choice that is over a budget by less than the solver's tolerance is cut too and the
    program solved again, so what comes back is within every budget in exact integers.
    """
    levels = np.array([option.level for option in program.options])
    one_each = (levels == np.arange(levels.max() + 1)[:, None]).astype(np.float64)
    constraints = [LinearConstraint(one_each, 1, 1), *extra]
    for budget in budgets:
        total = program.totals[budget.metric]
        needed = (total - budget.limit) * (_SCALE / total)
        constraints.append(LinearConstraint(program.savings(budget.metric)[None, :], needed, np.inf))
    excluded = [tuple(cut) for cut in cuts]
    while True:
        no_goods = []
        for cut in excluded:  # not all of these options together again
            row = np.zeros((1, len(program.options)))
            row[0, list(cut)] = 1.0
            no_goods.append(LinearConstraint(row, -np.inf, len(cut) - 1))
        answer = milp(
            objective,
            integrality=np.ones(len(program.options)),
            bounds=Bounds(0, 1),
            constraints=[*constraints, *no_goods],
            options={"mip_rel_gap": 0.0},
        )
        if answer.status == _INFEASIBLE:
            return None
        if answer.status != _OPTIMAL:
            raise RuntimeError(f"HiGHS stopped without an answer: {answer.message}")
        chosen = tuple(int(index) for index in np.flatnonzero(answer.x > 0.5))
        if program.meets(chosen, budgets):
            return chosen
        excluded.append(chosen)


def _cheaper_equal(
    program: _Program,
    chosen: tuple[int, ...],
    metric: Metric,
    budgets: Sequence[Budget],
    cuts: Sequence[Sequence[int]],
) -> tuple[int, ...]:
    """The cheapest of all choices whose impact is that of ``chosen``, which itself may be it."""
    impacts = program.impacts()
    ceiling = LinearConstraint(impacts[None, :], -np.inf, float(impacts[list(chosen)].sum()))
    # Closer than this is rounding: impacts are sums of floats.
    rounding = 1e-12 * max(abs(option.impact) for option in program.options)
    tried: list[Sequence[int]] = list(cuts)
    while True:
        other = _solve(program, -program.savings(metric), budgets, tried, [ceiling])
        if other is None or program.cost(other, metric) >= program.cost(chosen, metric):
            return chosen
        if program.impact(other) <= program.impact(chosen) + rounding:
            return other
        tried.append(other)  # within the solver's tolerance of a tie, but no tie


def _explain_impossible(program: _Program, budgets: Sequence[Budget]) -> BudgetError:
    """What was asked, the smallest that can be reached, and what would work."""
    index = next(
        index
        for index in range(len(budgets))
        if _solve(program, program.impacts(), budgets[: index + 1], ()) is None
    )
    budget, others = budgets[index], budgets[:index]
    smallest = _solve(program, -program.savings(budget.metric), others, ())
    assert smallest is not None  # the budgets before this one can be met together
    reached, total = program.cost(smallest, budget.metric), program.totals[budget.metric]
    share = math.ceil(Decimal(reached) * 1000 / total) / 10
    within = f" within {' and '.join(other.text for other in others)}" if others else ""
    return BudgetError(
        f"asked for {budget.text} (at most {budget.limit:,}){within}; the smallest native plan{within} has "
        f"{budget.metric} {reached:,} of {total:,}; give {budget.metric}<={reached} or {budget.metric}<={share}%"
    )


def check_reachable(architecture: Architecture, costs: CostTable, budgets: Sequence[Budget]) -> None:
    """Raise BudgetError, with the smallest reachable cost, when no native plan meets all ``budgets`` at once.

    Needs no scores: which plans exist and what they cost does not depend on them.
    """
    program = _Program.of(architecture, {block.name: 0.0 for block in architecture.blocks}, costs)
    if _solve(program, program.impacts(), budgets, ()) is None:
        raise _explain_impossible(program, budgets)


def _plan_name(budgets: Sequence[Budget], number: int) -> str:
    asked = [re.sub(r"[^\w.]+", "-", budget.text.replace("%", "pct")).strip("-") for budget in budgets]
    return "-".join(["search", *asked, str(number)])


def search_plans(
    architecture: Architecture,
    importance: ImportanceTable,
    costs: CostTable,
    budgets: Sequence[Budget],
    *,
    count: int = 1,
) -> tuple[PruningPlan, ...]:
    """The ``count`` native plans of least predicted impact that meet all ``budgets`` at once, best first.

    Of plans with equal impact the one with the lower cost (the first budget's metric, MACs without budgets) comes
    first. Blocks that cannot be removed never appear. Fewer plans come back when fewer exist. Plans are named after the
    budget, as in ``search-params-bk-small-1``. Raises BudgetError with the smallest reachable cost when no plan
    meets the budgets, DataError when a block has no score.
    """
    program = _Program.of(architecture, importance.block_impacts(), costs)
    metric = budgets[0].metric if budgets else "macs"
    plans: list[PruningPlan] = []
    found: list[tuple[int, ...]] = []
    while len(found) < count:
        chosen = _solve(program, program.impacts(), budgets, found)
        if chosen is None:
            break
        chosen = _cheaper_equal(program, chosen, metric, budgets, found)
        found.append(chosen)
        plan = plan_of(architecture, program.blocks(chosen), _plan_name(budgets, len(found)))
        assert all(budget.allows(costs.of(plan)) for budget in budgets), "costs are not additive over levels"
        plans.append(plan)
    if not plans:
        raise _explain_impossible(program, budgets)
    return tuple(plans)
