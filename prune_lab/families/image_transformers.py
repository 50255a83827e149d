"""Transformers that make one picture of a latent, one list of blocks after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prune_lab.errors import NonNativePlanError
from prune_lab.families.chain import (
    JOINT,
    LENGTH,
    STEPS,
    Blocks,
    Chain,
    Config,
    Kept,
    as_arguments,
    counted,
    word_mask,
)
from prune_lab.families.family import Condition, Family, Layout, Outline

MASKED_TEXT = ("text", "encoder_attention_mask", None, None)  # and those of the empty caption
_MASK = word_mask("encoder_attention_mask")

# PixArt ---------------------------------------------------------------------------------------------------------------


def _wants_picture_size(config: Config) -> bool:
    """Whether a PixArt takes the size of the picture: unless it is said, only that of 1024 pixels does."""
    said = config.get("use_additional_conditions")
    return config.get("sample_size", 128) == 128 if said is None else bool(said)


def _pixart_conditions(config: Config) -> tuple[Condition, ...]:
    if not _wants_picture_size(config):
        return (_MASK,)
    return (
        _MASK,
        Condition(name="resolution", place="added_cond_kwargs", shape=(2,), of_size=True),
        Condition(name="aspect_ratio", place="added_cond_kwargs", shape=(1,), of_size=True),
    )


def _pixart_arrange(config: Config, *given: Any) -> dict[str, Any]:
    return {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}} | as_arguments(config, *given)


PIXART = Chain(
    "PixArtTransformer2DModel",
    (Blocks(letter="B", self_attention=("attn1",)),),
    text=lambda config: int(config["caption_channels"] or config["cross_attention_dim"]),
    arrange=_pixart_arrange,
    answers=MASKED_TEXT,
    # Sigma's configs say that it takes no size of the picture, and its pipeline asks for 300 words, Alpha's for 120
    pixels=lambda config: 8,
    tokens=lambda config: 300 if config.get("use_additional_conditions") is False else 120,
    conditions=_pixart_conditions,
    stem="pos_embed",
    compiled=("BasicTransformerBlock",),
).family()

# Sana -----------------------------------------------------------------------------------------------------------------

# 4.5 of guidance, times a tenth: that of SANA-Sprint
GUIDANCE = Condition(name="guidance", place="argument", shape=(), value=0.45)


def sana_conditions(config: Config) -> tuple[Condition, ...]:
    """The words that count and, where the model was distilled with it, the guidance."""
    return (_MASK, GUIDANCE) if config["guidance_embeds"] else (_MASK,)


def sana_arrange(config: Config, *given: Any) -> dict[str, Any]:
    """The timestep is scaled as the config says."""
    inputs = as_arguments(config, *given)
    scale = config.get("timestep_scale", 1)
    return inputs if scale == 1 else {**inputs, "timestep": inputs["timestep"] * scale}


SANA = Chain(
    "SanaTransformer2DModel",
    (Blocks(letter="B", self_attention=("attn1",)),),
    text=lambda config: int(config["caption_channels"]),
    arrange=sana_arrange,
    answers=MASKED_TEXT,
    pixels=lambda config: 32,
    tokens=lambda config: 300,
    conditions=sana_conditions,
    stem="patch_embed",
    compiled=("SanaTransformerBlock",),
).family()

# DiT ------------------------------------------------------------------------------------------------------------------


def _dit_arrange(config: Config, *given: Any) -> dict[str, Any]:
    inputs = as_arguments(config, *given)
    del inputs["encoder_hidden_states"]  # it reads no text
    return inputs


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


DIT = Chain(
    "DiTTransformer2DModel",
    (Blocks(letter="B", self_attention=("attn1",)),),
    text=lambda config: 0,
    arrange=_dit_arrange,
    adapt=_with_the_embedding,
    pixels=lambda config: 8,
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
).family()

# AuraFlow -------------------------------------------------------------------------------------------------------------


def share_of_noise(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with the timestep as the share of noise, from 0 to 1."""
    return {**inputs, "timestep": inputs["timestep"].to(inputs["hidden_states"].dtype) / STEPS}


def _share_arrange(config: Config, *given: Any) -> dict[str, Any]:
    return share_of_noise(as_arguments(config, *given))


AURAFLOW = Chain(
    "AuraFlowTransformer2DModel",
    (
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
    ),
    text=lambda config: int(config["joint_attention_dim"]),
    arrange=_share_arrange,
    answers=("text", None, None, None),
    pixels=lambda config: 8,
    tokens=lambda config: 256,
    stem="pos_embed",
    compiled=("AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock"),
).family()

# Lumina 2 and Z-Image -------------------------------------------------------------------------------------------------


def _share_of_picture(timestep: Tensor, length: Tensor | int = STEPS) -> Tensor:
    """0 for noise and 1 for the picture: these models count the other way, and predict the way to the picture."""
    return 1 - timestep / length


def _to_noise(config: Config, output: Tensor, sample: Tensor) -> Tensor:
    return -output


def _lumina2_arrange(config: Config, *given: Any) -> dict[str, Any]:
    inputs = as_arguments(config, *given)
    length = inputs.pop(LENGTH.place)
    return {
        **inputs,
        "timestep": _share_of_picture(inputs["timestep"], length),
        "encoder_attention_mask": counted(inputs["encoder_attention_mask"]),
    }


LUMINA2 = Chain(
    "Lumina2Transformer2DModel",
    (Blocks(letter="B", path="layers", self_attention=("attn",)),),
    text=lambda config: int(config["cap_feat_dim"]),
    arrange=_lumina2_arrange,
    prediction=_to_noise,
    answers=MASKED_TEXT,
    conditions=lambda config: (_MASK, LENGTH),
    pixels=lambda config: 8,
    tokens=lambda config: 256,
    width=lambda config: int(config["hidden_size"]),
    stem="x_embedder",
    head="norm_out",
    compiled=("Lumina2TransformerBlock",),
).family()


_WORDS = "words"  # the mask that tells the texts of a batch apart, which the model takes one by one


def _z_image_patch(config: Config) -> tuple[int, int]:
    """Latent pixels of a side, and frames, of a patch: what the pipeline asks for, else the first of the model."""
    known = list(zip(config["all_patch_size"], config["all_f_patch_size"], strict=True))
    return (2, 1) if (2, 1) in known else known[0]


def _z_image_module(name: str) -> Callable[[Config], str]:
    """The path of the one of its modules called ``name`` that is for its patches."""
    return lambda config: f"{name}.{'-'.join(map(str, _z_image_patch(config)))}"


def _z_image_arrange(
    config: Config, conditions: Any, sample: Tensor, timestep: Tensor, text: Tensor, given: Any
) -> dict[str, Any]:
    lengths = counted(given[_WORDS]).sum(1).tolist()
    side, frames = _z_image_patch(config)
    return {
        "x": list(sample.unsqueeze(2)),
        "t": _share_of_picture(timestep),
        "cap_feats": [words[:length] for words, length in zip(text, lengths, strict=True)],
        "patch_size": side,
        "f_patch_size": frames,
    }


def _z_image_prediction(config: Config, output: list[Tensor], sample: Tensor) -> Tensor:
    return -torch.stack(list(output)).squeeze(2)


Z_IMAGE = Chain(
    "ZImageTransformer2DModel",
    (
        Blocks(
            letter="B",
            path="layers",
            setting="n_layers",
            hands_on=("x",),
            main="x",
            self_attention=("attention",),
        ),
    ),
    text=lambda config: int(config["cap_feat_dim"]),
    arrange=_z_image_arrange,
    prediction=_z_image_prediction,
    answers=("text", None),
    conditions=lambda config: (word_mask(_WORDS, place="text"),),
    size=lambda config: (128, 128),
    pixels=lambda config: 8,
    tokens=lambda config: 512,
    width=lambda config: int(config["dim"]),
    latents="x",
    stem=_z_image_module("all_x_embedder"),
    head=_z_image_module("all_final_layer"),
    compiled=("ZImageTransformerBlock",),
).family()

# CogView --------------------------------------------------------------------------------------------------------------


def _cogview(class_name: str, block: str, tokens: int) -> Family:
    return Chain(
        class_name,
        (
            Blocks(
                letter="B",
                hands_on=("hidden_states", "encoder_hidden_states"),
                in_tuple=True,
                self_attention=("attn1",),
            ),
        ),
        text=lambda config: int(config["text_embed_dim"]),
        answers=("text", None),
        pixels=lambda config: 8,
        tokens=lambda config: tokens,
        conditions=lambda config: tuple(
            Condition(name=name, place="argument", shape=(2,), of_size=True)
            for name in ("original_size", "target_size", "crop_coords")
        ),
        stem="patch_embed",
        compiled=(block,),
    ).family()


COGVIEW3 = _cogview("CogView3PlusTransformer2DModel", "CogView3PlusTransformerBlock", 224)
COGVIEW4 = _cogview("CogView4Transformer2DModel", "CogView4TransformerBlock", 1024)

# PRX ------------------------------------------------------------------------------------------------------------------


def _prx_arrange(config: Config, *given: Any) -> dict[str, Any]:
    inputs = as_arguments(config, *given)
    length = inputs.pop(LENGTH.place)
    return {**inputs, "timestep": inputs["timestep"] / length}


PRX = Chain(
    "PRXTransformer2DModel",
    (Blocks(letter="B", path="blocks", setting="depth", self_attention=("attention",)),),
    text=lambda config: int(config["context_in_dim"]),
    arrange=_prx_arrange,
    answers=("text", "attention_mask", None, None),
    conditions=lambda config: (word_mask("attention_mask"), LENGTH),
    size=lambda config: (32, 32),  # 1024 pixels through a VAE of 32 to one
    pixels=lambda config: {16: 8, 32: 32}.get(config["in_channels"]),
    tokens=lambda config: 256,
    width=lambda config: int(config["hidden_size"]),
    stem="img_in",
    head="final_layer",
    compiled=("PRXBlock",),
).family()

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
