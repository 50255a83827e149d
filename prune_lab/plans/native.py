"""Whether a plain diffusers config describes what a plan leaves, and which one.

A plan is *native* when a plain ``UNet2DConditionModel`` config describes the network it leaves. ``native_layout`` finds
out by executing both networks on symbols: the original with its removed blocks bypassed, and the network that the
config would build. They are the same function exactly when their outputs are the same symbol.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from prune_lab.blocks import Architecture
from prune_lab.errors import NonNativePlanError, PlanError
from prune_lab.plans.plan import PruningPlan

# Settings of a diffusers config that hold one entry per stage, outermost first.
_PER_STAGE = (
    "down_block_types",
    "block_out_channels",
    "layers_per_block",
    "attention_head_dim",
    "num_attention_heads",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "only_cross_attention",
)


@dataclasses.dataclass(frozen=True, slots=True)
class NativeLayout:
    """A plain diffusers U-Net that computes what the bypassed original computes.

    ``config`` is the student's config; ``sources`` maps each module path of the student that was moved or kept inside
    a stage (blocks and samplers) to its path in the original. Modules outside of the stages keep their own path.
    """

    config: Mapping[str, Any]
    sources: Mapping[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class _Stage:
    """One stage as the walk sees it; a name is ``None`` where the block or sampler is bypassed."""

    side: str  # Dn, Md or Up
    resnets: tuple[str | None, ...]
    attentions: tuple[str | None, ...]
    sampler: str | None = None  # of the original, or None: bypassed or absent
    has_sampler: bool = False


def _stages_of(architecture: Architecture) -> list[_Stage]:
    samplers = {sampler.stage: sampler.name for sampler in architecture.samplers}
    stages = []
    for stage in architecture.stages:
        blocks = architecture.stage_blocks(stage)
        names = {
            kind: tuple(block.name for block in blocks if block.kind == kind)
            for kind in ("resnet", "attention")
        }
        stages.append(
            _Stage(stage[:2], names["resnet"], names["attention"], samplers.get(stage), stage in samplers)
        )
    return stages


def _without(stage: _Stage, gone: set[str]) -> _Stage:
    def kept(names: Iterable[str | None]) -> tuple[str | None, ...]:
        return tuple(None if name in gone else name for name in names)

    return dataclasses.replace(
        stage,
        resnets=kept(stage.resnets),
        attentions=kept(stage.attentions),
        sampler=None if stage.sampler in gone else stage.sampler,
    )


def _closed(stage: _Stage) -> _Stage:
    """The stage with its gaps closed: what a config with fewer layers would build."""
    return dataclasses.replace(
        stage,
        resnets=tuple(name for name in stage.resnets if name),
        attentions=tuple(name for name in stage.attentions if name),
        has_sampler=stage.sampler is not None,
    )


def _check_depths(
    architecture: Architecture, downs: list[_Stage], mid: _Stage | None, ups: list[_Stage]
) -> None:
    depth = len(downs)
    for i, (down, up) in enumerate(zip(downs, reversed(ups), strict=True)):
        lost = len(architecture.config["down_block_types"]) - depth
        names = f"Dn{i + 1}", f"Up{depth - i + lost}"
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
    if shape not in ((2, 1), (1, 0), (0, 0)):
        raise NonNativePlanError(
            f"Md would keep {shape[0]} residual and {shape[1]} attention blocks; plain diffusers knows mid stages of "
            "R1 A1 R2, of one residual block, or none"
        )


def _execute(stages: list[_Stage], symbols: dict[tuple[object, ...], int]) -> int:
    """The symbol of the network's output; equal symbols are equal functions of the input.

    Mirrors ``UNet2DConditionModel.forward``: a down stage pushes its state after each layer and after its sampler, an
    up stage pops one for each layer. A bypassed block hands on the main path.
    """

    def applied(name: str | None, *inputs: int) -> int:
        return symbols.setdefault((name, *inputs), len(symbols)) if name else inputs[0]

    state = symbols.setdefault(("conv_in",), len(symbols))
    skips = [state]
    for stage in stages:
        if stage.side == "Md":
            for resnet, attention in itertools.zip_longest(stage.resnets, stage.attentions):
                state = applied(attention, applied(resnet, state))
            continue
        for resnet, attention in itertools.zip_longest(stage.resnets, stage.attentions):
            skip = (skips.pop(),) if stage.side == "Up" else ()
            state = applied(attention, applied(resnet, state, *skip))
            if stage.side == "Dn":
                skips.append(state)
        if stage.has_sampler:
            state = applied(stage.sampler, state)
            if stage.side == "Dn":
                skips.append(state)
    return state


def _miswired(architecture: Architecture, bypassed: list[_Stage], kept: list[_Stage]) -> str:
    """The first surviving block whose inputs differ between the two networks, in words."""
    symbols: dict[tuple[object, ...], int] = {}
    _execute(bypassed, symbols)
    wanted = {key[0]: key[1:] for key in symbols}
    _execute(kept, symbols)
    for key in symbols:
        if wanted[key[0]] != key[1:]:
            return f"{key[0]} would read another skip connection or another block's output in a plain diffusers model"
    return "the surviving blocks would be wired otherwise in a plain diffusers model"


def _check_widths(architecture: Architecture, ups: list[_Stage]) -> None:
    """Refuse an up stage whose surviving blocks do not have the widths of the positions they move to."""
    channels = list(architecture.config["block_out_channels"])[: len(ups)][::-1]
    previous = channels[0]
    for i, stage in enumerate(ups):
        inner = channels[min(i + 1, len(channels) - 1)]
        last = len(stage.resnets) - 1
        for position, name in enumerate(stage.resnets):
            block = architecture.block(name or "")
            main = previous if position == 0 else channels[i]
            skip = inner if position == last else channels[i]
            found = (block.in_channels - block.skip_channels, block.skip_channels)
            if found != (main, skip):
                raise NonNativePlanError(
                    f"{block.name} takes {found[0]} main and {found[1]} skip channels, its place in a plain diffusers "
                    f"model has {main} and {skip}; keep another block of {block.stage} instead"
                )
        previous = channels[i]


def _stage_sources(architecture: Architecture, stage: _Stage, path: str) -> dict[str, str]:
    samplers = {sampler.name: sampler.path for sampler in architecture.samplers}
    sources = {}
    for part, names in (("resnets", stage.resnets), ("attentions", stage.attentions)):
        for i, name in enumerate(names):
            sources[f"{path}.{part}.{i}"] = architecture.block(name or "").path
    if stage.sampler:
        part = "downsamplers" if stage.side == "Dn" else "upsamplers"
        sources[f"{path}.{part}.0"] = samplers[stage.sampler]
    return sources


def _native_config(
    architecture: Architecture, downs: list[_Stage], mid: _Stage | None, ups: list[_Stage]
) -> dict[str, Any]:
    config = dict(architecture.config)
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
    reverse = config.get("reverse_transformer_layers_per_block")
    if reverse is not None:
        config["reverse_transformer_layers_per_block"] = list(reverse)[-depth:]
    if not mid or not mid.resnets:
        config["mid_block_type"] = None
    elif not mid.attentions:
        config["mid_block_type"] = "UNetMidBlock2D"
    return config


def removed_samplers(architecture: Architecture, plan: PruningPlan) -> tuple[str, ...]:
    """Names of the samplers that leave with ``plan``: where all blocks further in are gone, nothing is left to
    sample for (BK-SDM-Tiny loses ``Dn3.down`` and ``Up1.up``).
    """
    gone = set(plan.removed)
    return tuple(sampler.name for sampler in architecture.samplers if gone.issuperset(sampler.leaves_with))


def native_layout(architecture: Architecture, plan: PruningPlan) -> NativeLayout:
    """The plain diffusers layout of the network that ``plan`` leaves.

    Raises NonNativePlanError with the first reason why no ``UNet2DConditionModel`` config describes it: stages of
    unequal depth, a residual block without its attention block, or a surviving block that would read another skip
    connection. Raises PlanError when the plan belongs to another architecture.
    """
    if plan.architecture != architecture.signature:
        raise PlanError(
            f"the plan was made for architecture {plan.architecture}, this U-Net is {architecture.signature}; "
            "read it again as text for this U-Net"
        )
    original = _stages_of(architecture)
    gone = set(plan.removed) | set(removed_samplers(architecture, plan))
    bypassed = [_without(stage, gone) for stage in original]
    depth = len(architecture.config["down_block_types"])
    vanished = sum(name.endswith(".down") for name in removed_samplers(architecture, plan))
    student = [_closed(stage) for stage in bypassed[: depth - vanished]]
    mid = _closed(bypassed[depth]) if "Md" in architecture.stages and not vanished else None
    ups = [_closed(stage) for stage in bypassed[-(depth - vanished) :]]
    _check_depths(architecture, student, mid, ups)

    symbols: dict[tuple[object, ...], int] = {}
    kept = [*student, *([mid] if mid else []), *ups]
    if _execute(bypassed, symbols) != _execute(kept, symbols):
        raise NonNativePlanError(
            f"plan {plan.label}: {_miswired(architecture, bypassed, kept)}; "
            "remove or keep blocks so that each surviving block keeps its skip connection"
        )
    _check_widths(architecture, ups)
    sources: dict[str, str] = {}
    for side, stages in (("down_blocks", student), ("up_blocks", ups)):
        for i, stage in enumerate(stages):
            sources |= _stage_sources(architecture, stage, f"{side}.{i}")
    if mid:
        sources |= _stage_sources(architecture, mid, "mid_block")
    config = _native_config(architecture, student, mid, ups)
    return NativeLayout(MappingProxyType(config), MappingProxyType(sources))


def is_native(architecture: Architecture, plan: PruningPlan) -> bool:
    """Whether ``plan`` leaves a network that a plain ``UNet2DConditionModel`` config describes."""
    try:
        native_layout(architecture, plan)
    except NonNativePlanError:
        return False
    return True


@functools.lru_cache(maxsize=16)
def native_choices(architecture: Architecture) -> tuple[tuple[frozenset[str], ...], ...]:
    """Per level of resolution, outermost first, the sets of blocks that can leave natively.

    A native plan is one option per level, and every combination of options is native: levels meet only in the samplers
    between them. The last level holds the innermost stages and the mid stage together. Each level begins with the
    empty set. Where two or more inner levels have no starred block, plans that remove several of them whole are native
    too and are not listed: none of the presets has such levels.
    """
    depth = len(architecture.config["down_block_types"])
    levels: list[tuple[frozenset[str], ...]] = []
    for level in range(1, depth + 1):
        stages = {f"Dn{level}", f"Up{depth + 1 - level}"} | ({"Md"} if level == depth else set())
        members = [block for block in architecture.blocks if block.stage in stages and block.removable]
        options = [
            frozenset(names)
            for size in range(len(members) + 1)
            for names in itertools.combinations([block.name for block in members], size)
            if is_native(architecture, PruningPlan(names, architecture.signature))
        ]
        levels.append(tuple(options))
    return tuple(levels)
