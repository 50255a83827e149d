"""What narrower blocks save of the time of a pass: a share of it for each unit of each site, as it was measured.

A saving is linear in the units that leave, so that a search can add savings up. That is a straight line between the
whole width and the one that was measured, half of it. It misleads where a kernel works in steps of 8 or 16 channels: a
width between two steps takes the time of the larger one (``search.round_to`` keeps to the steps), and the last units of
a site save less than the first. So what a search finds by these numbers is timed before anybody relies on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prune_lab.blocks import Architecture
from prune_lab.errors import UnsupportedModelError
from prune_lab.families import Site
from prune_lab.plans import PruningPlan, plan_of
from prune_lab.width import width_of

HALF = 0.5  # of the units of a site: the width that savings are measured at
EVERYWHERE = 0.75  # of the units of all sites at once: what the sum of the savings is set right by


@dataclass(frozen=True, slots=True)
class UnitSaving:
    """The share of a pass of the whole model that one unit of a site saves; below 0 where narrow was slower."""

    site: str
    share: float


@dataclass(frozen=True, slots=True)
class WidthSavings:
    """What units of sites save, and what that adds up to for a model that is narrower everywhere, against its time.

    predicted = scale * sum of max(0, share) over the units that leave.
    """

    units: tuple[UnitSaving, ...]  # by site, in order of execution
    scale: float
    added_up: float  # shares of a pass that the model saves which is narrower everywhere: by the units alone,
    measured: float  # and as it was timed
    rounds: int  # at most

    def unit_shares(self) -> dict[str, float]:
        """The share of a pass that one unit of each site saves, by the name of the site; never below 0."""
        return {unit.site: self.scale * max(0.0, unit.share) for unit in self.units}


# Models to measure ---------------------------------------------------------------------------------------------------


def narrowed(architecture: Architecture, share: float, sites: Iterable[Site]) -> PruningPlan:
    """The plan by which ``share`` of the units of each of ``sites`` stay, at least one; no block leaves."""
    widths = [width_of(site, range(math.ceil(share * site.count))) for site in sites]
    return plan_of(architecture, (), widths=[width for width in widths if width.count < width.of]).built(
        "own"
    )


def plans_by_kind(architecture: Architecture) -> dict[str, PruningPlan]:
    """By the kind of sites, the plan that halves all of that kind. Raises UnsupportedModelError without any sites."""
    if not architecture.sites:
        raise UnsupportedModelError(
            f"asked for the time that narrower blocks of a {architecture.config['_class_name']} save, which has none "
            "whose width is known"
        )
    kinds = dict.fromkeys(site.kind for site in architecture.sites)
    return {
        kind: narrowed(architecture, HALF, [site for site in architecture.sites if site.kind == kind])
        for kind in kinds
    }


def plan_everywhere(architecture: Architecture) -> PruningPlan:
    """The plan that makes all sites narrower, by a quarter where they have so many units."""
    plan = narrowed(architecture, EVERYWHERE, architecture.sites)
    return plan if plan.widths else narrowed(architecture, HALF, architecture.sites)


# From what groups save to units --------------------------------------------------------------------------------------


def shared_out(
    sites: Sequence[Site], saved: float, gone: Mapping[str, int], weights: Mapping[Site, float]
) -> list[UnitSaving]:
    """``saved`` by the units that are ``gone`` of ``sites`` together, for one unit of each: in proportion to
    ``weights``, such as their multiply-adds.
    """
    units = sum(gone.get(site.name, 0) for site in sites)
    if not units:  # each has a single unit, which stays
        return [UnitSaving(site.name, 0.0) for site in sites]
    whole = sum(gone.get(site.name, 0) * weights[site] for site in sites)
    return [UnitSaving(site.name, saved * (weights[site] / whole if whole else 1 / units)) for site in sites]


def width_savings(
    architecture: Architecture, units: Iterable[UnitSaving], measured: float, rounds: int
) -> WidthSavings:
    """The savings of ``units``, with the scale by which they say of the model that is narrower everywhere what it
    saved, ``measured``; 1 where they add up to nothing.
    """
    found = {unit.site: unit for unit in units}
    ordered = tuple(found[site.name] for site in architecture.sites)
    added_up = math.fsum(
        (width.of - width.count) * max(0.0, found[width.site].share)
        for width in plan_everywhere(architecture).widths
    )
    scale = max(0.0, measured) / added_up if added_up else 1.0
    return WidthSavings(ordered, scale, added_up, measured, rounds)


def unit_ms(
    architecture: Architecture, savings: WidthSavings, whole_ms: float, parts_ms: Mapping[str, float]
) -> dict[str, float]:
    """Milliseconds of a pass of ``whole_ms`` that one unit of each site saves, by the name of the site.

    All units of a block together save at most what the block does, by ``parts_ms``, where that can be removed.
    """
    found = {name: share * whole_ms for name, share in savings.unit_shares().items()}
    together: dict[str, float] = {}
    for site in architecture.sites:
        around = outer_block(architecture, site)
        together[around] = together.get(around, 0.0) + site.count * found[site.name]
    for site in architecture.sites:
        around = outer_block(architecture, site)
        if architecture.block(around).removable and together[around] > parts_ms[around]:
            found[site.name] *= parts_ms[around] / together[around]
    return found


def outer_block(architecture: Architecture, site: Site) -> str:
    """The name of the block that ``site`` lies in, also where it lies in a layer of it."""
    return architecture.block(site.block).inside or site.block
