"""Transformers whose blocks are not a plain chain: HunyuanDiT pairs them by long skips, Latte counts them in pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed

from prune_lab.errors import NonNativePlanError
from prune_lab.families.chain import Blocks, Chain, Config, Kept, as_arguments, word_mask
from prune_lab.families.family import Condition, Layout, Outline

# HunyuanDiT -----------------------------------------------------------------------------------------------------------


def _hunyuan_conditions(config: Config) -> tuple[Condition, ...]:
    # both texts have the lengths that their padding was learned for
    shape = (int(config["text_len_t5"]), int(config["cross_attention_dim_t5"]))
    texts = (
        word_mask("text_embedding_mask"),
        Condition(name="encoder_hidden_states_t5", place="argument", shape=shape, of_text=True),
        word_mask("text_embedding_mask_t5", shape[:1]),
    )
    if not config["use_style_cond_and_image_meta_size"]:
        return texts
    return (
        *texts,
        Condition(name="image_meta_size", place="argument", shape=(6,), of_size=True),
        Condition(name="style", place="argument", shape=(), whole=True, value=0),
    )


def _hunyuan_arrange(config: Config, *given: Any) -> dict[str, Any]:
    """The angles of the places are those of HunyuanDiT's pipeline."""
    # its module loads text encoders as well
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    inputs = as_arguments(config, *given)
    sample = inputs["hidden_states"]
    rows, columns = (side // config["patch_size"] for side in sample.shape[-2:])
    region = get_resize_crop_region_for_grid((rows, columns), 512 // 8 // config["patch_size"])
    angles = get_2d_rotary_pos_embed(
        config["attention_head_dim"], region, (rows, columns), device=torch.device("cpu"), output_type="pt"
    )
    return {
        **inputs,
        "timestep": inputs["timestep"].to(sample.dtype),
        "image_rotary_emb": tuple(one.to(sample.device) for one in angles),
    }


_Wires = list[
    tuple[int, int, int | None]
]  # of each block: itself, the writer of its input, the writer of its skip
_STEM, _NOTHING = -1, -2


def _wires(blocks: Sequence[int], kept: Iterable[int]) -> _Wires:
    """What each of the ``kept`` reads in a HunyuanDiT of ``blocks``, where the others hand on their input.

    A block of the first half but its last puts its state on a stack, one of the second half but its first takes one.
    """
    left, half = set(kept), len(blocks) // 2
    state, skips, wires = _STEM, list[int](), _Wires()
    for place, block in enumerate(blocks):
        skip = (skips.pop() if skips else _NOTHING) if place > half else None
        if block in left:
            wires.append((block, state, skip))
            state = block
        if place < half - 1:
            skips.append(state)
    return wires


def _hunyuan_finish(outline: Outline, layout: Layout, kept: Kept) -> Layout:
    left = kept["blocks"]
    if _wires(range(outline.config["num_layers"]), left) != _wires(left, left):
        raise NonNativePlanError(
            "a block of the first half and its partner of the second half share a skip connection: the first with the "
            "last, the second with the last but one; remove both or none, and keep the two blocks in the middle"
        )
    return layout


def _hunyuan_levels(outline: Outline) -> list[list[str]]:
    names = [unit.name for unit in outline.units]
    half = len(names) // 2
    return [[names[i], names[-1 - i]] for i in range(half)]


HUNYUAN_DIT = Chain(
    "HunyuanDiT2DModel",
    (Blocks(letter="B", path="blocks", self_attention=("attn1",)),),
    text=lambda config: int(config["cross_attention_dim"]),
    arrange=_hunyuan_arrange,
    answers=(),
    pixels=lambda config: 8,
    tokens=lambda config: int(config["text_len"]),
    padded=True,
    conditions=_hunyuan_conditions,
    finish=_hunyuan_finish,
    levels=_hunyuan_levels,
    stem="pos_embed",
    compiled=("HunyuanDiTBlock",),
).family()

# Latte ----------------------------------------------------------------------------------------------------------------


def _in_turns(outline: Outline) -> Outline:
    """A spatial block, then the temporal block of the same number."""
    lists = [outline.units_in(stage.name) for stage in outline.stages]
    return dataclasses.replace(
        outline, units=tuple(unit for pair in zip(*lists, strict=True) for unit in pair)
    )


_FRAMES_MARKED = ("mark", 0)  # where the places of the frames are added: ahead of the first temporal block


def _latte_finish(outline: Outline, layout: Layout, kept: Kept) -> Layout:
    spatial, temporal = kept["transformer_blocks"], kept["temporal_transformer_blocks"]
    order: list[tuple[str, int]] = []
    for i in range(outline.config["num_layers"]):
        order += [("S", i)] if i in spatial else []
        order += [_FRAMES_MARKED] if i == 0 else []
        order += [("T", i)] if i in temporal else []
    plain: list[tuple[str, int]] = []
    for first, (space, time) in enumerate(zip(spatial, temporal, strict=False)):
        plain += [("S", space), *([_FRAMES_MARKED] if first == 0 else []), ("T", time)]
    if order != plain or len(spatial) != len(temporal):
        raise NonNativePlanError(
            "spatial and temporal blocks take turns in a plain model, S1 ahead of the places of the frames: keep S1, "
            "and remove neighbours in pairs, such as -T1 -S2 or -S2 -T2"
        )
    return layout


def _latte_levels(outline: Outline) -> list[list[str]]:
    """A temporal block and the spatial block after it; a spatial block and the temporal one after it can also leave."""
    names = [unit.name for unit in outline.units]
    return [list(pair) for pair in zip(names[1::2], names[2::2], strict=False)]


LATTE = Chain(
    "LatteTransformer3DModel",
    (
        Blocks(letter="S", self_attention=("attn1",)),
        Blocks(letter="T", path="temporal_transformer_blocks", self_attention=("attn1",)),
    ),
    text=lambda config: int(config["caption_channels"]),
    answers=("text", None),
    film=lambda config: int(config["video_length"]),
    pixels=lambda config: 8,
    tokens=lambda config: 120,
    adapt=_in_turns,
    finish=_latte_finish,
    levels=_latte_levels,
    complete=False,
    stem="pos_embed",
    compiled=("BasicTransformerBlock",),
).family()

SKIPPING_TRANSFORMERS = {"HunyuanDiT2DModel": HUNYUAN_DIT, "LatteTransformer3DModel": LATTE}
