"""Greedy removal with re-scoring: the cheapest step first, measured given what is gone already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prune_lab.blocks import Architecture
from prune_lab.profiling import CostTable
from prune_lab.search.budgets import Budget
from prune_lab.search.constraints import Constraints
from prune_lab.search.effects import Effects
from prune_lab.search.exact import NATIVE, check_reachable
from prune_lab.search.program import Program
from prune_lab.search.results import CachedObjective, ImpactOf, SearchResult
from prune_lab.search.space import Removed, Space, spaces_of


@dataclass(slots=True)
class _Step:
    """Removing ``blocks`` next; ``added`` is the impact that adds, as measured when ``given`` was gone."""

    blocks: Removed
    added: float
    given: Removed


def greedy_plan(
    architecture: Architecture,
    costs: CostTable,
    budgets: Sequence[Budget],
    impact_of: ImpactOf,
    constraints: Constraints = NATIVE,
) -> SearchResult:
    """The plan that removes, step by step, what adds the least impact per saved cost until all ``budgets`` are met.

    A step is one block, or of native plans one option of a level that extends the level's present one. Saved
    cost is the share of what the budgets still ask for. A step after which no plan could meet budgets and
    constraints any more is never taken. All first steps are measured in one batch; later only the step that looks
    cheapest, until it stays the cheapest (lazy evaluation, Minoux 1978).

    Assumes that a good plan is reached by good steps, and laziness that what a step adds does not shrink while more
    is removed: of a step that became cheaper than its old measurement nothing is noticed until it comes to the top.
    Raises BudgetError when no plan meets the budgets, DataError for a bad measurement.
    """
    check_reachable(architecture, costs, budgets, constraints=constraints)
    spaces = spaces_of(architecture, costs, budgets, constraints)
    nothing = Effects({block.name: 0.0 for block in architecture.named})
    # Natively there may be a way where there is none in the form that is asked for.
    programs = (Program(space, nothing) for space in spaces)
    program = next(one for one in programs if one.least(one.objective, budgets) is not None)
    space = program.space
    objective = CachedObjective(impact_of)
    gone: Removed = frozenset()
    known: dict[Removed, _Step] = {}
    while not space.allows(gone):
        steps = [blocks for blocks in _steps(space, gone) if blocks not in known]
        total, *measured = objective.of([gone, *(gone | blocks for blocks in steps)]).tolist()
        for blocks, impact in zip(steps, measured, strict=True):
            known[blocks] = _Step(blocks, impact - total, gone)
        step = _cheapest(program, objective, gone, [known[blocks] for blocks in _steps(space, gone)])
        gone |= step.blocks
    return SearchResult(space.plan(gone, "greedy"), float(objective.of([gone])[0]), objective.count)


def _steps(space: Space, gone: Removed) -> list[Removed]:
    """What can leave next: what an option of a level has beyond what has left that level already."""
    steps = []
    for level in space.levels:
        present = gone & frozenset().union(*level)
        steps += [option - present for option in level if present < option]
    return steps


def _cheapest(program: Program, objective: CachedObjective, gone: Removed, steps: list[_Step]) -> _Step:
    """The step of least added impact per progress, measured as things stand; it leaves a way to the budgets."""
    space = program.space
    missing = _missing(space, gone)
    progress = {step.blocks: _progress(missing, _missing(space, gone | step.blocks)) for step in steps}

    def per_progress(step: _Step) -> tuple[bool, float]:
        # A step that lowers the impact comes first, whatever it saves.
        helps = step.added <= 0
        return not helps, step.added if helps else step.added / max(progress[step.blocks], 1e-12)

    left = list(steps)
    while True:
        step = min(left, key=per_progress)
        after = gone | step.blocks
        if step.given != gone:
            before, impact = objective.of([gone, after]).tolist()
            step.added, step.given = impact - before, gone
        elif program.least(program.objective, space.budgets, (), [program.including(after)]) is None:
            left.remove(step)  # a dead end
        else:
            return step


def _missing(space: Space, gone: Removed) -> list[float]:
    """How far each budget and each rule is from being met: costs over the limit, blocks yet to remove."""
    cost = space.costs.of(space.plan(gone))
    over = [max(0.0, cost.amount(budget.metric) - budget.limit) for budget in space.budgets]
    return [*over, *(float(max(0, limit.least - limit.gone(gone))) for limit in space.limits)]


def _progress(before: list[float], after: list[float]) -> float:
    """The shares of what was missing that are there now, added up."""
    return sum((old - new) / old for old, new in zip(before, after, strict=True) if old > 0)
