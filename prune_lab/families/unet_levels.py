"""The choices of a U-Net: blocks of each level of resolution and layers of attention blocks; and its feature points."""

from __future__ import annotations

from collections.abc import Sequence

from prune_lab.families.family import Outline, Removed, Stage, Unit, UnitKind
from prune_lab.families.unet_blocks import rows

# What a layer ends with: blocks of the first kind stand behind those of the second.
_ENDS: tuple[UnitKind, ...] = ("attention", "resnet")


def _tied_blocks(outline: Outline) -> tuple[Unit, ...]:
    """Attention blocks of which diffusers gives the mid stage and the last down stage one number of layers."""
    last = [stage for stage in outline.stages if stage.lane == "left"][-1:]
    middle = [stage for stage in outline.stages if stage.lane == "middle"]
    found = [
        [unit for unit in outline.units_in(stage.name, "attention") if outline.inner(unit.name)]
        for stage in (*last, *middle)
    ]
    return tuple(unit for units in found for unit in units) if len(found) == 2 and all(found) else ()


def levels(outline: Outline) -> list[list[str]]:
    """The removable blocks of each level of resolution, outermost first; the mid stage belongs to the innermost. Then
    every transformer layer that can leave alone is a level of its own.

    A native plan is one option per level, and every combination of options is native: levels meet only in the samplers
    between them. Where two or more inner levels have no block that changes the width, plans that remove several of them
    whole are native too and are not of this form: none of the presets has such levels. Nor are plans with layers of the
    mid stage and the last down stage other than those of ``more_options``.
    """
    found = rows(outline)
    if len(found) > 1 and all(stage.lane == "middle" for stage in found[-1]):
        found[-2:] = [[*found[-2], *found[-1]]]
    names = [{stage.name for stage in row} for row in found]
    tied = {unit.name for unit in _tied_blocks(outline)}
    return [
        *([unit.name for unit in outline.blocks if unit.stage in row and unit.removable] for row in names),
        *([unit.name] for unit in outline.units if unit.inside and unit.inside not in tied),
    ]


def more_options(outline: Outline, level: Sequence[str], option: Removed) -> list[Removed]:
    """``option`` of the innermost level with the last layers of all attention blocks that it leaves in the mid stage
    and the last down stage: one of each, two of each, and so on, as these blocks keep one number of layers.
    """
    blocks = _tied_blocks(outline)
    if not {unit.name for unit in blocks}.intersection(level):
        return []
    layers = [outline.inner(unit.name) for unit in blocks if unit.name not in option]
    most = min(map(len, layers), default=0)
    return [
        option | {layer.name for inner in layers for layer in inner[len(inner) - count :]}
        for count in range(1, most + 1)
    ]


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
    for kind in _ENDS:
        units = outline.units_in(stage.name, kind)
        left = [unit for unit in units if unit.name not in removed]
        if left:
            inner = ".proj_out" if units[-1].in_tuple else ""  # a tensor, where the block returns a tuple
            return [(units[-1].path + inner, left[-1].path + inner)]
    return []
