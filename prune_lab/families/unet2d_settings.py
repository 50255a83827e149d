"""What the settings of a ``UNet2DModel`` may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prune_lab.families.setting_rules import (
    FLAG,
    MOST_LAYERS,
    SIZE,
    TEXT,
    WIDTH,
    Rule,
    check_each,
    check_groups,
    check_per_stage,
    number,
    one_of,
    refuse,
    settings_of,
    stages_of,
    whole,
)

_RULES: Mapping[str, Rule] = {
    "sample_size": SIZE.or_null(),
    "in_channels": WIDTH,
    "out_channels": WIDTH,
    "center_input_sample": FLAG,
    "time_embedding_type": one_of("positional", "fourier", "learned"),
    "time_embedding_dim": WIDTH.or_null(),
    "freq_shift": number(0, 1),
    "flip_sin_to_cos": FLAG,
    "mid_block_type": TEXT.or_null(),
    "layers_per_block": whole(0, MOST_LAYERS),
    "mid_block_scale_factor": number(0, 1e6, above=True),
    "downsample_padding": whole(0, 1),
    "downsample_type": one_of("conv", "resnet"),
    "upsample_type": one_of("conv", "resnet"),
    "dropout": number(0, 1),
    "act_fn": TEXT,
    "attention_head_dim": WIDTH.or_null(),
    "norm_num_groups": WIDTH.or_null(),
    "attn_norm_num_groups": WIDTH.or_null(),
    "norm_eps": number(0, 1),
    "resnet_time_scale_shift": TEXT,
    "add_attention": FLAG,
    "class_embed_type": one_of("timestep", "identity").or_null(),
    "num_class_embeds": whole(1, 10**6).or_null(),
    "num_train_timesteps": whole(1, 10**6).or_null(),
}
_PER_STAGE: Mapping[str, tuple[Rule, bool]] = {
    "down_block_types": (TEXT, False),
    "up_block_types": (TEXT, False),
    "block_out_channels": (WIDTH, False),
}


def check_settings(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError, which names it, for a setting of another type or out of bounds.

    What ``config`` leaves out is as in ``defaults``, those of the class.
    """
    settings = settings_of(config, defaults)
    check_each(settings, _RULES)
    stages = stages_of(settings)
    check_per_stage(settings, _PER_STAGE, stages)
    layers = settings["layers_per_block"]
    if stages * (2 * layers + 1) > MOST_LAYERS:
        rule = f"less: all layers together are {stages * (2 * layers + 1):,}, at most {MOST_LAYERS} are built"
        refuse("layers_per_block", layers, rule)
    if settings["time_embedding_type"] == "learned" and settings["num_train_timesteps"] is None:
        refuse("num_train_timesteps", None, "a number, since the embedding of timesteps is learned")
    check_groups("norm_num_groups", settings["norm_num_groups"], settings["block_out_channels"])
