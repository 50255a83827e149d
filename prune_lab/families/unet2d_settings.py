"""What the settings of a ``UNet2DModel`` may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prune_lab.families.setting_rules import (
    FLAG,
    MOST_LAYERS,
    OF_STAGES,
    OF_UNETS,
    WIDTH,
    Rule,
    check_each,
    check_groups,
    check_layers,
    check_per_stage,
    one_of,
    refuse,
    settings_of,
    stages_of,
    whole,
)

_RULES: Mapping[str, Rule] = {
    **OF_UNETS,
    "time_embedding_type": one_of("positional", "fourier", "learned"),
    "layers_per_block": whole(0, MOST_LAYERS),
    "downsample_type": one_of("conv", "resnet"),
    "upsample_type": one_of("conv", "resnet"),
    "attention_head_dim": WIDTH.or_null(),
    "attn_norm_num_groups": WIDTH.or_null(),
    "add_attention": FLAG,
    "class_embed_type": one_of("timestep", "identity").or_null(),
    "num_train_timesteps": whole(1, 10**6).or_null(),
}


def check_settings(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError, which names it, for a setting of another type or out of bounds.

    What ``config`` leaves out is as in ``defaults``, those of the class.
    """
    settings = settings_of(config, defaults)
    check_each(settings, _RULES)
    stages = stages_of(settings)
    check_per_stage(settings, OF_STAGES, stages)
    layers = settings["layers_per_block"]
    check_layers(stages * (2 * layers + 1), layers)
    if settings["time_embedding_type"] == "learned" and settings["num_train_timesteps"] is None:
        refuse("num_train_timesteps", None, "a number, since the embedding of timesteps is learned")
    check_groups("norm_num_groups", settings["norm_num_groups"], settings["block_out_channels"])
