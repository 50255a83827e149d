"""Surgery: a bypassed teacher, the materialised student and the reloaded folder are one function, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_lab.blocks import architecture_of
from prune_lab.errors import ModelFormatError, NonNativePlanError, StorageError, UnremovableBlockError
from prune_lab.models import resolve_model
from prune_lab.plans import native_choices, parse_plan, plan_of
from prune_lab.surgery import bypassed, materialise, materialise_from_folder, prune_pipeline, save_model


@torch.no_grad()
def run(unet, inputs):
    return unet(**inputs).sample


@pytest.mark.parametrize("name", ["bk-base", "bk-small", "bk-tiny"])
def test_bypassed_teacher_equals_the_reloaded_student(tiny_unet, tiny_inputs, tmp_path, name):
    plan = parse_plan(name, architecture_of(tiny_unet))
    with bypassed(tiny_unet, plan):
        expected = run(tiny_unet, tiny_inputs)
    save_model(materialise(tiny_unet, plan), tmp_path / "student", plan, {"source": "test"})
    student = UNet2DConditionModel.from_pretrained(tmp_path / "student").eval()
    assert torch.equal(run(student, tiny_inputs), expected)
    assert not torch.equal(run(tiny_unet, tiny_inputs), expected)


@settings(max_examples=25)
@given(data=st.data())
def test_random_native_plans_give_the_same_function(tiny_unet_shared, data):
    architecture = architecture_of(tiny_unet_shared)
    options = [data.draw(st.sampled_from(level)) for level in native_choices(architecture)]
    plan = plan_of(architecture, frozenset().union(*options))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    inputs = {
        "sample": torch.randn(1, 4, 16, 16, generator=generator),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 5, 16, generator=generator),
    }
    with bypassed(tiny_unet_shared, plan):
        expected = run(tiny_unet_shared, inputs)
    assert torch.equal(run(materialise(tiny_unet_shared, plan), inputs), expected)


def test_second_pairs_give_a_native_model_with_one_layer_and_copied_weights(
    tiny_unet, tiny_config, tiny_inputs
):
    """Independent of the plan machinery: a plain model with layers_per_block=1, its weights copied by hand."""
    native = UNet2DConditionModel(
        **{k: v for k, v in tiny_config.items() if k[0] != "_"} | {"layers_per_block": 1}
    )
    teacher = tiny_unet.state_dict()
    weights = {}
    for key in native.state_dict():
        parts = key.split(".")
        if parts[0] == "up_blocks" and parts[2] in ("resnets", "attentions") and parts[3] == "1":
            parts[3] = "2"
        weights[key] = teacher[".".join(parts)]
    native.load_state_dict(weights)
    with bypassed(tiny_unet, parse_plan("bk-base", architecture_of(tiny_unet))):
        assert torch.equal(run(tiny_unet, tiny_inputs), run(native.eval(), tiny_inputs))


@given(seed=st.integers(0, 2**16))
@settings(max_examples=10)
def test_the_model_comes_back_even_when_the_body_raises(tiny_unet_shared, seed):
    names = [block.name for block in architecture_of(tiny_unet_shared).blocks if block.removable]
    chosen = [name for i, name in enumerate(names) if seed >> (i % 17) & 1]
    before = dict(tiny_unet_shared.named_modules())
    weights = {key: value.clone() for key, value in tiny_unet_shared.state_dict().items()}
    with pytest.raises(ZeroDivisionError), bypassed(tiny_unet_shared, chosen):
        raise ZeroDivisionError
    after = dict(tiny_unet_shared.named_modules())
    assert before.keys() == after.keys()
    assert all(after[path] is module for path, module in before.items())
    assert all(torch.equal(value, weights[key]) for key, value in tiny_unet_shared.state_dict().items())


def test_each_block_alone_changes_the_output_and_only_inside(tiny_unet, tiny_inputs):
    expected = run(tiny_unet, tiny_inputs)
    for block in architecture_of(tiny_unet).blocks:
        with bypassed(tiny_unet, [block.name], stand_in=True):
            assert not torch.equal(run(tiny_unet, tiny_inputs), expected), block.name
    assert torch.equal(run(tiny_unet, tiny_inputs), expected)


def test_starred_blocks_are_never_bypassed_without_a_stand_in(tiny_unet):
    with pytest.raises(UnremovableBlockError, match=r"Up3\.R1"), bypassed(tiny_unet, ["Up3.R1"]):
        pass


def test_channel_interpolation_by_hand():
    from prune_lab.families.unet_blocks import ChannelInterpolation

    hidden = torch.tensor([0.0, 4.0, 100.0]).reshape(1, 3, 1, 1)  # two main channels, one of skip
    # Half-pixel centres: new channel i lies at (i + 0.5) / 2 - 0.5 = -0.25, 0.25, 0.75, 1.25, clamped to [0, 1].
    expected = torch.tensor([0.0, 1.0, 3.0, 4.0]).reshape(1, 4, 1, 1)
    assert torch.equal(ChannelInterpolation(2, 4)(hidden), expected)


def test_weights_are_copied_unless_handed_over(tiny_unet):
    plan = parse_plan("bk-small", architecture_of(tiny_unet))
    copied, handed = materialise(tiny_unet, plan), materialise(tiny_unet, plan, hand_over=True)
    original = tiny_unet.conv_in.weight
    assert torch.equal(copied.conv_in.weight, original)
    assert copied.conv_in.weight.data_ptr() != original.data_ptr()
    assert handed.conv_in.weight.data_ptr() == original.data_ptr()
    assert all(parameter.requires_grad for parameter in copied.parameters())


def test_plans_without_a_plain_config_are_refused(tiny_unet):
    architecture = architecture_of(tiny_unet)
    with pytest.raises(NonNativePlanError, match="Dn1"):
        materialise(tiny_unet, parse_plan("-Dn1.A1", architecture))


def test_only_surviving_tensors_are_read(tiny_unet, tiny_inputs, tmp_path, monkeypatch):
    import prune_lab.surgery.building as surgery

    tiny_unet.save_pretrained(tmp_path / "teacher")
    plan = parse_plan("bk-tiny", architecture_of(tiny_unet))
    read = []

    class Recorded:
        def __init__(self, path, **kwargs):
            self.path, self.kwargs = path, kwargs

        def __enter__(self):
            self.file = original(self.path, **self.kwargs)
            return self

        def __exit__(self, *_):
            return None

        def keys(self):
            return self.file.keys()

        def get_tensor(self, key):
            read.append(key)
            return self.file.get_tensor(key)

    original = surgery.safe_open
    monkeypatch.setattr(surgery, "safe_open", Recorded)
    student = materialise_from_folder(tmp_path / "teacher", plan)
    assert len(read) == len(student.state_dict())
    assert not [key for key in read if key.startswith(("mid_block", "down_blocks.3", "up_blocks.0"))]
    with bypassed(tiny_unet, plan):
        assert torch.equal(run(student, tiny_inputs), run(tiny_unet, tiny_inputs))


def test_weights_that_do_not_fit_the_config_are_refused(tiny_unet, tmp_path):
    tiny_unet.save_pretrained(tmp_path / "teacher")
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    config["cross_attention_dim"] = 24
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config))
    architecture = architecture_of(config)
    with pytest.raises(ModelFormatError, match="do not belong together"):
        materialise_from_folder(tmp_path / "teacher", parse_plan("bk-base", architecture))


@pytest.mark.parametrize("name", ["bk-base", "bk-tiny"])
def test_a_pruned_pipeline_folder_loads_and_generates(tiny_pipeline_folder, tmp_path, name):
    source = resolve_model(str(tiny_pipeline_folder))
    plan = parse_plan(name, architecture_of(source.config))
    out = prune_pipeline(source, plan, tmp_path / "out")
    pipeline = StableDiffusionPipeline.from_pretrained(out, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a red apple", num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (32, 32, 3)
    saved = json.loads((out / "unet" / "plan.json").read_text())
    assert saved["removed"] == list(plan.removed)
    provenance = json.loads((out / "unet" / "provenance.json").read_text())
    assert provenance["plan_id"] == plan.id
    assert provenance["source_digest"]
    # The saved config describes the saved weights: nothing of the original's shape is left in it.
    assert architecture_of(pipeline.unet).total_params == sum(p.numel() for p in pipeline.unet.parameters())


def test_a_full_folder_is_not_overwritten(tiny_pipeline_folder, tmp_path):
    source = resolve_model(str(tiny_pipeline_folder))
    plan = parse_plan("bk-base", architecture_of(source.config))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("keep")
    with pytest.raises(StorageError, match=r"not empty.*--force"):
        prune_pipeline(source, plan, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "precious.txt").read_text() == "keep"
    with pytest.raises(StorageError, match=r"not empty.*precious\.txt"):
        prune_pipeline(source, plan, tmp_path / "out", force=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious.txt"]
    (tmp_path / "out" / "precious.txt").unlink()
    prune_pipeline(source, plan, tmp_path / "out", force=True)
    prune_pipeline(source, plan, tmp_path / "out", force=True)  # what we wrote may be replaced
    assert (tmp_path / "out" / "model_index.json").exists()
