"""The plain model that a plan leaves, and whether there is one; of another form see ``prune_lab.forms``.

A plan is *native* when a plain diffusers config describes the network it leaves; the model's family decides that
without any weights.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import Any

from prune_lab.blocks import Architecture
from prune_lab.errors import NonNativePlanError, PlanError
from prune_lab.families import Kept, Layout
from prune_lab.plans.plan import PruningPlan, plan_of
from prune_lab.width import site_named


def removed_samplers(architecture: Architecture, plan: PruningPlan) -> tuple[str, ...]:
    """Names of the samplers that leave with ``plan``: where all blocks further in are gone, nothing is left to
    sample for (BK-SDM-Tiny loses ``Dn3.down`` and ``Up1.up``).
    """
    gone = set(plan.removed)
    return tuple(
        sampler.name
        for sampler in architecture.samplers
        if sampler.leaves_with and gone.issuperset(sampler.leaves_with)
    )


def gone_with(
    architecture: Architecture, removed: Iterable[str], *, stand_in: bool = False
) -> frozenset[str]:
    """The names of all units that are bypassed when the blocks ``removed`` are gone: these, and samplers left over.

    Raises UnknownBlockError, and UnremovableBlockError for a block that cannot be removed, unless ``stand_in``.
    """
    blocks = [architecture.block(name) for name in removed]
    plan = plan_of(architecture, (block.name for block in blocks if block.removable or not stand_in))
    named = architecture.outermost(block.name for block in blocks)
    return named | frozenset(removed_samplers(architecture, plan))


def units_gone(architecture: Architecture, plan: PruningPlan) -> frozenset[str]:
    """The names of what leaves with ``plan``, samplers too. Raises PlanError for a plan of another architecture."""
    if plan.architecture != architecture.signature:
        raise PlanError(
            f"the plan was made for architecture {plan.architecture}, this model is {architecture.signature}; "
            "read it again as text for this model"
        )
    return frozenset((*plan.removed, *removed_samplers(architecture, plan)))


def chosen_units(architecture: Architecture, plan: PruningPlan) -> Kept:
    """The units that stay of each site of which ``plan`` takes some. Raises PlanError where they are not chosen yet."""
    kept = {}
    for width in plan.widths:
        site = site_named(width.site, architecture.sites)
        if width.of != site.count:
            raise PlanError(
                f"asked for {width.short}, and this model has {site.count} units of it; read the plan again as text"
            )
        if not width.chosen:
            raise PlanError(
                f"asked for {width.short}, which says how many units stay and not which; choose them by weights or "
                f"scores (prune does), or name them: {width.short}@0-{width.count - 1}"
            )
        kept[site] = width.kept
    return kept


def native_layout(architecture: Architecture, plan: PruningPlan) -> Layout:
    """The plain config of the network that ``plan`` leaves, and where the original's modules are in it.

    Raises NonNativePlanError with the first reason why no plain diffusers config describes it, PlanError when the plan
    belongs to another architecture.
    """
    if plan.widths:
        raise NonNativePlanError(
            f"{plan.widths[0].short} makes a layer inside of a block narrower, which no plain diffusers config "
            "describes; ask for --form own, or padded to try it"
        )
    return architecture.family.layout(architecture.outline, units_gone(architecture, plan))


def is_native(architecture: Architecture, plan: PruningPlan) -> bool:
    """Whether ``plan`` leaves a network that a plain diffusers config describes."""
    try:
        native_layout(architecture, plan)
    except NonNativePlanError:
        return False
    return True


@functools.lru_cache(maxsize=16)
def native_choices(architecture: Architecture) -> tuple[tuple[frozenset[str], ...], ...]:
    """For each of the family's levels the sets of blocks that can leave natively, the empty set first.

    A native plan is one option per level, and every combination of options is native: of a block and a layer inside it
    the block counts. Of a U-Net a level is one resolution, outermost first, and one for each layer inside a block; of a
    chain it is one block.
    """

    def native(names: Iterable[str]) -> bool:
        return is_native(architecture, PruningPlan(tuple(names), architecture.signature))

    family, outline = architecture.family, architecture.outline
    choices = []
    for members in family.levels(outline):
        options = [
            frozenset(names)
            for size in range(len(members) + 1)
            for names in itertools.combinations(members, size)
            if native(names)
        ]
        more = [other for option in options for other in family.more_options(outline, members, option)]
        choices.append(tuple(dict.fromkeys([*options, *filter(native, more)])))
    return tuple(choices)


def choices_to_json(architecture: Architecture) -> dict[str, Any]:
    """What ``native_choices`` gives of whole blocks, as JSON values, for a reader without this package.

    ``levels``: for each level the sets of blocks that can leave it natively. ``samplers``: the blocks with which a
    sampler leaves, of those that can. ``complete``: whether every native plan of whole blocks is one set of each level;
    where it is not, a plan of another form may be native too.
    """
    order = {block.name: place for place, block in enumerate(architecture.blocks)}
    fixed = {block.stage for block in architecture.blocks if not block.removable}
    listed = [
        (members, [option for option in choices if option <= order.keys()])
        for members, choices in zip(
            architecture.family.levels(architecture.outline), native_choices(architecture), strict=True
        )
        if set(members) <= order.keys()  # others are of layers
    ]
    stages = [{architecture.block(name).stage for name in members} for members, _ in listed]
    whole = [level for level in stages if not level & fixed]
    beyond = any(not option <= set(members) for members, options in listed for option in options)
    known = architecture.family.complete
    return {
        "levels": [[sorted(removed, key=order.__getitem__) for removed in options] for _, options in listed],
        "samplers": {
            sampler.name: list(sampler.leaves_with)
            for sampler in architecture.samplers
            if sampler.leaves_with and all(architecture.block(name).removable for name in sampler.leaves_with)
        },
        "complete": len(whole) < 2 and not beyond if known is None else known,
    }
