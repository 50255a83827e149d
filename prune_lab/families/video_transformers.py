"""Transformers that make a video: latents have frames, and the config of most says no size."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from prune_lab.families.chain import Blocks, Config, Kept, Sizes, chain, refuse_an_empty_chain
from prune_lab.families.family import Condition, Family, Layout, Outline

FRAMES = 21  # of the latent: 81 frames through a VAE of four to one
_PICTURE_FIRST = Blocks(
    letter="B",
    hands_on=("hidden_states", "encoder_hidden_states"),
    in_tuple=True,
    self_attention=("attn1",),
)

# Wan and its kin ------------------------------------------------------------------------------------------------------


def _image_tokens(config: Config) -> tuple[Condition, ...]:
    if not config.get("image_dim"):
        return ()
    reason = "the tokens of a first picture, which another network makes and this program does not run"
    return (
        Condition(
            name="encoder_hidden_states_image",
            place="argument",
            shape=(257, int(config["image_dim"])),
            reason=f"{reason}; its blocks can be counted, profiled and pruned without",
        ),
    )


def _wan_inputs(config: Config, sizes: Sizes) -> dict[str, Any]:
    pictures = {one.name: sizes.zeros(*one.shape) for one in _image_tokens(config)}
    return {
        "hidden_states": sizes.zeros(config["in_channels"], FRAMES, sizes.height, sizes.width),
        "timestep": sizes.whole(),
        "encoder_hidden_states": sizes.zeros(sizes.tokens, config["text_dim"]),
        **pictures,
    }


def _wan(class_name: str, block: str) -> Family:
    return chain(
        class_name,
        Blocks(letter="B", path="blocks", self_attention=("attn1",)),
        inputs=_wan_inputs,
        size=lambda config: (60, 104),  # 480 by 832 pixels
        tokens=lambda config: 512,
        conditions=_image_tokens,
        stem="patch_embedding",
        compiled=(block,),
    )


WAN = _wan("WanTransformer3DModel", "WanTransformerBlock")
CHRONO_EDIT = _wan("ChronoEditTransformer3DModel", "WanTransformerBlock")
SKYREELS = _wan("SkyReelsV2Transformer3DModel", "SkyReelsV2TransformerBlock")

# CogVideoX ------------------------------------------------------------------------------------------------------------


def _cogvideo_inputs(config: Config, sizes: Sizes) -> dict[str, Any]:
    patch, across_time = config["patch_size"], config.get("patch_size_t")
    frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
    if across_time:
        frames += -frames % across_time
    inputs: dict[str, Any] = {
        "hidden_states": sizes.zeros(frames, config["in_channels"], sizes.height, sizes.width),
        "timestep": sizes.whole(),
        "encoder_hidden_states": sizes.zeros(sizes.tokens, config["text_embed_dim"]),
    }
    if config.get("ofs_embed_dim"):
        inputs["ofs"] = sizes.zeros()
    if config.get("use_rotary_positional_embeddings"):
        places = frames // (across_time or 1) * (sizes.height // patch) * (sizes.width // patch)
        angles = torch.ones(places, config["attention_head_dim"], device=sizes.device, dtype=torch.float32)
        inputs["image_rotary_emb"] = (angles, angles)
    return inputs


COGVIDEO = chain(
    "CogVideoXTransformer3DModel",
    _PICTURE_FIRST,
    inputs=_cogvideo_inputs,
    size=lambda config: (int(config["sample_height"]), int(config["sample_width"])),
    tokens=lambda config: int(config["max_text_seq_length"]),
    conditions=lambda config: (
        (Condition(name="ofs", place="argument", shape=()),) if config.get("ofs_embed_dim") else ()
    ),
    stem="patch_embed",
    compiled=("CogVideoXBlock",),
)

# LTX, Allegro ---------------------------------------------------------------------------------------------------------


def _ltx_inputs(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        "hidden_states": sizes.zeros(FRAMES * sizes.height * sizes.width, config["in_channels"]),
        "timestep": sizes.whole(),
        "encoder_hidden_states": sizes.zeros(sizes.tokens, config["caption_channels"]),
        "encoder_attention_mask": sizes.ones(sizes.tokens),
        "num_frames": FRAMES,
        "height": sizes.height,
        "width": sizes.width,
    }


LTX = chain(
    "LTXVideoTransformer3DModel",
    Blocks(letter="B", self_attention=("attn1",)),
    inputs=_ltx_inputs,
    size=lambda config: (16, 22),  # 512 by 704 pixels through a VAE of 32 to one
    tokens=lambda config: 128,
    stem="proj_in",
    compiled=("LTXVideoTransformerBlock",),
)


def _allegro_inputs(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        "hidden_states": sizes.zeros(
            config["in_channels"], config["sample_frames"], sizes.height, sizes.width
        ),
        "timestep": sizes.whole(),
        "encoder_hidden_states": sizes.zeros(sizes.tokens, config["caption_channels"]),
    }


ALLEGRO = chain(
    "AllegroTransformer3DModel",
    Blocks(letter="B", self_attention=("attn1",)),
    inputs=_allegro_inputs,
    size=lambda config: (int(config["sample_height"]), int(config["sample_width"])),
    tokens=lambda config: 512,
    stem="pos_embed",
    compiled=("AllegroTransformerBlock",),
)

# Mochi ----------------------------------------------------------------------------------------------------------------

MOCHI_FRAMES = 14  # 84 frames through a VAE of six to one


def _mochi_inputs(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        "hidden_states": sizes.zeros(config["in_channels"], MOCHI_FRAMES, sizes.height, sizes.width),
        "timestep": sizes.whole(),
        "encoder_hidden_states": sizes.zeros(sizes.tokens, config["text_embed_dim"]),
        "encoder_attention_mask": sizes.all_words(),
    }


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


MOCHI = chain(
    "MochiTransformer3DModel",
    dataclasses.replace(_PICTURE_FIRST, last_is_less=True),
    inputs=_mochi_inputs,
    size=lambda config: (60, 106),  # 480 by 848 pixels
    tokens=lambda config: int(config["max_sequence_length"]),
    finish=_mochi_finish,
    stem="patch_embed",
    compiled=("MochiTransformerBlock",),
)

# HunyuanVideo ---------------------------------------------------------------------------------------------------------


def _hunyuan_conditions(config: Config) -> tuple[Condition, ...]:
    pooled = Condition(
        name="pooled_projections", place="argument", shape=(int(config["pooled_projection_dim"]),)
    )
    guidance = Condition(name="guidance", place="argument", shape=())
    return (pooled, guidance) if config.get("guidance_embeds") else (pooled,)


def _hunyuan_inputs(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        "hidden_states": sizes.zeros(config["in_channels"], FRAMES, sizes.height, sizes.width),
        "timestep": sizes.whole(),
        "encoder_hidden_states": sizes.zeros(sizes.tokens, config["text_embed_dim"]),
        "encoder_attention_mask": sizes.ones(sizes.tokens).bool(),
        "pooled_projections": sizes.zeros(config["pooled_projection_dim"]),
        **({"guidance": sizes.ones()} if config.get("guidance_embeds") else {}),
    }


HUNYUAN_VIDEO = chain(
    "HunyuanVideoTransformer3DModel",
    dataclasses.replace(_PICTURE_FIRST, letter="D", self_attention=("attn",)),
    dataclasses.replace(
        _PICTURE_FIRST,
        letter="S",
        path="single_transformer_blocks",
        setting="num_single_layers",
        self_attention=("attn",),
    ),
    inputs=_hunyuan_inputs,
    size=lambda config: (90, 160),  # 720 by 1280 pixels
    tokens=lambda config: 256,
    conditions=_hunyuan_conditions,
    stem="x_embedder",
    compiled=("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"),
)

# Sana ----------------------------------------------------------------------------------------------------------------


def _sana_inputs(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        "hidden_states": sizes.zeros(config["in_channels"], FRAMES, sizes.height, sizes.width),
        "timestep": sizes.zeros(),
        "encoder_hidden_states": sizes.zeros(sizes.tokens, config["caption_channels"]),
        **({"guidance": sizes.zeros()} if config["guidance_embeds"] else {}),
    }


SANA_VIDEO = chain(
    "SanaVideoTransformer3DModel",
    Blocks(letter="B", self_attention=("attn1",)),
    inputs=_sana_inputs,
    size=lambda config: (60, 104),  # 480 by 832 pixels
    tokens=lambda config: 300,
    conditions=lambda config: (
        (Condition(name="guidance", place="argument", shape=()),) if config["guidance_embeds"] else ()
    ),
    stem="patch_embedding",
    compiled=("SanaVideoTransformerBlock",),
)

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
