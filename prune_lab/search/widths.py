"""Which units leave under a budget: those that lose least for what they save."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from prune_lab.blocks import Architecture
from prune_lab.errors import BudgetError
from prune_lab.families import Site
from prune_lab.importance.intervals import Floats
from prune_lab.plans import PruningPlan, plan_of
from prune_lab.profiling import Counted, CostTable, unit_costs
from prune_lab.width import width_of


def sites_left(architecture: Architecture, plan: PruningPlan) -> tuple[Site, ...]:
    """The sites of the blocks that stay."""
    gone = set(plan.removed)
    return tuple(
        site
        for site in architecture.sites
        if site.block not in gone and architecture.block(site.block).inside not in gone
    )


def narrowed_to(
    costs: CostTable,
    plan: PruningPlan,
    impacts: Mapping[Site, Floats],
    metric: Counted,
    most: float,
    *,
    least_share: float = 0.0,
    channels: int = 1,
) -> PruningPlan:
    """``plan`` with the widths that bring it down to ``most`` of ``metric``: units leave in the order of what they lose
    for each parameter or multiply-add that they save.

    Each site keeps one unit, ``least_share`` of all, and, where a device likes multiples of so many ``channels``, a
    multiple of them: so many units count together. Raises BudgetError where that is not enough.
    """
    architecture = costs.architecture
    count = costs.count or architecture.count()
    prices = unit_costs(architecture, count)
    now = costs.of(plan.built("own").without_widths()).amount(metric)
    found: list[tuple[float, float, Site, tuple[int, ...]]] = []
    for site in sites_left(architecture, plan):
        if site not in impacts:
            continue
        price = prices[site]
        saves = price.params if metric == "params" else price.macs
        saves -= price.attention_macs if metric == "paper_macs" else 0
        together = max(1, channels // np.gcd(channels, site.size))
        order = [int(unit) for unit in np.argsort(impacts[site], kind="stable")]
        least = max(1, int(np.ceil(least_share * site.count)))
        least = -(-least // together) * together
        # What is left is a multiple of ``together``: the first to leave are those beyond the last multiple.
        first = (site.count - least) % together
        steps = [order[:first]] if first else []
        steps += [order[at : at + together] for at in range(first, site.count - least, together)]
        last = 0.0
        for units in steps:
            loss = float(sum(impacts[site][unit] for unit in units))
            rate = max(last, loss / (len(units) * saves))  # never before those of its site that lose less
            last = rate
            found.append((rate, len(units) * saves, site, tuple(units)))
    gone: dict[Site, list[int]] = {}
    for _, saves, site, units in sorted(found, key=lambda one: one[0]):  # stable: in order of execution
        if now <= most:
            break
        gone.setdefault(site, []).extend(units)
        now -= saves
    if now > most:
        raise BudgetError(
            f"asked for at most {most:,.0f} {metric} by narrower blocks, found {now:,.0f} with all of them as narrow "
            "as they may be; ask for more, or remove blocks as well"
        )
    widths = [
        width_of(site, [unit for unit in range(site.count) if unit not in units])
        for site, units in gone.items()
    ]
    return dataclasses.replace(plan_of(architecture, plan.removed, widths=widths), form="own")


def unit_impacts(impacts: Mapping[Site, Floats]) -> Mapping[str, Floats]:
    """The same by name of the site."""
    return {site.name: values for site, values in impacts.items()}


def predicted_loss(plan: PruningPlan, impacts: Mapping[str, Sequence[float]]) -> float:
    """The sum of the impacts of all units that leave by the widths of ``plan``."""
    return float(
        sum(
            value
            for width in plan.widths
            for unit, value in enumerate(impacts[width.site])
            if unit not in width.kept
        )
    )
