"""What a U-Net takes beside noisy latents, timestep and text, as its config says it.

The inputs are those of ``UNet2DConditionModel.forward``; which pipeline gives them how is in diffusers' own pipelines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prune_lab.errors import UnsupportedModelError
from prune_lab.families.family import Condition

SDXL_TIME_IDS = 6  # original size, crop corner and target size, two numbers each
REFINER_TIME_IDS = 5  # an aesthetic score in place of the target size
_COUNTED = "; its blocks can be counted, profiled and pruned without"


def latent_channels(config: Mapping[str, Any]) -> int:
    """Channels of the noisy latents: those that are predicted, unless the model predicts a variance as well."""
    taken, predicted = int(config.get("in_channels", 4)), int(config.get("out_channels", 4))
    return min(taken, predicted)


def text_widths(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(width of the text, channels) of every stage that attends to a text, of a config with a width for each stage."""
    texts, channels = list(config["cross_attention_dim"]), list(config["block_out_channels"])
    pairs = list(zip(texts, channels, strict=True))
    rows = (
        (config["down_block_types"], pairs),
        (config["up_block_types"], list(reversed(pairs))),
        ([config.get("mid_block_type") or ""], pairs[-1:]),
    )
    return [pair for kinds, own in rows for kind, pair in zip(kinds, own, strict=True) if "CrossAttn" in kind]


def _width(config: Mapping[str, Any]) -> int:
    """Width of the cross-attention, of the first stage where each has its own."""
    width = config.get("cross_attention_dim") or 0
    return int(width if isinstance(width, int) else width[0])


def _time_width(config: Mapping[str, Any]) -> int:
    """Width of the embedded timestep."""
    times = 2 if config.get("time_embedding_type") == "fourier" else 4
    return int(config.get("time_embedding_dim") or times * config["block_out_channels"][0])


# Further channels ----------------------------------------------------------------------------------------------------


def _channels(name: str, count: int, *, giver: str = "", reason: str = "") -> Condition:
    return Condition(name=name, place="sample", shape=(count,), of_picture=True, giver=giver, reason=reason)


def _further_channels(config: Mapping[str, Any]) -> tuple[Condition, ...]:
    """Channels behind the noisy latents: of an inpainting model, of one that edits pictures, or not known."""
    latents = latent_channels(config)
    more = int(config.get("in_channels", 4)) - latents
    if config.get("addition_embed_type") == "image_hint":
        more -= latents  # forward itself puts the embedded hint behind the latents
    if more <= 0:
        return ()
    if more == 1 + latents:  # StableDiffusionInpaintPipeline
        giver = "prepare_mask_latents"
        return _channels("mask", 1, giver=giver), _channels("masked_latents", latents, giver=giver)
    if more == latents:  # StableDiffusionInstructPix2PixPipeline
        return (_channels("picture_latents", latents, giver="prepare_image_latents"),)
    known = {
        1: (
            "depth",
            "a depth map of each picture, which another network makes and this program does not run",
        ),
        3: ("low_resolution", "a small noisy picture to upscale, which this program does not make"),
    }
    name, what = known.get(
        more, ("channels", f"{more} channels behind the latents, whose meaning is not known")
    )
    return (_channels(name, more, reason=what + _COUNTED),)


# Embeddings that are added to that of the timestep -------------------------------------------------------------------


def _guidance(config: Mapping[str, Any]) -> tuple[Condition, ...]:
    """Of a model that was distilled with guidance (LCM, arXiv:2310.04378): the embedded guidance scale."""
    width = config.get("time_cond_proj_dim")
    if not width:
        return ()
    giver = "get_guidance_scale_embedding"
    return (Condition(name="guidance", place="timestep_cond", shape=(int(width),), giver=giver),)


def _class_labels(config: Mapping[str, Any]) -> tuple[Condition, ...]:
    """A label of each sample; what labels mean is not in the config, so no rows are made."""
    kind, count = config.get("class_embed_type"), config.get("num_class_embeds")
    shape: tuple[int, ...] = ()
    if kind == "timestep":
        what = "a number for each sample, embedded like a timestep"
    elif kind == "identity":
        shape, what = (_time_width(config),), f"{_time_width(config)} numbers for each sample"
    elif kind in ("projection", "simple_projection"):
        width = int(config.get("projection_class_embeddings_input_dim") or 0)
        shape, what = (width,), f"{width} numbers for each sample"
    elif kind is None and count is not None:
        what = f"one of {count} numbers for each sample, such as the noise level of an upscaler"
    else:
        return ()
    reason = f"class labels ({what}), whose meaning is not in the config{_COUNTED}"
    whole = kind in (None, "timestep")
    return (Condition(name="class_labels", place="class_labels", shape=shape, whole=whole, reason=reason),)


def _needed(config: Mapping[str, Any], key: str, kind: str) -> int:
    """The setting ``key``. Raises UnsupportedModelError where it is missing."""
    value = config.get(key)
    if not isinstance(value, int):
        raise UnsupportedModelError(
            f"asked for inputs of a U-Net with {kind}; its config has {key} {value!r}, a width is needed"
        )
    return value


def _sdxl_widths(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """SDXL's pooled text and numbers about the picture: five for the refiner, six for all others.

    What the numbers leave of the input width is that of the pooled text. The refiner has one text encoder, whose text
    and pooled text are of equal width; in the other models the texts of two encoders stand side by side.
    """
    kind = "addition_embed_type 'text_time'"
    whole = _needed(config, "projection_class_embeddings_input_dim", kind)
    each = _needed(config, "addition_time_embed_dim", kind)
    ids = REFINER_TIME_IDS if whole - REFINER_TIME_IDS * each == _width(config) else SDXL_TIME_IDS
    if whole <= ids * each:
        raise UnsupportedModelError(
            f"asked for inputs of a U-Net with {kind}; its config has projection_class_embeddings_input_dim {whole}, "
            f"of which {ids} numbers of width {each} leave nothing for the text"
        )
    return {"text_embeds": (whole - ids * each,), "time_ids": (ids,)}


def _added(config: Mapping[str, Any]) -> tuple[Condition, ...]:
    """What goes into ``added_cond_kwargs``: SDXL's pooled text and size, or an embedded picture (Kandinsky)."""
    kind, projected = config.get("addition_embed_type"), config.get("encoder_hid_dim_type")
    shapes: dict[str, tuple[int, ...]] = {}
    if kind == "text_time":
        shapes = _sdxl_widths(config)
    elif kind == "text_image":
        shapes = {"text_embeds": (_width(config),), "image_embeds": (_width(config),)}
    elif kind in ("image", "image_hint"):
        shapes = {"image_embeds": (_needed(config, "encoder_hid_dim", f"addition_embed_type {kind!r}"),)}
    if projected == "text_image_proj":
        shapes.setdefault("image_embeds", (_width(config),))
    elif projected == "image_proj":
        shapes.setdefault(
            "image_embeds", (_needed(config, "encoder_hid_dim", "encoder_hid_dim_type image_proj"),)
        )
    what = (
        "an embedded picture (as Kandinsky's models do), which needs an image encoder that is not read here"
    )
    reason = what + _COUNTED if "image_embeds" in shapes else ""
    giver = "" if reason else "_get_add_time_ids"
    found = tuple(
        Condition(
            name=name,
            place="added_cond_kwargs",
            shape=shape,
            giver=giver,
            reason=reason,
            of_text=name == "text_embeds",
            of_size=name == "time_ids",
        )
        for name, shape in shapes.items()
    )
    if kind != "image_hint":
        return found
    hint = Condition(
        name="hint", place="added_cond_kwargs", shape=(3,), of_picture=True, scale=8, reason=reason
    )
    return (*found, hint)


def conditions(config: Mapping[str, Any]) -> tuple[Condition, ...]:
    """What the U-Net of ``config`` takes beside noisy latents, timestep and text; see ``Family.conditions``."""
    return (*_further_channels(config), *_guidance(config), *_class_labels(config), *_added(config))
