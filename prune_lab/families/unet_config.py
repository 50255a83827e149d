"""The settings of a ``UNet2DConditionModel`` that builds what is left of one: stages, layers and transformer depths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prune_lab.errors import NonNativePlanError
from prune_lab.families.unet_stages import DOWN, TRANSFORMERS, UP
from prune_lab.families.unet_wiring import Left, Wiring

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


# Stages --------------------------------------------------------------------------------------------------------------


def spread(value: Any, count: int) -> list[Any]:
    """``value`` for each of ``count`` stages: itself where it is a list."""
    return list(value) if isinstance(value, (list, tuple)) else [value] * count


def check_middle(mid: Wiring | None, known: Sequence[tuple[int, int]], words: str) -> None:
    """Raise NonNativePlanError unless the mid stage has one of the ``known`` numbers of blocks: residual, attention."""
    if mid and (len(mid.resnets), len(mid.attentions)) not in known:
        raise NonNativePlanError(
            f"{mid.name} would keep {len(mid.resnets)} residual and {len(mid.attentions)} attention blocks; plain "
            f"diffusers knows mid stages of {words}"
        )


def stage_types(left: Left) -> dict[str, list[str]]:
    """``down_block_types`` and ``up_block_types``: a stage without attention is one of another class.

    Raises NonNativePlanError where that class computes something else.
    """
    types = {}
    for key, stages in (("down_block_types", left.downs), ("up_block_types", left.ups)):
        said = list(left.outline.config[key])
        types[key] = [
            said[stage.place] if stage.attentions else _bare(left, stage, said[stage.place])
            for stage in stages
        ]
    return types


def _bare(left: Left, stage: Wiring, said: str) -> str:
    """The type of a stage that has lost its attention blocks, or has had none."""
    bare = {**DOWN, **UP}[stage.kind]
    if bare == stage.kind:
        return said
    side = "downsample" if stage.lane == "left" else "upsample"
    if stage.has_sampler and left.outline.config.get(f"{side}_type") == "resnet":
        return f"Resnet{side.title()}Block2D"
    if stage.one_skip and not _same_without_attention(left, stage):
        raise NonNativePlanError(
            f"{stage.name} would keep no attention block; a plain {bare} in place of its {stage.kind} computes "
            f"something else: keep an attention block in {stage.name} for each residual block"
        )
    return bare


def _same_without_attention(left: Left, stage: Wiring) -> bool:
    """Whether a K stage without its attention blocks is a plain K stage: it gives or takes a skip as that one does, and
    its last residual block does not change the width by itself.
    """
    last = next(unit for unit in left.outline.units if unit.name == stage.resnets[-1])
    return stage.gives or (stage.takes and last.main_channels == last.out_channels)


def _check_heads(left: Left) -> None:
    """Refuse up stages that would get other heads: diffusers does not turn ``attention_head_dim`` round for them."""
    config = left.outline.config
    heads = spread(
        config["attention_head_dim"], len(config["up_block_types"])
    )  # places are those of the original
    for new, stage in enumerate(left.ups):
        if stage.attentions and stage.kind not in TRANSFORMERS and heads[new] != heads[stage.place]:
            raise NonNativePlanError(
                f"{stage.name} has attention heads of {heads[stage.place]} channels, as up stage {new + 1} of a plain "
                f"diffusers model it would have heads of {heads[new]}; keep the stages further in"
            )


# Transformer layers --------------------------------------------------------------------------------------------------


def _entry(depths: Sequence[int], unused: object) -> int | list[int]:
    """The entry of a stage whose attention blocks have these ``depths``; of none, ``unused`` where it is a number."""
    if not depths:
        return unused if isinstance(unused, int) else 1
    return depths[0] if len(set(depths)) == 1 else list(depths)


def _transformer_layers(left: Left) -> dict[str, Any]:
    """The settings that say how many transformer layers each attention block has, from what is left.

    Diffusers takes the numbers of the up stages from the down stages, unless they have a list of their own, and that of
    the mid stage from the first attention block of the last down stage. So this pair must agree where both are left:
    otherwise raises NonNativePlanError.
    """
    outline, downs, mid = left.outline, left.downs, left.mid
    layers = {
        unit.name: unit.transformer_layers - len(outline.inner(unit.name)) + len(left.layers(unit.name))
        for unit in outline.blocks
    }

    def depths(stage: Wiring) -> list[int]:
        return [layers[name or ""] for name in stage.attentions] if stage.kind in TRANSFORMERS else []

    setting = outline.config["transformer_layers_per_block"]
    per_stage = [setting] * len(downs) if isinstance(setting, int) else list(setting)
    middle = depths(mid) if mid else []
    down, up = [depths(stage) for stage in downs], [depths(stage) for stage in reversed(left.ups)]
    if mid and middle and down[-1] and down[-1][0] != middle[0]:
        stage = downs[-1]
        raise NonNativePlanError(
            f"{mid.attentions[0]} has {middle[0]} transformer layers and {stage.attentions[0]}, the first attention "
            f"block that {stage.name} would keep, {down[-1][0]}; plain diffusers gives both the same number: "
            f"keep another one, or remove all attention blocks of {stage.name} or of {mid.name}"
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


# All of it -----------------------------------------------------------------------------------------------------------


def _middle_type(left: Left) -> str | None:
    mid, config = left.mid, left.outline.config
    if not mid or not mid.resnets:
        return None
    if mid.attentions:
        return str(config["mid_block_type"])
    if mid.kind == "UNetMidBlock2DSimpleCrossAttn" and config["resnet_skip_time_act"]:
        raise NonNativePlanError(
            f"{mid.name} would keep one residual block; a plain UNetMidBlock2D has none with resnet_skip_time_act: "
            f"keep {mid.name} as it is or remove all of it"
        )
    return "UNetMidBlock2D"


def describe(left: Left) -> Mapping[str, Any]:
    """The settings of what is left. Raises NonNativePlanError with the reason where there are none."""
    check_middle(left.mid, ((2, 1), (1, 0), (0, 0)), "R1 A1 R2, of one residual block, or none")
    _check_heads(left)
    config = dict(left.outline.config)
    depth = len(left.downs)
    for key in _PER_STAGE:
        if isinstance(config.get(key), (list, tuple)):
            config[key] = list(config[key])[:depth]
    layers = [len(stage.resnets) for stage in left.downs]
    config["layers_per_block"] = layers[0] if len(set(layers)) == 1 else layers
    config["mid_block_type"] = _middle_type(left)
    return config | stage_types(left) | _transformer_layers(left)
