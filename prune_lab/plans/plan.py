"""Which blocks to remove, and how wide the others stay: a plan as data, checked, written, and named by content."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from typing import Any

from prune_lab.blocks import Architecture, block_groups
from prune_lab.errors import PlanError, UnremovableBlockError
from prune_lab.families import CLASS_NAME, FAMILIES, Form
from prune_lab.runs import plan_id_of
from prune_lab.runtime import printable
from prune_lab.width import Width, all_kept, parse_width, site_named

_LONGEST_TITLE = 60  # characters


@dataclasses.dataclass(frozen=True, slots=True)
class PruningPlan:
    """A set of removed blocks of one architecture, and what stays of the widths of others; equal content gives equal
    ``id``, whatever its ``names``.

    ``removed`` holds block names in order of execution; ``plan_of`` and ``parse_plan`` make plans and check them.
    """

    removed: tuple[str, ...]
    architecture: str
    names: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    """What the plan is called, the first name first: several where it was found in several ways."""
    origin: str = dataclasses.field(default="", compare=False)
    """Where a run has the plan from: ``control``, ``search``, or empty where a person wrote it."""
    form: Form = dataclasses.field(default="native", compare=False)
    """How the smaller model is built; the same network in each."""
    widths: tuple[Width, ...] = ()
    """What stays of sites of which something leaves, in order of execution."""
    timed: str = dataclasses.field(default="", compare=False)
    """In words, how long what is left takes beside the teacher, and where; empty where a search has not timed it."""

    @property
    def id(self) -> str:
        """12 hexadecimal digits of the content."""
        return plan_id_of(self.architecture, self.removed, self._kept())

    @property
    def text(self) -> str:
        """The plan as a person writes it: ``-Dn1.R2 -Dn1.A2 ~Dn3.A1.heads=2/4@0,3``; empty when nothing leaves."""
        return " ".join([*(f"-{name}" for name in self.removed), *(width.text for width in self.widths)])

    @property
    def changes(self) -> bool:
        """Whether anything leaves."""
        return bool(self.removed or self.widths)

    def _kept(self) -> dict[str, int | list[int]]:
        return {width.site: width.to_json() for width in self.widths}

    @property
    def name(self) -> str:
        """The first name; empty when the plan has none."""
        return self.names[0] if self.names else ""

    @property
    def label(self) -> str:
        """The first name, or the id when the plan has none."""
        return self.name or self.id

    @property
    def title(self) -> str:
        """What people read: the first name, else the plan in writing where that is short, else the id."""
        return self.name or (self.text if len(self.text) <= _LONGEST_TITLE else self.id)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values; ``plan_from_json`` reads them back."""
        return {
            "id": self.id,
            "names": list(self.names),
            "origin": self.origin,
            "architecture": self.architecture,
            "removed": list(self.removed),
            **({"widths": self._kept()} if self.widths else {}),
            "form": self.form,
            **({"timed": self.timed} if self.timed else {}),
        }

    def named(self, *names: str, origin: str | None = None) -> PruningPlan:
        """The same plan under these names, of the origin it had unless another is given; empty names are left out."""
        return dataclasses.replace(
            self, names=tuple(filter(None, names)), origin=self.origin if origin is None else origin
        )

    def built(self, form: Form) -> PruningPlan:
        """The same plan, to be built in this form; one in another form takes another time."""
        return dataclasses.replace(self, form=form, timed=self.timed if form == self.form else "")

    def without_widths(self) -> PruningPlan:
        """The plan that removes the same blocks and leaves the others as wide as they are."""
        return dataclasses.replace(self, widths=(), timed="")


def _checked_widths(
    architecture: Architecture, widths: Iterable[Width], gone: frozenset[str]
) -> tuple[Width, ...]:
    """``widths`` in order of execution, without those that keep all. PlanError for one of a block that leaves."""
    wanted = {width.site: width for width in widths if not all_kept(width)}
    if not wanted:
        return ()
    for name in wanted:
        block = site_named(name, architecture.sites).block
        if block in gone or architecture.block(block).inside in gone:
            raise PlanError(
                f"asked for a width of {name}, but {block} is removed by the same plan; leave out one of the two"
            )
    return tuple(wanted[site.name] for site in architecture.sites if site.name in wanted)


def plan_of(
    architecture: Architecture, removed: Iterable[str], name: str = "", *, widths: Iterable[Width] = ()
) -> PruningPlan:
    """The checked plan that removes the blocks and layers named ``removed`` and keeps ``widths`` of others; a layer of
    a removed block leaves with it.

    Raises UnknownBlockError or UnremovableBlockError naming the block and the reason, PlanError for a width of a block
    that is removed.
    """
    wanted = {block: architecture.block(block) for block in removed}
    for block in wanted.values():
        if not block.removable:
            raise UnremovableBlockError(
                f"asked to remove {block.name}, but it {block.reason}; remove other blocks of {block.stage}"
            )
    gone = architecture.outermost(wanted)
    names = tuple(block.name for block in architecture.named if block.name in gone)
    kept = _checked_widths(architecture, widths, gone)
    return PruningPlan(names, architecture.signature, widths=kept).named(name)


def _members(name: str, architecture: Architecture) -> set[str]:
    """The blocks that ``name`` stands for: a block, a pair, or all that can be removed from a stage."""
    if name in architecture.stages:
        return {block.name for block in architecture.stage_blocks(name) if block.removable}
    for pair in block_groups(architecture, "pair"):
        if pair.name == name:
            return set(pair.blocks)
    return {architecture.block(name).name}


def _taken(removed: set[str], members: set[str], architecture: Architecture) -> set[str]:
    """``removed`` and ``members``, with the layers of every block among these."""
    return removed | members | {layer.name for layer in architecture.layers if layer.inside in members}


def _given_back(removed: set[str], members: set[str], architecture: Architecture) -> set[str]:
    """``removed`` without ``members`` and their layers; of a removed block a layer that is given back stays alone."""
    layers = [layer for layer in architecture.layers if layer.inside in members or layer.name in members]
    return removed - members - {name for layer in layers for name in (layer.name, layer.inside)}


def named_plans(architecture: Architecture) -> list[str]:
    """The presets that have a meaning for the model."""
    found = []
    for name, preset in architecture.family.plans.items():
        with contextlib.suppress(PlanError):
            preset(architecture.outline)
            found.append(name)
    return found


def _preset(name: str, architecture: Architecture) -> set[str]:
    """The blocks that the preset removes. Raises PlanError, which says what is defined, where it is not this one."""
    preset = architecture.family.plans.get(name)
    if preset is not None:
        try:
            return set(preset(architecture.outline))
        except PlanError as error:
            reason = str(error)
    else:
        example = f"name the blocks instead, for example '-{architecture.blocks[-1].name}'"
        reason = f"the plan {name} is not defined for a {architecture.config[CLASS_NAME]}; {example}"
    defined = ", ".join(named_plans(architecture)) or "none"
    raise PlanError(f"{reason} (presets that are defined for this model: {defined})")


def parsed_plan(text: str, architecture: Architecture, members: dict[str, set[str]]) -> PruningPlan:
    """``parse_plan`` that keeps in ``members`` what the names it met stand for: a file may hold many plans."""
    known = architecture.family.plans
    removed: set[str] = set()
    widths: dict[str, Width] = {}
    items = text.split()
    for item in items:
        if item == "teacher":
            continue
        if item in known or any(item in family.plans for family in FAMILIES.values()):
            if item not in members:
                members[item] = _preset(item, architecture)
            removed = _taken(removed, members[item], architecture)
        elif item[0] in "-+" and len(item) > 1:
            name = item[1:]
            if name not in members:
                members[name] = _members(name, architecture)
            change = _taken if item[0] == "-" else _given_back
            removed = change(removed, members[name], architecture)
        elif item[0] == "~":
            width = parse_width(item, architecture.sites)
            if widths.get(width.site, width) != width:
                raise PlanError(
                    f"asked for two widths of {width.site}, {widths[width.site].text} and {width.text}; leave out one"
                )
            widths[width.site] = width
        else:
            named = f"a preset ({', '.join(defined)}) or " if (defined := named_plans(architecture)) else ""
            raise PlanError(
                f"cannot read {printable(item)!r} in the plan {printable(text)!r}; use {named}-BLOCK and "
                "+BLOCK, or ~WIDTH=COUNT"
            )
    name = items[0] if len(items) == 1 and items[0] in known else ""
    return plan_of(architecture, removed, name, widths=widths.values())


def parse_plan(text: str, architecture: Architecture) -> PruningPlan:
    """The plan that ``text`` describes, for example ``bk-small``, ``bk-base -Md`` or ``-Dn1.R2 -Dn1.A2``.

    Items are names of plans that the model's family knows, ``-`` and ``+`` with a block, a pair (``Dn1.R2+A2``) or a
    stage (all of it that can be removed), or a layer (``Up1.A2.T7``); they apply from left to right, and a block goes
    and comes back with its layers: ``-Up1.A2 +Up1.A2.T7`` leaves that layer alone in it. ``~Dn3.A1.heads=2/4`` keeps
    two of four heads (``prune_lab.width``). ``teacher`` or nothing at all is the empty plan. Raises PlanError,
    UnknownBlockError or UnremovableBlockError.
    """
    return parsed_plan(text, architecture, {})


def refuse_widths(plans: Iterable[PruningPlan], what: str) -> None:
    """Raise PlanError for a plan with widths: ``what`` is done with removed blocks alone."""
    for plan in plans:
        if plan.widths:
            raise PlanError(
                f"asked to {what} the plan {plan.label}, which makes blocks narrower ({plan.widths[0].short}); that "
                "works with removed blocks alone so far: leave out the widths, or see prune, profile and export"
            )
