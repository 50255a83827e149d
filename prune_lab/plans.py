"""Which blocks to remove, and how wide the others stay: a plan as data, read, checked and named by content, and the
plain model that it leaves.

What a plan leaves in another form is in ``prune_lab.forms``.

A plan is *native* when a plain diffusers config describes the network it leaves; the model's family decides that
without any weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from prune_lab.blocks import Architecture, block_groups
from prune_lab.errors import NonNativePlanError, PlanError, PruneLabError, UnremovableBlockError
from prune_lab.families import CLASS_NAME, FAMILIES, Form, Kept, Layout
from prune_lab.runs import plan_id_of, read_plan_file
from prune_lab.runtime import path_text, printable, read_json, read_text
from prune_lab.width import Width, all_kept, parse_width, site_named, width_from_json

_LONGEST_TITLE = 60  # characters
_PLAN_FILES = (".json", ".txt")


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
        }

    def named(self, *names: str, origin: str | None = None) -> PruningPlan:
        """The same plan under these names, of the origin it had unless another is given; empty names are left out."""
        return dataclasses.replace(
            self, names=tuple(filter(None, names)), origin=self.origin if origin is None else origin
        )

    def built(self, form: Form) -> PruningPlan:
        """The same plan, to be built in this form."""
        return dataclasses.replace(self, form=form)

    def without_widths(self) -> PruningPlan:
        """The plan that removes the same blocks and leaves the others as wide as they are."""
        return dataclasses.replace(self, widths=())


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


def _parsed(text: str, architecture: Architecture, members: dict[str, set[str]]) -> PruningPlan:
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
    return _parsed(text, architecture, {})


def _is_called(name: str, plan: PruningPlan, architecture: Architecture) -> bool:
    """Whether ``plan`` may have the name: that of a preset belongs to the preset alone."""
    preset = architecture.family.plans.get(name)
    try:
        return preset is None or (set(preset(architecture.outline)) == set(plan.removed) and not plan.widths)
    except PlanError:  # it has no meaning for this architecture
        return False


def _check_said(plan: PruningPlan, said: object, architecture: Architecture) -> None:
    """Raise PlanError where a file calls ``plan`` by the id ``said`` or by the name of a preset, and it is another."""
    wrong = [f"the id {printable(str(said), 50)}"] if said is not None and said != plan.id else []
    wrong += [f"the name {name}" for name in plan.names if not _is_called(name, plan, architecture)]
    if wrong:
        raise PlanError(
            f"asked to read a plan, found {wrong[0]} and the blocks of another one, {plan.id}; remove its id and "
            "names, or restore its blocks"
        )


def plan_from_json(value: object, architecture: Architecture) -> PruningPlan:
    """The plan that ``to_json`` wrote; one that a person wrote may lack id and names.

    Raises PlanError when it is damaged, was made for another architecture, or has the id or preset's name of another.
    """
    if not isinstance(value, dict) or not isinstance(value.get("removed"), list):
        raise PlanError("asked to read a plan, found no list of removed blocks in it; write the plan again")
    made_for = value.get("architecture")
    if made_for != architecture.signature:
        raise PlanError(
            f"the plan was made for architecture {printable(str(made_for), 50)}, this model is "
            f"{architecture.signature}; write it as text (for example '-{architecture.blocks[-1].name}') to "
            "apply it here"
        )
    names = value.get("names", [])
    if "name" in value or not isinstance(names, list):
        raise PlanError(
            'asked to read a plan, found its name where a list of names belongs; write "names": [...] instead'
        )
    origin = value.get("origin", "")
    if not all(isinstance(one, str) for one in (*value["removed"], *names, origin)):
        raise PlanError(
            "asked to read a plan, found other things than text in its lists; write the plan again"
        )
    form = value.get("form", "native")
    if form not in get_args(Form):
        raise PlanError(
            f"asked to read a plan, found the form {printable(str(form), 50)!r} in it; the forms are "
            f"{', '.join(get_args(Form))}"
        )
    said = value.get("widths", {})
    if not isinstance(said, dict):
        raise PlanError(
            'asked to read a plan, found no names with its widths; write "widths": {"SITE": [0, 1, ...]}'
        )
    widths = [width_from_json(name, kept, architecture.sites) for name, kept in said.items()]
    plan = plan_of(architecture, value["removed"], widths=widths).named(*names, origin=origin).built(form)
    _check_said(plan, value.get("id"), architecture)
    return plan


def read_plan(path: Path, architecture: Architecture) -> PruningPlan:
    """The plan that ``to_json`` wrote to ``path``.

    Raises DataError when the file is damaged or holds another plan than its name or folder says, PlanError when it was
    made for another architecture.
    """
    value = read_plan_file(path)
    try:
        return plan_from_json(value, architecture)
    except PruneLabError as error:
        raise PlanError(f"asked to read {path}: {error}") from None


def refuse_widths(plans: Iterable[PruningPlan], what: str) -> None:
    """Raise PlanError for a plan with widths: ``what`` is done with removed blocks alone."""
    for plan in plans:
        if plan.widths:
            raise PlanError(
                f"asked to {what} the plan {plan.label}, which makes blocks narrower ({plan.widths[0].short}); that "
                "works with removed blocks alone so far: leave out the widths, or see prune, profile and export"
            )


def plan_file(text: str) -> tuple[str, str]:
    """(file, which of its plans) of ``plans.json#2`` or ``plans.json#bk-base``; all of ``text`` and nothing else."""
    file, mark, wanted = text.rpartition("#")
    return (file, wanted) if mark and Path(file).suffix in _PLAN_FILES else (text, "")


def read_plans(text: str, architecture: Architecture) -> tuple[PruningPlan, ...]:
    """The plans that ``text`` names: a plan as ``parse_plan`` reads it, a ``.json`` file of one plan or a list, or a
    text file with one plan a line (blank lines and ``#`` comments are skipped). After the file ``#2`` is the second of
    them, ``#NAME`` the one that goes by this name or id.
    """
    file, wanted = plan_file(text)
    path = Path(file)
    if path.suffix == ".json":
        value = read_json(path)
        plans = tuple(
            plan_from_json(item, architecture) for item in (value if isinstance(value, list) else [value])
        )
        return (_chosen(plans, file, wanted),) if wanted else plans
    if path.suffix == ".txt":
        try:
            lines = [line.split("#")[0].strip() for line in read_text(path).splitlines()]
        except PruneLabError as error:
            raise PlanError(f"asked for the plans in {path_text(path)}: {error}") from None
        members: dict[str, set[str]] = {}
        plans = tuple(_parsed(line, architecture, members) for line in lines if line)
        return (_chosen(plans, file, wanted),) if wanted else plans
    return (parse_plan(text, architecture),)


def _chosen(plans: Sequence[PruningPlan], file: str, wanted: str) -> PruningPlan:
    found = [plan for plan in plans if wanted in (plan.id, *plan.names)]
    if not found and re.fullmatch(r"[1-9]\d{0,5}", wanted, re.ASCII) and int(wanted) <= len(plans):
        found = [plans[int(wanted) - 1]]
    if not found:
        raise PlanError(
            f"asked for the plan {printable(wanted, 60)!r} of {path_text(file)}, which has none such; "
            f"{_those_in(plans)}"
        )
    return found[0]


_SHOWN = 8  # plans of a file that an error names


def _those_in(plans: Sequence[PruningPlan]) -> str:
    shown = [f"#{number} {plan.label}" for number, plan in enumerate(plans[:_SHOWN], 1)]
    return f"it has {', '.join(shown)}{f' and {len(plans) - _SHOWN} more' * (len(plans) > _SHOWN)}"


def read_one_plan(text: str, architecture: Architecture) -> PruningPlan:
    """The one plan that ``text`` names, as ``read_plans`` reads it. Raises PlanError for a file of several."""
    plans = read_plans(text, architecture)
    if len(plans) == 1:
        return plans[0]
    file = path_text(text)
    if not plans:
        raise PlanError(f"asked for the plan in {file}, found none in it; give a file with a plan")
    raise PlanError(
        f"asked for one plan, found {len(plans)} in {file}; choose by number or name, as in '{file}#1': "
        f"{_those_in(plans)}"
    )


# The model that a plan leaves ----------------------------------------------------------------------------------------


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
