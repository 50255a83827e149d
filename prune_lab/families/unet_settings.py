"""What the settings of a U-Net may be: their types and bounds, looked at before anything is built from them.

Rules of one setting are in ``setting_rules``; here they are put together for ``UNet2DConditionModel``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prune_lab.families import unet_conditions
from prune_lab.families.setting_rules import (
    FLAG,
    MOST_LAYERS,
    ODD,
    OF_STAGES,
    OF_UNETS,
    TEXT,
    TRUTH,
    WIDTH,
    Rule,
    check_each,
    check_groups,
    check_layers,
    check_per_stage,
    number,
    one_of,
    refuse,
    settings_of,
    stages_of,
    whole,
)
from prune_lab.families.unet_stages import TRANSFORMERS, stage_class

_RULES: Mapping[str, Rule] = {
    **OF_UNETS,
    "encoder_hid_dim": WIDTH.or_null(),
    "encoder_hid_dim_type": TEXT.or_null(),
    "dual_cross_attention": FLAG,
    "use_linear_projection": FLAG,
    "class_embed_type": one_of("timestep", "identity", "projection", "simple_projection").or_null(),
    "addition_embed_type": TEXT.or_null(),
    "addition_time_embed_dim": WIDTH.or_null(),
    "upcast_attention": FLAG,
    "resnet_skip_time_act": FLAG,
    "resnet_out_scale_factor": number(0, 1e6, above=True),
    "time_embedding_type": TEXT,
    "time_embedding_act_fn": TEXT.or_null(),
    "timestep_post_act": TEXT.or_null(),
    "time_cond_proj_dim": WIDTH.or_null(),
    "conv_in_kernel": ODD,
    "conv_out_kernel": ODD,
    "projection_class_embeddings_input_dim": whole(1, 10**6).or_null(),
    "attention_type": one_of("default", "gated", "gated-text-image"),
    "class_embeddings_concat": FLAG,
    "mid_block_only_cross_attention": FLAG,
    "cross_attention_norm": one_of("layer_norm", "group_norm").or_null(),
    "addition_embed_type_num_heads": WIDTH,
}

_PER_STAGE: Mapping[str, tuple[Rule, bool]] = {
    **OF_STAGES,
    "layers_per_block": (whole(0, MOST_LAYERS), True),
    "attention_head_dim": (WIDTH, True),
    "cross_attention_dim": (WIDTH, True),
    "only_cross_attention": (TRUTH, True),
}
_DEPTH = whole(0, MOST_LAYERS)  # transformer layers of a block; each block of a stage may have its own


def _attends(kind: str) -> bool:
    """Whether a stage of the type ``kind`` has transformers."""
    return stage_class(kind) in TRANSFORMERS


def _check_depths(key: str, value: object, kinds: Sequence[str], layers: Sequence[int]) -> int:
    """Transformer layers of all blocks of the stages ``kinds``, which have as many ``layers``, as ``value`` says."""
    each: Sequence[Any] = value if isinstance(value, list) else [value] * len(layers)
    usable, total = len(each) == len(layers), 0
    for kind, own, count in zip(kinds, each, layers, strict=False):
        depths = own if isinstance(own, list) else [own] * count
        as_many = len(depths) == count or not _attends(kind)
        usable = usable and as_many and all(map(_DEPTH.fits, own if isinstance(own, list) else [own]))
        total += sum(depths) if usable and _attends(kind) else 0
    if not usable:
        refuse(
            key,
            value,
            f"{_DEPTH.meaning}, or a list of {len(layers)} such, one for each stage; where the layers of a stage "
            "differ, one for each layer",
        )
    return total


def _spread(value: Any, stages: int) -> list[Any]:
    return list(value) if isinstance(value, list) else [value] * stages


def _attention_widths(settings: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """(width, heads) of every stage with attention."""
    widths = settings["block_out_channels"]
    heads = _spread(settings["attention_head_dim"], len(widths))
    pairs = list(zip(widths, heads, strict=True))
    for kinds, own in (
        (settings["down_block_types"], pairs),
        (settings["up_block_types"], list(reversed(pairs))),
        ([settings["mid_block_type"] or ""], pairs[-1:]),
    ):
        yield from (pair for kind, pair in zip(kinds, own, strict=True) if _attends(kind))


def check_settings(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError, which names it, for a setting of another type or out of bounds.

    What ``config`` leaves out is as in ``defaults``, those of the class.
    """
    settings = settings_of(config, defaults)
    check_each(settings, _RULES)
    if settings["num_attention_heads"] is not None:
        refuse(
            "num_attention_heads",
            settings["num_attention_heads"],
            "null, since diffusers reads the number of heads from attention_head_dim: leave num_attention_heads out",
        )
    stages = stages_of(settings)
    kinds = settings["down_block_types"]
    check_per_stage(settings, _PER_STAGE, stages)
    layers = _spread(settings["layers_per_block"], stages)
    key, reverse = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
    total = sum(2 * count + 1 for count in layers) + _check_depths(key, settings[key], kinds, layers)
    if settings[reverse] is not None:
        more = [count + 1 for count in reversed(layers)]
        total += _check_depths(reverse, settings[reverse], settings["up_block_types"], more)
    check_layers(total, settings["layers_per_block"])
    for width, heads in _attention_widths(settings):
        if width % heads:
            refuse(
                "attention_head_dim",
                settings["attention_head_dim"],
                f"a number of heads that divides the width of its stage, {width} here",
            )
    check_groups("norm_num_groups", settings["norm_num_groups"], settings["block_out_channels"])
    unet_conditions.conditions(settings)  # raises where one of them needs a setting that is not there
