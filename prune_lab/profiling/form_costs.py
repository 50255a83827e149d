"""What leaves a model in one form of a student: counted from the layout that is built, not from the blocks of a plan.

A removed block that stays and does nothing takes nothing along but the layers that a config can leave out of it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from prune_lab.blocks import Architecture
from prune_lab.counting import Macs, count_macs
from prune_lab.errors import FormError
from prune_lab.families import Form, Layout, meta_model
from prune_lab.forms import layout_of
from prune_lab.plans import PruningPlan, plan_of
from prune_lab.profiling.plan_costs import PICOSECONDS, PartCost, PartKind, PlanCost
from prune_lab.profiling.plan_matrix import REST, sampler_groups


class Gone(NamedTuple):
    """Parameters, multiply-adds of one forward pass, and those of them in attention products."""

    params: int
    macs: int
    attention_macs: int


def _canonical(config: Mapping[str, Any]) -> str:
    return json.dumps(dict(config), sort_keys=True)


@functools.lru_cache(maxsize=8)
def _sizes(canonical: str) -> Mapping[str, int]:
    """Parameters right in each module, by its path; modules inside of it do not count."""
    model = meta_model(json.loads(canonical))
    return {
        path: sum(parameter.numel() for parameter in module.parameters(recurse=False))
        for path, module in model.named_modules()
    }


def _counts_anew(architecture: Architecture, layout: Layout) -> bool:
    """Whether what is left does other work than it did in the whole model: what a removed block keeps for others runs
    fewer times, and without any block what they alone read is not computed.
    """
    gone = [unit for unit in architecture.outline.present if layout.renamed(unit.path) is None]
    left = {unit.name for unit in architecture.outline.blocks} - {unit.name for unit in gone}
    return not left or any(unit.keeps for unit in gone)


def gone_by(
    architecture: Architecture, layout: Layout, count: Macs, sizes: Mapping[str, Any] = MappingProxyType({})
) -> Gone:
    """What is not there any more in the smaller model of ``layout``; ``count`` is that of the whole model at ``sizes``,
    the arguments of ``count_macs``.
    """
    own = _sizes(_canonical(architecture.config))
    shares = count.own_by_module
    gone = [path for path in own if path and layout.renamed(path) is None]
    params = sum(own[path] for path in gone)
    if _counts_anew(architecture, layout):
        built = count_macs(layout.config, **sizes)
        return Gone(params, count.total - built.total, count.attention - built.attention)
    macs = [shares.get(path, (0, 0)) for path in gone]
    return Gone(
        params,
        sum(one for one, _ in macs),
        sum(attention for _, attention in macs),
    )


# The parts of a model in a form ------------------------------------------------------------------------------


class FormCosts(NamedTuple):
    """What leaves with each part of a model in one form, and what leaves only when several blocks are all gone."""

    parts: tuple[PartCost, ...]
    layers: tuple[PartCost, ...]
    together: tuple[tuple[frozenset[str], PartCost], ...]


def _gone_with(
    architecture: Architecture, count: Macs, sizes: Mapping[str, Any], removed: Iterable[str], form: Form
) -> Gone:
    """What leaves with the blocks ``removed``, counted from what is built; nothing where that cannot be."""
    plan = plan_of(architecture, removed).built(form)
    try:
        return gone_by(architecture, layout_of(architecture, plan), count, sizes)
    except FormError:
        return Gone(0, 0, 0)


def _sum(costs: Iterable[PartCost | Gone]) -> Gone:
    listed = list(costs)
    return Gone(*(sum(getattr(one, column) for one in listed) for column in Gone._fields))


def _less(whole: Gone, part: Gone) -> Gone:
    return Gone(*(one - other for one, other in zip(whole, part, strict=True)))


def parts_in_form(
    architecture: Architecture,
    native: Sequence[PartCost],
    layers: Sequence[PartCost],
    count: Macs,
    sizes: Mapping[str, Any],
    form: Form,
) -> FormCosts:
    """The parts of a model in ``form``, from its ``native`` ones, whose layers are ``layers``, and its ``count`` at
    ``sizes``.
    """
    size = sum(one.weight_bytes for one in native) // sum(one.params for one in native)
    timed = all(one.latency_ms is not None for one in native)

    def part(name: str, kind: PartKind, gone: Gone, usual: PartCost | None = None) -> PartCost:
        share = gone.macs / usual.macs if usual and usual.macs else 0.0
        took = usual.latency_ms * share if usual and usual.latency_ms is not None else None
        took = took if took is not None else 0.0 if timed else None
        return PartCost(name, kind, *gone, gone.params * size, took)

    def alone(one: PartCost) -> PartCost:
        removable = architecture.block(one.name).removable
        gone = _gone_with(architecture, count, sizes, [one.name], form) if removable else Gone(0, 0, 0)
        if gone == (one.params, one.macs, one.attention_macs):
            return one  # with what was measured of it
        return part(one.name, "block", gone, one)

    blocks = [alone(one) for one in native if one.kind == "block"]
    inside_blocks = [alone(one) for one in layers]
    samplers = [one for one in native if one.kind == "sampler"]
    saved = {one.name: one for one in (*blocks, *inside_blocks, *samplers)}
    sets = [(frozenset(group.blocks), group.samplers) for group in sampler_groups(architecture)]
    sets += [(frozenset(names), ()) for names in architecture.family.tied(architecture.outline)]
    if form == "own" and all(block.removable for block in architecture.blocks):
        # without any block what they alone read is not computed either
        everything = frozenset(block.name for block in architecture.blocks)
        sets += [(everything, ())] if everything not in dict(sets) else []
    together: list[tuple[frozenset[str], PartCost]] = []
    for names, left in sorted(sets, key=lambda one: len(one[0])):
        smaller = [name for inner, more in sets if inner < names for name in more if name not in left]
        others = [saved[name] for name in (*names, *left, *smaller)]
        others += [cost for inner, cost in together if inner < names]
        rest = _less(_gone_with(architecture, count, sizes, names, form), _sum(others))
        if any(rest):
            together.append((names, part("+".join(sorted(names)), "block", rest)))
    taken = [*blocks, *samplers]
    stays = part(REST, "rest", _less(_sum(native), _sum(taken)))
    spent = sum(one.picoseconds for one in native) - sum(one.picoseconds for one in taken)
    rest_of_all = dataclasses.replace(stays, latency_ms=spent / PICOSECONDS if timed else None)
    return FormCosts((*blocks, *samplers, rest_of_all), tuple(inside_blocks), tuple(together))


def counted_cost(
    architecture: Architecture,
    count: Macs,
    sizes: Mapping[str, Any],
    whole: PlanCost,
    plan: PruningPlan,
    predicted: PlanCost,
) -> PlanCost:
    """``predicted`` with what is counted from the student that ``plan`` builds; without blocks that is ``whole``."""
    if not plan.removed:
        return predicted
    gone = gone_by(architecture, layout_of(architecture, plan), count, sizes)
    assert whole.weight_bytes is not None
    assert predicted.weight_bytes is not None
    params = whole.params - gone.params
    # What the parts weigh, which may be of several number formats, and what they do not know at the usual weight.
    unforeseen = (params - predicted.params) * (whole.weight_bytes // whole.params)
    return dataclasses.replace(
        predicted,
        params=params,
        macs=whole.macs - gone.macs,
        attention_macs=whole.attention_macs - gone.attention_macs,
        weight_bytes=predicted.weight_bytes + unforeseen,
    )
