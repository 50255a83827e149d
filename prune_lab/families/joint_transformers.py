"""Transformers whose blocks carry the text along with the picture: SD3, FLUX and those built like them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from prune_lab.errors import DataError
from prune_lab.families.chain import (
    JOINT,
    Blocks,
    Chain,
    Config,
    Kept,
    Size,
    as_arguments,
    grid,
    heads,
    one_stays,
    refuse_an_empty_chain,
    refused,
    word_mask,
)
from prune_lab.families.family import Condition, Family, Layout, Outline
from prune_lab.families.image_transformers import share_of_noise


def _pooled(config: Config) -> Condition:
    width = int(config["pooled_projection_dim"])
    return Condition(name="pooled_projections", place="argument", shape=(width,), of_text=True)


# SD3 ------------------------------------------------------------------------------------------------------------------

_LIST = "transformer_blocks"
_TEXT_ALONE = ("attn.to_add_out", "ff_context", "norm2_context")  # what writes the text in a block


def _sd3_arrange(config: Config, *given: Any) -> dict[str, Any]:
    inputs = as_arguments(config, *given)
    return {**inputs, "timestep": inputs["timestep"].float()}


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


SD3 = Chain(
    "SD3Transformer2DModel",
    (
        Blocks(
            letter="B",
            hands_on=JOINT,
            last_hands_on=(None, "hidden_states"),
            last_is_less=True,
            in_tuple=True,
            self_attention=("attn",),
        ),
    ),
    text=lambda config: int(config["joint_attention_dim"]),
    arrange=_sd3_arrange,
    answers=("text", None, "pooled_projections", None),
    joins="in a row",
    pixels=lambda config: 8,
    tokens=lambda config: 77 + 256,  # of CLIP and T5
    conditions=lambda config: (_pooled(config),),
    finish=_sd3_finish,
    rules=one_stays,
    stem="pos_embed",
    compiled=("JointTransformerBlock",),
).family()

# FLUX and those like it: latents packed into rows, double blocks and single blocks ------------------------------------


def packed_size(config: Config) -> Size:
    """1024 pixels through a VAE of eight to one: the config says no size."""
    return 128, 128


def packed(latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) as rows (B, h/2 * w/2, 4 C): two by two latent pixels are one."""
    rows, channels, height, width = latents.shape
    if height % 2 or width % 2:
        raise DataError(
            f"asked to pack latents of {height} by {width} two by two, found a side that is odd; give even sides"
        )
    parts = latents.reshape(rows, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return parts.reshape(rows, (height // 2) * (width // 2), channels * 4)


def unpacked(config: Config, rows: Tensor, sample: Tensor) -> Tensor:
    """The opposite of ``packed``, in the form of ``sample``."""
    count, channels, height, width = sample.shape
    parts = rows.reshape(count, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return parts.reshape(sample.shape)


def latent_channels(config: Config) -> int:
    """Channels of the latents before they are packed."""
    return int(config["in_channels"]) // 4


def _predicted_channels(config: Config) -> int:
    """Channels of the prediction before it is packed."""
    each = int(config.get("patch_size") or 1) ** 2
    return each * int(config.get("out_channels") or config["in_channels"]) // 4


def text_width(config: Config) -> int:
    """Width of the text."""
    return int(config["joint_attention_dim"])


def _picture_places(sample: Tensor, *, axes: int = 3, kind: int = 0, start: int = 0) -> Tensor:
    """Where each row of a packed picture stands: (kind, row, column, ...)."""
    places = grid(sample.shape[-2] // 2, sample.shape[-1] // 2, like=sample) + start
    before = torch.full((len(places), 1), kind, device=places.device, dtype=places.dtype)
    after = torch.zeros(len(places), axes - 3, device=places.device, dtype=places.dtype)
    return torch.cat([before, places, after], dim=1)


def _packed_arrange(
    config: Config, conditions: Any, sample: Tensor, timestep: Tensor, text: Tensor, given: Any
) -> dict[str, Any]:
    """``img_ids`` and ``txt_ids`` say where each row stands; those of the text are 0."""
    inputs = as_arguments(config, conditions, packed(sample), timestep, text, given)
    return {
        **inputs,
        "img_ids": _picture_places(sample),
        "txt_ids": torch.zeros(text.shape[1], 3, device=sample.device, dtype=sample.dtype),
    }


def _flux_arrange(config: Config, *given: Any) -> dict[str, Any]:
    return share_of_noise(_packed_arrange(config, *given))


def _guidance(config: Config, value: float = 3.5) -> tuple[Condition, ...]:
    """Of a model that was distilled with guidance: the number that its pipeline gives where nothing else is said."""
    if not config.get("guidance_embeds"):
        return ()
    return (Condition(name="guidance", place="argument", shape=(), value=value),)


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


FLUX = Chain(
    "FluxTransformer2DModel",
    (_DOUBLE, _SINGLE),
    channels=latent_channels,
    predicted=_predicted_channels,
    text=text_width,
    arrange=_flux_arrange,
    prediction=unpacked,
    answers=("text", "pooled_projections", None),
    joins="pooled beside",
    size=packed_size,
    pixels=lambda config: 8,
    tokens=lambda config: 512,
    conditions=lambda config: (_pooled(config), *_guidance(config)),
    stem="x_embedder",
    compiled=_classes("Flux"),
).family()


def _flux2_arrange(
    config: Config, conditions: Any, sample: Tensor, timestep: Tensor, text: Tensor, given: Any
) -> dict[str, Any]:
    inputs = as_arguments(config, conditions, packed(sample), timestep, text, given)
    axes = len(config["axes_dims_rope"])
    words = torch.zeros(text.shape[1], axes, device=sample.device, dtype=sample.dtype)
    words[:, -1] = grid(text.shape[1], like=sample)[:, 0]
    return share_of_noise({**inputs, "img_ids": _picture_places(sample, axes=axes), "txt_ids": words})


FLUX2 = Chain(
    "Flux2Transformer2DModel",
    (_DOUBLE, _SINGLE_OF_ONE_STREAM),
    channels=latent_channels,
    predicted=_predicted_channels,
    text=text_width,
    arrange=_flux2_arrange,
    prediction=unpacked,
    answers=("text", None),
    size=packed_size,
    pixels=lambda config: 8,
    tokens=lambda config: 512,
    conditions=lambda config: _guidance(config, 4.0),
    stem="x_embedder",
    compiled=_classes("Flux2"),
).family()


def _ovis_arrange(config: Config, *given: Any) -> dict[str, Any]:
    inputs = _flux_arrange(config, *given)
    words = grid(inputs["encoder_hidden_states"].shape[1], like=inputs["img_ids"])
    inputs["txt_ids"][:, 1:] = words
    return inputs


def _longcat_arrange(config: Config, *given: Any) -> dict[str, Any]:
    """The picture is of another kind than the text, and stands behind it."""
    inputs = _ovis_arrange(config, *given)
    sample, words = given[1], inputs["encoder_hidden_states"].shape[1]
    return {**inputs, "img_ids": _picture_places(sample, kind=1, start=words)}


def _like_flux(name: str, tokens: int, arrange: Any, answers: tuple[str | None, ...]) -> Family:
    return Chain(
        f"{name}Transformer2DModel",
        (_DOUBLE, _SINGLE),
        channels=latent_channels,
        predicted=_predicted_channels,
        text=text_width,
        arrange=arrange,
        prediction=unpacked,
        answers=answers,
        size=packed_size,
        pixels=lambda config: 8,
        tokens=lambda config: tokens,
        stem="x_embedder",
        compiled=_classes(name),
    ).family()


BRIA = _like_flux("Bria", 128, _packed_arrange, ("text", None, None))  # its timestep is not a share
LONGCAT = _like_flux("LongCatImage", 512, _longcat_arrange, ("text", None))
OVIS = _like_flux("OvisImage", 256, _ovis_arrange, ("text", None, None, None))


def _chroma_arrange(config: Config, *given: Any) -> dict[str, Any]:
    inputs = _flux_arrange(config, *given)
    mask, rows = inputs["attention_mask"].bool(), inputs["hidden_states"]
    picture = torch.ones(rows.shape[:2], dtype=torch.bool, device=mask.device)
    return {**inputs, "attention_mask": torch.cat([mask, picture], dim=1)}


CHROMA = Chain(
    "ChromaTransformer2DModel",
    (_DOUBLE, _SINGLE_OF_ONE_STREAM),
    channels=latent_channels,
    predicted=_predicted_channels,
    text=text_width,
    arrange=_chroma_arrange,
    prediction=unpacked,
    answers=("text", None, "attention_mask", None, None, None),
    size=packed_size,
    pixels=lambda config: 8,
    tokens=lambda config: 512,
    conditions=lambda config: (word_mask("attention_mask"),),
    finish=refused(
        "every block reads its modulation by its place among all blocks, from a table that is made for their number: "
        "with fewer blocks the others would read another one's"
    ),
    stem="x_embedder",
    compiled=_classes("Chroma"),
).family()

# Qwen-Image -----------------------------------------------------------------------------------------------------------


def _qwen_arrange(
    config: Config, conditions: Any, sample: Tensor, timestep: Tensor, text: Tensor, given: Any
) -> dict[str, Any]:
    inputs = as_arguments(config, conditions, packed(sample), timestep, text, given)
    height, width = sample.shape[-2:]
    return share_of_noise({**inputs, "img_shapes": [[(1, height // 2, width // 2)]] * len(sample)})


def _qwen_conditions(config: Config) -> tuple[Condition, ...]:
    mask = word_mask("encoder_hidden_states_mask")
    if not config["use_additional_t_cond"]:
        return (mask,)
    return mask, Condition(name="additional_t_cond", place="argument", shape=(), whole=True, value=0)


QWEN = Chain(
    "QwenImageTransformer2DModel",
    (Blocks(letter="B", hands_on=JOINT, in_tuple=True, self_attention=("attn",)),),
    channels=latent_channels,
    predicted=_predicted_channels,
    text=text_width,
    arrange=_qwen_arrange,
    prediction=unpacked,
    answers=("text", "encoder_hidden_states_mask"),
    size=packed_size,
    pixels=lambda config: 8,
    tokens=lambda config: 512,
    conditions=_qwen_conditions,
    stem="img_in",
    compiled=("QwenImageTransformerBlock",),
).family()

# HunyuanImage ---------------------------------------------------------------------------------------------------------


_GLYPHS = 128  # words of the text that a second encoder reads letter by letter


def _hunyuan_image_conditions(config: Config) -> tuple[Condition, ...]:
    mask, guidance = word_mask("encoder_attention_mask"), _guidance(config, 3250.0)
    if not config["text_embed_2_dim"]:
        return (mask, *guidance)
    shape = (_GLYPHS, int(config["text_embed_2_dim"]))
    second = Condition(name="encoder_hidden_states_2", place="argument", shape=shape, of_text=True)
    return (mask, second, word_mask("encoder_attention_mask_2", (_GLYPHS,)), *guidance)


def _hunyuan_image_arrange(config: Config, *given: Any) -> dict[str, Any]:
    inputs = as_arguments(config, *given)
    inputs["timestep"] = inputs["timestep"].to(inputs["hidden_states"].dtype)
    # What is predicted is the mean of the way between two timesteps; of a flow it is the way at one.
    return {**inputs, "timestep_r": inputs["timestep"]} if config["use_meanflow"] else inputs


_PICTURE_FIRST = ("hidden_states", "encoder_hidden_states")
HUNYUAN_IMAGE = Chain(
    "HunyuanImageTransformer2DModel",
    (
        dataclasses.replace(_DOUBLE, hands_on=_PICTURE_FIRST),
        dataclasses.replace(_SINGLE, hands_on=_PICTURE_FIRST),
    ),
    text=lambda config: int(config["text_embed_dim"]),
    arrange=_hunyuan_image_arrange,
    answers=("text", "encoder_attention_mask", "encoder_hidden_states_2", "encoder_attention_mask_2"),
    size=lambda config: (64, 64),  # 2048 pixels through a VAE of 32 to one
    pixels=lambda config: 32,
    tokens=lambda config: 1000,
    conditions=_hunyuan_image_conditions,
    stem="x_embedder",
    compiled=_classes("HunyuanImage"),
).family()

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
