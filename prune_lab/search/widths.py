"""Which units leave under a budget: those that lose least for what they save."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from prune_lab.blocks import Architecture
from prune_lab.errors import BudgetError
from prune_lab.families import Site
from prune_lab.importance.intervals import Floats
from prune_lab.plans import PruningPlan, plan_of
from prune_lab.profiling import CostTable, Counted, Metric, unit_costs
from prune_lab.width import Width, width_of


def sites_left(architecture: Architecture, plan: PruningPlan) -> tuple[Site, ...]:
    """The sites of the blocks that stay."""
    gone = set(plan.removed)
    return tuple(
        site
        for site in architecture.sites
        if site.block not in gone and architecture.block(site.block).inside not in gone
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """Units of one site that leave together, and what is lost by it."""

    site: Site
    units: tuple[int, ...]
    loss: float


def unit_savings(costs: CostTable, metric: Metric) -> Mapping[Site, float]:
    """What one unit of each site costs in ``metric``: a number, or milliseconds by the latency table of ``costs``.

    Raises BudgetError for memory, which is no sum of parts, and for latency where it was not measured what units save.
    """
    if metric == "memory":
        raise BudgetError(
            "asked for a budget on the memory of plans that make blocks narrower: their peak is no sum of parts, and "
            "is not known before it is measured; give a budget on params, macs or latency"
        )
    if metric == "latency_ms":
        if costs.unit_ms is None:
            raise BudgetError(
                "asked for a budget on the latency of plans that make blocks narrower, found no measured savings of "
                "their parts; measure the width savings of this model first, or give macs or params"
            )
        return {site: costs.unit_ms[site.name] for site in costs.architecture.sites}
    return _counted_savings(costs, metric)


def _counted_savings(costs: CostTable, metric: Counted) -> dict[Site, int]:
    assert costs.count is not None, "a cost table is made by cost_table"
    prices = unit_costs(costs.architecture, costs.count)
    saved = {
        "params": lambda price: price.params,
        "macs": lambda price: price.macs,
        "paper_macs": lambda price: price.macs - price.attention_macs,
    }
    return {site: saved[metric](price) for site, price in prices.items()}


def steps_of(
    sites: Sequence[Site],
    impacts: Mapping[Site, Floats],
    *,
    least_share: float = 0.0,
    channels: int = 1,
) -> dict[Site, list[Step]]:
    """What can leave of each site in turn, the units that lose least first.

    Each site keeps one unit, ``least_share`` of all, and, where a device likes multiples of so many ``channels``, a
    multiple of them: the first step then is what is over, and in each other one so many units leave together.
    """
    found: dict[Site, list[Step]] = {}
    for site in sites:
        if site not in impacts:
            continue
        together = channels // math.gcd(channels, site.size)
        least = max(1, math.ceil(least_share * site.count))
        least = -(-least // together) * together
        order = [int(unit) for unit in np.argsort(impacts[site], kind="stable")][: max(0, site.count - least)]
        first = len(order) % together
        parts = [order[:first]] if first else []
        parts += [order[at : at + together] for at in range(first, len(order), together)]
        found[site] = [
            Step(site, tuple(part), float(sum(impacts[site][unit] for unit in part))) for part in parts
        ]
    return found


def widths_without(steps: Iterable[Step]) -> list[Width]:
    """The widths of which the units of ``steps`` are gone."""
    gone: dict[Site, set[int]] = {}
    for step in steps:
        gone.setdefault(step.site, set()).update(step.units)
    return [
        width_of(site, [unit for unit in range(site.count) if unit not in units])
        for site, units in gone.items()
    ]


def narrowed_to(
    costs: CostTable,
    plan: PruningPlan,
    impacts: Mapping[Site, Floats],
    metric: Metric,
    most: float,
    *,
    least_share: float = 0.0,
    channels: int = 1,
) -> PruningPlan:
    """``plan`` with the widths that bring it down to ``most`` of ``metric``: units leave in the order of what they lose
    for each parameter, multiply-add or millisecond that they save (``steps_of``).

    Raises BudgetError where that is not enough.
    """
    architecture = costs.architecture
    now = costs.of(plan.built("own").without_widths()).amount(metric)
    sites, saves = sites_left(architecture, plan), unit_savings(costs, metric)
    by_rate: list[tuple[float, Step]] = []
    for site, steps in steps_of(sites, impacts, least_share=least_share, channels=channels).items():
        rate = -math.inf
        for step in steps if saves[site] > 0 else ():  # else they would leave for nothing
            # never before those of its site that lose less
            rate = max(rate, step.loss / (len(step.units) * saves[site]))
            by_rate.append((rate, step))
    taken: list[Step] = []
    for _, step in sorted(by_rate, key=lambda one: one[0]):  # stable: in order of execution
        if now <= most:
            break
        taken.append(step)
        now -= len(step.units) * saves[step.site]
    if now > most:
        raise BudgetError(
            f"asked for at most {most:,.6g} {metric} by narrower blocks, found {now:,.6g} with all of them as narrow "
            "as they may be; ask for more, or remove blocks as well"
        )
    return plan_of(architecture, plan.removed, widths=widths_without(taken)).built("own")


def predicted_loss(plan: PruningPlan, impacts: Mapping[Site, Floats]) -> float:
    """The sum of the impacts of all units that leave by the widths of ``plan``."""
    of_site = {site.name: values for site, values in impacts.items()}
    return math.fsum(
        float(value)
        for width in plan.widths
        for unit, value in enumerate(of_site[width.site])
        if unit not in width.kept
    )
