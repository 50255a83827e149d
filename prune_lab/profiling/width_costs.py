"""What one unit of a width costs: the share of it that every layer has which it lies in.

A layer lies in one site at most and on one of its sides, so what a model saves is linear in the units that leave, and
exact: parameters by shape, multiply-adds by the count of the whole model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prune_lab.blocks import Architecture
from prune_lab.counting import Macs
from prune_lab.families import Site, cut_tensors, meta_model
from prune_lab.profiling.form_costs import Gone
from prune_lab.profiling.plan_costs import PICOSECONDS, PlanCost
from prune_lab.width import Width, site_named


def unit_params(architecture: Architecture) -> dict[Site, int]:
    """Parameters of one unit of each site."""
    model: Any = meta_model(architecture.config)
    return {
        site: sum(model.get_parameter(name).numel() // site.count for name in cut_tensors(model, site))
        for site in architecture.sites
    }


def unit_costs(architecture: Architecture, count: Macs) -> dict[Site, Gone]:
    """What one unit of each site costs, by the ``count`` of the whole model. Macs are those of the count's batch."""
    params = unit_params(architecture)
    found = {}
    for site in architecture.sites:
        # Every member is linear in the units; attention products are those of the module that holds the heads.
        layers = sum(count.by_module.get(member.path, (0, 0))[0] for member in site.members)
        products = count.by_module.get(site.path, (0, 0))[1] if site.kind in ("heads", "cross") else 0
        found[site] = Gone(params[site], (layers + products) // site.count, products // site.count)
    return found


def saved_by(architecture: Architecture, count: Macs, widths: Iterable[Width]) -> Gone:
    """What leaves with the units that ``widths`` do not keep."""
    costs = unit_costs(architecture, count)
    saved = [(width.of - width.count, costs[site_named(width.site, architecture.sites)]) for width in widths]
    return Gone(*(sum(units * cost[column] for units, cost in saved) for column in range(len(Gone._fields))))


def _left_ms(
    widths: Sequence[Width], latency_ms: float | None, unit_ms: Mapping[str, float] | None
) -> float | None:
    if latency_ms is None or unit_ms is None:
        return None
    saved = sum((width.of - width.count) * round(unit_ms[width.site] * PICOSECONDS) for width in widths)
    return (round(latency_ms * PICOSECONDS) - saved) / PICOSECONDS


def narrowed_cost(
    architecture: Architecture,
    count: Macs,
    widths: Sequence[Width],
    whole: PlanCost,
    unit_ms: Mapping[str, float] | None = None,
) -> PlanCost:
    """``whole``, without what the units take along that leave by ``widths``.

    The time is known where ``unit_ms`` says what a unit of each site saves of it; what memory a model needs at its
    peak is not.
    """
    saved = saved_by(architecture, count, widths)
    params = whole.params - saved.params
    return dataclasses.replace(
        whole,
        params=params,
        macs=whole.macs - saved.macs,
        attention_macs=whole.attention_macs - saved.attention_macs,
        weight_bytes=None if whole.weight_bytes is None else params * (whole.weight_bytes // whole.params),
        latency_ms=_left_ms(widths, whole.latency_ms, unit_ms),
        activation_bytes=None,
    )
