"""The neutral form of a U-Net: a plain model whose removed blocks are there and do nothing, exactly.

A residual block adds to its input what its last convolution writes: with zeros there it hands on its input, and in an
up stage, whose input carries a skip connection behind the main path, its shortcut picks the main path out. An attention
block does the same by its last projection; of a transformer the layers leave as well, since a config can say for each
block how many it has. So a removed attention block costs next to nothing, and a removed residual block what it did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.errors import FormError
from prune_lab.families.family import Layout, Outline, Removed, Unit
from prune_lab.families.meta_device import shapes_of
from prune_lab.families.unet_wiring import Describe
from prune_lab.families.unet_wiring import layout as native_layout

Convert = dict[str, Callable[[Tensor], Tensor]]
# What the parts of a transformer layer end with; a fuser (of boxes, as in GLIGEN) by two numbers of its own.
_ENDS = ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2", "fuser")


def _module(outline: Outline, path: str) -> nn.Module:
    found: nn.Module = shapes_of(outline.config).get_submodule(path)
    return found


# Modules that write nothing ------------------------------------------------------------------------------------------


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor)


def _first(channels: int) -> Callable[[Tensor], Tensor]:
    """A convolution of one pixel (out, in, 1, 1) that hands on the first ``channels``."""

    def picked(tensor: Tensor) -> Tensor:
        kernel = torch.zeros_like(tensor)
        kernel[:channels, :channels, 0, 0] = torch.eye(channels, dtype=tensor.dtype, device=tensor.device)
        return kernel

    return picked


def _silent(module: nn.Module, path: str) -> Convert:
    """What makes the layer at ``path`` write zeros."""
    return {f"{path}.{name}": _zeros for name, _ in module.named_parameters(recurse=False)}


def _check_scale(unit: Unit, scale: float) -> None:
    if scale != 1:
        raise FormError(
            f"asked for the neutral form without {unit.name}, whose output is divided by {scale:g}: it cannot stay and "
            "do nothing; ask for --form own"
        )


def _silent_residual(unit: Unit, module: Any) -> Convert:
    _check_scale(unit, module.output_scale_factor)
    found = _silent(module.conv2, f"{unit.path}.conv2")
    if module.conv_shortcut is not None:
        shortcut = _silent(module.conv_shortcut, f"{unit.path}.conv_shortcut")
        found |= shortcut | {f"{unit.path}.conv_shortcut.weight": _first(unit.main_channels)}
    return found


def _ends_of_attention(unit: Unit, module: Any) -> tuple[str, ...]:
    """The layers by which an attention block of any class writes, by their paths in it."""
    if hasattr(module, "transformer_blocks"):
        return ("proj_out",)
    if hasattr(module, "add_self_attention"):  # a K-diffusion block
        return ("attn1.to_out.0", "attn2.to_out.0") if module.add_self_attention else ("attn2.to_out.0",)
    if not module.residual_connection:
        raise FormError(
            f"asked for the neutral form without {unit.name}, an attention block that adds nothing to its input; ask "
            "for --form own"
        )
    _check_scale(unit, module.rescale_output_factor)
    return ("to_out.0",)


def _silent_layers(module: nn.Module, path: str, ends: Iterable[str]) -> Convert:
    there = {name for name, _ in module.named_modules()}
    found: Convert = {}
    for end in ends:
        if end in there:
            found |= _silent(module.get_submodule(end), f"{path}.{end}")
    return found


# Transformer layers --------------------------------------------------------------------------------------------------


def _transformers(outline: Outline, lane: str) -> list[list[Unit]]:
    """The attention blocks with transformer layers, for each stage of ``lane``."""
    return [
        [unit for unit in outline.units_in(stage.name, "attention") if unit.in_tuple]
        for stage in outline.stages
        if stage.lane == lane
    ]


def tied(outline: Outline) -> list[tuple[str, ...]]:
    """The first attention block of the last down stage and that of the mid stage: diffusers gives both one number of
    layers.
    """
    downs, middle = _transformers(outline, "left"), _transformers(outline, "middle")
    if not downs or not downs[-1] or not middle or not middle[0]:
        return []
    return [(downs[-1][0].name, middle[0][0].name)]


def _layers_left(outline: Outline, unit: Unit, removed: Removed) -> list[int]:
    """Places of the layers of an attention block that compute something."""
    if unit.name in removed:
        return []
    gone = {layer.path for layer in outline.inner(unit.name) if layer.name in removed}
    return [
        place
        for place, _ in enumerate(unit.self_attention)
        if f"{unit.path}.transformer_blocks.{place}" not in gone
    ]


def _filled(left: list[int], count: int, all_of_them: int) -> list[int]:
    """``left`` and as many of the other places as make up ``count``."""
    others = [place for place in range(all_of_them) if place not in left]
    return sorted([*left, *others[: count - len(left)]])


def _entry(depths: Sequence[int]) -> int | list[int]:
    return (depths[0] if len(set(depths)) == 1 else list(depths)) if depths else 1


def _depths(outline: Outline, places: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The settings that give each attention block as many layers as it has ``places``."""

    def depths(stage: Sequence[Unit]) -> list[int]:
        return [len(places[unit.name]) for unit in stage]

    downs = [depths(stage) for stage in _transformers(outline, "left")]
    ups = [depths(stage) for stage in _transformers(outline, "right")]
    middle = [depths(stage) for stage in _transformers(outline, "middle")]
    entries: list[Any] = [_entry(stage) for stage in downs]
    if middle and middle[0] and not downs[-1]:
        entries[-1] = middle[0][0]  # read by the mid stage alone
    elif middle and middle[0] and entries:
        entries[-1] = list(downs[-1])  # of a list the mid stage takes the first
    return {
        "transformer_layers_per_block": entries,
        "reverse_transformer_layers_per_block": [_entry(stage) for stage in ups],
    }


# All of it -----------------------------------------------------------------------------------------------------------


def _vanishing(outline: Outline, removed: Removed) -> Removed:
    """Of ``removed`` what leaves with a sampler: stages further in of which nothing is left."""
    samplers = [unit for unit in outline.units if unit.kind == "sampler" and unit.name in removed]
    return frozenset(unit.name for unit in samplers).union(*(unit.leaves_with for unit in samplers))


def _places(outline: Outline, removed: Removed) -> dict[str, list[int]]:
    """For each attention block with layers the places of those that are built."""
    blocks = [
        unit
        for lane in ("left", "middle", "right")
        for stage in _transformers(outline, lane)
        for unit in stage
    ]
    places = {unit.name: _layers_left(outline, unit, removed) for unit in blocks}
    counts = {unit.name: unit.transformer_layers for unit in blocks}
    for names in tied(outline):
        most = max(len(places[name]) for name in names)
        places |= {name: _filled(places[name], most, counts[name]) for name in names}
    return places


def layout(outline: Outline, removed: Removed, describe: Describe) -> Layout:
    """A plain model that computes what is left without the units ``removed``; ``describe`` as for the native layout.

    Stages further in of which nothing is left are gone. Raises FormError where a block cannot stay and do nothing.
    """
    vanishing = _vanishing(outline, removed)
    plain = native_layout(outline, vanishing, describe) if vanishing else Layout(outline.config, {})
    staying = removed - vanishing
    units = [unit for unit in outline.units if unit.name in staying]
    convert: Convert = {}
    names: dict[str, str | None] = dict(plain.names)
    frozen = [unit.path for unit in units]
    places = _places(outline, removed)
    config = dict(plain.config)
    for unit in units:
        module = _module(outline, unit.path)
        if unit.kind == "resnet":
            convert |= _silent_residual(unit, module)
        elif unit.inside:
            if int(unit.path.rsplit(".", 1)[1]) in places[unit.inside]:
                convert |= _silent_layers(module, unit.path, _ENDS)
        else:
            convert |= _silent_layers(module, unit.path, _ends_of_attention(unit, module))
    if any(unit.kind != "resnet" for unit in units):
        kept = {unit.name: places[unit.name] for unit in outline.blocks if unit.name in places}
        blocks = {unit.name: unit for unit in outline.blocks}
        for name, built in kept.items():
            path = f"{blocks[name].path}.transformer_blocks"
            new = plain.renamed(path)
            for place in range(blocks[name].transformer_layers):
                where = f"{new}.{built.index(place)}" if new is not None and place in built else None
                names[f"{path}.{place}"] = where
        if kept:
            config |= _depths_left(outline, plain, places)
    moved = Layout(config, names)
    return Layout(
        config,
        names,
        {new: make for name, make in convert.items() if (new := moved.renamed(name)) is not None},
        tuple(new for path in frozen if (new := moved.renamed(path)) is not None),
    )


def _depths_left(outline: Outline, plain: Layout, places: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """``_depths`` of the stages that are left in the ``plain`` layout."""
    stages = tuple(stage for stage in outline.stages if plain.renamed(stage.path) is not None)
    return _depths(Outline(outline.config, stages, outline.units), places)
