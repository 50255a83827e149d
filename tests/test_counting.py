"""Counting on ``meta``: against arithmetic by hand, and against itself on other sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import flop_counter

from prune_lab.counting import check_attention_is_counted, count_module, count_on_meta, meta_copy
from prune_lab.errors import UnsupportedModelError
from prune_lab.families import example_inputs, meta_unet
from prune_lab.models import preset_config

TOKENS = 77


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


def test_linear_projections_are_not_taken_for_attention() -> None:
    # SD-v2 projects with linear layers, which torch runs as the same operator as attention on some layouts.
    count = count_on_meta(preset_config("sd-v2.1-base"))
    assert count.attention == attention_by_hand(64, [320, 640, 1280, 1280])
    assert count.by_module["down_blocks.0.attentions.0.proj_in"] == (64 * 64 * 320 * 320, 0)


@pytest.mark.parametrize(
    ("preset", "params"),
    [("sd-v1.4", 859_520_964), ("sd-v2.1-base", 865_910_724), ("sdxl-base", 2_567_463_684)],
)
def test_meta_unet_has_the_published_number_of_parameters(preset: str, params: int) -> None:
    unet = meta_unet(preset_config(preset))
    assert sum(parameter.numel() for parameter in unet.parameters()) == params
    assert {parameter.device.type for parameter in unet.parameters()} == {"meta"}
    assert not unet.training


def test_counts_scale_with_batch_and_size(tiny_config: dict[str, Any]) -> None:
    one = count_on_meta(tiny_config)
    three = count_on_meta(tiny_config, batch=3)
    assert (three.total, three.attention) == (3 * one.total, 3 * one.attention)
    assert one.attention == attention_by_hand(16, tiny_config["block_out_channels"])
    larger = count_on_meta(tiny_config, latent=32, tokens=10)
    assert larger.attention == attention_by_hand(32, tiny_config["block_out_channels"], tokens=10)
    convolution = "down_blocks.0.resnets.0.conv1"
    assert one.by_module[convolution] == (16 * 16 * 9 * 8 * 8, 0)
    assert larger.by_module[convolution] == (32 * 32 * 9 * 8 * 8, 0)


def test_parts_of_a_module_add_up_to_it(tiny_config: dict[str, Any]) -> None:
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
    assert count_on_meta(tiny_config) is count_on_meta(reordered)


def test_a_live_unet_counts_the_same_and_stays_as_it_was(tiny_unet: Any, tiny_config: dict[str, Any]) -> None:
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in tiny_unet.state_dict().items()}
    twin = meta_copy(tiny_unet)
    count = count_module(twin, example_inputs(tiny_unet.config, device="meta"))
    assert count == count_on_meta(tiny_config)
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
