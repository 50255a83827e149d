"""Transformers that make a video: latents have frames, and the config of most says no size."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro
from torch import Tensor

from prune_lab.families.chain import (
    LENGTH,
    Blocks,
    Chain,
    Config,
    Kept,
    as_arguments,
    counted,
    refuse_an_empty_chain,
    word_mask,
)
from prune_lab.families.family import Condition, Family, Layout, Outline, noise_alone
from prune_lab.families.image_transformers import MASKED_TEXT, sana_arrange, sana_conditions

FRAMES = 21  # of the latent: 81 frames through a VAE of four to one


def _frames(config: Config) -> int:
    return FRAMES


_MASK = word_mask("encoder_attention_mask")
_PICTURE_FIRST = Blocks(
    letter="B",
    hands_on=("hidden_states", "encoder_hidden_states"),
    in_tuple=True,
    self_attention=("attn1",),
)

# Wan and its kin ------------------------------------------------------------------------------------------------------


_NOT_MADE = "which this program does not make; its blocks can be counted, profiled and pruned without"


def _wan_channels(config: Config) -> int:
    return int(min(config["in_channels"], config["out_channels"]))


def _first_picture(config: Config) -> tuple[Condition, ...]:
    """Of a model that goes on from a picture: its tokens, and its latents with a mask behind the noisy ones."""
    found = []
    if more := int(config["in_channels"]) - _wan_channels(config):
        reason = f"{more} channels of a first picture behind the latents, {_NOT_MADE}"
        found.append(
            Condition(name="first_picture", place="sample", shape=(more,), of_picture=True, reason=reason)
        )
    if config.get("image_dim"):
        reason = f"the tokens of a first picture, {_NOT_MADE}"
        shape = (257, int(config["image_dim"]))
        found.append(
            Condition(name="encoder_hidden_states_image", place="argument", shape=shape, reason=reason)
        )
    return tuple(found)


def _wan(class_name: str, block: str) -> Family:
    return Chain(
        class_name,
        (Blocks(letter="B", path="blocks", self_attention=("attn1",)),),
        channels=_wan_channels,
        text=lambda config: int(config["text_dim"]),
        answers=("text", None),
        film=_frames,
        size=lambda config: (60, 104),  # 480 by 832 pixels
        pixels=lambda config: {16: 8, 48: 16}.get(config["out_channels"]),
        tokens=lambda config: 512,
        conditions=_first_picture,
        stem="patch_embedding",
        compiled=(block,),
    ).family()


WAN = _wan("WanTransformer3DModel", "WanTransformerBlock")
CHRONO_EDIT = _wan("ChronoEditTransformer3DModel", "WanTransformerBlock")
SKYREELS = _wan("SkyReelsV2Transformer3DModel", "SkyReelsV2TransformerBlock")

# CogVideoX ------------------------------------------------------------------------------------------------------------


def _cogvideo_frames(config: Config) -> int:
    frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
    return int(frames + -frames % (config["patch_size_t"] or 1))


def _rotary(config: Config, frames: int, height: int, width: int, device: torch.device) -> Any:
    """Cosines and sines of the places of all patches, as CogVideoX's pipelines make them."""
    # its module loads text encoders as well
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    patch, across_time = config["patch_size"], config["patch_size_t"]
    grid, full = (
        (rows // patch, columns // patch)
        for rows, columns in ((height, width), (config["sample_height"], config["sample_width"]))
    )
    made = functools.partial(
        get_3d_rotary_pos_embed, embed_dim=config["attention_head_dim"], grid_size=grid, device=device
    )
    if across_time:
        return made(
            crops_coords=None, temporal_size=-(-frames // across_time), grid_type="slice", max_size=full
        )
    return made(crops_coords=get_resize_crop_region_for_grid(grid, full[1], full[0]), temporal_size=frames)


def _cogvideo_arrange(
    config: Config, conditions: Any, sample: Tensor, timestep: Tensor, text: Tensor, given: Any
) -> dict[str, Any]:
    """Frames come before channels. Where several frames are one patch, the first is repeated to fill it."""
    behind = [given[one.name] for one in conditions if one.place == "sample"]
    conditions = [one for one in conditions if one.place != "sample"]
    latents = torch.cat([sample, *behind], dim=1).transpose(1, 2)
    if missing := -latents.shape[1] % (config["patch_size_t"] or 1):
        latents = torch.cat([latents[:, :1]] * missing + [latents], dim=1)
    inputs = as_arguments(config, conditions, latents, timestep, text, given)
    if config["use_rotary_positional_embeddings"]:
        frames, height, width = latents.shape[1], *latents.shape[3:]
        device = torch.device("cpu") if sample.is_meta else sample.device
        angles = _rotary(config, frames, height, width, device)
        inputs["image_rotary_emb"] = tuple(one.to(sample.device) for one in angles)
    return inputs


def _cogvideo_prediction(config: Config, output: Tensor, sample: Tensor) -> Tensor:
    return output[:, -sample.shape[2] :].transpose(1, 2)


def _cogvideo_conditions(config: Config) -> tuple[Condition, ...]:
    found: list[Condition] = []
    if more := int(config["in_channels"]) - _wan_channels(config):
        reason = f"{more} channels of a first picture behind the latents, {_NOT_MADE}"
        found.append(Condition(name="first_picture", place="sample", shape=(more,), reason=reason))
    if config["ofs_embed_dim"]:
        found.append(Condition(name="ofs", place="argument", shape=(), value=2.0))
    return tuple(found)


COGVIDEO = Chain(
    "CogVideoXTransformer3DModel",
    (_PICTURE_FIRST,),
    text=lambda config: int(config["text_embed_dim"]),
    arrange=_cogvideo_arrange,
    prediction=_cogvideo_prediction,
    answers=("text", None),
    channels=_wan_channels,
    film=_cogvideo_frames,
    size=lambda config: (int(config["sample_height"]), int(config["sample_width"])),
    pixels=lambda config: 8,
    tokens=lambda config: int(config["max_text_seq_length"]),
    conditions=_cogvideo_conditions,
    stem="patch_embed",
    compiled=("CogVideoXBlock",),
).family()

# LTX, Allegro ---------------------------------------------------------------------------------------------------------


# Frames a second of the latent, and pixels of the picture for one of its own, by which LTX's pipeline counts places.
_LTX_SCALE = (8 / 25, 32, 32)


def _ltx_packed(latents: Tensor, patch: int, across_time: int) -> Tensor:
    rows, channels, frames, height, width = latents.shape
    parts = latents.reshape(
        *(rows, channels, frames // across_time, across_time),
        *(height // patch, patch, width // patch, patch),
    )
    return parts.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4, 7).flatten(1, 3)


def _ltx_unpacked(config: Config, rows: Tensor, sample: Tensor) -> Tensor:
    count, channels, frames, height, width = sample.shape
    patch, across_time = config["patch_size"], config["patch_size_t"]
    parts = rows.reshape(
        *(count, frames // across_time, height // patch, width // patch),
        *(channels, across_time, patch, patch),
    )
    return parts.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(sample.shape)


def _ltx_arrange(
    config: Config, conditions: Any, sample: Tensor, timestep: Tensor, text: Tensor, given: Any
) -> dict[str, Any]:
    patch, across_time = config["patch_size"], config["patch_size_t"]
    frames, height, width = sample.shape[2:]
    latents = _ltx_packed(sample, patch, across_time)
    return {
        **as_arguments(config, conditions, latents, timestep, text, given),
        "num_frames": frames // across_time,
        "height": height // patch,
        "width": width // patch,
        "rope_interpolation_scale": _LTX_SCALE,
    }


LTX = Chain(
    "LTXVideoTransformer3DModel",
    (Blocks(letter="B", self_attention=("attn1",)),),
    text=lambda config: int(config["caption_channels"]),
    arrange=_ltx_arrange,
    prediction=_ltx_unpacked,
    answers=MASKED_TEXT,
    channels=lambda config: (
        int(config["in_channels"]) // (config["patch_size"] ** 2 * config["patch_size_t"])
    ),
    film=_frames,
    conditions=lambda config: (_MASK,),
    size=lambda config: (16, 22),  # 512 by 704 pixels through a VAE of 32 to one
    pixels=lambda config: 32,
    tokens=lambda config: 128,
    stem="proj_in",
    compiled=("LTXVideoTransformerBlock",),
).family()


def _allegro_arrange(config: Config, *given: Any) -> dict[str, Any]:
    inputs = as_arguments(config, *given)
    sample = inputs["hidden_states"]
    device = torch.device("cpu") if sample.is_meta else sample.device
    rows, columns = (side // config["patch_size"] for side in sample.shape[-2:])
    *angles, across, down, along = get_3d_rotary_pos_embed_allegro(
        embed_dim=config["attention_head_dim"],
        crops_coords=((0, 0), (rows, columns)),
        grid_size=(rows, columns),
        temporal_size=sample.shape[2],
        interpolation_scale=tuple(config[f"interpolation_scale_{axis}"] for axis in "thw"),
        device=device,
    )
    places = torch.cartesian_prod(across.long(), down.long(), along.long()).T.reshape(3, 1, -1).contiguous()

    def moved(tensors: Any) -> Any:
        if isinstance(tensors, Tensor):
            return tensors.to(sample.device)
        return tuple(moved(one) for one in tensors)

    return {**inputs, "image_rotary_emb": (moved(tuple(angles)), moved(tuple(places)))}


ALLEGRO = Chain(
    "AllegroTransformer3DModel",
    (Blocks(letter="B", self_attention=("attn1",)),),
    text=lambda config: int(config["caption_channels"]),
    arrange=_allegro_arrange,
    answers=MASKED_TEXT,
    film=lambda config: int(config["sample_frames"]),
    conditions=lambda config: (_MASK,),
    size=lambda config: (int(config["sample_height"]), int(config["sample_width"])),
    pixels=lambda config: 8,
    tokens=lambda config: 512,
    stem="pos_embed",
    compiled=("AllegroTransformerBlock",),
).family()

# Mochi ----------------------------------------------------------------------------------------------------------------

MOCHI_FRAMES = 14  # 84 frames through a VAE of six to one


def _mochi_arrange(config: Config, *given: Any) -> dict[str, Any]:
    """Timesteps are counted from noise to the film."""
    inputs = as_arguments(config, *given)
    timestep = (inputs.pop(LENGTH.place) - inputs["timestep"]).to(inputs["hidden_states"].dtype)
    mask = counted(inputs["encoder_attention_mask"])
    return {**inputs, "timestep": timestep, "encoder_attention_mask": mask}


def _mochi_prediction(config: Config, output: Tensor, sample: Tensor) -> Tensor:
    return -noise_alone(config, output, sample)


def _mochi_finish(outline: Outline, layout: Layout, kept: Kept) -> Layout:
    """The new last block no longer writes the text, which nobody reads."""
    refuse_an_empty_chain(kept)
    places = kept["transformer_blocks"]
    if places[-1] == outline.config["num_layers"] - 1:
        return layout
    old, new = f"transformer_blocks.{places[-1]}", f"transformer_blocks.{len(places) - 1}"
    width = int(outline.config["pooled_projection_dim"])

    def of_the_last(rows: Tensor) -> Tensor:
        return rows[:width]  # the scale of its attention; the other rows belong to what it no longer has

    parts = ("attn1.to_add_out", "ff_context")
    return Layout(
        layout.config,
        {
            **layout.names,
            **{f"{old}.{part}": None for part in parts},
            f"{old}.norm1_context.linear": f"{new}.norm1_context.linear_1",
        },
        {f"{new}.norm1_context.linear_1.{part}": of_the_last for part in ("weight", "bias")},
    )


MOCHI = Chain(
    "MochiTransformer3DModel",
    (dataclasses.replace(_PICTURE_FIRST, last_is_less=True),),
    text=lambda config: int(config["text_embed_dim"]),
    arrange=_mochi_arrange,
    prediction=_mochi_prediction,
    answers=MASKED_TEXT,
    film=lambda config: MOCHI_FRAMES,
    conditions=lambda config: (_MASK, LENGTH),
    size=lambda config: (60, 106),  # 480 by 848 pixels
    pixels=lambda config: 8,
    tokens=lambda config: int(config["max_sequence_length"]),
    finish=_mochi_finish,
    stem="patch_embed",
    compiled=("MochiTransformerBlock",),
).family()

# HunyuanVideo ---------------------------------------------------------------------------------------------------------


def _hunyuan_conditions(config: Config) -> tuple[Condition, ...]:
    width = int(config["pooled_projection_dim"])
    pooled = Condition(name="pooled_projections", place="argument", shape=(width,), of_text=True)
    guidance = Condition(name="guidance", place="argument", shape=(), value=6000.0)
    return (pooled, _MASK, guidance) if config["guidance_embeds"] else (pooled, _MASK)


HUNYUAN_VIDEO = Chain(
    "HunyuanVideoTransformer3DModel",
    (
        dataclasses.replace(_PICTURE_FIRST, letter="D", self_attention=("attn",)),
        dataclasses.replace(
            _PICTURE_FIRST,
            letter="S",
            path="single_transformer_blocks",
            setting="num_single_layers",
            self_attention=("attn",),
        ),
    ),
    text=lambda config: int(config["text_embed_dim"]),
    answers=("text", "pooled_projections", "encoder_attention_mask"),
    channels=_wan_channels,
    film=_frames,
    size=lambda config: (90, 160),  # 720 by 1280 pixels
    pixels=lambda config: 8,
    tokens=lambda config: 256,
    conditions=_hunyuan_conditions,
    stem="x_embedder",
    compiled=("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"),
).family()

# Sana ----------------------------------------------------------------------------------------------------------------


SANA_VIDEO = Chain(
    "SanaVideoTransformer3DModel",
    (Blocks(letter="B", self_attention=("attn1",)),),
    text=lambda config: int(config["caption_channels"]),
    arrange=sana_arrange,
    answers=MASKED_TEXT,
    film=_frames,
    size=lambda config: (60, 104),  # 480 by 832 pixels
    pixels=lambda config: {16: 8, 128: 32}.get(config["in_channels"]),
    tokens=lambda config: 300,
    conditions=sana_conditions,
    stem="patch_embedding",
    compiled=("SanaVideoTransformerBlock",),
).family()

VIDEO_TRANSFORMERS = {
    "WanTransformer3DModel": WAN,
    "ChronoEditTransformer3DModel": CHRONO_EDIT,
    "SkyReelsV2Transformer3DModel": SKYREELS,
    "CogVideoXTransformer3DModel": COGVIDEO,
    "LTXVideoTransformer3DModel": LTX,
    "AllegroTransformer3DModel": ALLEGRO,
    "MochiTransformer3DModel": MOCHI,
    "HunyuanVideoTransformer3DModel": HUNYUAN_VIDEO,
    "SanaVideoTransformer3DModel": SANA_VIDEO,
}
