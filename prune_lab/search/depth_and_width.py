"""Blocks and widths in one 0-1 program: what to remove and what to narrow for the least loss within budgets.

One variable x_b per block, 1 when it is gone, one w_k per step of a site (``steps_of``), 1 when these units are gone,
and one y_s per group of samplers that leave together:

    minimise  sum impact_b x_b + sum loss_k w_k
    with      sum saving_b x_b + sum saving_k w_k + sum saving_s y_s >= total - limit  for each budget,
              least <= sum of the x_b of a rule <= most,
              w_k + x_b <= 1 for the steps of block b,   w_k+1 <= w_k within a site,   y_s <= x_b for its blocks.

Losses of blocks and of units must be on one scale, as output-mse of blocks and gate-fisher of units are. They add up
here, and so do the milliseconds of a latency table with what units save: what comes back is a plan to measure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias, cast

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from prune_lab.errors import BudgetError, DataError
from prune_lab.families import Site
from prune_lab.importance.intervals import Floats
from prune_lab.plans import PruningPlan, plan_of
from prune_lab.profiling import CostTable, Counted, sampler_groups
from prune_lab.search.budgets import Budget, unreachable
from prune_lab.search.constraints import ANY_PLAN, Constraints
from prune_lab.search.widths import Step, steps_of, unit_savings, widths_without

Additive: TypeAlias = Counted | Literal["latency_ms"]  # what the parts of a model add up to

_GAP = 1e-6  # of the loss: units of one site are many, and nearly alike
_TOLERANCE = 2e-6  # of the whole model's cost: more than the rounding of the solver
_INFEASIBLE = 2  # scipy.optimize.milp's status


class _Rows:
    """Rules over the variables: sums that lie between two numbers."""

    def __init__(self) -> None:
        self.places: list[tuple[int, int, float]] = []  # row, column, coefficient
        self.low: list[float] = []
        self.high: list[float] = []

    def add(self, terms: Mapping[int, float], low: float, high: float) -> None:
        """One more rule: the sum of ``terms``, coefficients by column, lies from ``low`` to ``high``."""
        self.places += [(len(self.low), column, value) for column, value in terms.items()]
        self.low.append(low)
        self.high.append(high)

    def extend(self, others: _Rows) -> None:
        """``others`` as well."""
        first = len(self.low)
        self.places += [(first + row, column, value) for row, column, value in others.places]
        self.low += others.low
        self.high += others.high

    def constraint(self, columns: int, first: int, more: float) -> LinearConstraint:
        """All of them, for so many variables; the ``first`` ones ask for ``more``."""
        rows, places, values = zip(*self.places, strict=True)
        matrix = coo_array((values, (rows, places)), shape=(len(self.low), columns))
        low = np.array(self.low)
        low[:first] += more
        return LinearConstraint(matrix.tocsc(), low, np.array(self.high))


def _check(impacts: Mapping[Site, Floats]) -> None:
    if any(not np.isfinite(values).all() or (values < 0).any() for values in impacts.values()):
        raise DataError(
            "asked to search widths, found scores of parts of blocks below 0 or not finite; score them again"
        )


class _Program:
    """The variables of a model and the rules that they keep to; see the module."""

    def __init__(
        self,
        costs: CostTable,
        block_impacts: Mapping[str, float],
        impacts: Mapping[Site, Floats],
        constraints: Constraints,
        steps: Mapping[Site, Sequence[Step]],
    ) -> None:
        architecture, self.own = costs.architecture, costs.in_form("own")
        self.costs, self.impacts, self.block_impacts = costs, impacts, block_impacts
        self.blocks = [
            block.name for block in architecture.blocks if block.removable and block.name in block_impacts
        ]
        self.steps = [step for of_site in steps.values() for step in of_site]
        self.groups = [
            group for group in sampler_groups(architecture) if set(group.blocks) <= set(self.blocks)
        ]
        self.first_step, self.first_group = len(self.blocks), len(self.blocks) + len(self.steps)
        self.size = self.first_group + len(self.groups)
        self.column = {name: place for place, name in enumerate(self.blocks)}
        self.structure = self._structure(constraints, steps)

    def _structure(self, constraints: Constraints, steps: Mapping[Site, Sequence[Step]]) -> _Rows:
        """What holds whatever the budgets are."""
        architecture, column, rows = self.costs.architecture, self.column, _Rows()
        for rule in constraints.limits(architecture):
            rows.add({column[name]: 1 for name in rule.blocks if name in column}, rule.least, rule.most)
        place = self.first_step
        for site, of_site in steps.items():
            outer = architecture.block(site.block).inside or site.block
            for number in range(len(of_site)):
                if outer in column:
                    rows.add({place: 1, column[outer]: 1}, -np.inf, 1)
                if number:
                    rows.add({place: 1, place - 1: -1}, -np.inf, 0)
                place += 1
        for number, group in enumerate(self.groups):
            for name in group.blocks:
                rows.add({self.first_group + number: 1, column[name]: -1}, -np.inf, 0)
        return rows

    @property
    def losses(self) -> Floats:
        """(variables,) what each loses."""
        of_blocks = [self.block_impacts[name] for name in self.blocks]
        return np.array([*of_blocks, *(step.loss for step in self.steps), *[0.0] * len(self.groups)])

    def savings(self, metric: Additive) -> Floats:
        """(variables,) what each saves of the whole model's ``metric``, as shares of it."""
        saves, total = unit_savings(self.costs, metric), self.costs.total.amount(metric)

        def saved(names: Iterable[str]) -> float:
            return sum(self.own.part(name).amount(metric) for name in names) / total

        of_steps = [len(step.units) * saves[step.site] / total for step in self.steps]
        of_groups = [saved(group.samplers) for group in self.groups]
        return np.array([*(saved([name]) for name in self.blocks), *of_steps, *of_groups])

    def least(self, objective: Floats, budgets: Sequence[Budget]) -> PruningPlan | None:
        """The plan of the least ``objective``, (variables,), within ``budgets``; None where there is none."""
        if not self.size:
            return None
        rows = _Rows()
        for budget in budgets:
            metric = cast("Additive", budget.metric)
            terms = dict(enumerate(self.savings(metric).tolist()))
            rows.add(terms, 1 - budget.limit / self.costs.total.amount(metric), np.inf)
        rows.extend(self.structure)
        for more in (0.0, _TOLERANCE):  # the solver keeps to its rules up to rounding
            answer = milp(
                objective / (np.abs(objective).max(initial=0.0) or 1.0),
                integrality=np.ones(self.size),
                bounds=Bounds(0, 1),
                constraints=rows.constraint(self.size, len(budgets), more),
                options={"mip_rel_gap": _GAP},
            )
            if answer.status == _INFEASIBLE or answer.x is None:
                return None
            chosen = answer.x > 0.5
            removed = [name for name in self.blocks if chosen[self.column[name]]]
            taken = [step for place, step in enumerate(self.steps) if chosen[self.first_step + place]]
            plan = plan_of(self.costs.architecture, removed, widths=widths_without(taken)).built("own")
            if all(budget.allows(self.costs.of(plan)) for budget in budgets):
                return plan
        return None


def depth_and_width(
    costs: CostTable,
    block_impacts: Mapping[str, float],
    impacts: Mapping[Site, Floats],
    budgets: Sequence[Budget],
    constraints: Constraints = ANY_PLAN,
    *,
    least_share: float = 0.0,
    channels: int = 1,
) -> PruningPlan:
    """The plan of whole blocks and widths that loses least within ``budgets``, by scores that add up.

    Blocks without an impact stay, and sites without. ``constraints`` are rules over blocks; of their form no account is
    taken. Raises DataError for a negative or infinite impact of a unit, BudgetError for a budget on memory, on
    latency where what units save was not measured, or, with the least that can be reached, where no plan meets them.
    """
    _check(impacts)
    steps = steps_of(costs.architecture.sites, impacts, least_share=least_share, channels=channels)
    program = _Program(costs, block_impacts, impacts, constraints, steps)
    plan = program.least(program.losses, budgets)
    if plan is None:
        raise _impossible(program, budgets)
    return plan


def check_reachable_narrower(
    costs: CostTable,
    blocks: Iterable[str],
    budgets: Sequence[Budget],
    constraints: Constraints = ANY_PLAN,
    *,
    channels: int = 1,
) -> None:
    """Raise BudgetError as ``depth_and_width`` does where no plan of ``blocks`` and widths meets ``budgets``; needs no
    scores: which plans exist and what they cost does not depend on them.
    """
    nothing = {site: np.zeros(site.count) for site in costs.architecture.sites}
    depth_and_width(costs, dict.fromkeys(blocks, 0.0), nothing, budgets, constraints, channels=channels)


def _impossible(program: _Program, budgets: Sequence[Budget]) -> BudgetError:
    """What was asked, and the least that can be reached of the first budget that cannot be met with those before it."""
    asked = ", ".join(budget.text for budget in budgets)
    zero = np.zeros(program.size)
    for place, budget in enumerate(budgets):
        others = budgets[:place]
        if program.least(zero, budgets[: place + 1]) is not None:
            continue
        metric = cast("Additive", budget.metric)
        smallest = program.least(-program.savings(metric), others)
        if smallest is None:
            break
        reached, total = (cost.amount(metric) for cost in (program.costs.of(smallest), program.costs.total))
        among = f" within {' and '.join(other.text for other in others)}" if others else ""
        return unreachable(budget, "plan of blocks and widths", among, reached, total)
    return BudgetError(
        f"asked for {asked}, found no plan of blocks and widths that keeps to the rules, whatever it costs; give fewer "
        "rules"
    )
