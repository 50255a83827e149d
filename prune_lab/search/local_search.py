"""Local search: from a good plan to the best one nearby, by measuring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prune_lab.blocks import Architecture
from prune_lab.errors import ConfigError, PlanError
from prune_lab.plans import PruningPlan
from prune_lab.profiling import CostTable
from prune_lab.search.budgets import Budget
from prune_lab.search.constraints import Constraints
from prune_lab.search.exact import NATIVE
from prune_lab.search.results import CachedObjective, ImpactOf, SearchResult
from prune_lab.search.space import Removed, Space, spaces_of


def local_search(
    architecture: Architecture,
    costs: CostTable,
    budgets: Sequence[Budget],
    impact_of: ImpactOf,
    start: PruningPlan,
    constraints: Constraints = NATIVE,
    *,
    rounds: int = 20,
) -> SearchResult:
    """The plan that is reached from ``start`` by going to the best neighbour until none measures better.

    Neighbours within budgets and constraints: one level takes another option (with any plan: one block more or less),
    or one level gives blocks back while another loses some (a swap). A round measures all new neighbours in one call
    of ``impact_of``; after ``rounds`` rounds the best so far comes back. ``measured`` counts the start too.

    Assumes that the measured impact is smooth enough over plans for neighbours to lead somewhere; it ends in a local
    optimum, and on a noisy measurement in a lucky one. Raises PlanError when ``start`` is not in the space that is
    searched, DataError for a bad measurement.
    """
    if rounds < 1:
        raise ConfigError(f"asked for {rounds} rounds of local search; give at least 1")
    spaces = spaces_of(architecture, costs, budgets, constraints)
    space = next((space for space in spaces if space.made_of_options(start)), spaces[0])
    levels = space.chosen(start)
    removed = frozenset(start.removed)
    if not space.allows(removed):
        raise PlanError(
            f"asked to start from {start.label}, which is over a budget or breaks a constraint; start from a plan that "
            "search_plans finds"
        )
    objective = CachedObjective(impact_of)
    best = float(objective.of([removed])[0])
    for _ in range(rounds):
        near = [other for other in dict.fromkeys(_neighbours(space, levels)) if space.allows(other)]
        impacts = objective.of(near)
        if not near or impacts.min() >= best:
            break
        removed, best = near[int(impacts.argmin())], float(impacts.min())
        levels = space.chosen(space.plan(removed))
    return SearchResult(space.plan(removed, "local-search"), best, objective.count)


def _neighbours(space: Space, chosen: tuple[Removed, ...]) -> Iterator[Removed]:
    removed = frozenset().union(*chosen)
    for present, options in zip(chosen, space.levels, strict=True):
        yield from ((removed - present) | option for option in options if option != present)
    for place, gives in enumerate(chosen):
        for other, takes in enumerate(chosen):
            if place == other:
                continue
            rest = removed - gives - takes
            for smaller in _next(gives, space.levels[place], grow=False):
                yield from (
                    rest | smaller | larger for larger in _next(takes, space.levels[other], grow=True)
                )


def _next(present: Removed, options: Sequence[Removed], *, grow: bool) -> list[Removed]:
    """The options just above or below ``present``: with none of the others in between."""
    beyond = [option for option in options if (present < option if grow else option < present)]
    if grow:
        return [option for option in beyond if not any(other < option for other in beyond)]
    return [option for option in beyond if not any(option < other for other in beyond)]
