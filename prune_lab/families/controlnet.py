"""What of a ControlNet of the teacher its student can take: the residuals of the skip connections that are left.

A ControlNet is a copy of the way down with one convolution for each skip connection of the U-Net, and one for the mid
stage. diffusers builds as many as its way down has, so a ControlNet for a student is cut by the same plan: the blocks
of the way down that the student lost leave its own, and each skip connection keeps the convolution of the teacher's
skip that its reader reads. The mid stage stays whole: what it gives is added after the student's mid stage, or in its
place. Where stages have left with their samplers there is no such place any more, and its convolution becomes zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import diffusers
import torch

from prune_lab.errors import NonNativePlanError, UnsupportedModelError
from prune_lab.families import Layout, Outline, meta_model, outline_of, plain_config

CONTROLNET = "ControlNetModel"
# Settings of what a ControlNet reads beside latents and text; where it has one, its teacher has the same.
_INPUTS = (
    *("class_embed_type", "num_class_embeds", "encoder_hid_dim_type"),
    *("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim"),
)
_MIDDLE_CONVOLUTION = "controlnet_mid_block"
# What diffusers raises when it builds a ControlNet from settings that it does not have.
_BUILD_ERRORS = (TypeError, ValueError, LookupError, AttributeError, RuntimeError)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ControlNetCut:
    """The layout of a ControlNet for a student; ``zero`` are its modules that must give nothing."""

    layout: Layout
    skips: Mapping[int, int]
    """Number of each skip connection of the student: that of the teacher's that it stands for. 0 is the first."""
    teacher_skips: int
    zero: tuple[str, ...] = ()


def _readers(outline: Outline) -> tuple[dict[str, int], int]:
    """(by path of a block that reads one, the number of its skip connection; how many skips there are)."""
    waiting, given, readers = [0], 1, {}
    for unit in outline.units:
        if unit.takes_skip:
            readers[unit.path] = waiting.pop()
        if unit.gives_skip:
            waiting.append(given)
            given += 1
    return readers, given


def surviving_skips(teacher: Outline, layout: Layout) -> tuple[dict[int, int], int]:
    """(by number of each skip of the student, the teacher's that its reader reads; how many the teacher has)."""
    old, num_skips = _readers(teacher)
    new, _ = _readers(outline_of(meta_model(layout.config)))
    renamed = {path: layout.renamed(path) for path in old}
    return {new[path]: old[was] for was, path in renamed.items() if path is not None}, num_skips


def _stages(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(layers, width) of each stage of the way down."""
    widths = list(config["block_out_channels"])
    layers = config["layers_per_block"]
    return list(
        zip(layers if isinstance(layers, (list, tuple)) else [layers] * len(widths), widths, strict=True)
    )


def _stage_config(
    config: Mapping[str, Any], layout: Layout, stage: int, layers: int
) -> tuple[str, int | list[int]]:
    """(type of the stage, its transformer layers) without the blocks that the student lost."""
    kind, depths = config["down_block_types"][stage], config["transformer_layers_per_block"]
    depth = depths[stage] if isinstance(depths, (list, tuple)) else depths
    left = [
        number
        for number in range(layers)
        if layout.renamed(f"down_blocks.{stage}.attentions.{number}") is not None
    ]
    if isinstance(depth, (list, tuple)):
        depth = [depth[number] for number in left]
    attends = "CrossAttn" in layout.config["down_block_types"][stage]
    return kind if attends else "DownBlock2D", depth


def _check_shapes(config: Mapping[str, Any], teacher: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError where the ControlNet of ``config`` reads inputs that ``teacher`` is not given."""
    wrong: list[tuple[str, Any, Any]] = [
        (name, config[name], teacher.get(name))
        for name in _INPUTS
        if config.get(name) is not None and config[name] != teacher.get(name)
    ]
    # of a model for inpainting it reads the latents alone, which are as many as the model predicts
    channels = config["in_channels"]
    if channels not in (teacher["in_channels"], teacher["out_channels"]):
        wrong.append(("in_channels", channels, teacher["in_channels"]))
    attends = any(
        "CrossAttn" in str(kind) for kind in (*config["down_block_types"], config["mid_block_type"])
    )
    text, wanted = _text_widths(config), _text_widths(teacher)
    if attends and text != wanted:
        found, teachers = (" or ".join(map(str, sorted(one))) for one in (text, wanted))
        wrong.append(("cross_attention_dim", found, teachers))
    if wrong:
        name, found, teachers = wrong[0]
        raise UnsupportedModelError(
            f"asked to convert a ControlNet with {name} {found}; the teacher has {teachers}: give one that was "
            "trained for this student's teacher"
        )


def _text_widths(config: Mapping[str, Any]) -> set[int]:
    """Widths of the text as a model of ``config`` is given it."""
    width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    return set(width) if isinstance(width, (list, tuple)) else {width}


def cut_controlnet(config: Mapping[str, Any], teacher: Outline, layout: Layout) -> ControlNetCut:
    """How the ControlNet of ``config``, made for ``teacher``, becomes one for the student of ``layout``.

    Raises UnsupportedModelError when it was made for another U-Net, NonNativePlanError when no plain ControlNet has as
    many layers as the student has skip connections.
    """
    full = dict(meta_controlnet(config).config)
    if _stages(full) != _stages(teacher.config):
        raise UnsupportedModelError(
            f"asked to convert a ControlNet whose stages have (layers, width) {_stages(full)}; the teacher has "
            f"{_stages(teacher.config)}: give one that was trained for this student's teacher"
        )
    _check_shapes(full, teacher.config)
    stages = _stages(layout.config)
    layers = {number for number, _ in stages}
    if len(layers) != 1:
        raise NonNativePlanError(
            f"the student has {[number for number, _ in stages]} layers in the stages of its way down; a plain "
            "ControlNet has the same number in each, so none fits this student"
        )
    skips, num_skips = surviving_skips(teacher, layout)
    depth, vanished = len(stages), len(stages) < len(_stages(full))
    old_layers = _stages(full)[0][0]
    kinds = [_stage_config(full, layout, stage, old_layers) for stage in range(depth)]
    smaller = {
        key: list(value)[:depth]
        if isinstance(value, (list, tuple)) and len(value) == len(_stages(full)) and _by_stage(key)
        else value
        for key, value in full.items()
    }
    smaller |= {
        "down_block_types": [kind for kind, _ in kinds],
        "layers_per_block": layers.pop(),
        "transformer_layers_per_block": [found for _, found in kinds],
    }
    if vanished:
        smaller["mid_block_type"] = "UNetMidBlock2D"
    names: dict[str, str | None] = {
        path: new
        for path, new in layout.names.items()
        # A ControlNet keeps its own transformer layers: what the student lost inside an attention block is no skip.
        if path.startswith("down_blocks.") and "transformer_blocks" not in path
    }
    places = {old: new for new, old in skips.items()}
    names |= {
        f"controlnet_down_blocks.{old}": f"controlnet_down_blocks.{places[old]}" if old in places else None
        for old in range(num_skips)
    }
    zero = (_MIDDLE_CONVOLUTION,) if vanished else ()
    return ControlNetCut(
        Layout(MappingProxyType(plain_config(smaller)), MappingProxyType(names)), skips, num_skips, zero
    )


def _by_stage(key: str) -> bool:
    """Whether a list under ``key`` in a ControlNet's config has an entry for each stage."""
    return key in (
        *("down_block_types", "block_out_channels", "attention_head_dim", "num_attention_heads"),
        *("only_cross_attention", "transformer_layers_per_block"),
    )


def meta_controlnet(config: Mapping[str, Any]) -> Any:
    """The ControlNet of ``config`` without memory; UnsupportedModelError when it is none, or cannot be built."""
    name = config.get("_class_name")
    if name != CONTROLNET:
        raise UnsupportedModelError(
            f"asked to convert a ControlNet, found a config of class {name}; {CONTROLNET} is read"
        )
    try:
        with torch.device("meta"):
            return diffusers.ControlNetModel.from_config(plain_config(config)).eval()
    except _BUILD_ERRORS as error:
        raise UnsupportedModelError(f"no ControlNet can be built from its config: {error}") from None


def controlnet_config(teacher: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a ControlNet as it is trained for the U-Net ``teacher``: a copy of its way down.

    Raises UnsupportedModelError when no plain ControlNet is one: for stages of unequal depth, or without a mid stage.
    """
    model = meta_model(teacher)
    try:
        with torch.device("meta"):
            return plain_config(diffusers.ControlNetModel.from_unet(model, load_weights_from_unet=False))
    except _BUILD_ERRORS as error:
        raise UnsupportedModelError(
            f"no plain ControlNet is built like the way down of the teacher ({error})"
        ) from None


def takes_adapter_features(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> tuple[int, int]:
    """(features of a T2I-Adapter that the student takes where the teacher does, features that there are).

    A stage with attention takes its feature ahead of its sampler, one without after it: where a stage lost its
    attention the feature has another size than the state, and none fits.
    """
    old, new = list(teacher["down_block_types"]), list(student["down_block_types"])
    same = all(("CrossAttn" in was) == ("CrossAttn" in now) for was, now in zip(old, new, strict=False))
    return (len(new) if same else 0), len(old)
