"""The parts of a U-Net: stages, residual and attention blocks and samplers in order of execution.

Names follow BK-SDM (arXiv:2305.15798): ``Dn1 ... Dn4``, ``Md``, ``Up1 ... Up4`` are stages (``Dn1`` outermost, ``Up1``
innermost), ``R1, R2, ...`` residual and ``A1, A2, ...`` attention blocks in order of execution, so ``Dn2.A1`` is
``down_blocks.1.attentions.0``. What diffusers calls a block is a stage here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from types import MappingProxyType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from prune_lab.errors import UnsupportedModelError
from prune_lab.families.family import Groups, Outline, Stage, Unit, plain_config
from prune_lab.families.unet_stages import K_STAGES, check_stage, skips_of

ATTENTIONS = {"Transformer2DModel": True, "Attention": False, "KAttentionBlock": False}
"""Classes of attention blocks, and whether each returns a tuple."""
# What the first input of a sampler is called, where it is not ``hidden_states``.
_FIRST_INPUTS = {"ResnetBlock2D": "input_tensor", "KDownsample2D": "inputs", "KUpsample2D": "inputs"}
MIDDLE = "Md"


class ChannelInterpolation(nn.Module):
    """In place of a block that changes the width: its main path, resized linearly along the channels.

    Only for scoring: BK-SDM marks blocks scored this way with a star. Of an up stage's input the skip is discarded.
    """

    def __init__(self, main_channels: int, out_channels: int) -> None:
        super().__init__()
        self.main_channels = main_channels
        self.out_channels = out_channels

    def forward(self, hidden: Tensor, *_: object, **__: object) -> Tensor:
        """(B, out_channels, H, W) of (B, main_channels + skip, H, W)."""
        main = hidden[:, : self.main_channels]
        pixels = main.flatten(2).transpose(1, 2)  # (B, H W, main_channels)
        resized: Tensor = F.interpolate(pixels, size=self.out_channels, mode="linear", align_corners=False)
        return resized.transpose(1, 2).reshape(hidden.shape[0], self.out_channels, *hidden.shape[2:])


# Stages and units ---------------------------------------------------------------------------------------------------


def _stages(unet: Any) -> list[tuple[Stage, Any]]:
    """The stages with their modules, in order of execution."""
    depth = len(unet.down_blocks)
    down = [
        (Stage(f"Dn{i + 1}", f"down_blocks.{i}", "left", row=i), module)
        for i, module in enumerate(unet.down_blocks)
    ]
    middle = [] if unet.mid_block is None else [(Stage(MIDDLE, "mid_block", row=depth), unet.mid_block)]
    up = [
        (Stage(f"Up{i + 1}", f"up_blocks.{i}", "right", row=len(unet.up_blocks) - 1 - i), module)
        for i, module in enumerate(unet.up_blocks)
    ]
    return [*down, *middle, *up]


def _residual(name: str, path: str, stage: str, module: Any, width: int, *, reads_skip: bool) -> Unit:
    """The unit of a residual block that gets ``width`` channels on the main path."""
    skip = module.in_channels - width if reads_skip else 0
    main, out = module.in_channels - skip, module.conv2.out_channels
    changes = f"changes the width of the main path from {main} to {out} channels" if main != out else ""
    return Unit(
        name=name,
        path=path,
        stage=stage,
        kind="resnet",
        in_channels=module.in_channels,
        out_channels=out,
        skip_channels=skip,
        hands_on=("input_tensor",),
        reason=changes,
        stand_in=functools.partial(ChannelInterpolation, main, out) if changes else None,
    )


def _attention(name: str, path: str, stage: str, module: Any, width: int) -> Unit:
    kind = type(module).__name__
    if kind not in ATTENTIONS:
        raise UnsupportedModelError(
            f"attention block {name} is a {kind} (dual_cross_attention); known are those of one text"
        )
    return Unit(
        name=name,
        path=path,
        stage=stage,
        kind="attention",
        in_channels=width,
        out_channels=width,
        in_tuple=ATTENTIONS[kind],
        self_attention=tuple(f"{path}{inner}" for inner in _self_attentions(module)),
    )


def _self_attentions(module: Any) -> list[str]:
    """Where in an attention block its self-attentions lie: one for each transformer layer, or the block itself."""
    if hasattr(module, "transformer_blocks"):
        return [f".transformer_blocks.{layer}.attn1" for layer in range(len(module.transformer_blocks))]
    if hasattr(module, "add_self_attention"):  # a K-diffusion block
        return [".attn1"] if module.add_self_attention else []
    return [] if getattr(module, "added_kv_proj_dim", None) else [""]


def _layers(block: Unit) -> Iterator[Unit]:
    """The transformer layers inside an attention block that has more than one: a single one is the block itself."""
    if block.transformer_layers < 2 or not block.in_tuple:
        return
    for layer, attention in enumerate(block.self_attention):
        yield Unit(
            name=f"{block.name}.T{layer + 1}",
            path=f"{block.path}.transformer_blocks.{layer}",
            stage=block.stage,
            kind="transformer",
            in_channels=block.in_channels,
            out_channels=block.out_channels,
            self_attention=(attention,),
            inside=block.name,
        )


def _blocks(stage: Stage, module: Any, width: int) -> Iterator[Unit]:
    """Residual and attention blocks of a stage in turns, layers behind their block; ``width`` channels come in."""
    resnets: list[Any] = list(module.resnets)
    attentions: list[Any] = [one for one in getattr(module, "attentions", None) or [] if one is not None]
    skips = skips_of(stage, module, width)
    for i in range(max(len(resnets), len(attentions))):
        attends = i < len(attentions)
        if i < len(resnets):
            path = f"{stage.path}.resnets.{i}"
            unit = _residual(
                f"{stage.name}.R{i + 1}", path, stage.name, resnets[i], width, reads_skip=skips.reads(i)
            )
            yield dataclasses.replace(unit, gives_skip=skips.gives(i, len(resnets)) and not attends)
            width = unit.out_channels
        if attends:
            path = f"{stage.path}.attentions.{i}"
            unit = _attention(f"{stage.name}.A{i + 1}", path, stage.name, attentions[i], width)
            # A down stage puts its state on the stack after each layer, that is after its attention block.
            last_of_layer = i + 1 < len(resnets) or i + 1 >= len(attentions)
            unit = dataclasses.replace(unit, gives_skip=skips.gives(i, len(resnets)) and last_of_layer)
            yield unit
            yield from _layers(unit)


def _sampler(stage: Stage, module: Any, width: int) -> Unit | None:
    """The sampler at the end of a stage, without the blocks that it leaves with; None where there is none."""
    for side, modules in (("down", "downsamplers"), ("up", "upsamplers")):
        if getattr(module, modules, None) is not None:
            (sampler,) = getattr(module, modules)
            return Unit(
                name=f"{stage.name}.{side}",
                path=f"{stage.path}.{modules}.0",
                stage=stage.name,
                kind="sampler",
                in_channels=width,
                out_channels=width,
                gives_skip=side == "down" and type(module).__name__ not in K_STAGES,
                hands_on=(_FIRST_INPUTS.get(type(sampler).__name__, "hidden_states"),),
                reason="stays, since the blocks around it were made for it"
                if type(module).__name__ in K_STAGES
                else "leaves only together with all blocks further in",
            )
    return None


def _further_in(sampler: Unit, stages: Sequence[Stage], units: Sequence[Unit]) -> tuple[str, ...]:
    """The blocks between a down-sampler and the up-sampler of the same level, for either of the two."""
    places = {stage.name: stage for stage in stages}
    own = places[sampler.stage]
    least = own.row + 1 if own.lane == "left" else own.row
    return tuple(
        unit.name
        for unit in units
        if unit.kind != "sampler" and not unit.inside and places[unit.stage].row >= least
    )


def outline(unet: Any) -> Outline:
    """The parts of ``unet``. Raises UnsupportedModelError for a stage of a type that is not known here."""
    units: list[Unit] = []
    width = unet.conv_in.out_channels
    found = _stages(unet)
    for stage, module in found:
        check_stage(stage, module)
        units += _blocks(stage, module, width)
        blocks = [unit for unit in units if not unit.inside]
        width = blocks[-1].out_channels if blocks else width
        sampler = _sampler(stage, module, width)
        units += [sampler] if sampler else []
    stages = tuple(stage for stage, _ in found)
    staying = {stage.name for stage, module in found if type(module).__name__ in K_STAGES}
    placed = tuple(
        dataclasses.replace(unit, leaves_with=_further_in(unit, stages, units))
        if unit.kind == "sampler" and unit.stage not in staying
        else unit
        for unit in units
    )
    # Missing settings of a config take the class's defaults, which only the built model knows.
    return Outline(MappingProxyType(plain_config(unet)), stages, placed)


# Groups ---------------------------------------------------------------------------------------------------------------


def _neighbours(pattern: Sequence[str], outline: Outline) -> Groups:
    """Removable blocks of one stage that follow each other and are of these kinds, as ``Dn1.R2+A2``."""
    blocks = outline.blocks
    runs = zip(*(blocks[start:] for start in range(len(pattern))), strict=False)
    return {
        "+".join([run[0].name, *(unit.local_name for unit in run[1:])]): tuple(unit.name for unit in run)
        for run in runs
        if [unit.kind for unit in run] == list(pattern)
        and len({unit.stage for unit in run}) == 1
        and all(unit.removable for unit in run)
    }


def pairs(outline: Outline) -> Groups:
    """A residual block with the attention block that follows it."""
    return _neighbours(("resnet", "attention"), outline)


def triplets(outline: Outline) -> Groups:
    """A residual block, the attention block and the residual block that follow it."""
    return _neighbours(("resnet", "attention", "resnet"), outline)


def rows(outline: Outline) -> list[list[Stage]]:
    """The stages of each level of resolution, outermost first; the mid stage by itself at the end."""
    found: dict[int, list[Stage]] = {}
    for stage in outline.stages:
        found.setdefault(stage.row, []).append(stage)
    return [found[row] for row in sorted(found)]


def inner_stages(outline: Outline) -> Groups:
    """The mid stage, then with the stages around it, as long as every block of them can be removed."""
    groups: dict[str, tuple[str, ...]] = {}
    inside: list[Stage] = []
    for row in reversed(rows(outline)):
        around = [*inside, *row]
        inside = [stage for stage in outline.stages if stage in around]
        names = {stage.name for stage in inside}
        members = [unit for unit in outline.blocks if unit.stage in names]
        if not all(unit.removable for unit in members):
            break
        groups["+".join(stage.name for stage in inside)] = tuple(unit.name for unit in members)
    return groups
