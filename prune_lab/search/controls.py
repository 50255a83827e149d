"""Controls at a budget: the plans that a search has to beat to be worth its trouble.

They cost next to nothing and take away easy explanations: that any plan of that size would do (random), that the hand
design is as good (BK, uniform), or that looking at activations is enough (similarity).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from prune_lab.blocks import Architecture, block_groups
from prune_lab.errors import PruneLabError
from prune_lab.plans import PruningPlan, parse_plan, plan_of, refuse_widths
from prune_lab.profiling import CostTable
from prune_lab.search.budgets import Budget, within
from prune_lab.search.constraints import Constraints
from prune_lab.search.effects import Scores, predicted_impact
from prune_lab.search.exact import NATIVE, search_plans
from prune_lab.search.results import CachedObjective, ImpactOf
from prune_lab.search.sampling import sample_near


def named_plans(architecture: Architecture) -> tuple[tuple[PruningPlan, ...], dict[str, str]]:
    """The family's named plans that are defined for this model and remove something, and why each of the others is not.

    Of a U-Net these are BK-SDM's Base, Small and Tiny; a pruned student, SDXL and its kin have none of them.
    """
    plans, missing = [], {}
    for name in architecture.family.plans:
        try:
            plan = parse_plan(name, architecture)
            refuse_widths([plan], "run")
        except PruneLabError as error:
            missing[name] = str(error)
            continue
        if plan.removed:
            plans.append(plan)
        else:
            missing[name] = "it removes nothing from this model"
    return tuple(plans), missing


def bk_control(
    architecture: Architecture, costs: CostTable, budgets: Sequence[Budget], constraints: Constraints = NATIVE
) -> PruningPlan | None:
    """The largest of the family's named plans within budgets and constraints; of a U-Net BK-SDM's Base, Small and Tiny
    (arXiv:2305.15798).

    None when none of them is, or the model is of a shape that they are not defined for.
    """
    plans, _ = named_plans(architecture)
    return _largest(plans, architecture, costs, budgets, constraints)


def uniform_control(
    architecture: Architecture, costs: CostTable, budgets: Sequence[Budget], constraints: Constraints = NATIVE
) -> PruningPlan | None:
    """The largest plan within budgets and constraints that removes the same pattern in every stage: ``uniform``.

    A pattern is a set of places (R1, A1, R2 ...); blocks that cannot be removed stay. Where no pattern alone meets
    the budgets the inner stages leave whole as well, as few as will do. None when that does not help either.
    """
    inner: list[tuple[str, ...]] = [(), *(group.blocks for group in block_groups(architecture, "inner"))]
    for whole in inner:
        plans = [plan_of(architecture, {*pattern, *whole}) for pattern in _patterns(architecture)]
        largest = _largest(plans, architecture, costs, budgets, constraints)
        if largest:
            return largest.named("uniform")
    return None


def random_median(
    architecture: Architecture,
    importance: Scores,
    costs: CostTable,
    budgets: Sequence[Budget],
    constraints: Constraints = NATIVE,
    *,
    draws: int = 33,
    seed: int = 0,
) -> PruningPlan:
    """The median by predicted impact of ``draws`` random plans just below the budgets (``sample_near``):
    ``random-median``.

    What one gets without looking. Raises what ``sample_near`` raises, and DataError when a block has no score.
    """
    plans = sample_near(architecture, costs, budgets, draws, seed, constraints)
    ranked = sorted(plans, key=lambda plan: predicted_impact(plan, importance))
    return ranked[(len(ranked) - 1) // 2].named("random-median")


def lowest_one_shot(
    architecture: Architecture,
    costs: CostTable,
    budgets: Sequence[Budget],
    impact_of: ImpactOf,
    constraints: Constraints = NATIVE,
    *,
    draws: int = 33,
    seed: int = 0,
) -> PruningPlan:
    """The plan of least measured impact among ``draws`` random ones just below the budgets: ``lowest-one-shot``.

    Assumes that the loss before training predicts the loss after it; TinyFusion (arXiv:2412.01199) found that it can
    be far off. Raises what ``sample_near`` raises, and DataError for a bad measurement.
    """
    plans = sample_near(architecture, costs, budgets, draws, seed, constraints)
    impacts = CachedObjective(impact_of).of([frozenset(plan.removed) for plan in plans])
    return plans[int(impacts.argmin())].named("lowest-one-shot")


def similarity_control(
    architecture: Architecture,
    similarity: Scores,
    costs: CostTable,
    budgets: Sequence[Budget],
    constraints: Constraints = NATIVE,
) -> PruningPlan:
    """The exact optimum for the scores of the ``similarity`` criterion: ``similarity``.

    Assumes that a block which hardly changes its input is worth little. Raises what ``search_plans`` raises.
    """
    (plan,) = search_plans(architecture, similarity, costs, budgets, constraints=constraints)
    return plan.named("similarity")


def controls_at(
    architecture: Architecture,
    importance: Scores,
    costs: CostTable,
    budgets: Sequence[Budget],
    constraints: Constraints = NATIVE,
    *,
    impact_of: ImpactOf | None = None,
    similarity: Scores | None = None,
    draws: int = 33,
    seed: int = 0,
) -> tuple[PruningPlan, ...]:
    """All controls that exist at these budgets, each under its name: the BK plan, uniform, random-median,
    lowest-one-shot (with ``impact_of``) and similarity (with its table).

    Two of them may be the same plan under two names. Raises what the controls raise.
    """
    place = (architecture, costs, budgets)
    plans = [
        bk_control(*place, constraints),
        uniform_control(*place, constraints),
        random_median(architecture, importance, costs, budgets, constraints, draws=draws, seed=seed),
    ]
    if impact_of is not None:
        plans.append(lowest_one_shot(*place, impact_of, constraints, draws=draws, seed=seed))
    if similarity is not None:
        plans.append(similarity_control(architecture, similarity, costs, budgets, constraints))
    return tuple(plan for plan in plans if plan)


def _largest(
    plans: Sequence[PruningPlan],
    architecture: Architecture,
    costs: CostTable,
    budgets: Sequence[Budget],
    constraints: Constraints,
) -> PruningPlan | None:
    """The allowed plan that leaves most of the first budget's metric (MACs without budgets); the first of equals."""
    metric = budgets[0].metric if budgets else "macs"
    # Cheap checks first: whether a plan is native takes a walk through the network.
    fitting = [plan for plan in plans if within(plan, budgets, costs)]
    ordered = sorted(fitting, key=lambda plan: -costs.of(plan).amount(metric))
    return next((plan for plan in ordered if constraints.allow(architecture, plan)), None)


def _patterns(architecture: Architecture) -> Iterator[frozenset[str]]:
    """Removable blocks of every set of places, fewest places first; a set that adds nothing is listed once."""
    places = dict.fromkeys(block.local_name for block in architecture.blocks)
    seen = set()
    for size in range(1, len(places) + 1):
        for chosen in itertools.combinations(places, size):
            blocks = frozenset(
                block.name for block in architecture.blocks if block.removable and block.local_name in chosen
            )
            if blocks not in seen:
                seen.add(blocks)
                yield blocks
