"""``UNet2DModel``, the U-Net without a text: unconditional and class-conditional diffusion of pixels or latents.

It has one number of layers for all stages, so that every stage must lose as many.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor

from prune_lab.errors import NonNativePlanError
from prune_lab.families import unet2d_settings, unet_blocks, unet_levels, unet_neutral, unet_wiring
from prune_lab.families.family import Condition, Family, Outline, Removed, arranged, sample_size
from prune_lab.families.unet_blocks import MIDDLE, rows
from prune_lab.families.unet_config import check_middle, stage_types
from prune_lab.families.unet_wiring import Left


def _channels(config: Mapping[str, Any]) -> int:
    """Channels of the noisy picture, or of latents."""
    return min(int(config.get("in_channels", 3)), int(config.get("out_channels", 3)))


def conditions(config: Mapping[str, Any]) -> tuple[Condition, ...]:
    """What the model of ``config`` takes beside a noisy picture and a timestep: a class, or further channels."""
    taken, latents = int(config.get("in_channels", 3)), _channels(config)
    found: list[Condition] = []
    if taken > latents:
        what = f"{taken - latents} channels behind the noisy ones, whose meaning is not known"
        shape = (taken - latents,)
        found.append(Condition(name="channels", place="sample", shape=shape, of_picture=True, reason=what))
    kind, count = config.get("class_embed_type"), config.get("num_class_embeds")
    label = functools.partial(Condition, name="class_labels", place="class_labels")
    if kind == "timestep":
        found.append(label(shape=(), whole=True, reason="a number for each sample, embedded like a timestep"))
    elif kind == "identity":
        width = int(config.get("time_embedding_dim") or 4 * config["block_out_channels"][0])
        found.append(label(shape=(width,), reason=f"{width} numbers for each sample in place of a class"))
    elif kind is None and count is not None:
        found.append(label(shape=(), whole=True, classes=int(count)))
    return tuple(found)


def example_inputs(
    config: Mapping[str, Any],
    *,
    batch: int = 1,
    latent: int | None = None,
    tokens: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Keyword arguments of ``forward``: zeros of the right shapes. sample (B, C, H, W), timestep (B,), and class_labels
    where the config asks for them; ``tokens`` mean nothing here.
    """
    height, width = sample_size(config) if latent is None else (latent, latent)
    sample = torch.zeros(batch, int(config.get("in_channels", 3)), height, width, device=device, dtype=dtype)
    inputs: dict[str, Tensor] = {
        "sample": sample,
        "timestep": torch.zeros(batch, device=device, dtype=torch.long),
    }
    for one in conditions(config):
        if one.place == "class_labels":
            form = torch.long if one.whole else dtype
            inputs["class_labels"] = torch.zeros(batch, *one.shape, device=device, dtype=form)
    return inputs


def arrange(config: Mapping[str, Any], *given: Any) -> dict[str, Any]:
    """Keyword arguments of ``forward``; there is no text among them."""
    inputs = arranged(config, *given)
    del inputs["encoder_hidden_states"]
    return inputs


# What is left --------------------------------------------------------------------------------------------------------


def describe(left: Left) -> Mapping[str, Any]:
    """The settings of what is left. Raises NonNativePlanError with the reason where there are none."""
    config, mid = dict(left.outline.config), left.mid
    check_middle(mid, ((2, 1), (2, 0), (0, 0)), "R1 A1 R2, of R1 R2, or none")
    layers = {stage.name: len(stage.resnets) for stage in left.downs}
    if len(set(layers.values())) > 1:
        raise NonNativePlanError(
            f"the down stages would keep {layers} residual blocks; a plain UNet2DModel has one number of layers for "
            "all stages: remove as many from every stage"
        )
    depth = len(left.downs)
    config["block_out_channels"] = list(config["block_out_channels"])[:depth]
    config["layers_per_block"] = next(iter(layers.values()))
    if not mid or not mid.resnets:
        config["mid_block_type"] = None
    else:
        config["add_attention"] = bool(mid.attentions)
    return config | stage_types(left)


def levels(outline: Outline) -> list[list[str]]:
    """A level for all stages together, whose options ``more_options`` lists, and one of the mid stage's blocks."""
    middle = [unit.name for unit in outline.blocks if unit.stage == MIDDLE and unit.removable]
    return [[], middle] if middle else [[]]


def _patterns(outline: Outline) -> list[Removed]:
    """Native removals of the same layers from all down stages and of as many from all up stages, nothing first."""
    layers = int(outline.config["layers_per_block"])
    sides = {
        lane: {stage.name for stage in outline.stages if stage.lane == lane} for lane in ("left", "right")
    }
    found = []
    for count in range(layers + 1):
        for down, up in itertools.product(
            itertools.combinations(range(1, layers + 1), count),
            itertools.combinations(range(1, layers + 2), count),
        ):
            gone = {
                "left": {f"{kind}{i}" for i in down for kind in "RA"},
                "right": {f"{kind}{i}" for i in up for kind in "RA"},
            }
            found.append(
                [
                    unit
                    for unit in outline.blocks
                    for lane, names in sides.items()
                    if unit.stage in names and unit.local_name in gone[lane]
                ]
            )
    removals = [frozenset(unit.name for unit in units) for units in found if all(u.removable for u in units)]
    return [removed for removed in removals if _is_native(outline, removed)]


def _is_native(outline: Outline, removed: Removed) -> bool:
    try:
        unet_wiring.layout(outline, removed, describe)
    except NonNativePlanError:
        return False
    return True


def more_options(outline: Outline, level: Sequence[str], option: Removed) -> list[Removed]:
    """Of the level of all stages: the same layers of all down stages and as many of all up stages, and with each of
    these the attention blocks of some levels of resolution.

    Stages that lose different layers, or one of two opposite stages its attention, are native too and not listed.
    """
    if level or option:
        return []
    attentions = [
        {unit.name for stage in row for unit in outline.units_in(stage.name, "attention")}
        for row in rows(outline)
        if row[0].lane != "middle"
    ]
    attending = [names for names in attentions if names]
    found = [
        pattern.union(*some)
        for pattern in _patterns(outline)
        for count in range(len(attending) + 1)
        for some in itertools.combinations(attending, count)
    ]
    return [removed for removed in dict.fromkeys(found) if removed]


UNET2D = Family(
    model_class=lambda: diffusers.UNet2DModel,
    check=unet2d_settings.check_settings,
    channels=_channels,
    text=lambda config: 0,
    tokens=lambda config: 0,
    example_inputs=example_inputs,
    conditions=conditions,
    arrange=arrange,
    outline=unet_blocks.outline,
    layout=functools.partial(unet_wiring.layout, describe=describe),
    neutral=functools.partial(unet_neutral.layout, describe=describe),
    levels=levels,
    more_options=more_options,
    groups={
        "pair": unet_blocks.pairs,
        "triplet": unet_blocks.triplets,
        "inner": unet_blocks.inner_stages,
    },
    stage_features=unet_levels.stage_features,
    stem=lambda config: "conv_in",
    head=lambda config: "conv_out",
    compiled=("ResnetBlock2D", "Attention"),
)
