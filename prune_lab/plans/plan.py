"""Which blocks to remove, as data: read, checked, combined, and named by content."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prune_lab.blocks import Architecture, block_groups
from prune_lab.errors import PlanError, UnremovableBlockError
from prune_lab.runtime import read_json

PLAN_PRESETS = ("bk-base", "bk-small", "bk-tiny")


def _execution_order(name: str) -> tuple[int, int, int, int]:
    """Sorting key of a block name: stage by stage, and R1 A1 R2 A2 within a stage."""
    match = re.fullmatch(r"(Dn|Md|Up)(\d*)\.([RA])(\d+)", name)
    assert match, f"not a block name: {name}"
    side, stage, kind, index = match.groups()
    return ("Dn", "Md", "Up").index(side), int(stage or 0), int(index), "RA".index(kind)


@dataclasses.dataclass(frozen=True, slots=True)
class PruningPlan:
    """A set of removed blocks of one architecture; equal content gives equal ``id``, whatever its ``names``.

    ``removed`` holds block names in order of execution; ``plan_of`` and ``parse_plan`` make plans and check them.
    """

    removed: tuple[str, ...]
    architecture: str
    names: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    """What the plan is called, the first name first: several where it was found in several ways."""
    origin: str = dataclasses.field(default="", compare=False)
    """Where a run has the plan from: ``control``, ``search``, or empty where a person wrote it."""

    @property
    def id(self) -> str:
        """12 hexadecimal digits of the content."""
        content = json.dumps([self.architecture, self.removed])
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    @property
    def text(self) -> str:
        """The plan as a person writes it: ``-Dn1.R2 -Dn1.A2``; empty when nothing is removed."""
        return " ".join(f"-{name}" for name in self.removed)

    @property
    def name(self) -> str:
        """The first name; empty when the plan has none."""
        return self.names[0] if self.names else ""

    @property
    def label(self) -> str:
        """The first name, or the id when the plan has none."""
        return self.name or self.id

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values; ``plan_from_json`` reads them back."""
        return {
            "id": self.id,
            "names": list(self.names),
            "origin": self.origin,
            "architecture": self.architecture,
            "removed": list(self.removed),
        }

    def named(self, *names: str, origin: str | None = None) -> PruningPlan:
        """The same plan under these names, of the origin it had unless another is given; empty names are left out."""
        return dataclasses.replace(
            self, names=tuple(filter(None, names)), origin=self.origin if origin is None else origin
        )

    def __or__(self, other: PruningPlan) -> PruningPlan:
        """What either plan removes."""
        return self._combined(other, set(self.removed) | set(other.removed))

    def __and__(self, other: PruningPlan) -> PruningPlan:
        """What both plans remove."""
        return self._combined(other, set(self.removed) & set(other.removed))

    def __sub__(self, other: PruningPlan) -> PruningPlan:
        """What this plan removes and ``other`` keeps."""
        return self._combined(other, set(self.removed) - set(other.removed))

    def _combined(self, other: PruningPlan, names: set[str]) -> PruningPlan:
        if self.architecture != other.architecture:
            raise PlanError(
                f"asked to combine plans of two architectures, {self.architecture} and {other.architecture}; "
                "make both for the same U-Net"
            )
        return PruningPlan(tuple(sorted(names, key=_execution_order)), self.architecture)


def plan_of(architecture: Architecture, removed: Iterable[str], name: str = "") -> PruningPlan:
    """The checked plan that removes the blocks named ``removed``.

    Raises UnknownBlockError or UnremovableBlockError naming the block and the reason.
    """
    blocks = [architecture.block(block) for block in removed]
    for block in blocks:
        if block.starred:
            raise UnremovableBlockError(
                f"asked to remove {block.name}, but it {block.reason}; remove other blocks of {block.stage}"
            )
    names = tuple(sorted({block.name for block in blocks}, key=_execution_order))
    return PruningPlan(names, architecture.signature).named(name)


def _preset(name: str, architecture: Architecture) -> set[str]:
    """The blocks that BK-SDM's ``name`` removes (arXiv:2305.15798 section 3): ``bk-base`` the second residual-attention
    pair of every stage but the middle, ``bk-small`` the mid stage as well, ``bk-tiny`` the innermost stages as well.
    """
    stages = [stage for stage in architecture.stages if stage != "Md"]
    pairs_per_stage = {
        stage: sum(b.kind == "resnet" for b in architecture.stage_blocks(stage)) for stage in stages
    }
    expected = {f"Dn{i}": 2 for i in range(1, 5)} | {f"Up{i}": 3 for i in range(1, 5)}
    if pairs_per_stage != expected:
        raise PlanError(
            f"{name} is defined for four stages of two layers with a mid stage, as in Stable Diffusion 1 and 2; this "
            f"U-Net has residual blocks {pairs_per_stage}; name the blocks instead, for example '-Dn1.R2 -Dn1.A2'"
        )
    removed = {
        block.name
        for block in architecture.blocks
        if block.stage != "Md" and block.name.endswith(("R2", "A2"))
    }
    if name in ("bk-small", "bk-tiny") and "Md" in architecture.stages:
        removed |= {block.name for block in architecture.stage_blocks("Md")}
    if name == "bk-tiny":
        for stage in ("Dn4", "Up1"):
            removed |= {block.name for block in architecture.stage_blocks(stage)}
    return removed


def _members(name: str, architecture: Architecture) -> set[str]:
    """The blocks that ``name`` stands for: a block, a pair, or all that can be removed from a stage."""
    if name in architecture.stages:
        return {block.name for block in architecture.stage_blocks(name) if block.removable}
    for pair in block_groups(architecture, "pair"):
        if pair.name == name:
            return set(pair.blocks)
    return {architecture.block(name).name}


def parse_plan(text: str, architecture: Architecture) -> PruningPlan:
    """The plan that ``text`` describes, for example ``bk-small``, ``bk-base -Md`` or ``-Dn1.R2 -Dn1.A2``.

    Items are preset names, ``-`` and ``+`` with a block, a pair (``Dn1.R2+A2``) or a stage (all of it that can be
    removed); they apply from left to right. ``teacher`` or nothing at all is the empty plan.
    Raises PlanError, UnknownBlockError or UnremovableBlockError.
    """
    removed: set[str] = set()
    items = text.split()
    for item in items:
        if item == "teacher":
            continue
        if item in PLAN_PRESETS:
            removed |= _preset(item, architecture)
        elif item[0] in "-+" and len(item) > 1:
            names = _members(item[1:], architecture)
            removed = removed | names if item[0] == "-" else removed - names
        else:
            known = ", ".join(PLAN_PRESETS)
            raise PlanError(
                f"cannot read {item!r} in the plan {text!r}; use a preset ({known}) or -BLOCK and +BLOCK"
            )
    return plan_of(architecture, removed, items[0] if len(items) == 1 and items[0] in PLAN_PRESETS else "")


def plan_from_json(value: object, architecture: Architecture) -> PruningPlan:
    """The plan that ``to_json`` wrote. Raises PlanError when it is damaged or was made for another architecture."""
    if not isinstance(value, dict) or not isinstance(value.get("removed"), list):
        raise PlanError("asked to read a plan, found no list of removed blocks in it; write the plan again")
    made_for = value.get("architecture")
    if made_for != architecture.signature:
        raise PlanError(
            f"the plan was made for architecture {made_for}, this U-Net is {architecture.signature}; "
            "write it as text (for example '-Dn1.R2 -Dn1.A2') to apply it here"
        )
    if "name" in value or not isinstance(value.get("names", []), list):
        raise PlanError(
            'asked to read a plan, found its name where a list of names belongs; write "names": [...] instead'
        )
    plan = plan_of(architecture, map(str, value["removed"]))
    return plan.named(*map(str, value.get("names", [])), origin=str(value.get("origin", "")))


def read_plans(text: str, architecture: Architecture) -> tuple[PruningPlan, ...]:
    """The plans that ``text`` names: a plan as ``parse_plan`` reads it, a ``.json`` file of one plan or a list, or a
    text file with one plan a line (blank lines and ``#`` comments are skipped).
    """
    path = Path(text)
    if path.suffix == ".json":
        value = read_json(path)
        return tuple(
            plan_from_json(item, architecture) for item in (value if isinstance(value, list) else [value])
        )
    if path.suffix == ".txt":
        try:
            lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except OSError as error:
            raise PlanError(f"asked to read plans from {path}: {error.strerror}; check the path") from None
        return tuple(parse_plan(line, architecture) for line in lines if line)
    return (parse_plan(text, architecture),)
