"""Whether a plain diffusers model computes what is left of a U-Net, and where its parts then lie.

``layout`` finds out by executing both networks on symbols: the original with its removed blocks bypassed, and the
network that a config with fewer layers would build. They are the same function exactly when their outputs are the same
symbol. What such a config says is the business of the class of model.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from prune_lab.errors import NonNativePlanError
from prune_lab.families.family import Lane, Layout, Outline, Removed, Stage, UnitKind
from prune_lab.families.unet_stages import K_STAGES, stage_class

_KINDS: tuple[UnitKind, ...] = ("resnet", "attention", "sampler")


@dataclasses.dataclass(frozen=True, slots=True)
class Wiring:
    """One stage as the symbolic execution sees it; a unit is ``None`` where it is bypassed."""

    stage: Stage
    place: int  # among the stages of its lane in the original
    kind: str  # class of the stage in the original
    resnets: tuple[str | None, ...]
    attentions: tuple[str | None, ...]
    sampler: str | None = None  # of the original, or None: bypassed or absent
    has_sampler: bool = False
    gives: bool = False  # whether layers put their state on the stack of skips
    takes: bool = False  # whether layers read a skip

    @property
    def name(self) -> str:
        """Of the stage."""
        return self.stage.name

    @property
    def lane(self) -> Lane:
        """``left`` for a down stage, ``middle``, ``right`` for an up stage."""
        return self.stage.lane

    @property
    def one_skip(self) -> bool:
        """Whether the last layer alone gives a skip, and the first alone reads one."""
        return self.kind in K_STAGES

    def without(self, gone: Removed) -> Wiring:
        """The stage with the units ``gone`` bypassed."""

        def kept(names: Iterable[str | None]) -> tuple[str | None, ...]:
            return tuple(None if name in gone else name for name in names)

        return dataclasses.replace(
            self,
            resnets=kept(self.resnets),
            attentions=kept(self.attentions),
            sampler=None if self.sampler in gone else self.sampler,
        )

    def closed(self) -> Wiring:
        """The stage with its gaps closed: what a config with fewer layers would build."""
        return dataclasses.replace(
            self,
            resnets=tuple(name for name in self.resnets if name),
            attentions=tuple(name for name in self.attentions if name),
            has_sampler=self.sampler is not None,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Left:
    """The stages of the network that is left, their gaps closed, and what is gone from the original."""

    outline: Outline
    removed: Removed
    downs: tuple[Wiring, ...]
    mid: Wiring | None
    ups: tuple[Wiring, ...]

    def layers(self, attention: str) -> list[str]:
        """Names of the transformer layers that are left in an attention block, where they are units."""
        return [unit.name for unit in self.outline.inner(attention) if unit.name not in self.removed]


Describe = Callable[[Left], Mapping[str, Any]]
"""The settings of a class of models that build what is left; raises NonNativePlanError where none do."""


@functools.lru_cache(maxsize=16)
def _wired(outline: Outline) -> tuple[Wiring, ...]:
    """The stages of the original, nothing bypassed."""
    stages, seen = [], dict.fromkeys(("left", "middle", "right"), 0)
    kinds = {"left": outline.config["down_block_types"], "right": outline.config["up_block_types"]}
    for stage in outline.stages:
        resnets, attentions, samplers = (outline.units_in(stage.name, kind) for kind in _KINDS)
        place = seen[stage.lane]
        seen[stage.lane] += 1
        kind = kinds[stage.lane][place] if stage.lane in kinds else outline.config["mid_block_type"]
        stages.append(
            Wiring(
                stage,
                place,
                stage_class(kind),
                tuple(unit.name for unit in resnets),
                tuple(unit.name for unit in attentions),
                next((unit.name for unit in samplers), None),
                bool(samplers),
                gives=any(unit.gives_skip for unit in (*resnets, *attentions)),
                takes=any(unit.takes_skip for unit in resnets),
            )
        )
    return tuple(stages)


# Is it the same function? --------------------------------------------------------------------------------------------


def _execute(stages: Iterable[Wiring], symbols: dict[tuple[object, ...], int]) -> int:
    """The symbol of the network's output; equal symbols are equal functions of the input.

    Mirrors ``forward``: a down stage pushes its state after each layer and after its sampler, an up stage pops one for
    each layer. A K stage pushes after its last layer and pops ahead of its first. A bypassed block hands on the main
    path.
    """

    def applied(name: str | None, *inputs: int) -> int:
        return symbols.setdefault((name, *inputs), len(symbols)) if name else inputs[0]

    state = symbols.setdefault(("conv_in",), len(symbols))
    skips = [state]
    for stage in stages:
        layers = list(itertools.zip_longest(stage.resnets, stage.attentions))
        for place, (resnet, attention) in enumerate(layers):
            reads = stage.takes and (place == 0 or not stage.one_skip)
            skip = (skips.pop(),) if reads else ()
            state = applied(attention, applied(resnet, state, *skip))
            if stage.gives and (place == len(layers) - 1 or not stage.one_skip):
                skips.append(state)
        if stage.has_sampler:
            state = applied(stage.sampler, state)
            if stage.lane == "left" and not stage.one_skip:
                skips.append(state)
    return state


def _miswired(bypassed: Iterable[Wiring], kept: Iterable[Wiring]) -> str:
    """The first surviving block whose inputs differ between the two networks, in words."""
    symbols: dict[tuple[object, ...], int] = {}
    _execute(bypassed, symbols)
    wanted = {key[0]: key[1:] for key in symbols}
    _execute(kept, symbols)
    for key in symbols:
        if wanted[key[0]] != key[1:]:
            return f"{key[0]} would read another skip connection or another block's output in a plain diffusers model"
    return "the surviving blocks would be wired otherwise in a plain diffusers model"


# Does a plain model have such stages? --------------------------------------------------------------------------------


def _check_depths(downs: Sequence[Wiring], ups: Sequence[Wiring]) -> None:
    for down, up in zip(downs, reversed(ups), strict=True):
        names, more = (down.name, up.name), 0 if up.one_skip else 1
        if len(up.resnets) != len(down.resnets) + more:
            exactly = "exactly one more" if more else "as many"
            less, other = names if len(down.resnets) + more > len(up.resnets) else names[::-1]
            number = abs(len(down.resnets) + more - len(up.resnets))
            raise NonNativePlanError(
                f"{names[0]} would keep {len(down.resnets)} residual blocks and {names[1]} {len(up.resnets)}; plain "
                f"diffusers needs {exactly} in {names[1]}: remove {number} more in {less}, or {number} fewer in {other}"
            )
        if up.one_skip and not up.resnets:
            raise NonNativePlanError(
                f"{names[0]} and {names[1]} would keep no residual block; a plain {up.kind} needs one: keep one in each"
            )
        for name, stage in zip(names, (down, up), strict=True):
            if len(stage.attentions) not in (0, len(stage.resnets)):
                raise NonNativePlanError(
                    f"{name} would keep {len(stage.resnets)} residual and {len(stage.attentions)} attention blocks; "
                    f"plain diffusers needs an attention block for each residual block of {name}, or none at all"
                )


def _check_widths(left: Left) -> None:
    """Refuse an up stage whose surviving blocks do not have the widths of the positions they move to."""
    units = {unit.name: unit for unit in left.outline.units}
    channels = list(left.outline.config["block_out_channels"])[: len(left.ups)][::-1]
    previous = channels[0]
    for i, stage in enumerate(left.ups):
        inner = channels[min(i + 1, len(channels) - 1)]
        last = len(stage.resnets) - 1
        for position, name in enumerate(stage.resnets):
            block = units[name or ""]
            main = previous if position == 0 and not stage.one_skip else channels[i]
            skip = inner if position == last else channels[i]
            if stage.one_skip:  # the first reads a skip as wide as the state, the last changes the width
                skip = channels[i] if stage.takes and position == 0 else 0
            out = inner if stage.one_skip and position == last else channels[i]
            if (block.main_channels, block.skip_channels, block.out_channels) != (main, skip, out):
                raise NonNativePlanError(
                    f"{block.name} takes {block.main_channels} main and {block.skip_channels} skip channels, its "
                    f"place in a plain diffusers model has {main} and {skip}; keep another block of {block.stage} "
                    "instead"
                )
        previous = channels[i]


# The smaller model ---------------------------------------------------------------------------------------------------


def _names(left: Left) -> dict[str, str | None]:
    """Module paths of stages and units with those in the smaller model, None for those that are gone."""
    outline, mid = left.outline, left.mid
    paths = {unit.name: unit.path for unit in outline.units}
    names: dict[str, str | None] = {stage.path: None for stage in outline.stages}
    names |= {unit.path: None for unit in outline.units}
    kept = [(f"down_blocks.{i}", stage) for i, stage in enumerate(left.downs)]
    kept += [("mid_block", mid)] if mid and mid.resnets else []
    kept += [(f"up_blocks.{i}", stage) for i, stage in enumerate(left.ups)]
    for path, stage in kept:
        names[stage.stage.path] = path
        for part, units in (("resnets", stage.resnets), ("attentions", stage.attentions)):
            names |= {paths[name or ""]: f"{path}.{part}.{i}" for i, name in enumerate(units)}
        for i, attention in enumerate(stage.attentions):
            inside = f"{path}.attentions.{i}.transformer_blocks"
            names |= {paths[name]: f"{inside}.{j}" for j, name in enumerate(left.layers(attention or ""))}
        if stage.sampler:
            part = "downsamplers" if stage.lane == "left" else "upsamplers"
            names[paths[stage.sampler]] = f"{path}.{part}.0"
    return names


def layout(outline: Outline, removed: Removed, describe: Describe) -> Layout:
    """The plain diffusers layout of the network that is left without the units ``removed``, its config by ``describe``.

    Raises NonNativePlanError with the first reason why no config describes it: stages of unequal depth, a residual
    block without its attention block, a surviving block that would read another skip connection, or what ``describe``
    finds.
    """
    bypassed = [stage.without(removed) for stage in _wired(outline)]
    # Where a down-sampler has left, its stage is the last one: the stages further in are empty and no longer there.
    downs = [stage for stage in bypassed if stage.lane == "left"]
    vanished = sum(stage.has_sampler and stage.sampler is None for stage in downs)
    ups = [stage.closed() for stage in bypassed if stage.lane == "right"][vanished:]
    downs = [stage.closed() for stage in downs[: len(downs) - vanished]]
    mid = (
        next((stage.closed() for stage in bypassed if stage.lane == "middle"), None) if not vanished else None
    )
    left = Left(outline, removed, tuple(downs), mid, tuple(ups))
    _check_depths(downs, ups)
    config = describe(left)

    symbols: dict[tuple[object, ...], int] = {}
    kept = [*downs, *([mid] if mid else []), *ups]
    if _execute(bypassed, symbols) != _execute(kept, symbols):
        raise NonNativePlanError(
            f"{_miswired(bypassed, kept)}; remove or keep blocks so that each surviving block keeps its skip connection"
        )
    _check_widths(left)
    return Layout(MappingProxyType(config), MappingProxyType(_names(left)))
