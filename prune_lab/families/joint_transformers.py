"""Transformers whose blocks carry the text along with the picture: SD3, FLUX and those built like them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from prune_lab.families.chain import (
    JOINT,
    Blocks,
    Config,
    Kept,
    Size,
    Sizes,
    chain,
    heads,
    refuse_an_empty_chain,
    refused,
)
from prune_lab.families.family import Condition, Family, Layout, Outline


def _pooled(config: Config) -> Condition:
    return Condition(
        name="pooled_projections", place="argument", shape=(int(config["pooled_projection_dim"]),)
    )


# SD3 ------------------------------------------------------------------------------------------------------------------

_LIST = "transformer_blocks"
_TEXT_ALONE = ("attn.to_add_out", "ff_context", "norm2_context")  # what writes the text in a block


def _sd3_inputs(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        "hidden_states": sizes.zeros(config["in_channels"], sizes.height, sizes.width),
        "timestep": sizes.zeros(),
        "encoder_hidden_states": sizes.zeros(sizes.tokens, config["joint_attention_dim"]),
        "pooled_projections": sizes.zeros(config["pooled_projection_dim"]),
    }


def _sd3_finish(outline: Outline, layout: Layout, kept: Kept) -> Layout:
    """The dual attention goes with its blocks; the new last block no longer writes the text, which nobody reads."""
    refuse_an_empty_chain(kept)
    places = kept[_LIST]
    dual = outline.config["dual_attention_layers"]
    config = {
        **layout.config,
        "dual_attention_layers": [new for new, old in enumerate(places) if old in dual],
    }
    if places[-1] == outline.config["num_layers"] - 1:
        return Layout(config, layout.names)
    width = heads(config)

    def of_the_last(rows: Tensor) -> Tensor:
        # shift, scale, gate, ... of all the block's parts become scale and shift of its attention alone
        return torch.cat([rows[width : 2 * width], rows[:width]])

    old, new = f"{_LIST}.{places[-1]}", f"{_LIST}.{len(places) - 1}"
    return Layout(
        config,
        {**layout.names, **{f"{old}.{part}": None for part in _TEXT_ALONE}},
        {f"{new}.norm1_context.linear.{part}": of_the_last for part in ("weight", "bias")},
    )


SD3 = chain(
    "SD3Transformer2DModel",
    Blocks(
        letter="B",
        hands_on=JOINT,
        last_hands_on=(None, "hidden_states"),
        last_is_less=True,
        in_tuple=True,
        self_attention=("attn",),
    ),
    inputs=_sd3_inputs,
    tokens=lambda config: 77 + 256,  # of CLIP and T5
    conditions=lambda config: (_pooled(config),),
    finish=_sd3_finish,
    stem="pos_embed",
    compiled=("JointTransformerBlock",),
)

# FLUX and those like it: latents packed into rows, double blocks and single blocks ------------------------------------


def packed_size(config: Config) -> Size:
    """1024 pixels through a VAE of eight to one: the config says no size."""
    return 128, 128


def _packed(config: Config, sizes: Sizes, axes: int = 3) -> dict[str, Any]:
    """Two by two latent pixels are one row; ``img_ids`` and ``txt_ids`` say where each row stands."""
    height, width = sizes.height // 2, sizes.width // 2
    places = sizes.grid(height, width)
    before = torch.zeros(len(places), 1, device=places.device, dtype=places.dtype)
    after = [before] * (axes - 3)
    return {
        "hidden_states": sizes.zeros(height * width, config["in_channels"]),
        "timestep": sizes.zeros(),
        "encoder_hidden_states": sizes.zeros(sizes.tokens, config["joint_attention_dim"]),
        "img_ids": torch.cat([before, places, *after], dim=1),
        "txt_ids": torch.zeros(sizes.tokens, axes, device=sizes.device, dtype=sizes.dtype),
    }


def _guidance(config: Config) -> tuple[Condition, ...]:
    return (Condition(name="guidance", place="argument", shape=()),) if config.get("guidance_embeds") else ()


def _flux_inputs(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        **_packed(config, sizes),
        "pooled_projections": sizes.zeros(config["pooled_projection_dim"]),
        **({"guidance": sizes.ones()} if config.get("guidance_embeds") else {}),
    }


_DOUBLE = Blocks(letter="D", hands_on=JOINT, in_tuple=True, self_attention=("attn",))
_SINGLE = Blocks(
    letter="S",
    path="single_transformer_blocks",
    setting="num_single_layers",
    hands_on=JOINT,
    in_tuple=True,
    self_attention=("attn",),
)
_SINGLE_OF_ONE_STREAM = Blocks(
    letter="S",
    path="single_transformer_blocks",
    setting="num_single_layers",
    self_attention=("attn",),
)


def _classes(name: str) -> tuple[str, str]:
    return f"{name}TransformerBlock", f"{name}SingleTransformerBlock"


FLUX = chain(
    "FluxTransformer2DModel",
    _DOUBLE,
    _SINGLE,
    inputs=_flux_inputs,
    size=packed_size,
    tokens=lambda config: 512,
    conditions=lambda config: (_pooled(config), *_guidance(config)),
    stem="x_embedder",
    compiled=_classes("Flux"),
)


def _flux2_inputs(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        **_packed(config, sizes, axes=len(config["axes_dims_rope"])),
        **({"guidance": sizes.ones()} if config.get("guidance_embeds") else {}),
    }


FLUX2 = chain(
    "Flux2Transformer2DModel",
    _DOUBLE,
    _SINGLE_OF_ONE_STREAM,
    inputs=_flux2_inputs,
    size=packed_size,
    tokens=lambda config: 512,
    conditions=_guidance,
    stem="x_embedder",
    compiled=_classes("Flux2"),
)


def _like_flux(name: str, tokens: int) -> Family:
    return chain(
        f"{name}Transformer2DModel",
        _DOUBLE,
        _SINGLE,
        inputs=_packed,
        size=packed_size,
        tokens=lambda config: tokens,
        stem="x_embedder",
        compiled=_classes(name),
    )


BRIA = _like_flux("Bria", 128)
LONGCAT = _like_flux("LongCatImage", 512)
OVIS = _like_flux("OvisImage", 256)

CHROMA = chain(
    "ChromaTransformer2DModel",
    _DOUBLE,
    _SINGLE_OF_ONE_STREAM,
    inputs=_packed,
    size=packed_size,
    tokens=lambda config: 512,
    finish=refused(
        "every block reads its modulation by its place among all blocks, from a table that is made for their number: "
        "with fewer blocks the others would read another one's"
    ),
    stem="x_embedder",
    compiled=_classes("Chroma"),
)

# Qwen-Image -----------------------------------------------------------------------------------------------------------


def _qwen_inputs(config: Config, sizes: Sizes) -> dict[str, Any]:
    height, width = sizes.height // 2, sizes.width // 2
    return {
        "hidden_states": sizes.zeros(height * width, config["in_channels"]),
        "timestep": sizes.zeros(),
        "encoder_hidden_states": sizes.zeros(sizes.tokens, config["joint_attention_dim"]),
        "img_shapes": [[(1, height, width)]] * sizes.batch,
        **({"additional_t_cond": sizes.whole()} if config.get("use_additional_t_cond") else {}),
    }


QWEN = chain(
    "QwenImageTransformer2DModel",
    Blocks(letter="B", hands_on=JOINT, in_tuple=True, self_attention=("attn",)),
    inputs=_qwen_inputs,
    size=packed_size,
    tokens=lambda config: 512,
    conditions=lambda config: (
        (Condition(name="additional_t_cond", place="argument", shape=(), whole=True),)
        if config.get("use_additional_t_cond")
        else ()
    ),
    stem="img_in",
    compiled=("QwenImageTransformerBlock",),
)

# HunyuanImage ---------------------------------------------------------------------------------------------------------


def _hunyuan_image_conditions(config: Config) -> tuple[Condition, ...]:
    later = (Condition(name="timestep_r", place="argument", shape=()),) if config["use_meanflow"] else ()
    return (*_guidance(config), *later)


def _hunyuan_image_inputs(config: Config, sizes: Sizes) -> dict[str, Any]:
    frames = [1] * (len(config["patch_size"]) - 2)
    return {
        "hidden_states": sizes.zeros(config["in_channels"], *frames, sizes.height, sizes.width),
        "timestep": sizes.zeros(),
        "encoder_hidden_states": sizes.zeros(sizes.tokens, config["text_embed_dim"]),
        "encoder_attention_mask": sizes.ones(sizes.tokens).bool(),
        **{one.name: sizes.ones() for one in _hunyuan_image_conditions(config)},
    }


_PICTURE_FIRST = ("hidden_states", "encoder_hidden_states")
HUNYUAN_IMAGE = chain(
    "HunyuanImageTransformer2DModel",
    dataclasses.replace(_DOUBLE, hands_on=_PICTURE_FIRST),
    dataclasses.replace(_SINGLE, hands_on=_PICTURE_FIRST),
    inputs=_hunyuan_image_inputs,
    size=lambda config: (64, 64),  # 2048 pixels through a VAE of 32 to one
    tokens=lambda config: 1000,
    conditions=_hunyuan_image_conditions,
    stem="x_embedder",
    compiled=_classes("HunyuanImage"),
)

JOINT_TRANSFORMERS = {
    "SD3Transformer2DModel": SD3,
    "FluxTransformer2DModel": FLUX,
    "Flux2Transformer2DModel": FLUX2,
    "BriaTransformer2DModel": BRIA,
    "LongCatImageTransformer2DModel": LONGCAT,
    "OvisImageTransformer2DModel": OVIS,
    "ChromaTransformer2DModel": CHROMA,
    "HunyuanImageTransformer2DModel": HUNYUAN_IMAGE,
    "QwenImageTransformer2DModel": QWEN,
}
