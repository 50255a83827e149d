"""The plans that a search may choose from: one option per level, within constraints and budgets.

A native plan is one option of each level (``plans.native_choices``; of a U-Net a level of resolution), or for families
that have rules any choice that keeps to these. Any plan is the same thing with one level per removable block, which
stays or goes. All solvers work on levels of options and so serve both.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from prune_lab.blocks import Architecture
from prune_lab.errors import BudgetError, PlanError
from prune_lab.families import Form
from prune_lab.forms import exists_in, within_form
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
        """The plan that removes these blocks, as it is built where the constraints ask for their form."""
        return within_form(
            self.architecture, plan_of(self.architecture, removed, name), self.constraints.form
        )

    def satisfies_rules(self, removed: Removed) -> bool:
        """Whether the constraints allow to remove these blocks, which are one option of each level."""
        return all(limit.allows(removed) for limit in self.limits)

    def allows(self, removed: Removed) -> bool:
        """Whether constraints and budgets allow to remove these blocks, which are one option of each level."""
        return (
            self.satisfies_rules(removed)
            and self.can_be_built(removed)
            and within(self.plan(removed), self.budgets, self.costs)
        )

    def can_be_built(self, removed: Removed) -> bool:
        """Whether there is a model without these blocks in the form of the constraints, or a native one."""
        plan = self.plan(removed)
        return exists_in(self.architecture, plan, plan.form)

    def _options(self, plan: PruningPlan) -> tuple[Removed, ...]:
        return tuple(frozenset(plan.removed) & frozenset().union(*level) for level in self.levels)

    def made_of_options(self, plan: PruningPlan) -> bool:
        """Whether ``plan`` is of this model and takes one option of each level."""
        options = self._options(plan)
        return (
            plan.architecture == self.architecture.signature
            and all(option in level for option, level in zip(options, self.levels, strict=True))
            and frozenset().union(*options) == set(plan.removed)
        )

    def chosen(self, plan: PruningPlan) -> tuple[Removed, ...]:
        """The option that ``plan`` takes of each level. Raises PlanError when it is not made of options."""
        if not self.made_of_options(plan):
            kind = "native plan" if self.constraints.form == "native" else "plan"
            raise PlanError(
                f"asked to start from {plan.label}, which is no {kind} of this model within the constraints; "
                "start from one that search_plans finds"
            )
        return self._options(plan)


def space_of(
    architecture: Architecture, costs: CostTable, budgets: Sequence[Budget], constraints: Constraints
) -> Space:
    """The plans of ``architecture`` within ``budgets`` and ``constraints``, priced as they are in the form asked for;
    ``spaces_of`` adds those that are native and cost less so.

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
    levels = _every_block(architecture, constraints.form)
    if constraints.form == "native":
        levels = native_choices(architecture)
        if (rules := architecture.family.rules) is not None:
            levels = _every_choice(architecture)
            limits += tuple(
                Limit("native", rule.blocks, rule.most, rule.least, rule.against)
                for rule in rules(architecture.outline)
            )
    kept = tuple(tuple(_satisfying_alone(level, limits)) for level in levels)
    return Space(costs.in_form(constraints.form), tuple(budgets), constraints, limits, kept)


def spaces_of(
    architecture: Architecture, costs: CostTable, budgets: Sequence[Budget], constraints: Constraints
) -> tuple[Space, ...]:
    """The spaces that together hold every plan at the price at which it is built: that of the form that is asked for,
    and the native one where plans cost less natively or are nothing else.

    Raises what ``space_of`` raises.
    """
    asked = space_of(architecture, costs, budgets, constraints)
    if asked.costs is costs.in_form("native"):
        return (asked,)
    natively = dataclasses.replace(constraints, form="native")
    return asked, space_of(architecture, costs, budgets, natively)


def _every_choice(architecture: Architecture) -> tuple[tuple[Removed, ...], ...]:
    """All sets of units of each of the family's levels, and each unit that is in none."""
    family, outline = architecture.family, architecture.outline
    levels = [tuple(level) for level in family.levels(outline)]
    listed = {name for level in levels for name in level}
    levels += [(unit.name,) for unit in outline.blocks if unit.removable and unit.name not in listed]
    return tuple(
        tuple(
            frozenset(names)
            for size in range(len(level) + 1)
            for names in itertools.combinations(level, size)
        )
        for level in levels
    )


def _every_block(architecture: Architecture, form: Form) -> tuple[tuple[Removed, ...], ...]:
    names = (block.name for block in architecture.named if block.removable)
    return tuple(
        (frozenset[str](), frozenset([name]))
        for name in names
        if exists_in(architecture, plan_of(architecture, [name]), form)
    )


def _satisfying_alone(level: tuple[Removed, ...], limits: tuple[Limit, ...]) -> Iterator[Removed]:
    members = frozenset().union(*level)
    alone = [limit for limit in limits if members.issuperset((*limit.blocks, *limit.against))]
    return (option for option in level if all(limit.allows(option) for limit in alone))
