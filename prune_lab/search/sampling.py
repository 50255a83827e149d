"""Random plans near a budget: what interactions are fitted to, and what controls are drawn from.

Every plan is the optimum of the exact program for random impacts, in a band just below a budget. A 0-1 point is always
a corner of the convex hull of the set it belongs to, so every allowed plan can be drawn; some are drawn more often.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from prune_lab.blocks import Architecture
from prune_lab.errors import ConfigError
from prune_lab.plans import PruningPlan
from prune_lab.profiling import CostTable
from prune_lab.search.budgets import Budget
from prune_lab.search.constraints import Constraints
from prune_lab.search.effects import Effects
from prune_lab.search.exact import NATIVE, check_reachable
from prune_lab.search.program import Floor, LinearBound, Program, Vector
from prune_lab.search.space import Removed, spaces_of

_PATIENCE = 5  # draws in a row that find nothing new, after which known plans are cut off


def sample_near(
    architecture: Architecture,
    costs: CostTable,
    budgets: Sequence[Budget],
    count: int,
    seed: int = 0,
    constraints: Constraints = NATIVE,
    *,
    band: float = 0.05,
) -> tuple[PruningPlan, ...]:
    """``count`` different random plans within all ``budgets``, each at most ``band`` (a share) below one of them.

    Without budgets any plan will do. Where fewer plans lie in the band it is doubled until there are enough, so a
    coarse space of few plans gives what it has; fewer than ``count`` come back only when fewer exist. Named
    ``random-1`` and so on, in the order drawn. Raises BudgetError when no plan meets the budgets, and what bad
    constraints raise.
    """
    if count < 1 or not 0 < band <= 1:
        raise ConfigError(
            f"asked for {count} plans in a band of {band}; give at least 1, and a share from 0 to 1"
        )
    check_reachable(architecture, costs, budgets, constraints=constraints)
    spaces = spaces_of(architecture, costs, budgets, constraints)
    generator = np.random.default_rng(seed)
    names = [block.name for block in architecture.blocks]
    programs = [Program(space, Effects(dict.fromkeys(names, 0.0))) for space in spaces]
    found: dict[Removed, None] = {}
    repeats, width = 0, band
    while len(found) < count:
        cuts = [LinearBound(removed) for removed in found] if repeats >= _PATIENCE else []
        removed = _drawn(programs, budgets, width, cuts, generator)
        if removed is not None and removed not in found:
            found[removed] = None
            repeats = 0
        elif not cuts and found:
            repeats += 1
        elif width < 1:
            width *= 2
        else:
            break  # everything that there is
    return tuple(spaces[0].plan(removed, f"random-{number}") for number, removed in enumerate(found, start=1))


def _drawn(
    programs: Sequence[Program],
    budgets: Sequence[Budget],
    width: float,
    cuts: Sequence[LinearBound],
    generator: np.random.Generator,
) -> Removed | None:
    """A random plan at most ``width`` below one of the budgets, taken in random order; None when there is none."""
    names = list(dict.fromkeys(name for program in programs for name in program.blocks))
    impacts = {name: generator.normal() for name in names}
    order = [budgets[place] for place in generator.permutation(len(budgets))]
    bands = [[Floor(budget.metric, budget.limit * (1 - width))] for budget in order]
    for floors in bands or [[]]:
        found = [
            (sum(impacts[name] for name in removed), removed)
            for program in programs
            if (removed := program.least(_over(program, impacts), budgets, cuts, floors=floors)) is not None
        ]
        if found:
            return min(found, key=lambda one: one[0])[1]
    return None


def _over(program: Program, impacts: Mapping[str, float]) -> Vector:
    """The sum of the impacts of the blocks that leave, over the variables of a program."""
    objective = np.zeros(program.size)
    for name in program.blocks:
        objective += impacts[name] * program.gone(name)
    return objective
