"""What the readers of the LDM layout assume beyond the names and shapes in a file, and where a model is otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What the readers build whatever the file holds, since nothing in the layout says otherwise.
_ASSUMED = {
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
}
_HEADS = 8  # of each attention in Stable Diffusion 1
_HEAD_WIDTH = 64  # in Stable Diffusion 2 and XL, which have more heads where they are wider


def _per_stage(value: Any, stages: int) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * stages


def reader_notes(configs: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """What a reader must be told of the model with these ``configs`` by part, since the layout cannot hold it."""
    unet = configs["unet"]
    notes = [
        f"{name} is {unet[name]}; readers of this layout assume {assumed}"
        for name, assumed in _ASSUMED.items()
        if unet.get(name, assumed) not in (assumed, None)
    ]
    channels = list(unet["block_out_channels"])
    heads = _per_stage(unet.get("num_attention_heads") or unet.get("attention_head_dim", 8), len(channels))
    by_width = [width // _HEAD_WIDTH for width in channels]
    wanted = by_width if unet.get("use_linear_projection") else [_HEADS] * len(channels)
    attends = [
        "CrossAttn" in down or "CrossAttn" in up
        for down, up in zip(unet["down_block_types"], reversed(unet["up_block_types"]), strict=True)
    ]
    if any(has and found != want for has, found, want in zip(attends, heads, wanted, strict=True)):
        notes.append(f"attention heads are {heads} by stage; readers of this layout assume {wanted}")
    if configs.get("scheduler", {}).get("prediction_type") == "v_prediction":
        notes.append(
            "the model predicts v, which the layout does not say; ComfyUI guesses it from a block that a student may "
            "not have: set ModelSamplingDiscrete to v_prediction"
        )
    if unet.get("mid_block_type", "UNetMidBlock2DCrossAttn") is None:
        notes.append("the U-Net has no mid stage; ComfyUI needs a version that knows such models")
    return tuple(notes)
