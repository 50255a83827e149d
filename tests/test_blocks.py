"""The inventory: names, counts and shapes against the published model and against arithmetic by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet3DConditionModel

import prune_lab
from prune_lab.blocks import architecture_of, block_groups, blocks_frame
from prune_lab.errors import UnknownBlockError, UnsupportedModelError

PRESETS = Path(prune_lab.__file__).parent / "presets"


def preset(name):
    return json.loads((PRESETS / f"{name}.json").read_text())


def test_sd_v14_has_the_blocks_of_the_paper():
    blocks = architecture_of(preset("sd-v1.4")).blocks
    assert len(blocks) == 38
    assert sum(block.kind == "resnet" for block in blocks) == 22
    assert sum(block.kind == "attention" for block in blocks) == 16
    assert sum(block.removable for block in blocks) == 34
    assert [b.name for b in blocks if b.starred] == ["Dn2.R1", "Dn3.R1", "Up3.R1", "Up4.R1"]


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [  # the fact sheet's inventory, counted by another tool: (whole = counted + attention products) in G
        ("Dn1.R1", 2_255_040, 7.550),
        ("Dn1.A1", 2_546_240, 8.442 + 10.939),
        ("Dn2.R1", 6_558_080, 5.873),
        ("Dn3.A2", 34_760_960, 8.544 + 0.218),
        ("Md.A1", 34_760_960, 2.250 + 0.023),
        ("Up1.R2", 49_164_800, 3.043),
        ("Up2.R3", 40_971_520, 10.068),
        ("Up4.A3", 2_546_240, 8.442 + 10.939),
    ],
)
def test_sd_v14_block_costs_are_the_known_ones(name, params, macs):
    block = architecture_of(preset("sd-v1.4")).block(name)
    assert block.params == params
    # That tool counts biases and norms too, which are not products: up to 0.2 %.
    assert block.macs / 1e9 == pytest.approx(macs, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "params"),
    [("sd-v1.4", 859_520_964), ("sd-v2.1-base", 865_910_724), ("sdxl-base", 2_567_463_684)],
)
def test_total_parameters_are_the_published_ones(name, params):
    assert architecture_of(preset(name)).total_params == params


def test_names_and_paths_go_together_in_order_of_execution(tiny_unet):
    blocks = architecture_of(tiny_unet).blocks
    paths = {block.name: block.path for block in blocks}
    assert paths["Dn2.A1"] == "down_blocks.1.attentions.0"
    assert paths["Md.R2"] == "mid_block.resnets.1"
    assert paths["Up1.R3"] == "up_blocks.0.resnets.2"
    assert [block.name for block in blocks][:5] == ["Dn1.R1", "Dn1.A1", "Dn1.R2", "Dn1.A2", "Dn2.R1"]
    assert [block.name for block in blocks if block.stage == "Md"] == ["Md.R1", "Md.A1", "Md.R2"]


def test_the_order_is_the_order_of_execution(tiny_unet, tiny_inputs):
    called = []
    handles = [
        tiny_unet.get_submodule(block.path).register_forward_hook(
            lambda *_, name=block.name: called.append(name)
        )
        for block in architecture_of(tiny_unet).blocks
    ]
    try:
        tiny_unet(**tiny_inputs)
    finally:
        for handle in handles:
            handle.remove()
    assert called == [block.name for block in architecture_of(tiny_unet).blocks]


def test_skip_channels_are_what_forward_concatenates(tiny_unet, tiny_inputs):
    """The up stages concatenate [main, skip]; the main part is the width that came out of the block before."""
    widths = {}
    handles = []
    for block in architecture_of(tiny_unet).blocks:
        module = tiny_unet.get_submodule(block.path)
        handles.append(
            module.register_forward_pre_hook(
                lambda _, args, name=block.name: widths.update({name: args[0].shape[1]})
            )
        )
    try:
        tiny_unet(**tiny_inputs)
    finally:
        for handle in handles:
            handle.remove()
    for block in architecture_of(tiny_unet).blocks:
        assert widths[block.name] == block.in_channels
        if block.stage.startswith("Dn"):
            assert block.skip_channels == 0


def test_sdxl_counts_the_layers_inside_an_attention_block():
    architecture = architecture_of(preset("sdxl-base"))
    assert architecture.stages == ("Dn1", "Dn2", "Dn3", "Md", "Up1", "Up2", "Up3")
    layers = {
        block.name: block.transformer_layers for block in architecture.blocks if block.kind == "attention"
    }
    assert layers["Dn2.A1"] == 2
    assert layers["Dn3.A2"] == layers["Md.A1"] == layers["Up1.A3"] == 10


def test_groups_hold_only_what_can_be_removed(tiny_unet):
    architecture = architecture_of(tiny_unet)
    groups = {
        kind: {g.name: g.blocks for g in block_groups(architecture, kind)}
        for kind in ("block", "pair", "stage")
    }
    assert len(groups["block"]) == 38
    assert groups["pair"]["Dn1.R2+A2"] == ("Dn1.R2", "Dn1.A2")
    assert "Dn2.R1+A1" not in groups["pair"]  # Dn2.R1 changes the width
    assert groups["stage"]["Md"] == ("Md.R1", "Md.A1", "Md.R2")
    assert groups["stage"]["Dn2"] == ("Dn2.A1", "Dn2.R2", "Dn2.A2")


def test_unknown_block_names_the_nearest(tiny_unet):
    with pytest.raises(UnknownBlockError, match=r"'Dn1\.R9'.*nearest: .*Dn1\.R1"):
        architecture_of(tiny_unet).block("Dn1.R9")


def test_frame_columns_are_fixed(tiny_unet):
    frame = blocks_frame(architecture_of(tiny_unet))
    assert list(frame.columns) == [
        "name",
        "path",
        "stage",
        "kind",
        "in_channels",
        "out_channels",
        "skip_channels",
        "transformer_layers",
        "params",
        "macs",
        "attention_macs",
        "tokens",
        "removable",
        "reason",
        "lane",
        "row",
    ]
    assert (
        frame.set_index("name").loc["Dn2.R1", "reason"]
        == "changes the width of the main path from 8 to 16 channels"
    )


def test_other_model_classes_are_refused(tiny_config):
    unet = UNet3DConditionModel(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "UpBlock3D"),
    )
    with pytest.raises(UnsupportedModelError, match="UNet3DConditionModel"):
        architecture_of(unet)
    other = {
        **tiny_config,
        "down_block_types": ["SkipDownBlock2D", *tiny_config["down_block_types"][1:]],
    }
    with pytest.raises(UnsupportedModelError, match="SkipDownBlock2D"):
        architecture_of(other)


def test_a_model_edited_in_place_is_refused(tiny_config):
    unet = UNet2DConditionModel(**tiny_config)
    unet.mid_block.attentions[0] = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match="edited in place"):
        architecture_of(unet)
