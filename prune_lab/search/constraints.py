"""What a plan must look like whatever it costs: blocks that stay or go, quotas of stages, runs, native or not."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from prune_lab.blocks import Architecture
from prune_lab.errors import ConfigError, UnknownBlockError, UnremovableBlockError
from prune_lab.families import Form
from prune_lab.forms import exists_in, within_form
from prune_lab.plans import PruningPlan
from prune_lab.runtime import printable


@dataclass(frozen=True, slots=True)
class Quota:
    """How many blocks of one stage leave: from ``least`` to ``most``; equal numbers mean exactly so many."""

    stage: str
    most: int
    least: int = 0

    @property
    def text(self) -> str:
        """The quota as ``parse_quota`` reads it where it can: ``Dn1<=2`` or ``Dn1=2``."""
        if self.least == self.most:
            return f"{self.stage}={self.most}"
        return f"{self.stage}<={self.most}" if not self.least else f"{self.least}<={self.stage}<={self.most}"


def as_list(name: str, values: Sequence[str]) -> str:
    """How several ``values`` of the setting ``name`` are written, on the command line and in TOML."""
    listed, (table, _, key) = json.dumps(list(values)), name.partition(".")
    return f"--set '{name}={listed}', or {key} = {listed} under [{table}] in TOML"


def check_single(name: str, values: Sequence[str]) -> None:
    """Raise ConfigError where one of ``values`` of the setting ``name`` is several in one text: no name has a comma or
    a space in it.
    """
    for text in values:
        parts = [part for part in re.split(r"[,;\s]+", text) if part]
        if len(parts) > 1:
            raise ConfigError(
                f"asked for {name} {printable(text, 60)!r}, found {len(parts)} in one text; write them as a list: "
                f"{as_list(name, parts)}"
            )


def parse_quota(text: str) -> Quota:
    """The quota that ``text`` describes: ``Dn1<=2`` (at most two blocks of Dn1 leave) or ``Dn1=2`` (exactly two).

    Raises ConfigError for anything else.
    """
    match = re.fullmatch(r"\s*(\w+)\s*(<?=)\s*(\d+)\s*", text)
    if not match:
        raise ConfigError(
            f"cannot read the quota {printable(text, 60)!r}; write STAGE<=2 for at most two, STAGE=2 for exactly two, "
            f"and several as a list: {as_list('search.quotas', ['STAGE<=2', 'OTHER=1'])}"
        )
    return Quota(match[1], int(match[3]), int(match[3]) if match[2] == "=" else 0)


@dataclass(frozen=True, slots=True)
class Limit:
    """One linear rule over the removed blocks: as many of ``blocks`` leave as of ``against`` and from ``least`` to
    ``most`` more. ``reason`` names it.
    """

    reason: str
    blocks: tuple[str, ...]
    most: int
    least: int = 0
    against: tuple[str, ...] = ()

    def gone(self, removed: Collection[str]) -> int:
        """How many more of ``blocks`` than of ``against`` are removed."""
        return sum(block in removed for block in self.blocks) - sum(
            block in removed for block in self.against
        )

    def allows(self, removed: Collection[str]) -> bool:
        """Whether a plan that removes these blocks keeps to the rule."""
        return self.least <= self.gone(removed) <= self.most


@dataclass(frozen=True, slots=True)
class Constraints:
    """Hard rules for a plan, beside its budgets; by default only that it is native.

    ``keep`` and ``remove`` name blocks or whole stages; a stage in ``remove`` stands for all that can be removed from
    it. ``least_resnets`` residual blocks stay in every stage (0: no rule; BK-SDM-Tiny empties its inner stages).
    ``longest_run`` caps how many blocks in a row, in order of execution, leave together. ``form`` is the one in which
    plans have to exist (``prune_lab.forms``): with ``native`` a plain diffusers config describes what is left.
    """

    keep: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    least_resnets: int = 0
    quotas: tuple[Quota, ...] = ()
    longest_run: int | None = None
    form: Form = "native"

    def __post_init__(self) -> None:
        if self.least_resnets < 0:
            raise ConfigError(f"least_resnets must be at least 0, got {self.least_resnets}")
        if self.longest_run is not None and self.longest_run < 1:
            raise ConfigError(
                f"longest_run must be at least 1, got {self.longest_run}; leave it out for no rule"
            )
        for quota in self.quotas:
            if not 0 <= quota.least <= quota.most:
                raise ConfigError(
                    f"the quota {quota.text} allows no number of blocks; write 0 <= least <= most"
                )

    def limits(self, architecture: Architecture) -> tuple[Limit, ...]:
        """The rules as linear rows over the removable blocks of ``architecture``, their form aside.

        Raises UnknownBlockError, UnremovableBlockError or ConfigError naming the block or stage and the reason.
        """
        return (
            *_inside(architecture),
            *_fixed(self, architecture),
            *_resnets(self, architecture),
            *_quotas(self, architecture),
            *_runs(self, architecture),
        )

    def allow(self, architecture: Architecture, plan: PruningPlan) -> bool:
        """Whether ``plan`` keeps to all of the rules."""
        rules = self.limits(architecture)
        built = within_form(architecture, plan, self.form)
        return all(rule.allows(plan.removed) for rule in rules) and exists_in(architecture, built, built.form)


ANY_PLAN = Constraints(form="own")


def _members(name: str, architecture: Architecture) -> tuple[str, ...]:
    """The blocks, removable or not, that a block or stage name stands for."""
    if name in architecture.stages:
        return tuple(block.name for block in architecture.stage_blocks(name))
    return (architecture.block(name).name,)


def _inside(architecture: Architecture) -> Iterator[Limit]:
    """A layer of a removed block is not removed besides: that would be the same plan."""
    for layer in architecture.layers:
        yield Limit(f"{layer.name} leaves with {layer.inside}", (layer.inside, layer.name), most=1)


def _kept(name: str, architecture: Architecture) -> Iterator[str]:
    """What stays when the block, layer or stage ``name`` is kept: layers of its blocks, and the block of a layer."""
    for member in _members(name, architecture):
        block = architecture.block(member)
        yield from (member, *([block.inside] if block.inside else []))
        yield from (layer.name for layer in architecture.layers_in(member))


def _fixed(constraints: Constraints, architecture: Architecture) -> Iterator[Limit]:
    kept = {block: f"keep {name}" for name in constraints.keep for block in _kept(name, architecture)}
    for block, reason in kept.items():
        yield Limit(reason, (block,), most=0)
    for name in constraints.remove:
        members = [architecture.block(block) for block in _members(name, architecture)]
        removable = [block.name for block in members if block.removable]
        if not removable:
            raise UnremovableBlockError(
                f"asked to always remove {name}, but {members[0].name} {members[0].reason}; remove other blocks"
            )
        for block in removable:
            if block in kept:
                raise ConfigError(
                    f"asked to {kept[block]} and to remove {name}, found {block} in both; name it in one of them"
                )
            yield Limit(f"remove {name}", (block,), most=1, least=1)


def _resnets(constraints: Constraints, architecture: Architecture) -> Iterator[Limit]:
    least = constraints.least_resnets
    for stage in architecture.stages if least else ():
        resnets = [block for block in architecture.stage_blocks(stage) if block.kind == "resnet"]
        if len(resnets) < least:
            raise ConfigError(
                f"asked to keep {least} residual blocks in every stage, found {len(resnets)} in {stage}; "
                f"give least_resnets of at most {len(resnets)}"
            )
        removable = tuple(block.name for block in resnets if block.removable)
        yield Limit(f"at least {least} residual in every stage", removable, most=len(resnets) - least)


def _quotas(constraints: Constraints, architecture: Architecture) -> Iterator[Limit]:
    for quota in constraints.quotas:
        if quota.stage not in architecture.stages:
            raise UnknownBlockError(
                f"asked for the quota {quota.text}, found no stage {quota.stage!r}; the stages are "
                f"{', '.join(architecture.stages)}"
            )
        removable = tuple(block.name for block in architecture.stage_blocks(quota.stage) if block.removable)
        if quota.least > len(removable):
            raise ConfigError(
                f"asked for the quota {quota.text}, found {len(removable)} blocks of {quota.stage} that can be "
                "removed; ask for no more than these"
            )
        yield Limit(f"quota {quota.text}", removable, quota.most, quota.least)


def _runs(constraints: Constraints, architecture: Architecture) -> Iterator[Limit]:
    longest = constraints.longest_run
    if longest is None:
        return
    for start in range(len(architecture.blocks) - longest):
        window = architecture.blocks[start : start + longest + 1]
        if all(block.removable for block in window):  # one that stays ends the run
            yield Limit(f"no run longer than {longest}", tuple(block.name for block in window), most=longest)
