"""Whether a plain diffusers config describes what is left of a U-Net, and which one.

Removed blocks are *native* when a plain ``UNet2DConditionModel`` config describes the network they leave. ``layout``
finds out by executing both networks on symbols: the original with its removed blocks bypassed, and the network that the
config would build. They are the same function exactly when their outputs are the same symbol.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from types import MappingProxyType
from typing import Any

from prune_lab.errors import NonNativePlanError
from prune_lab.families.family import Lane, Layout, Outline, Removed, Stage, UnitKind
from prune_lab.families.unet_blocks import rows

# Settings of a diffusers config that hold one entry per stage, outermost first.
_PER_STAGE = (
    "down_block_types",
    "block_out_channels",
    "layers_per_block",
    "attention_head_dim",
    "num_attention_heads",
    "cross_attention_dim",
    "only_cross_attention",
)
# What a layer of each kind ends with: blocks of the first kind stand behind those of the second.
_ENDS: tuple[tuple[UnitKind, str], ...] = (("attention", ".proj_out"), ("resnet", ""))
_KINDS: tuple[UnitKind, ...] = ("resnet", "attention", "sampler")


@dataclasses.dataclass(frozen=True, slots=True)
class _Wiring:
    """One stage as the symbolic execution sees it; a unit is ``None`` where it is bypassed."""

    stage: Stage
    resnets: tuple[str | None, ...]
    attentions: tuple[str | None, ...]
    sampler: str | None = None  # of the original, or None: bypassed or absent
    has_sampler: bool = False

    @property
    def lane(self) -> Lane:
        """``left`` for a down stage, ``middle``, ``right`` for an up stage."""
        return self.stage.lane

    def without(self, gone: Removed) -> _Wiring:
        """The stage with the units ``gone`` bypassed."""

        def kept(names: Iterable[str | None]) -> tuple[str | None, ...]:
            return tuple(None if name in gone else name for name in names)

        return dataclasses.replace(
            self,
            resnets=kept(self.resnets),
            attentions=kept(self.attentions),
            sampler=None if self.sampler in gone else self.sampler,
        )

    def closed(self) -> _Wiring:
        """The stage with its gaps closed: what a config with fewer layers would build."""
        return dataclasses.replace(
            self,
            resnets=tuple(name for name in self.resnets if name),
            attentions=tuple(name for name in self.attentions if name),
            has_sampler=self.sampler is not None,
        )


@functools.lru_cache(maxsize=16)
def _wired(outline: Outline) -> tuple[_Wiring, ...]:
    """The stages of the original, nothing bypassed."""
    stages = []
    for stage in outline.stages:
        resnets, attentions, samplers = (
            tuple(unit.name for unit in outline.units_in(stage.name, kind)) for kind in _KINDS
        )
        stages.append(_Wiring(stage, resnets, attentions, next(iter(samplers), None), bool(samplers)))
    return tuple(stages)


# Is it the same function? --------------------------------------------------------------------------------------------


def _execute(stages: Iterable[_Wiring], symbols: dict[tuple[object, ...], int]) -> int:
    """The symbol of the network's output; equal symbols are equal functions of the input.

    Mirrors ``UNet2DConditionModel.forward``: a down stage pushes its state after each layer and after its sampler, an
    up stage pops one for each layer. A bypassed block hands on the main path.
    """

    def applied(name: str | None, *inputs: int) -> int:
        return symbols.setdefault((name, *inputs), len(symbols)) if name else inputs[0]

    state = symbols.setdefault(("conv_in",), len(symbols))
    skips = [state]
    for stage in stages:
        for resnet, attention in itertools.zip_longest(stage.resnets, stage.attentions):
            skip = (skips.pop(),) if stage.lane == "right" else ()
            state = applied(attention, applied(resnet, state, *skip))
            if stage.lane == "left":
                skips.append(state)
        if stage.has_sampler:
            state = applied(stage.sampler, state)
            if stage.lane == "left":
                skips.append(state)
    return state


def _miswired(bypassed: Iterable[_Wiring], kept: Iterable[_Wiring]) -> str:
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


def _check_depths(downs: Sequence[_Wiring], mid: _Wiring | None, ups: Sequence[_Wiring]) -> None:
    for down, up in zip(downs, reversed(ups), strict=True):
        names = down.stage.name, up.stage.name
        if len(up.resnets) != len(down.resnets) + 1:
            raise NonNativePlanError(
                f"{names[0]} would keep {len(down.resnets)} residual blocks and {names[1]} {len(up.resnets)}; plain "
                f"diffusers needs exactly one more in {names[1]}: remove one elsewhere in {names[0]} or {names[1]}"
            )
        for name, stage in zip(names, (down, up), strict=True):
            if len(stage.attentions) not in (0, len(stage.resnets)):
                raise NonNativePlanError(
                    f"{name} would keep {len(stage.resnets)} residual and {len(stage.attentions)} attention blocks; "
                    f"plain diffusers needs an attention block for each residual block of {name}, or none at all"
                )
    shape = (len(mid.resnets), len(mid.attentions)) if mid else (0, 0)
    if mid and shape not in ((2, 1), (1, 0), (0, 0)):
        raise NonNativePlanError(
            f"{mid.stage.name} would keep {shape[0]} residual and {shape[1]} attention blocks; plain diffusers knows "
            "mid stages of R1 A1 R2, of one residual block, or none"
        )


def _check_widths(outline: Outline, ups: Sequence[_Wiring]) -> None:
    """Refuse an up stage whose surviving blocks do not have the widths of the positions they move to."""
    units = {unit.name: unit for unit in outline.units}
    channels = list(outline.config["block_out_channels"])[: len(ups)][::-1]
    previous = channels[0]
    for i, stage in enumerate(ups):
        inner = channels[min(i + 1, len(channels) - 1)]
        last = len(stage.resnets) - 1
        for position, name in enumerate(stage.resnets):
            block = units[name or ""]
            main = previous if position == 0 else channels[i]
            skip = inner if position == last else channels[i]
            if (block.main_channels, block.skip_channels) != (main, skip):
                raise NonNativePlanError(
                    f"{block.name} takes {block.main_channels} main and {block.skip_channels} skip channels, its "
                    f"place in a plain diffusers model has {main} and {skip}; keep another block of {block.stage} "
                    "instead"
                )
        previous = channels[i]


# The smaller model ---------------------------------------------------------------------------------------------------


def _entry(depths: Sequence[int], unused: object) -> int | list[int]:
    """The entry of a stage whose attention blocks have these ``depths``; of none, ``unused`` where it is a number."""
    if not depths:
        return unused if isinstance(unused, int) else 1
    return depths[0] if len(set(depths)) == 1 else list(depths)


def _transformer_layers(
    outline: Outline, downs: Sequence[_Wiring], mid: _Wiring | None, ups: Sequence[_Wiring]
) -> dict[str, Any]:
    """The settings that say how many transformer layers each attention block has, from the blocks that are left.

    Diffusers takes the numbers of the up stages from the down stages, unless they have a list of their own, and that of
    the mid stage from the first attention block of the last down stage. So this pair must agree where both are left:
    otherwise raises NonNativePlanError.
    """
    layers = {unit.name: unit.transformer_layers for unit in outline.units}

    def depths(stage: _Wiring) -> list[int]:
        return [layers[name or ""] for name in stage.attentions]

    setting = outline.config["transformer_layers_per_block"]
    per_stage = [setting] * len(downs) if isinstance(setting, int) else list(setting)
    middle = depths(mid) if mid else []
    down, up = [depths(stage) for stage in downs], [depths(stage) for stage in reversed(ups)]
    if mid and middle and down[-1] and down[-1][0] != middle[0]:
        stage = downs[-1]
        raise NonNativePlanError(
            f"{mid.attentions[0]} has {middle[0]} transformer layers and {stage.attentions[0]}, the first attention "
            f"block that {stage.stage.name} would keep, {down[-1][0]}; plain diffusers gives both the same number: "
            f"keep another one, or remove all attention blocks of {stage.stage.name} or of {mid.stage.name}"
        )
    if not down[-1] and middle:
        per_stage[len(downs) - 1] = middle[0]  # read by the mid stage alone
    found = [_entry(numbers, unused) for numbers, unused in zip(down, per_stage, strict=False)]
    for i, numbers in enumerate(up):
        if not down[i] and len(set(numbers)) == 1 and not (middle and i == len(found) - 1):
            found[i] = numbers[0]  # read by the up stage alone
    opposite = [_entry(numbers, entry) for numbers, entry in zip(up, found, strict=True)]
    single = isinstance(setting, int) and all(entry == setting for entry in found)
    return {
        "transformer_layers_per_block": setting if single else found,
        "reverse_transformer_layers_per_block": None
        if opposite == found and all(isinstance(entry, int) for entry in found)
        else opposite[::-1],
    }


def _config(
    outline: Outline, downs: Sequence[_Wiring], mid: _Wiring | None, ups: Sequence[_Wiring]
) -> dict[str, Any]:
    config = dict(outline.config)
    depth = len(downs)
    for key in _PER_STAGE:
        if isinstance(config.get(key), (list, tuple)):
            config[key] = list(config[key])[:depth]
    layers = [len(stage.resnets) for stage in downs]
    config["layers_per_block"] = layers[0] if len(set(layers)) == 1 else layers
    config["down_block_types"] = [
        kind if stage.attentions else "DownBlock2D"
        for kind, stage in zip(config["down_block_types"], downs, strict=True)
    ]
    config["up_block_types"] = [
        kind if stage.attentions else "UpBlock2D"
        for kind, stage in zip(list(config["up_block_types"])[-depth:], ups, strict=True)
    ]
    if not mid or not mid.resnets:
        config["mid_block_type"] = None
    elif not mid.attentions:
        config["mid_block_type"] = "UNetMidBlock2D"
    return config | _transformer_layers(outline, downs, mid, ups)


def _names(
    outline: Outline, downs: Sequence[_Wiring], mid: _Wiring | None, ups: Sequence[_Wiring]
) -> dict[str, str | None]:
    """Module paths of stages and units with those in the smaller model, None for those that are gone."""
    paths = {unit.name: unit.path for unit in outline.units}
    names: dict[str, str | None] = {stage.path: None for stage in outline.stages}
    names |= {unit.path: None for unit in outline.units}
    left = [(f"down_blocks.{i}", stage) for i, stage in enumerate(downs)]
    left += [("mid_block", mid)] if mid and mid.resnets else []
    left += [(f"up_blocks.{i}", stage) for i, stage in enumerate(ups)]
    for path, stage in left:
        names[stage.stage.path] = path
        for part, units in (("resnets", stage.resnets), ("attentions", stage.attentions)):
            names |= {paths[name or ""]: f"{path}.{part}.{i}" for i, name in enumerate(units)}
        if stage.sampler:
            part = "downsamplers" if stage.lane == "left" else "upsamplers"
            names[paths[stage.sampler]] = f"{path}.{part}.0"
    return names


def layout(outline: Outline, removed: Removed) -> Layout:
    """The plain diffusers layout of the network that is left without the units ``removed``.

    Raises NonNativePlanError with the first reason why no ``UNet2DConditionModel`` config describes it: stages of
    unequal depth, a residual block without its attention block, a surviving block that would read another skip
    connection, or a mid stage of another number of transformer layers than the stage before it.
    """
    bypassed = [stage.without(removed) for stage in _wired(outline)]
    # Where a down-sampler has left, its stage is the last one: the stages further in are empty and no longer there.
    downs = [stage for stage in bypassed if stage.lane == "left"]
    vanished = sum(stage.has_sampler and stage.sampler is None for stage in downs)
    depth = len(downs) - vanished
    ups = [stage.closed() for stage in bypassed if stage.lane == "right"][vanished:]
    downs = [stage.closed() for stage in downs[:depth]]
    mid = (
        next((stage.closed() for stage in bypassed if stage.lane == "middle"), None) if not vanished else None
    )
    _check_depths(downs, mid, ups)

    symbols: dict[tuple[object, ...], int] = {}
    kept = [*downs, *([mid] if mid else []), *ups]
    if _execute(bypassed, symbols) != _execute(kept, symbols):
        raise NonNativePlanError(
            f"{_miswired(bypassed, kept)}; remove or keep blocks so that each surviving block keeps its skip connection"
        )
    _check_widths(outline, ups)
    return Layout(
        MappingProxyType(_config(outline, downs, mid, ups)),
        MappingProxyType(_names(outline, downs, mid, ups)),
    )


def levels(outline: Outline) -> list[list[str]]:
    """The removable blocks of each level of resolution, outermost first; the mid stage belongs to the innermost.

    A native plan is one option per level, and every combination of options is native: levels meet only in the samplers
    between them. Where two or more inner levels have no block that changes the width, plans that remove several of them
    whole are native too and are not of this form: none of the presets has such levels.
    """
    found = rows(outline)
    if len(found) > 1 and all(stage.lane == "middle" for stage in found[-1]):
        found[-2:] = [[*found[-2], *found[-1]]]
    names = [{stage.name for stage in row} for row in found]
    return [[unit.name for unit in outline.units if unit.stage in row and unit.removable] for row in names]


def stage_features(outline: Outline, removed: Removed) -> list[tuple[str, str]]:
    """The ends of the down and up stages: the state after the sampler; never the mid stage.

    The last down stage of a smaller model has lost its sampler where stages further in are gone, and the original's
    output is half its size there. That stage is compared ahead of the sampler, at the ``proj_out`` of the last
    attention block of each (the last residual block where either has no attention there).
    """
    points: list[tuple[str, str]] = []
    for stage in outline.stages:
        samplers = outline.units_in(stage.name, "sampler")
        if any(sampler.name in removed for sampler in samplers):
            points += _ahead_of_the_sampler(outline, stage, removed)
        elif stage.lane != "middle":
            points.append((stage.path, stage.path))
    return points


def _ahead_of_the_sampler(outline: Outline, stage: Stage, removed: Removed) -> list[tuple[str, str]]:
    """The pair at the end of a stage ahead of its sampler; none when no block is left there."""
    for kind, inner in _ENDS:
        units = outline.units_in(stage.name, kind)
        left = [unit for unit in units if unit.name not in removed]
        if left:
            return [(units[-1].path + inner, left[-1].path + inner)]
    return []
