"""The plans that a search may choose from: one option per level, within constraints and budgets.

A native plan is one option of each level (``plans.native_choices``; of a U-Net a level of resolution). Any plan is the
same thing with one level per removable block, which stays or goes. All solvers work on levels of options and so serve
both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from prune_lab.blocks import Architecture
from prune_lab.errors import BudgetError, PlanError
from prune_lab.families import Form
from prune_lab.forms import exists_in
from prune_lab.plans import PruningPlan, native_choices, plan_of
from prune_lab.profiling import CostTable
from prune_lab.search.budgets import Budget, within
from prune_lab.search.constraints import Constraints, Limit

Removed = frozenset[str]  # names of removed blocks


@dataclass(frozen=True, slots=True)
class Space:
    """Levels of options, and the rules that tie the levels together.

    Each level lists the sets of blocks that can leave it; options that a rule within their level forbids are left out.
    """

    costs: CostTable
    budgets: tuple[Budget, ...]
    constraints: Constraints
    limits: tuple[Limit, ...]
    levels: tuple[tuple[Removed, ...], ...]

    @property
    def architecture(self) -> Architecture:
        """The model whose blocks are chosen from."""
        return self.costs.architecture

    def plan(self, removed: Iterable[str], name: str = "") -> PruningPlan:
        """The plan that removes these blocks, in the form that the constraints ask for."""
        return plan_of(self.architecture, removed, name).built(self.constraints.form)

    def satisfies_rules(self, removed: Removed) -> bool:
        """Whether the constraints allow to remove these blocks, which are one option of each level."""
        return all(limit.allows(removed) for limit in self.limits)

    def allows(self, removed: Removed) -> bool:
        """Whether constraints and budgets allow to remove these blocks, which are one option of each level."""
        return self.satisfies_rules(removed) and within(self.plan(removed), self.budgets, self.costs)

    def chosen(self, plan: PruningPlan) -> tuple[Removed, ...]:
        """The option that ``plan`` takes of each level. Raises PlanError when it is not made of options."""
        removed = frozenset(plan.removed)
        options = tuple(removed & frozenset().union(*level) for level in self.levels)
        listed = all(option in level for option, level in zip(options, self.levels, strict=True))
        if (
            plan.architecture != self.architecture.signature
            or not listed
            or frozenset().union(*options) != removed
        ):
            kind = "native plan" if self.constraints.form == "native" else "plan"
            raise PlanError(
                f"asked to start from {plan.label}, which is no {kind} of this model within the constraints; "
                "start from one that search_plans finds"
            )
        return options


def space_of(
    architecture: Architecture, costs: CostTable, budgets: Sequence[Budget], constraints: Constraints
) -> Space:
    """The plans of ``architecture`` within ``budgets`` and ``constraints``.

    Raises what ``Constraints.limits`` raises, and BudgetError for a budget on what was not measured.
    """
    for budget in budgets:
        costs.total.amount(budget.metric)
        if budget.metric == "memory" and constraints.form == "neutral":
            raise BudgetError(
                "asked for a budget on memory in the neutral form, in which the memory of a pass is not known; give "
                "params, macs or latency, or another form"
            )
    limits = constraints.limits(architecture)
    levels = (
        native_choices(architecture)
        if constraints.form == "native"
        else _every_block(architecture, constraints.form)
    )
    kept = tuple(tuple(_satisfying_alone(level, limits)) for level in levels)
    return Space(costs.in_form(constraints.form), tuple(budgets), constraints, limits, kept)


def _every_block(architecture: Architecture, form: Form) -> tuple[tuple[Removed, ...], ...]:
    names = (block.name for block in architecture.named if block.removable)
    return tuple(
        (frozenset[str](), frozenset([name]))
        for name in names
        if exists_in(architecture, plan_of(architecture, [name]), form)
    )


def _satisfying_alone(level: tuple[Removed, ...], limits: tuple[Limit, ...]) -> Iterator[Removed]:
    members = frozenset().union(*level)
    alone = [limit for limit in limits if members.issuperset(limit.blocks)]
    return (option for option in level if all(limit.allows(option) for limit in alone))
