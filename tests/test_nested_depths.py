"""U-Nets whose attention blocks have transformer layers of their own: what a native plan promises is what it builds."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from conftest import TINY_UNET, build_unet
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_lab.blocks import Architecture, architecture_of
from prune_lab.errors import NonNativePlanError
from prune_lab.plans import (
    PruningPlan,
    is_native,
    native_choices,
    native_layout,
    parse_plan,
    plan_of,
    removed_samplers,
)
from prune_lab.surgery import bypassed, materialise

# The settings of public models that say which blocks there are; all widths are theirs.
XL: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
PUBLIC: dict[str, tuple[int, dict[str, Any]]] = {
    "SSD-1B": (
        1_331_334_404,
        {
            **XL,
            "transformer_layers_per_block": [0, [2, 2], [4, 4]],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
            "mid_block_type": "UNetMidBlock2D",
        },
    ),
    "Vega": (
        745_225_604,
        {
            **XL,
            "transformer_layers_per_block": [0, [1, 1], [2, 2]],
            "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
            "mid_block_type": "UNetMidBlock2D",
        },
    ),
    "KOALA-1B": (1_161_184_324, {**XL, "layers_per_block": 1, "transformer_layers_per_block": [0, 2, 6]}),
    "KOALA-700M": (
        782_822_724,
        {**XL, "layers_per_block": 1, "transformer_layers_per_block": [0, 2, 5], "mid_block_type": None},
    ),
    "SDXL": (2_567_463_684, {**XL, "transformer_layers_per_block": [1, 2, 10]}),
    "SDXL refiner": (
        2_259_526_660,
        {
            **XL,
            "attention_head_dim": [6, 12, 24, 24],
            "block_out_channels": [384, 768, 1536, 1536],
            "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"],
            "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
            "cross_attention_dim": 1280,
            "transformer_layers_per_block": 4,
            "projection_class_embeddings_input_dim": 2560,
        },
    ),
}


def built_by_diffusers(config: dict[str, Any]) -> int:
    """Parameters of the model that plain diffusers makes of ``config``."""
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(json.loads(json.dumps(config)))
    return sum(parameter.numel() for parameter in model.parameters())


def promised(architecture: Architecture, plan: PruningPlan) -> int:
    gone = {*plan.removed, *removed_samplers(architecture, plan)}
    units = (*architecture.units, *architecture.layers)
    return architecture.total_params - sum(unit.params for unit in units if unit.name in gone)


def drawn_plan(architecture: Architecture, choose: Any) -> PruningPlan:
    options = [choose(level) for level in native_choices(architecture)]
    return plan_of(architecture, frozenset().union(*options))


def test_the_plan_that_lost_layers_without_a_word() -> None:
    params, config = PUBLIC["SSD-1B"]
    architecture = architecture_of(config)
    assert architecture.total_params == params
    plan = parse_plan("-Dn3.A1 -Dn3.R2 -Up1.R2 -Up1.A2", architecture)
    layout = native_layout(architecture, plan)
    assert built_by_diffusers(dict(layout.config)) == promised(architecture, plan) == 966_420_484
    assert layout.config["reverse_transformer_layers_per_block"][0] == [4, 10]


@pytest.mark.parametrize("name", PUBLIC)
def test_native_plans_of_public_models_build_what_they_promise(name: str) -> None:
    params, config = PUBLIC[name]
    architecture = architecture_of(config)
    assert architecture.total_params == params
    assert built_by_diffusers(dict(native_layout(architecture, plan_of(architecture, ())).config)) == params
    chance, seen = random.Random(0), {}
    for _ in range(12):
        plan = drawn_plan(architecture, lambda level: chance.choice(sorted(level, key=sorted)))
        seen[plan.id] = plan
    for plan in seen.values():
        found = built_by_diffusers(dict(native_layout(architecture, plan).config))
        assert found == promised(architecture, plan), plan.text


@st.composite
def nested(draw: st.DrawFn) -> dict[str, Any]:
    """A narrow U-Net of two or three stages whose attention blocks have one to three layers each."""
    depth = draw(st.integers(2, 3))
    layers = [draw(st.integers(1, 2)) for _ in range(depth)]
    attends = [[draw(st.booleans()) for _ in range(depth)] for _ in range(2)]
    numbers = [
        [
            draw(st.lists(st.integers(1, 3), min_size=count + extra, max_size=count + extra))
            for count in layers
        ]
        for extra in (0, 1)
    ]
    return {
        **TINY_UNET,
        "sample_size": 8,
        "block_out_channels": draw(st.sampled_from([[8, 8, 8], [8, 16, 16], [8, 16, 32]]))[:depth],
        "attention_head_dim": draw(st.sampled_from([2, [1, 2, 4][:depth]])),
        "only_cross_attention": draw(st.sampled_from([False, [False, True, False][:depth]])),
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends[0]],
        "up_block_types": ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in attends[1]],
        "mid_block_type": draw(st.sampled_from(["UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None])),
        "transformer_layers_per_block": numbers[0],
        "reverse_transformer_layers_per_block": numbers[1][::-1],
    }


@settings(max_examples=6)
@given(config=nested(), data=st.data())
def test_a_native_plan_builds_exactly_what_it_promises(config: dict[str, Any], data: st.DataObject) -> None:
    architecture = architecture_of(config)
    assert architecture.total_params == built_by_diffusers(config)
    plan = drawn_plan(architecture, lambda level: data.draw(st.sampled_from(level)))
    layout = native_layout(architecture, plan)
    assert built_by_diffusers(dict(layout.config)) == promised(architecture, plan), plan.text


@settings(max_examples=6)
@given(config=nested(), data=st.data())
def test_a_native_student_is_the_bypassed_teacher(config: dict[str, Any], data: st.DataObject) -> None:
    teacher = build_unet(config)
    plan = drawn_plan(architecture_of(teacher), lambda level: data.draw(st.sampled_from(level)))
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "sample": torch.randn(1, 4, 8, 8, generator=generator),
        "timestep": 500,
        "encoder_hidden_states": torch.randn(1, 5, 16, generator=generator),
    }
    with torch.no_grad():
        with bypassed(teacher, plan):
            expected = teacher(**inputs).sample
        assert torch.equal(materialise(teacher, plan)(**inputs).sample, expected), plan.text


def test_a_mid_stage_of_another_depth_is_refused_with_the_reason() -> None:
    config = {**XL, "transformer_layers_per_block": [1, 2, [10, 4]]}
    config["reverse_transformer_layers_per_block"] = [[4, 10, 10], 2, 1]
    architecture = architecture_of(config)
    pair = "-Up1.R2 -Up1.A2"
    refused = parse_plan(f"-Dn3.A1 -Dn3.R2 {pair}", architecture)
    with pytest.raises(NonNativePlanError, match=r"Md\.A1 has 10 transformer layers and Dn3\.A2.*, 4;"):
        native_layout(architecture, refused)
    # without the mid stage, or with the other attention block, a plain config describes it
    for text in (f"-Md -Dn3.A1 -Dn3.R2 {pair}", f"-Dn3.A2 -Dn3.R2 {pair}"):
        assert is_native(architecture, parse_plan(text, architecture))
