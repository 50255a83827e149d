"""The key map of the LDM layout: against lists made by the public rule, against diffusers' own converter, and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import SHAPES, TINY_UNET, build_text_encoder, build_unet
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from ldm_layout import GOLDEN, GOLDEN_LISTS, Shapes, golden_shapes, golden_text, ldm_unet_shapes, read_golden

from prune_lab.blocks import architecture_of
from prune_lab.errors import UnsupportedModelError
from prune_lab.families import meta_model
from prune_lab.families.ldm_keys import (
    clip_places,
    diffusers_to_ldm,
    empty_attentions,
    ldm_to_diffusers,
    open_clip_places,
    unet_places,
    vae_places,
)
from prune_lab.models import preset_config
from prune_lab.plans import native_layout, parse_plan

# U-Net -------------------------------------------------------------------------------------------------------------


def ldm_shapes(config: dict[str, Any]) -> Shapes:
    """Name and shape of each tensor of the U-Net of ``config`` in the LDM layout, by our map."""
    shapes = {key: tuple(tensor.shape) for key, tensor in meta_model(config).state_dict().items()}
    return {place.key: place.shape([shapes[key] for key in place.sources]) for place in unet_places(config)}


def student_config(model: str, plan: str) -> dict[str, Any]:
    architecture = architecture_of(preset_config(model))
    return dict(native_layout(architecture, parse_plan(plan, architecture)).config)


@pytest.mark.parametrize(("file", "num_res_blocks"), GOLDEN_LISTS.items())
def test_the_golden_lists_are_what_the_public_rule_gives(file: str, num_res_blocks: int) -> None:
    shapes = golden_shapes(num_res_blocks)
    assert (GOLDEN / file).read_text(encoding="utf-8") == golden_text(shapes)
    assert len(shapes) == {1: 442, 2: 686}[num_res_blocks]


@pytest.mark.parametrize(("plan", "file"), [("teacher", "ldm_sd_v1.txt"), ("bk-base", "ldm_bk_base.txt")])
def test_every_key_and_shape_is_in_the_golden_list(plan: str, file: str) -> None:
    assert ldm_shapes(student_config("sd-v1.4", plan)) == read_golden(GOLDEN / file)


def test_without_a_mid_stage_the_rest_is_as_in_base() -> None:
    base = read_golden(GOLDEN / "ldm_bk_base.txt")
    wanted = {key: shape for key, shape in base.items() if not key.startswith("middle_block")}
    assert ldm_shapes(student_config("sd-v1.4", "bk-small")) == wanted


def test_half_a_mid_stage_is_its_first_residual_block() -> None:
    found = ldm_shapes(student_config("sd-v1.4", "-Md.A1 -Md.R2"))
    wanted = read_golden(GOLDEN / "ldm_sd_v1.txt")
    assert found == {
        k: v for k, v in wanted.items() if not k.startswith(("middle_block.1", "middle_block.2"))
    }


def test_without_the_innermost_stage_three_levels_are_left() -> None:
    three = ldm_unet_shapes(
        num_res_blocks=[1] * 3, channel_mult=(1, 2, 4), attention_resolutions=(4, 2, 1), context_dim=768
    )
    found = ldm_shapes(student_config("sd-v1.4", "bk-tiny"))
    assert found == {key: shape for key, shape in three.items() if not key.startswith("middle_block")}


def test_stages_of_unequal_depth_and_without_attention() -> None:
    plan = "-Dn1.A1 -Dn1.A2 -Dn2.R2 -Dn2.A2 -Up3.R2 -Up3.A2"
    wanted = ldm_unet_shapes(
        num_res_blocks=[2, 1, 2, 2],
        channel_mult=(1, 2, 4, 4),
        attention_resolutions=(4, 2, 1),
        context_dim=768,
    )
    # the rule knows attention by resolution only: of the outermost one the down side loses it here
    wanted = {
        key: shape
        for key, shape in wanted.items()
        if not key.startswith(("input_blocks.1.1.", "input_blocks.2.1."))
    }
    assert ldm_shapes(student_config("sd-v1.4", plan)) == wanted


def test_stable_diffusion_2_has_linear_projections() -> None:
    wanted = ldm_unet_shapes(
        num_res_blocks=[2] * 4,
        channel_mult=(1, 2, 4, 4),
        attention_resolutions=(4, 2, 1),
        context_dim=1024,
        use_linear=True,
    )
    assert ldm_shapes(preset_config("sd-v2.1")) == wanted


NARROW = {
    "block_out_channels": [8, 8, 16, 16],
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
}


@st.composite
def random_configs(draw: st.DrawFn) -> dict[str, Any]:
    """A plain config of two to four stages: any depths, attention anywhere, any of the three mid stages."""
    num_stages = draw(st.integers(2, 4))
    attends = draw(st.lists(st.booleans(), min_size=num_stages, max_size=num_stages))
    up_attends = draw(st.lists(st.booleans(), min_size=num_stages, max_size=num_stages))
    layers = draw(st.lists(st.integers(1, 3), min_size=num_stages, max_size=num_stages))
    return {
        **TINY_UNET,
        **NARROW,
        "block_out_channels": NARROW["block_out_channels"][:num_stages],
        "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in up_attends],
        "mid_block_type": draw(st.sampled_from(["UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None])),
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "transformer_layers_per_block": draw(
            st.lists(st.integers(1, 2), min_size=num_stages, max_size=num_stages)
        ),
        "use_linear_projection": draw(st.booleans()),
        "in_channels": draw(st.sampled_from([4, 9])),
    }


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].shape == tensor.shape, key
        assert torch.equal(found[key], tensor), key


@settings(max_examples=15)
@given(random_configs())
def test_there_and_back_on_random_architectures(config: dict[str, Any]) -> None:
    tensors = build_unet(config).state_dict()
    places = unet_places(config)
    there = diffusers_to_ldm(places, tensors)
    assert len(there) == len(places) == len(tensors)
    assert_equal(ldm_to_diffusers(places, there), tensors)
    if isinstance(config["layers_per_block"], int):  # all that diffusers' converter can count
        assert_equal(convert_ldm_unet_checkpoint(prefixed("model.diffusion_model.", there), config), tensors)


@pytest.mark.parametrize("shape", SHAPES)
def test_diffusers_reads_what_our_map_writes(shape: str) -> None:
    tensors = build_unet(SHAPES[shape]).state_dict()
    there = diffusers_to_ldm(unet_places(SHAPES[shape]), tensors)
    assert_equal(
        convert_ldm_unet_checkpoint(prefixed("model.diffusion_model.", there), SHAPES[shape]), tensors
    )


def prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{key}": tensor for key, tensor in tensors.items()}


def test_attention_of_no_layers_has_no_place_and_the_upsampler_moves_up() -> None:
    depths = [[1, 0], [1, 1], [1, 1], [1, 1]]
    up_depths = [[1, 1, 1], [1, 1, 1], [1, 1, 0], [0, 1, 1]]
    config = {
        **TINY_UNET,
        "transformer_layers_per_block": depths,
        "reverse_transformer_layers_per_block": up_depths,
    }
    keys = {place.key for place in unet_places(config)}
    assert empty_attentions(config) == (
        "down_blocks.0.attentions.1",
        "up_blocks.2.attentions.2",
        "up_blocks.3.attentions.0",
    )
    assert not [key for key in keys if key.startswith(("input_blocks.2.1.", "output_blocks.9.1."))]
    assert "output_blocks.8.1.conv.weight" in keys
    assert "output_blocks.5.2.conv.weight" in keys


@pytest.mark.parametrize(
    ("changes", "tensor"),
    [
        ({"time_cond_proj_dim": 16}, "time_embedding.cond_proj.weight"),
        (
            {"down_block_types": ["AttnDownBlock2D", *TINY_UNET["down_block_types"][1:]]},
            "down_blocks.0.attentions.0",
        ),
        ({"dual_cross_attention": True}, "attentions.0.transformers.0"),
        ({"encoder_hid_dim": 8, "encoder_hid_dim_type": "text_proj"}, "encoder_hid_proj.weight"),
    ],
)
def test_what_has_no_place_is_named(changes: dict[str, Any], tensor: str) -> None:
    with pytest.raises(UnsupportedModelError, match=tensor):
        unet_places({**TINY_UNET, **changes})


# VAE and text encoders ---------------------------------------------------------------------------------------------


def narrow_vae(levels: int = 4) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[8, 16, 32, 32][:levels],
        layers_per_block=2,
        norm_num_groups=4,
        latent_channels=4,
    )


@pytest.mark.parametrize("levels", [2, 4])
def test_the_vae_goes_there_and_back_and_diffusers_reads_it(levels: int) -> None:
    vae = narrow_vae(levels)
    tensors, places = vae.state_dict(), vae_places(vae.config)
    there = diffusers_to_ldm(places, tensors)
    assert_equal(ldm_to_diffusers(places, there), tensors)
    assert_equal(convert_ldm_vae_checkpoint(prefixed("first_stage_model.", there), vae.config), tensors)
    assert there["encoder.mid.attn_1.q.weight"].dim() == 4
    innermost = levels - 1
    assert f"decoder.up.{innermost}.upsample.conv.weight" in there  # the first to be executed
    assert "decoder.up.0.upsample.conv.weight" not in there


def test_the_places_of_the_vae_by_the_public_layout() -> None:
    keys = {place.key for place in vae_places(narrow_vae().config)}
    # the first stage model of Stable Diffusion: 4 levels, 2 blocks each, 3 on the way up
    resnet = [
        f"{layer}.{kind}" for layer in ("norm1", "conv1", "norm2", "conv2") for kind in ("weight", "bias")
    ]
    blocks = [f"encoder.down.{level}.block.{block}" for level in range(4) for block in range(2)]
    blocks += [f"decoder.up.{level}.block.{block}" for level in range(4) for block in range(3)]
    blocks += [f"{side}.mid.block_{block}" for side in ("encoder", "decoder") for block in (1, 2)]
    wanted = {f"{block}.{layer}" for block in blocks for layer in resnet}
    plain = ["quant_conv", "post_quant_conv"]
    plain += [f"encoder.down.{level}.downsample.conv" for level in range(3)]
    plain += [f"decoder.up.{level}.upsample.conv" for level in (1, 2, 3)]
    plain += [
        f"{side}.{name}" for side in ("encoder", "decoder") for name in ("conv_in", "norm_out", "conv_out")
    ]
    plain += [
        f"{side}.mid.attn_1.{name}"
        for side in ("encoder", "decoder")
        for name in ("norm", "q", "k", "v", "proj_out")
    ]
    shortcuts = [
        "encoder.down.1.block.0",
        "encoder.down.2.block.0",
        "decoder.up.0.block.0",
        "decoder.up.1.block.0",
    ]
    plain += [f"{block}.nin_shortcut" for block in shortcuts]
    assert keys == wanted | {f"{name}.{kind}" for name in plain for kind in ("weight", "bias")}


def text_tensors(model: Any) -> dict[str, torch.Tensor]:
    return {key.removeprefix("text_model."): tensor for key, tensor in model.state_dict().items()}


def test_openai_clip_keeps_its_names() -> None:
    tensors = text_tensors(build_text_encoder())
    there = diffusers_to_ldm(clip_places(tensors), tensors)
    assert "transformer.text_model.encoder.layers.0.self_attn.q_proj.weight" in there
    assert "transformer.text_model.embeddings.position_embedding.weight" in there
    assert_equal(ldm_to_diffusers(clip_places(tensors), there), tensors)


@pytest.mark.parametrize("projected", [False, True])
def test_open_clip_goes_there_and_back_and_diffusers_reads_it(projected: bool) -> None:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    config = build_text_encoder().config
    config.projection_dim = 16  # OpenCLIP's is square, and diffusers' converter counts on it
    model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    tensors = text_tensors(model)
    places = open_clip_places(tensors)
    there = diffusers_to_ldm(places, tensors)
    assert there["model.transformer.resblocks.1.attn.in_proj_weight"].shape == (48, 16)
    assert there["model.transformer.resblocks.1.attn.in_proj_bias"].shape == (48,)
    assert "model.positional_embedding" in there
    assert ("model.text_projection" in there) is projected
    assert_equal(ldm_to_diffusers(places, there), tensors)
    prefix = "conditioner.embedders.1." if projected else "cond_stage_model."
    read = convert_open_clip_checkpoint(model, prefixed(prefix, there), prefix=f"{prefix}model.")
    assert_equal({key.removeprefix("text_model."): tensor for key, tensor in read.items()}, tensors)


def test_another_text_encoder_has_no_place() -> None:
    with pytest.raises(UnsupportedModelError, match=r"shared\.weight"):
        open_clip_places(["shared.weight"])
