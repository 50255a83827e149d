"""Counting on ``meta``: fvcore's count against torch's, against arithmetic by hand, and on other sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils import flop_counter
from torch_counter import check_attention_is_counted, count_module, count_on_meta
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from prune_lab.counting import ANALYTIC_EXTRAS, ATTENTION, count_call, count_macs, meta_copy
from prune_lab.errors import UnsupportedModelError
from prune_lab.families import example_inputs, meta_model
from prune_lab.models import preset_config

TOKENS = 77


def hooks_of(unet: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in unet.modules())


def attention_by_hand(latent: int, widths: list[int], tokens: int = TOKENS) -> int:
    """QK^T and AV of every attention layer of an SD-like U-Net: N x keys x width each, however many heads."""

    def layer(side: int, width: int) -> int:
        pixels = side * side
        return 2 * pixels * pixels * width + 2 * pixels * tokens * width

    stages = sum(
        5 * layer(latent >> i, width) for i, width in enumerate(widths[:3])
    )  # 2 going down, 3 going up
    return stages + layer(latent >> 3, widths[3])


def test_sd_v1_4_is_402_gmac_of_which_63_are_attention_products() -> None:
    count = count_on_meta(preset_config("sd-v1.4"))
    assert round(count.total / 1e9, 1) == 401.6
    assert count.attention == attention_by_hand(64, [320, 640, 1280, 1280])
    assert count.without_attention == count.total - count.attention
    traced = count_macs(preset_config("sd-v1.4"))
    assert (round(traced.total / 1e9, 1), round(traced.without_attention / 1e9, 1)) == (402.0, 339.0)
    assert traced.attention == count.attention


def test_linear_projections_are_not_taken_for_attention() -> None:
    # SD-v2 projects with linear layers, which torch runs as the same operator as attention on some layouts.
    count = count_on_meta(preset_config("sd-v2.1-base"))
    assert count.attention == attention_by_hand(64, [320, 640, 1280, 1280])
    assert count.by_module["down_blocks.0.attentions.0.proj_in"] == (64 * 64 * 320 * 320, 0)
    assert (
        count_macs(preset_config("sd-v2.1-base")).by_module["down_blocks.0.attentions.0.proj_in"]
        == count.by_module["down_blocks.0.attentions.0.proj_in"]
    )


@pytest.mark.parametrize(
    ("preset", "params"),
    [("sd-v1.4", 859_520_964), ("sd-v2.1-base", 865_910_724), ("sdxl-base", 2_567_463_684)],
)
def test_meta_unet_has_the_published_number_of_parameters(preset: str, params: int) -> None:
    unet = meta_model(preset_config(preset))
    assert sum(parameter.numel() for parameter in unet.parameters()) == params
    assert {parameter.device.type for parameter in unet.parameters()} == {"meta"}
    assert not unet.training


@pytest.mark.long
@pytest.mark.parametrize("count", [count_macs, count_on_meta])
def test_counts_scale_with_batch_and_size(count: Any, tiny_config: dict[str, Any]) -> None:
    one = count(tiny_config)
    three = count(tiny_config, batch=3)
    assert (three.total, three.attention) == (3 * one.total, 3 * one.attention)
    assert one.attention == attention_by_hand(16, tiny_config["block_out_channels"])
    larger = count(tiny_config, latent=32, tokens=10)
    assert larger.attention == attention_by_hand(32, tiny_config["block_out_channels"], tokens=10)
    convolution = "down_blocks.0.resnets.0.conv1"
    assert one.by_module[convolution] == (16 * 16 * 9 * 8 * 8, 0)
    assert larger.by_module[convolution] == (32 * 32 * 9 * 8 * 8, 0)


def test_parts_of_a_module_add_up_to_it(tiny_config: dict[str, Any]) -> None:
    traced = count_macs(tiny_config)
    assert traced.by_module[""] == (traced.total, traced.attention)
    assert sum(row[0] for path, row in traced.by_module.items() if path and "." not in path) == traced.total
    count = count_on_meta(tiny_config)
    assert count.by_module[""] == (count.total, count.attention)
    tops = [row for path, row in count.by_module.items() if path and "." not in path]
    lists = [
        row
        for path, row in count.by_module.items()
        if path.count(".") == 1 and path.startswith(("down_blocks.", "up_blocks."))
    ]
    # A ModuleList is never called, so it has no count of its own.
    assert sum(total for total, _ in tops) + sum(total for total, _ in lists) == count.total


def test_asking_again_costs_nothing(tiny_config: dict[str, Any]) -> None:
    reordered = dict(reversed(tiny_config.items())) | {"_diffusers_version": "0.0.0"}
    assert count_macs(tiny_config) is count_macs(reordered)


def test_a_live_unet_counts_the_same_and_stays_as_it_was(tiny_unet: Any, tiny_config: dict[str, Any]) -> None:
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in tiny_unet.state_dict().items()}
    twin = meta_copy(tiny_unet)
    inputs = example_inputs(tiny_unet.config, device="meta")
    assert count_module(twin, inputs) == count_on_meta(tiny_config)
    assert count_call(twin, inputs) == count_macs(tiny_config)
    for name, tensor in tiny_unet.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])
    assert {tensor.device.type for tensor in twin.state_dict().values()} == {"meta"}


def test_a_torch_that_counts_attention_as_nothing_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    check_attention_is_counted.cache_clear()
    check_attention_is_counted()
    monkeypatch.delitem(flop_counter.flop_registry, torch.ops.aten.bmm)
    check_attention_is_counted.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"counts \(0, 0\) multiply-adds .* of 1680 on meta"):
            check_attention_is_counted()
    finally:
        check_attention_is_counted.cache_clear()


# fvcore's count, which is the one -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset", ["sd-v1.4", "sd-v2.1-base", pytest.param("sdxl-base", marks=pytest.mark.long)]
)
def test_two_counters_agree_but_for_norms_and_upsampling(preset: str) -> None:
    config = preset_config(preset)
    traced, dispatched = count_macs(config), count_on_meta(config)
    assert abs(traced.total / dispatched.total - 1) < 0.002
    assert traced.attention == dispatched.attention
    extras = sum(traced.by_operator[operator] for operator in ANALYTIC_EXTRAS)
    assert traced.total - extras == dispatched.total  # nothing else sets them apart
    assert set(traced.by_operator) == {"conv", "linear", ATTENTION, *ANALYTIC_EXTRAS}


def test_a_resnet_block_by_hand(tiny_config: dict[str, Any]) -> None:
    # Dn2.R1: 8 -> 16 channels on 8 x 8, time embedding of width 32, and a 1 x 1 shortcut for the change of width.
    pixels, time_width = 8 * 8, 32
    expected = pixels * 9 * 8 * 16 + time_width * 16 + pixels * 9 * 16 * 16 + pixels * 8 * 16
    norms = 5 * pixels * (8 + 16)  # fvcore's five per element
    path = "down_blocks.1.resnets.0"
    assert count_on_meta(tiny_config).by_module[path] == (expected, 0)
    assert count_macs(tiny_config).by_module[path] == (expected + norms, 0)


def test_a_transformer_block_by_hand(tiny_config: dict[str, Any]) -> None:
    # Dn2.A1's layer: width 16 on 8 x 8 = 64 positions, 77 words of width 16.
    n, words, width, text = 64, 77, 16, 16
    own = 4 * n * width * width  # query, key, value and output of self-attention
    cross = 2 * n * width * width + 2 * words * text * width
    feed_forward = n * width * (8 * width) + n * (4 * width) * width  # a gated layer: 4 x width, twice
    products = 2 * n * n * width + 2 * n * words * width
    expected = own + cross + feed_forward + products
    path = "down_blocks.1.attentions.0.transformer_blocks.0"
    assert count_on_meta(tiny_config).by_module[path] == (expected, products)
    assert count_macs(tiny_config).by_module[path] == (expected + 5 * 3 * n * width, products)


def test_a_trace_on_meta_counts_what_a_real_trace_counts(tiny_unet: Any) -> None:
    real = count_call(tiny_unet, example_inputs(tiny_unet.config, batch=2))
    assert real == count_macs(tiny_unet, batch=2)
    assert real == count_macs(dict(tiny_unet.config), batch=2)


@pytest.mark.long
def test_counting_attention_written_out_changes_nothing(tiny_unet: Any) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    fused = count_macs(dict(tiny_unet.config))
    tiny_unet.set_attn_processor(AttnProcessor())
    written_out = count_macs(tiny_unet)
    assert (written_out.total, written_out.attention) == (fused.total, fused.attention)
    assert "aten::softmax" in written_out.uncounted


def test_what_has_no_formula_is_shown(tiny_unet: Any) -> None:
    count = count_macs(dict(tiny_unet.config))
    assert count.uncounted["aten::silu"] == 2 * 22 + 22 + 1 + 1  # per resnet two and one for the time, ends
    assert count.uncounted["aten::gelu"] == 16
    assert "aten::scaled_dot_product_attention" not in count.uncounted
    assert "aten::_convolution" not in count.uncounted


def test_counting_leaves_the_unet_alone(tiny_unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    count_macs(tiny_unet)
    assert hooks_of(tiny_unet) == 0
    monkeypatch.setitem(tiny_unet.down_blocks[0].__dict__, "forward", None)  # not callable: the trace fails
    with pytest.raises(TypeError):
        count_macs(tiny_unet)
    assert hooks_of(tiny_unet) == 0
    assert {parameter.device.type for parameter in tiny_unet.parameters()} == {"cpu"}


def test_other_modules_are_counted_too() -> None:
    text = CLIPTextConfig(
        vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    with torch.device("meta"):
        encoders = CLIPTextModel(text).eval(), CLIPTextModelWithProjection(text).eval()
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).eval()
    words = {"input_ids": torch.zeros(3, 16, dtype=torch.long, device="meta")}
    latents = {"sample": torch.zeros(3, 4, 8, 8, device="meta")}
    for module, inputs in ((encoders[0], words), (encoders[1], words), (vae.decoder, latents)):
        traced, dispatched = count_call(module, inputs), count_module(module, inputs)
        assert traced.attention == dispatched.attention > 0
        extras = sum(traced.by_operator.get(operator, 0) for operator in ANALYTIC_EXTRAS)
        assert traced.total - extras == dispatched.total


# The inputs ----------------------------------------------------------------------------------------------------


def test_sdxl_gets_its_added_conditions() -> None:
    config = preset_config("sdxl-base")
    inputs = example_inputs(config, batch=2, tokens=5, device="meta", dtype=torch.float16)
    assert inputs["sample"].shape == (2, 4, 128, 128)
    assert inputs["encoder_hidden_states"].shape == (2, 5, 2048)
    assert inputs["added_cond_kwargs"]["text_embeds"].shape == (2, 1280)
    assert inputs["added_cond_kwargs"]["time_ids"].shape == (2, 6)
    assert inputs["sample"].dtype == torch.float16


def test_inputs_without_batch_or_size_are_the_models_own(tiny_config: dict[str, Any]) -> None:
    inputs = example_inputs(tiny_config)
    assert inputs["sample"].shape == (1, 4, 16, 16)
    assert inputs["encoder_hidden_states"].shape == (1, 77, 16)
    assert "added_cond_kwargs" not in inputs
    assert example_inputs(tiny_config | {"sample_size": [8, 16]})["sample"].shape == (1, 4, 8, 16)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"addition_embed_type": "image"}, "addition_embed_type 'image'"),
        ({"cross_attention_dim": [16, 16, 8, 8]}, "one is needed"),
        ({"sample_size": None}, "pass a latent size"),
    ],
)
def test_a_conditioning_without_known_inputs_is_refused(
    tiny_config: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        example_inputs(tiny_config | changes)
