"""Transformers that make one picture of a latent, one list of blocks after the other."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from prune_lab.errors import NonNativePlanError
from prune_lab.families.chain import JOINT, Blocks, Config, Kept, Sizes, chain
from prune_lab.families.family import Condition, Family, Layout, Outline

# PixArt ---------------------------------------------------------------------------------------------------------------


def _wants_picture_size(config: Config) -> bool:
    """Whether a PixArt takes the size of the picture: unless it is said, only that of 1024 pixels does."""
    said = config.get("use_additional_conditions")
    return config.get("sample_size", 128) == 128 if said is None else bool(said)


def _pixart_conditions(config: Config) -> tuple[Condition, ...]:
    if not _wants_picture_size(config):
        return ()
    return (
        Condition(name="resolution", place="added_cond_kwargs", shape=(2,)),
        Condition(name="aspect_ratio", place="added_cond_kwargs", shape=(1,)),
    )


def _pixart_inputs(config: Config, sizes: Sizes) -> dict[str, Any]:
    picture: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if _wants_picture_size(config):
        picture = {"resolution": sizes.zeros(2), "aspect_ratio": sizes.zeros(1)}
    return {
        "hidden_states": sizes.zeros(config["in_channels"], sizes.height, sizes.width),
        "timestep": sizes.whole(),
        "encoder_hidden_states": sizes.zeros(
            sizes.tokens, config.get("caption_channels") or config["cross_attention_dim"]
        ),
        "added_cond_kwargs": picture,
    }


PIXART = chain(
    "PixArtTransformer2DModel",
    Blocks(letter="B", self_attention=("attn1",)),
    inputs=_pixart_inputs,
    tokens=lambda config: (
        300 if _wants_picture_size(config) else 120
    ),  # PixArt-Sigma's and -Alpha's pipelines
    conditions=_pixart_conditions,
    stem="pos_embed",
    compiled=("BasicTransformerBlock",),
)

# Sana -----------------------------------------------------------------------------------------------------------------

_GUIDANCE = Condition(name="guidance", place="argument", shape=())


def _sana_inputs(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        "hidden_states": sizes.zeros(config["in_channels"], sizes.height, sizes.width),
        "timestep": sizes.zeros(),
        "encoder_hidden_states": sizes.zeros(sizes.tokens, config["caption_channels"]),
        **({"guidance": sizes.zeros()} if config.get("guidance_embeds") else {}),
    }


SANA = chain(
    "SanaTransformer2DModel",
    Blocks(letter="B", self_attention=("attn1",)),
    inputs=_sana_inputs,
    tokens=lambda config: 300,
    conditions=lambda config: (_GUIDANCE,) if config.get("guidance_embeds") else (),
    stem="patch_embed",
    compiled=("SanaTransformerBlock",),
)

# DiT ------------------------------------------------------------------------------------------------------------------


def _dit_inputs(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        "hidden_states": sizes.zeros(config["in_channels"], sizes.height, sizes.width),
        "timestep": sizes.whole(),
        "class_labels": sizes.whole(),
    }


def _with_the_embedding(outline: Outline) -> Outline:
    first, *others = outline.units
    return dataclasses.replace(outline, units=(dataclasses.replace(first, keeps=("norm1.emb",)), *others))


def _keeps_the_first(outline: Outline, layout: Layout, kept: Kept) -> Layout:
    if 0 not in kept["transformer_blocks"]:
        raise NonNativePlanError(
            "the head reads the embedding of timestep and class inside B1 (its norm1.emb), and that of another block "
            "is another one: keep B1"
        )
    return layout


DIT = chain(
    "DiTTransformer2DModel",
    Blocks(letter="B", self_attention=("attn1",)),
    inputs=_dit_inputs,
    adapt=_with_the_embedding,
    tokens=lambda config: 0,
    conditions=lambda config: (
        Condition(
            name="class_labels",
            place="class_labels",
            shape=(),
            whole=True,
            classes=int(config["num_embeds_ada_norm"]),
        ),
    ),
    finish=_keeps_the_first,
    stem="pos_embed",
    head="proj_out_2",
    compiled=("BasicTransformerBlock",),
)

# AuraFlow -------------------------------------------------------------------------------------------------------------


def _auraflow_inputs(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        "hidden_states": sizes.zeros(config["in_channels"], sizes.height, sizes.width),
        "timestep": sizes.zeros(),
        "encoder_hidden_states": sizes.zeros(sizes.tokens, config["joint_attention_dim"]),
    }


AURAFLOW = chain(
    "AuraFlowTransformer2DModel",
    Blocks(
        letter="D",
        path="joint_transformer_blocks",
        setting="num_mmdit_layers",
        hands_on=JOINT,
        in_tuple=True,
        self_attention=("attn",),
    ),
    Blocks(
        letter="S",
        path="single_transformer_blocks",
        setting="num_single_dit_layers",
        self_attention=("attn",),
    ),
    inputs=_auraflow_inputs,
    tokens=lambda config: 256,
    stem="pos_embed",
    compiled=("AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock"),
)

# Lumina 2 and Z-Image -------------------------------------------------------------------------------------------------


def _lumina2_inputs(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        "hidden_states": sizes.zeros(config["in_channels"], sizes.height, sizes.width),
        "timestep": sizes.zeros(),
        "encoder_hidden_states": sizes.zeros(sizes.tokens, config["cap_feat_dim"]),
        "encoder_attention_mask": sizes.all_words(),
    }


LUMINA2 = chain(
    "Lumina2Transformer2DModel",
    Blocks(letter="B", path="layers", self_attention=("attn",)),
    inputs=_lumina2_inputs,
    tokens=lambda config: 256,
    width=lambda config: int(config["hidden_size"]),
    stem="x_embedder",
    head="norm_out",
    compiled=("Lumina2TransformerBlock",),
)


def _z_image_inputs(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        "x": list(sizes.zeros(config["in_channels"], 1, sizes.height, sizes.width)),
        "t": sizes.zeros(),
        "cap_feats": list(sizes.zeros(sizes.tokens, config["cap_feat_dim"])),
        "patch_size": config["all_patch_size"][0],
        "f_patch_size": config["all_f_patch_size"][0],
    }


Z_IMAGE = chain(
    "ZImageTransformer2DModel",
    Blocks(
        letter="B",
        path="layers",
        setting="n_layers",
        hands_on=("x",),
        main="x",
        self_attention=("attention",),
    ),
    inputs=_z_image_inputs,
    size=lambda config: (128, 128),
    tokens=lambda config: 512,
    width=lambda config: int(config["dim"]),
    latents="x",
    stem="all_x_embedder.2-1",
    head="all_final_layer.2-1",
    compiled=("ZImageTransformerBlock",),
)

# CogView --------------------------------------------------------------------------------------------------------------


def _cogview_inputs(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        "hidden_states": sizes.zeros(config["in_channels"], sizes.height, sizes.width),
        "timestep": sizes.zeros(),
        "encoder_hidden_states": sizes.zeros(sizes.tokens, config["text_embed_dim"]),
        **{name: sizes.zeros(2) for name in ("original_size", "target_size", "crop_coords")},
    }


def _cogview(class_name: str, block: str, tokens: int) -> Family:
    return chain(
        class_name,
        Blocks(
            letter="B",
            hands_on=("hidden_states", "encoder_hidden_states"),
            in_tuple=True,
            self_attention=("attn1",),
        ),
        inputs=_cogview_inputs,
        tokens=lambda config: tokens,
        conditions=lambda config: tuple(
            Condition(name=name, place="argument", shape=(2,))
            for name in ("original_size", "target_size", "crop_coords")
        ),
        stem="patch_embed",
        compiled=(block,),
    )


COGVIEW3 = _cogview("CogView3PlusTransformer2DModel", "CogView3PlusTransformerBlock", 224)
COGVIEW4 = _cogview("CogView4Transformer2DModel", "CogView4TransformerBlock", 1024)

# PRX ------------------------------------------------------------------------------------------------------------------


def _prx_inputs(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        "hidden_states": sizes.zeros(config["in_channels"], sizes.height, sizes.width),
        "timestep": sizes.zeros(),
        "encoder_hidden_states": sizes.zeros(sizes.tokens, config["context_in_dim"]),
    }


PRX = chain(
    "PRXTransformer2DModel",
    Blocks(letter="B", path="blocks", setting="depth", self_attention=("attention",)),
    inputs=_prx_inputs,
    size=lambda config: (32, 32),  # 1024 pixels through a VAE of 32 to one
    tokens=lambda config: 256,
    width=lambda config: int(config["hidden_size"]),
    stem="img_in",
    head="final_layer",
    compiled=("PRXBlock",),
)

IMAGE_TRANSFORMERS = {
    "PixArtTransformer2DModel": PIXART,
    "SanaTransformer2DModel": SANA,
    "DiTTransformer2DModel": DIT,
    "AuraFlowTransformer2DModel": AURAFLOW,
    "Lumina2Transformer2DModel": LUMINA2,
    "ZImageTransformer2DModel": Z_IMAGE,
    "PRXTransformer2DModel": PRX,
    "CogView3PlusTransformer2DModel": COGVIEW3,
    "CogView4Transformer2DModel": COGVIEW4,
}
