"""The units of a model in order of execution, each with what answers when it is there and when it is removed."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prune_lab.blocks import Architecture
from prune_lab.errors import ReplayError, UnknownBlockError
from prune_lab.families import Unit, only_watches
from prune_lab.surgery import stand_in_for

Code = tuple[bool, ...]  # of one set: for each site whether it is removed


@dataclass(frozen=True, slots=True)
class Site:
    """One unit at its place in the order of execution."""

    unit: Unit
    forward: Callable[..., Any]  # the module's own
    gone: Callable[..., Any]  # what answers when it is removed
    end: int  # the place after the last unit inside it; what it gives hangs on all decisions before that


def in_order(units: Sequence[Unit]) -> tuple[Unit, ...]:
    """The units in order of execution, each followed by those that lie inside it."""
    inner: dict[str, list[Unit]] = {}
    for unit in units:
        inner.setdefault(unit.inside, []).append(unit)

    def with_inner(unit: Unit) -> Iterator[Unit]:
        yield unit
        for one in inner.get(unit.name, ()):
            yield from with_inner(one)

    return tuple(itertools.chain.from_iterable(with_inner(unit) for unit in inner.get("", ())))


def _check_hands_on(unit: Unit, module: nn.Module) -> None:
    """Raise ReplayError where the unit would hand on an input that its module does not have."""
    parameters = inspect.signature(type(module).forward).parameters
    if not unit.removable or any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return
    missing = [name for name in unit.hands_on if name is not None and name not in parameters]
    if missing:
        raise ReplayError(
            f"asked for what goes on without {unit.name}, found that its family names the input {missing[0]!r}, which "
            f"{type(module).__name__}.forward does not take; it takes {', '.join(list(parameters)[1:])}"
        )


def _check_hooks(unit: Unit, module: nn.Module) -> None:
    """Raise ReplayError where something else changes what the unit is given or gives: it would go on doing so where the
    unit is removed.
    """
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    if not all(only_watches(hook) for hook in hooks):
        raise ReplayError(
            f"asked to run a model with and without {unit.name}, found a hook on it ({unit.path}), which torch calls "
            "whether it is there or not; take the hook off first (remove() of what registered it)"
        )


def _handing_on(unit: Unit, module: nn.Module) -> Callable[..., Any]:
    instead = stand_in_for(module, unit)

    def gone(*args: Any, **kwargs: Any) -> Any:
        try:
            return instead(*args, **kwargs)
        except KeyError as error:
            raise ReplayError(
                f"asked for what goes on without {unit.name}, found that the model calls it without the input "
                f"{error.args[0]!r}, which its family names"
            ) from None

    return gone


def sites_of(model: nn.Module, architecture: Architecture, compiled: bool) -> tuple[Site, ...]:
    """The sites of all units in order of execution. Raises ReplayError for a unit that hands on what is not there."""
    units = in_order(architecture.outline.present)
    places = {unit.name: place for place, unit in enumerate(units)}
    ends = [place + 1 for place in range(len(units))]
    for place in range(len(units) - 1, -1, -1):  # from the last, so that inner ends reach their outer units
        if units[place].inside:
            outer = places[units[place].inside]
            ends[outer] = max(ends[outer], ends[place])
    sites = []
    for place, unit in enumerate(units):
        module = model.get_submodule(unit.path)
        _check_hands_on(unit, module)
        _check_hooks(unit, module)
        forward = module.forward
        if compiled and ends[place] == place + 1:  # what others lie inside is patched there
            # for any number of rows; blocks of equal shapes share a graph
            forward = torch.compile(forward, dynamic=True)
        sites.append(Site(unit, forward, _handing_on(unit, module), ends[place]))
    return tuple(sites)


def coded(sites: Sequence[Site], removed: frozenset[str]) -> Code:
    """The decisions of a set; those inside of a removed unit make no difference and are left out."""
    unknown = removed - {site.unit.name for site in sites}
    if unknown:
        raise UnknownBlockError(f"asked to remove {', '.join(sorted(unknown))}, found no unit of that name")
    code: list[bool] = []
    for place, site in enumerate(sites):
        if place >= len(code):
            code.append(site.unit.name in removed)
            if code[-1]:
                code += [False] * (site.end - len(code))
    return tuple(code)


def grouped(sites: Sequence[Site], codes: Sequence[Code], width: int) -> list[list[Code]]:
    """The codes of each pass, in the order of their decisions.

    Where a sampler is gone all that follows has another size, so such sets stand apart from the others in wide passes.
    """
    samplers = [place for place, site in enumerate(sites) if site.unit.kind == "sampler"]

    def sizes(code: Code) -> Code:
        return tuple(code[place] for place in samplers) if width > 1 else ()

    groups = []
    for _, alike in itertools.groupby(sorted(codes, key=lambda code: (sizes(code), code)), key=sizes):
        members = list(alike)
        groups += [members[start : start + width] for start in range(0, len(members), width)]
    return groups
