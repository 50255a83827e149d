"""LoRA, ControlNet, IP-Adapter of a teacher for its students: equal to the teacher with them and without the blocks."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHAPES, TINY_UNET, BuiltOnce, build_unet
from diffusers import ControlNetModel, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from prune_lab.blocks import architecture_of
from prune_lab.cli import app
from prune_lab.errors import (
    FormError,
    ModelFormatError,
    NonNativePlanError,
    PlanError,
    RunError,
    StorageError,
    UnsupportedModelError,
)
from prune_lab.export import (
    Student,
    compatibility,
    convert_controlnet,
    convert_ip_adapter,
    convert_lora,
    student_in,
    student_of,
)
from prune_lab.families import meta_model
from prune_lab.families.adapter_names import adapter_names
from prune_lab.families.ldm_keys import unet_places
from prune_lab.models import preset_config, resolve_model
from prune_lab.plans import gone_with, parse_plan
from prune_lab.runs import open_run
from prune_lab.schemas import COMPATIBILITY_COLUMNS, CONVERTED_COLUMNS
from prune_lab.surgery import materialise, prune_pipeline, stand_in_for

PLANS = ("bk-base", "bk-small", "bk-tiny", "-Dn2.R2 -Dn2.A2 -Up3.R2 -Up3.A2 -Md.A1 -Md.R2")
RANK = 2


def student_for(config: dict[str, Any], plan: str) -> Student:
    architecture = architecture_of(config)
    return Student(architecture, parse_plan(plan, architecture))


def without_blocks(model: Any, student: Student, *, within: str = "") -> None:
    """Take the blocks of the plan out of ``model`` for good, whatever was added to it before."""
    gone = gone_with(student.architecture, student.plan.removed)
    for unit in student.architecture.units:
        if unit.name in gone and unit.path.startswith(within):
            model.set_submodule(unit.path, stand_in_for(model.get_submodule(unit.path), unit))


def given_to(config: dict[str, Any]) -> dict[str, Any]:
    """Inputs of one forward pass, two samples."""
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "sample": torch.randn(2, 4, 16, 16, generator=generator),
        "timestep": torch.tensor([20, 700]),
        "encoder_hidden_states": torch.randn(2, 7, 16, generator=generator),
    }
    if config.get("addition_embed_type"):
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(2, 24, generator=generator),
            "time_ids": torch.randn(2, 6, generator=generator),
        }
    return inputs


def predicted(unet: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = unet(**(given_to(unet.config) | more)).sample
    return found


# LoRA --------------------------------------------------------------------------------------------------------------


def targets(unet: Any) -> list[str]:
    """Query, key, value and output of each attention, the convolutions of two residual blocks and two samplers."""
    found = [
        name for name, module in unet.named_modules() if isinstance(module, nn.Linear) and ".attn" in name
    ]
    more = (
        "down_blocks.1.resnets.0.conv1",
        "up_blocks.1.resnets.2.conv1",
        "down_blocks.0.downsamplers.0.conv",
    )
    return [*found, *more, "up_blocks.1.upsamplers.0.conv"]


def matrices(unet: Any, modules: Iterable[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Two random matrices (or convolutions) for each module, as a LoRA of rank 2 has."""
    generator, found = torch.Generator().manual_seed(3), {}
    for name in modules:
        weight = unet.get_submodule(name).weight
        down = torch.randn(RANK, *weight.shape[1:], generator=generator)
        up = torch.randn(weight.shape[0], RANK, *[1] * (weight.dim() - 2), generator=generator)
        found[name] = (down, up)
    return found


def peft_file(unet: Any, path: Path) -> Path:
    """As today's diffusers writes it."""
    tensors = {}
    for name, (down, up) in matrices(unet, targets(unet)).items():
        tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    tensors["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 16)
    tensors["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight"] = torch.ones(16, 2)
    save_file(tensors, path, {"format": "pt", "ss_note": "kept", "sshs_model_hash": "of the old file"})
    return path


def processor_file(unet: Any, path: Path) -> Path:
    """As diffusers wrote it at first: inside of the processors."""
    tensors = {}
    attention = [name for name in targets(unet) if ".attn" in name]
    for name, (down, up) in matrices(unet, attention).items():
        module, _, layer = name.removesuffix(".0").rpartition(".")
        tensors |= {
            f"unet.{module}.processor.{layer}_lora.down.weight": down,
            f"unet.{module}.processor.{layer}_lora.up.weight": up,
        }
    save_file(tensors, path)
    return path


def kohya_file(unet: Any, path: Path, *, ldm: bool = False) -> Path:
    """As kohya's tools write it: underscores, with the names of diffusers or of the LDM layout, and an alpha."""
    places = {place.sources[0]: place.key for place in unet_places(unet.config)}
    tensors = {}
    for name, (down, up) in matrices(unet, targets(unet)).items():
        spelled = places[f"{name}.weight"].removesuffix(".weight") if ldm else name
        key = f"lora_unet_{spelled.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(4.0)
    save_file(tensors, path)
    return path


def with_lora(unet: Any, file: Path, *, xl: bool = False) -> Any:
    """``unet`` with the LoRA that plain diffusers reads from ``file``."""
    loader = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    state, alphas, settings = loader.lora_state_dict(
        str(file), unet_config=unet.config, return_lora_metadata=True
    )
    loader.load_lora_into_unet(state, alphas, unet, metadata=settings)
    return unet


FORMATS = {
    "peft": peft_file,
    "processor": processor_file,
    "kohya": kohya_file,
}


@pytest.mark.parametrize(
    ("form", "plan"), [*(("peft", plan) for plan in PLANS), ("processor", "bk-tiny"), ("kohya", "bk-small")]
)
def test_a_lora_on_the_student_is_the_teacher_with_it_and_without_the_blocks(
    form: str, plan: str, tmp_path: Path
) -> None:
    teacher, student = build_unet(TINY_UNET), student_for(TINY_UNET, plan)
    smaller = materialise(teacher, student.plan)
    plain = predicted(smaller)
    file = FORMATS[form](teacher, tmp_path / "lora.safetensors")
    converted = convert_lora(student, file, tmp_path / "converted.safetensors")
    without_blocks(with_lora(teacher, file), student)
    found = predicted(with_lora(smaller, converted.path))
    assert torch.equal(found, predicted(teacher))
    assert not torch.allclose(found, plain)


@pytest.mark.parametrize(
    ("built", "plan"),
    [
        ("own", "-Dn1.R2 -Up2.A1 -Md.A1"),
        ("own", "-Dn1.R2 -Dn2.A1 -Up3.R3"),
        ("neutral", "-Dn1.R2 -Dn1.A2 -Up2.A1"),
    ],
)
@pytest.mark.parametrize("spelling", ["dots", "underscores", "ldm"])
def test_a_lora_on_a_student_that_is_not_native(built: Any, plan: str, spelling: str, tmp_path: Path) -> None:
    teacher, named = build_unet(TINY_UNET), student_for(TINY_UNET, plan)
    student = dataclasses.replace(named, plan=named.plan.built(built))
    smaller = materialise(teacher, student.plan)
    file = tmp_path / "lora.safetensors"
    peft_file(teacher, file) if spelling == "dots" else kohya_file(teacher, file, ldm=spelling == "ldm")
    converted = convert_lora(student, file, tmp_path / "converted.safetensors")
    assert {name for name in student.plan.removed if "A" in name} <= set(converted.dropped_from)
    if spelling == "ldm":  # which no program reads for such a student: what stays keeps its name
        left, whole = load_file(converted.path), load_file(file)
        assert left.keys() < whole.keys()
        return
    without_blocks(with_lora(teacher, file), student)
    assert torch.equal(predicted(with_lora(smaller, converted.path)), predicted(teacher))


@pytest.mark.parametrize("plan", ["-Up1.A2 -Up1.R2 -Dn3.R2 -Dn3.A2", "-Dn2.R2 -Dn2.A2 -Up2.R2 -Up2.A2 -Md"])
def test_kohyas_names_of_the_ldm_layout_for_xl(plan: str, tmp_path: Path) -> None:
    teacher, student = build_unet(SHAPES["sdxl"]), student_for(SHAPES["sdxl"], plan)
    file = kohya_file(teacher, tmp_path / "lora.safetensors", ldm=True)
    converted = convert_lora(student, file, tmp_path / "converted.safetensors")
    assert "LDM layout" in converted.notes[0] or isinstance(student.layout.config["layers_per_block"], int)
    smaller = build_unet(dict(student.layout.config))
    # diffusers counts with the same number of layers everywhere, so what it reads is compared by its names
    wanted = kohya_file(teacher, tmp_path / "names.safetensors")
    names = convert_lora(student, wanted, tmp_path / "names-converted.safetensors")
    places = {place.key: place.sources[0] for place in unet_places(smaller.config)}
    spelled = {
        key.removesuffix(".weight").replace(".", "_"): source.removesuffix(".weight").replace(".", "_")
        for key, source in places.items()
    }
    found, plain = load_file(converted.path), load_file(names.path)
    renamed = {}
    for key, tensor in found.items():
        module, _, rest = key.removeprefix("lora_unet_").partition(".")
        renamed[f"lora_unet_{spelled[module]}.{rest}"] = tensor
    assert renamed.keys() == plain.keys()
    assert all(torch.equal(renamed[key], tensor) for key, tensor in plain.items())


def test_what_diffusers_reads_of_ldm_names(tmp_path: Path) -> None:
    plan = "-Dn1.R2 -Dn2.R2 -Dn2.A2 -Dn3.R2 -Dn3.A2 -Up1.R2 -Up1.A2 -Up2.R2 -Up2.A2 -Up3.R2"
    teacher, student = build_unet(SHAPES["sdxl"]), student_for(SHAPES["sdxl"], plan)
    smaller = materialise(teacher, student.plan)
    file = kohya_file(teacher, tmp_path / "lora.safetensors", ldm=True)
    converted = convert_lora(student, file, tmp_path / "converted.safetensors")
    without_blocks(with_lora(teacher, file, xl=True), student)
    assert torch.equal(predicted(with_lora(smaller, converted.path, xl=True)), predicted(teacher))


def test_without_conversion_modules_go_to_other_blocks_without_a_word(tmp_path: Path) -> None:
    teacher, student = build_unet(TINY_UNET), student_for(TINY_UNET, "bk-small")
    smaller = materialise(teacher, student.plan)
    file = peft_file(teacher, tmp_path / "lora.safetensors")
    wrong = {key: tensor for key, tensor in load_file(file).items() if ".attn" in key and "unet" in key}
    present = {name for name, _ in smaller.named_modules()}
    attached = {key.split(".lora")[0] for key in wrong} & {f"unet.{name}" for name in present}
    assert len(attached) == 72
    converted = convert_lora(student, file, tmp_path / "converted.safetensors")
    right = load_file(converted.path)
    others = [
        name
        for name in attached
        if not torch.equal(wrong[f"{name}.lora_A.weight"], right[f"{name}.lora_A.weight"])
    ]
    assert len(others) == 24


@pytest.fixture(scope="module")
def lora_of_sd(built_once: BuiltOnce) -> Path:
    """A LoRA of rank 1 on the attentions of a U-Net of the shape of Stable Diffusion 1."""

    def build(folder: Path) -> None:
        folder.mkdir()
        tensors = {}
        for name, module in meta_model(preset_config("sd-v1.4")).named_modules():
            if isinstance(module, nn.Linear) and ".attn" in name:
                outputs, inputs = module.weight.shape
                tensors[f"unet.{name}.lora_A.weight"] = torch.zeros(1, inputs)
                tensors[f"unet.{name}.lora_B.weight"] = torch.zeros(outputs, 1)
        assert len(tensors) == 2 * 128
        save_file(tensors, folder / "lora.safetensors")

    return built_once("lora-of-sd", build) / "lora.safetensors"


# 16 attention blocks of one layer, two attentions each, four matrices each: 8 modules a block. A2 leaves in six stages
# (Base), the one in the mid stage too (Small); Tiny moves the three up stages with attention up by one, six blocks.
@pytest.mark.parametrize(
    ("plan", "kept", "renamed", "dropped"),
    [
        ("bk-base", 10 * 8, 3 * 8, 6 * 8),
        ("bk-small", 9 * 8, 3 * 8, 7 * 8),
        ("bk-tiny", 9 * 8, 6 * 8, 7 * 8),
        ("-Md", 15 * 8, 0, 1 * 8),
    ],
)
def test_counts_at_the_shape_of_stable_diffusion(
    plan: str, kept: int, renamed: int, dropped: int, lora_of_sd: Path, tmp_path: Path
) -> None:
    student = student_for(preset_config("sd-v1.4"), plan)
    found = convert_lora(student, lora_of_sd, tmp_path / "out.safetensors")
    assert (found.parts, found.kept, found.renamed, found.dropped) == (128, kept, renamed, dropped)
    assert len(load_file(found.path)) == 2 * kept
    row = {row["what"]: row for row in compatibility(student).to_dict("records")}["LoRA"]
    assert (row["kept"], row["of"], row["renamed"]) == (kept, 128, renamed)


def test_ranks_and_alphas_in_the_settings_follow_their_modules(tmp_path: Path) -> None:
    from peft import LoraConfig

    teacher, student = build_unet(TINY_UNET), student_for(TINY_UNET, "bk-small")
    smaller = materialise(teacher, student.plan)
    third, gone = "up_blocks.1.attentions.2", "up_blocks.1.attentions.1"
    config = LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["to_q", "to_v"],
        rank_pattern={
            f"{third}.transformer_blocks.0.attn1.to_q": 3,
            f"{gone}.transformer_blocks.0.attn1.to_q": 5,
        },
        alpha_pattern={"attn2.to_v": 1},
        init_lora_weights=False,
    )
    teacher.add_adapter(config)
    teacher.save_lora_adapter(tmp_path / "raw")
    raw = load_file(tmp_path / "raw" / "pytorch_lora_weights.safetensors")
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "lora", unet_lora_layers=raw, unet_lora_adapter_metadata=json_settings(teacher)
    )
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    converted = convert_lora(student, file, tmp_path / "converted.safetensors")
    without_blocks(teacher, student)
    assert torch.equal(predicted(with_lora(smaller, converted.path)), predicted(teacher))


def json_settings(unet: Any) -> dict[str, Any]:
    """The settings of the LoRA of ``unet`` as they can be written."""
    settings = unet.peft_config["default"].to_dict()
    return {name: list(value) if isinstance(value, set) else value for name, value in settings.items()}


def test_the_text_encoder_and_the_metadata_go_along(tmp_path: Path) -> None:
    file = peft_file(build_unet(TINY_UNET), tmp_path / "lora.safetensors")
    student = student_for(TINY_UNET, "bk-base")
    found = convert_lora(student, file, tmp_path / "converted.safetensors")
    text = [key for key in load_file(found.path) if key.startswith("text_encoder.")]
    assert len(text) == 2
    with safe_open(found.path, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_note"] == "kept"
    assert "sshs_model_hash" not in metadata
    assert json.loads(metadata["prune_lab.plan"])["id"] == student.plan.id
    assert json.loads(metadata["prune_lab.provenance"])["converted_from"] == "lora.safetensors"
    assert not [value for value in metadata.values() if str(tmp_path) in value]
    # 80 of attention, 4 of the rest; A2 of six stages is gone
    assert (found.parts, found.kept) == (132, 84)
    assert found.dropped_from == ("Dn1.A2", "Dn2.A2", "Dn3.A2", "Up2.A2", "Up3.A2", "Up4.A2")


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("{}.processor.to_q_lora.down.weight", "{}.processor.to_q_lora.down.weight"),
        ("base_model.model.{}.to_q.lora_A.weight", "base_model.model.{}.to_q.lora_A.weight"),
        ("unet.{}.to_q.lora_magnitude_vector", "unet.{}.to_q.lora_magnitude_vector"),
        ("lora_unet_{_}_to_q.hada_w1_a", "lora_unet_{_}_to_q.hada_w1_a"),
        ("lycoris_{_}_to_out_0.lokr_w1", "lycoris_{_}_to_out_0.lokr_w1"),
    ],
)
def test_other_names_follow_their_module(key: str, wanted: str) -> None:
    student = student_for(TINY_UNET, "bk-small")
    names = adapter_names(student.architecture.config, student.layout)

    def at(text: str, place: str) -> str:
        return text.replace("{_}", place.replace(".", "_")).replace("{}", place)

    module = "up_blocks.3.attentions.{}.transformer_blocks.0.attn2"
    third, second, gone = (module.format(place) for place in (2, 1, 1))
    found = names.of(at(key, third))
    assert found is not None
    assert found.new_key == at(wanted, second)
    lost = names.of(at(key, gone))
    assert lost is not None
    assert lost.new_key is None


def test_the_middle_of_the_ldm_layout() -> None:
    student = student_for(TINY_UNET, "-Md.A1 -Md.R2 -Up3.R2 -Up3.A2 -Dn2.R2 -Dn2.A2")
    names = adapter_names(student.architecture.config, student.layout)
    # of Dn2 one layer is left: what follows counts one less; of Up3 the second of three, the ninth of all, is gone
    wanted = {
        "lora_unet_input_blocks_7_1_proj_in": "lora_unet_input_blocks_6_1_proj_in",
        "diffusion_model.output_blocks.8.1.proj_in": "diffusion_model.output_blocks.7.1.proj_in",
        "diffusion_model.output_blocks.8.2.conv": "diffusion_model.output_blocks.7.2.conv",
        "lora_unet_middle_block_0_in_layers_2": "lora_unet_middle_block_0_in_layers_2",
        "lora_unet_middle_block_1_proj_in": None,
        "lora_unet_output_blocks_7_1_proj_in": None,
    }
    for key, new in wanted.items():
        found = names.of(f"{key}.lora_down.weight")
        assert found is not None, key
        assert found.new_key == (new and f"{new}.lora_down.weight")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"unet.down_blocks.0.attentions.5.proj_in.lora_A.weight": torch.ones(2, 8)},
            r"attentions\.5.*no module",
        ),
        ({"transformer.blocks.0.to_q.lora_A.weight": torch.ones(2, 8)}, "no module of the teacher"),
        ({"lora_unet_down_blocks_0_attentions_0.lora_down.weight": torch.ones(2, 8)}, "no module"),
        ({"unet.conv_in.lora_A.weight": torch.ones(2, 9, 3, 3)}, r"\[2, 9, 3, 3\].*\[8, 4, 3, 3\]"),
        ({"text_encoder.a.lora_A.weight": torch.ones(2, 2)}, "nothing in it that is about a U-Net"),
        ({"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(2, 32, 1, 1)}, "all lie in blocks"),
    ],
)
def test_what_does_not_belong_to_the_teacher_is_refused(
    tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ModelFormatError, match=message):
        convert_lora(
            student_for(TINY_UNET, "bk-small"), tmp_path / "lora.safetensors", tmp_path / "o.safetensors"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


@pytest.mark.parametrize("ending", ["down", "up"])
@pytest.mark.parametrize("kind", [peft_file, processor_file, kohya_file])
def test_halves_of_a_lora_that_do_not_belong_together_are_refused(
    kind: Any, ending: str, tmp_path: Path
) -> None:
    file, out = kind(build_unet(TINY_UNET), tmp_path / "lora.safetensors"), tmp_path / "o.safetensors"
    tensors = load_file(file)
    spelled = (
        ("lora_A.weight", f"{ending}.weight") if ending == "down" else ("lora_B.weight", f"{ending}.weight")
    )
    key = next(key for key in tensors if key.endswith(spelled))
    module = key.partition(".processor" if kind is processor_file else ".lora")[0]
    taken = tensors.pop(key)
    save_file(tensors, file)
    with pytest.raises(ModelFormatError, match=f"{module}.*found no"):
        convert_lora(student_for(TINY_UNET, "bk-base"), file, out)
    other = torch.cat([taken, taken], dim=0 if ending == "down" else 1)
    save_file(tensors | {key: other}, file)
    with pytest.raises(ModelFormatError, match=f"{module}.*ranks? .*2.*4|{module}.*ranks? .*4.*2"):
        convert_lora(student_for(TINY_UNET, "bk-base"), file, out)
    assert not out.exists()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2, 3))])
@pytest.mark.parametrize("kind", [peft_file, kohya_file])
def test_a_lora_with_a_wrong_value_or_shape_is_refused(kind: Any, seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    file, out = kind(build_unet(TINY_UNET), tmp_path / "lora.safetensors"), tmp_path / "o.safetensors"
    tensors = load_file(file)
    key = draw.choice(sorted(key for key in tensors if not key.startswith("text_encoder")))
    wrong = tensors[key].clone()
    wrong.view(-1)[draw.randrange(wrong.numel())] = draw.choice([torch.nan, torch.inf, -torch.inf])
    shaped = [torch.ones(3), torch.ones(*wrong.shape, 5)]
    if not key.endswith("alpha"):
        shaped += [torch.tensor(1.0), torch.ones(2, 2, 2, 2, 2), wrong[:0]]
    student = student_for(TINY_UNET, "bk-base")
    for changed, message in [(wrong, "holds NaN|infinite"), *((one, "does not fit") for one in shaped)]:
        save_file(tensors | {key: changed.clone()}, file)
        with pytest.raises(ModelFormatError, match=message):
            convert_lora(student, file, out)
    assert not out.exists()


def test_weights_of_a_model_are_no_lora(tmp_path: Path) -> None:
    unet = build_unet(TINY_UNET)
    whole = unet.state_dict()
    lora = load_file(peft_file(unet, tmp_path / "lora.safetensors"))
    student = student_for(TINY_UNET, "bk-base")
    more = [
        whole,
        *(lora | {f"unet.{key}": whole[key]} for key in random.Random(1).sample(sorted(whole), 3)),
        lora | {"text_encoder.text_model.final_layer_norm.weight": torch.ones(16)},
    ]
    for tensors in more:
        save_file(tensors, tmp_path / "lora.safetensors")
        with pytest.raises(ModelFormatError, match="no part of a LoRA"):
            convert_lora(student, tmp_path / "lora.safetensors", tmp_path / "o.safetensors")
    save_file(lora | {"unet.conv_in." + "lora_" * 300: torch.ones(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ModelFormatError, match="key of 1,513 characters"):
        convert_lora(student, tmp_path / "lora.safetensors", tmp_path / "o.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("[]", "a list where an object"),
        ("3", "3 where an object"),
        ("null", "null where an object"),
        ("[" * 200_000, "nested deeper"),
        ('{"unet.r": NaN}', "cannot be read"),
        ('{"unet.rank_pattern": ["to_q"]}', "a list where an object"),
        ('{"unet.r": "x"}', "'x' where a whole number"),
        ('{"text_encoder.lora_alpha": {"a": []}}', "text_encoder.lora_alpha"),
        ('{"unet.target_modules": 7}', "target_modules"),
        ('{"unet.alpha_pattern": {"to_q": Infinity}}', "cannot be read"),
        ('{"unet.alpha_pattern": {"to_q": "x"}}', "'x' where a finite number"),
        ('{"unet.rank_pattern": {"to_q": 1%s}}' % ("0" * 400), r"below 2\*\*63"),
        *(
            (json.dumps({f"unet.{name}": {pattern: 2}}), "only names of modules")
            for name in ("rank_pattern", "alpha_pattern")
            for pattern in (
                "(([a-z_.0-9]+)+)+!",
                "(",
                "to_q|to_k",
                ".*",
                "",
                "to_q\n",
                "a{9}",
                "x" * 10**5 + "*",
            )
        ),
    ],
    ids=lambda text: ascii(text)[1:40],
)
def test_settings_that_are_none_are_refused(settings: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    module = "unet.down_blocks.0.attentions.0.proj_in"
    tensors = {
        f"{module}.lora_A.weight": torch.ones(2, 8, 1, 1),
        f"{module}.lora_B.weight": torch.ones(8, 2, 1, 1),
    }
    save_file(tensors, file, {"lora_adapter_metadata": settings})
    with pytest.raises(ModelFormatError, match=message) as caught:
        convert_lora(student_for(TINY_UNET, "bk-base"), file, tmp_path / "o.safetensors")
    assert len(str(caught.value)) < 700
    assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize(
    "key", ["to_q", "attn1.to_q", "^a.attn1.to_q", "a.attn1.to_q$", r"attn1\.to_q", "o_q", "^to_q"]
)
def test_plain_patterns_are_read_as_peft_reads_them(key: str) -> None:
    from peft.utils.other import get_pattern_key

    from prune_lab.export.lora import _pattern

    module = "a.attn1.to_q"
    wanted = {"new": 2} if get_pattern_key([key], module) == key else {}
    assert _pattern({key: 2}, {module: "new"}) == wanted


def test_pickled_and_missing_files_and_taken_names(tmp_path: Path) -> None:
    student, out = student_for(TINY_UNET, "bk-small"), tmp_path / "out.safetensors"
    (tmp_path / "lora.bin").write_bytes(b"x")
    with pytest.raises(ModelFormatError, match="pickled"):
        convert_lora(student, tmp_path / "lora.bin", out)
    with pytest.raises(ModelFormatError, match="no such file"):
        convert_ip_adapter(student, tmp_path / "none.safetensors", out)
    file = peft_file(build_unet(TINY_UNET), tmp_path / "lora.safetensors")
    with pytest.raises(StorageError, match="the file that it is made from"):
        convert_lora(student, file, file, force=True)
    out.write_text("mine")
    with pytest.raises(StorageError, match="--force"):
        convert_lora(student, file, out)
    with pytest.raises(StorageError, match="did not write"):
        convert_lora(student, file, out, force=True)
    assert out.read_text() == "mine"
    out.unlink()
    convert_lora(student, file, out)
    convert_lora(student, file, out, force=True)


# IP-Adapter --------------------------------------------------------------------------------------------------------


def ip_adapter_file(unet: Any, path: Path) -> Path:
    """An IP-Adapter of random weights for the cross-attentions of ``unet``; pictures are vectors of 12 numbers."""
    generator = torch.Generator().manual_seed(4)
    tensors = {
        "image_proj.proj.weight": torch.randn(4 * 16, 12, generator=generator),
        "image_proj.proj.bias": torch.randn(4 * 16, generator=generator),
        "image_proj.norm.weight": torch.ones(16),
        "image_proj.norm.bias": torch.zeros(16),
    }
    for number, name in enumerate(unet.attn_processors):
        if "attn2" in name:
            width = unet.get_submodule(name.removesuffix(".processor")).to_v.weight.shape[0]
            for kind in ("to_k_ip", "to_v_ip"):
                tensors[f"ip_adapter.{number}.{kind}.weight"] = torch.randn(width, 16, generator=generator)
    save_file(tensors, path)
    return path


def with_ip_adapter(unet: Any, file: Path) -> Any:
    """``unet`` with the IP-Adapter, as diffusers' ``load_ip_adapter`` gives it its file."""
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in load_file(file).items():
        part, _, name = key.partition(".")
        parts[part][name] = tensor
    unet._load_ip_adapter_weights([parts])
    return unet


@pytest.mark.parametrize(
    ("kind", "plan"), [("sd-v1", "bk-tiny"), ("sdxl", "-Up2.R2 -Up2.A2 -Dn2.R2 -Dn2.A2 -Md")]
)
def test_an_ip_adapter_on_the_student(kind: str, plan: str, tmp_path: Path) -> None:
    teacher, student = build_unet(SHAPES[kind]), student_for(SHAPES[kind], plan)
    smaller = materialise(teacher, student.plan)
    file = ip_adapter_file(teacher, tmp_path / "ip.safetensors")
    found = convert_ip_adapter(student, file, tmp_path / "converted.safetensors")
    cross = sum("attn2" in name for name in teacher.attn_processors)
    left = sum("attn2" in name for name in smaller.attn_processors)
    assert (found.parts, found.kept) == (cross, left)
    row = {row["what"]: row for row in compatibility(student).to_dict("records")}["IP-Adapter"]
    assert (row["kept"], row["of"], row["renamed"]) == (left, cross, found.renamed)
    without_blocks(with_ip_adapter(teacher, file), student)
    with_ip_adapter(smaller, found.path)
    picture = {"image_embeds": [torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(5))]}
    more = {"added_cond_kwargs": given_to(teacher.config).get("added_cond_kwargs", {}) | picture}
    assert torch.equal(predicted(smaller, **more), predicted(teacher, **more))


@pytest.mark.parametrize(
    ("built", "plan"), [("own", "-Dn1.R2 -Up2.A1 -Md.A1"), ("neutral", "-Dn1.A2 -Up2.A1")]
)
def test_an_ip_adapter_on_a_student_that_is_not_native(built: Any, plan: str, tmp_path: Path) -> None:
    teacher, named = build_unet(TINY_UNET), student_for(TINY_UNET, plan)
    student = dataclasses.replace(named, plan=named.plan.built(built))
    smaller = materialise(teacher, student.plan)
    file = ip_adapter_file(teacher, tmp_path / "ip.safetensors")
    found = convert_ip_adapter(student, file, tmp_path / "converted.safetensors")
    assert found.kept == sum("attn2" in name for name in smaller.attn_processors) < found.parts
    without_blocks(with_ip_adapter(teacher, file), student)
    with_ip_adapter(smaller, found.path)
    picture = {"image_embeds": [torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(5))]}
    more = {"added_cond_kwargs": picture}
    assert torch.equal(predicted(smaller, **more), predicted(teacher, **more))


@pytest.mark.parametrize("built", ["own", "neutral"])
def test_a_controlnet_for_a_student_that_is_not_native_is_refused(built: Any, tmp_path: Path) -> None:
    named = student_for(TINY_UNET, "-Dn1.A2")
    student = dataclasses.replace(named, plan=named.plan.built(built))
    with pytest.raises(FormError, match=f"in the {built} form; it counts skip connections"):
        convert_controlnet(student, tmp_path, tmp_path / "new")
    fits = {row["what"]: row["fits"] for row in compatibility(student).to_dict("records")}
    assert (fits["LoRA"], fits["IP-Adapter"]) == ("after conversion", "after conversion")
    assert (fits["ControlNet"], fits["T2I-Adapter"]) == ("not at all", "not at all")


def test_numbers_at_the_shape_of_stable_diffusion() -> None:
    # Cross-attentions are counted by odd numbers: 6 on the way down, 9 on the way up, the mid stage last. Of Small
    # the first of each pair is left on the way down, the first and third of each three on the way up.
    from prune_lab.export.ip_adapter import new_numbers

    numbers = new_numbers(student_for(preset_config("sd-v1.4"), "bk-small"))
    wanted = {1: 1, 5: 3, 9: 5, 13: 7, 17: 9, 19: 11, 23: 13, 25: 15, 29: 17}
    assert {old: new for old, new in numbers.items() if new is not None and old % 2} == wanted


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    student = student_for(TINY_UNET, "bk-base")
    os.mkfifo(tmp_path / "pipe.safetensors")
    for given, what in ((tmp_path / "pipe.safetensors", "a pipe"), (Path("/dev/zero"), "a device")):
        with pytest.raises((ModelFormatError, StorageError), match=f"found {what}"):
            convert_ip_adapter(student, given, tmp_path / "out.safetensors")
        with pytest.raises((ModelFormatError, StorageError), match=f"found {what}"):
            convert_lora(student, given, tmp_path / "out.safetensors")
        with pytest.raises((ModelFormatError, StorageError), match=f"found {what}"):
            convert_controlnet(student, given, tmp_path / "out")
        with pytest.raises(RunError, match=f"found {what}"):
            open_run(given, must_exist=True)


def test_another_models_ip_adapter_is_refused(tmp_path: Path) -> None:
    student, out = student_for(TINY_UNET, "bk-small"), tmp_path / "out.safetensors"
    file = ip_adapter_file(build_unet(SHAPES["sdxl"]), tmp_path / "ip.safetensors")
    with pytest.raises(ModelFormatError, match="trained for this student's teacher"):
        convert_ip_adapter(student, file, out)
    save_file({"ip_adapter.99.to_k_ip.weight": torch.ones(8, 16)}, file)
    with pytest.raises(ModelFormatError, match=r"ip_adapter\.99.*32 attentions"):
        convert_ip_adapter(student, file, out)
    for number in ("9" * 5000, "01", "\u0661"):
        save_file({f"ip_adapter.{number}.to_k_ip.weight": torch.ones(8, 16)}, file)
        with pytest.raises(ModelFormatError, match="32 attentions"):
            convert_ip_adapter(student, file, out)
    tensors = load_file(ip_adapter_file(build_unet(TINY_UNET), file))
    for key in random.Random(1).sample(sorted(tensors), 3):
        save_file(tensors | {key: tensors[key] * torch.nan}, file)
        with pytest.raises(ModelFormatError, match=f"{key} holds NaN"):
            convert_ip_adapter(student, file, out)
    assert not out.exists()


# ControlNet --------------------------------------------------------------------------------------------------------


def controlnet_of(unet: Any, **changes: Any) -> Any:
    """A ControlNet of ``unet`` whose convolutions are not zero, as after training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        made = ControlNetModel.from_unet(
            unet, conditioning_embedding_out_channels=(4, 4), load_weights_from_unet=False
        )
        made = ControlNetModel.from_config({**made.config, **changes})
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.1)
    return made.eval()


def controlled(unet: Any, controlnet: Any, *, middle: bool = True, **more: Any) -> Tensor:
    inputs = given_to(unet.config)
    picture = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        down, mid = controlnet(**inputs, controlnet_cond=picture, return_dict=False)
        if not middle:
            mid = torch.zeros(())
        return torch.as_tensor(
            unet(**inputs, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
        )


@pytest.mark.parametrize(
    ("kind", "plan"),
    [
        *(("sd-v1", plan) for plan in ("bk-base", "bk-small", "bk-tiny", "-Md.A1 -Md.R2", "-Dn1.A1 -Dn1.A2")),
        ("sd-v2", "bk-small"),
        ("sdxl", "-Dn1.R2 -Dn2.R2 -Dn2.A2 -Dn3.R2 -Dn3.A2 -Up1.R2 -Up1.A2 -Up2.R2 -Up2.A2 -Up3.R2"),
    ],
)
def test_a_controlnet_on_the_student(kind: str, plan: str, tmp_path: Path) -> None:
    teacher, student = build_unet(SHAPES[kind]), student_for(SHAPES[kind], plan)
    smaller, full = materialise(teacher, student.plan), controlnet_of(teacher)
    full.save_pretrained(tmp_path / "full")
    found = convert_controlnet(student, tmp_path / "full", tmp_path / "cut")
    cut = ControlNetModel.from_pretrained(tmp_path / "cut").eval()
    with_it = controlled(smaller, cut)
    without_blocks(teacher, student)
    without_blocks(full, student, within="down_blocks.")
    assert torch.equal(with_it, controlled(teacher, full, middle=plan != "bk-tiny"))
    assert not torch.allclose(with_it, predicted(smaller))
    assert found.kept == len(cut.controlnet_down_blocks)
    assert found.parts == len(full.controlnet_down_blocks)


# The readers of the skips of the way up, innermost first, take 11, 10, 9 | 8, 7, 6 | 5, 4, 3 | 2, 1, 0 in turn; the
# second of each three leaves with Base, and the first three with Tiny.
@pytest.mark.parametrize(
    ("plan", "convolutions"),
    [
        ("bk-base", [0, 2, 3, 5, 6, 8, 9, 11]),
        ("bk-small", [0, 2, 3, 5, 6, 8, 9, 11]),
        ("bk-tiny", [0, 2, 3, 5, 6, 8]),
    ],
)
def test_which_convolutions_are_kept(plan: str, convolutions: list[int], tmp_path: Path) -> None:
    teacher, student = build_unet(TINY_UNET), student_for(TINY_UNET, plan)
    full = controlnet_of(teacher)
    full.save_pretrained(tmp_path / "full")
    convert_controlnet(student, tmp_path / "full", tmp_path / "cut")
    cut = load_file(tmp_path / "cut" / "diffusion_pytorch_model.safetensors")
    for new, old in enumerate(convolutions):
        assert torch.equal(
            cut[f"controlnet_down_blocks.{new}.weight"], full.controlnet_down_blocks[old].weight
        )
    assert f"controlnet_down_blocks.{len(convolutions)}.weight" not in cut
    assert cut["controlnet_mid_block.weight"].any() == (plan != "bk-tiny")


def test_a_controlnet_without_attention_of_a_teacher_with(tmp_path: Path) -> None:
    teacher, student = build_unet(TINY_UNET), student_for(TINY_UNET, "bk-base")
    full = controlnet_of(teacher, down_block_types=["DownBlock2D"] * 4, mid_block_type="UNetMidBlock2D")
    full.save_pretrained(tmp_path / "full")
    convert_controlnet(student, tmp_path / "full", tmp_path / "cut")
    smaller, cut = (
        materialise(teacher, student.plan),
        ControlNetModel.from_pretrained(tmp_path / "cut").eval(),
    )
    found = controlled(smaller, cut)
    without_blocks(teacher, student)
    for unit in student.architecture.units:
        if (
            unit.kind == "resnet"
            and unit.name in student.plan.removed
            and unit.path.startswith("down_blocks")
        ):
            full.set_submodule(unit.path, stand_in_for(full.get_submodule(unit.path), unit))
    assert torch.equal(found, controlled(teacher, full))


def test_a_controlnet_of_numbers_that_are_none_is_refused(tmp_path: Path) -> None:
    controlnet = controlnet_of(build_unet(TINY_UNET))
    for parameter in controlnet.parameters():
        nn.init.constant_(parameter, torch.inf)
    controlnet.save_pretrained(tmp_path / "full")
    with pytest.raises(ModelFormatError, match="infinite"):
        convert_controlnet(student_for(TINY_UNET, "bk-base"), tmp_path / "full", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_controlnets_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    teacher = build_unet(TINY_UNET)
    controlnet_of(teacher).save_pretrained(tmp_path / "full")
    out = tmp_path / "cut"
    uneven = student_for(TINY_UNET, "-Dn2.R2 -Dn2.A2 -Up3.R2 -Up3.A2")
    with pytest.raises(NonNativePlanError, match=r"\[2, 1, 2, 2\] layers"):
        convert_controlnet(uneven, tmp_path / "full", out)
    other = student_for({**TINY_UNET, "block_out_channels": [8, 16, 16, 16]}, "bk-base")
    with pytest.raises(UnsupportedModelError, match="trained for this student's teacher"):
        convert_controlnet(other, tmp_path / "full", out)
    base = student_for(TINY_UNET, "bk-base")
    controlnet_of(teacher, cross_attention_dim=24).save_pretrained(tmp_path / "text")
    with pytest.raises(UnsupportedModelError, match=r"cross_attention_dim 24; .* teacher has 16"):
        convert_controlnet(base, tmp_path / "text", out)
    controlnet_of(teacher, in_channels=7).save_pretrained(tmp_path / "latents")
    with pytest.raises(UnsupportedModelError, match=r"in_channels 7; .* teacher has 4"):
        convert_controlnet(base, tmp_path / "latents", out)
    controlnet_of(teacher, class_embed_type="timestep").save_pretrained(tmp_path / "classes")
    with pytest.raises(UnsupportedModelError, match=r"class_embed_type timestep; .* teacher has None"):
        convert_controlnet(base, tmp_path / "classes", out)
    with pytest.raises(StorageError, match="a ControlNet is a folder"):
        convert_controlnet(base, tmp_path / "full", tmp_path / "x.safetensors")
    (tmp_path / "lone").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "lone" / "model.safetensors")
    with pytest.raises(ModelFormatError, match=r"no config\.json"):
        convert_controlnet(base, tmp_path / "lone" / "model.safetensors", out)
    teacher.save_pretrained(tmp_path / "unet")
    with pytest.raises(UnsupportedModelError, match="found a config of class UNet2D"):
        convert_controlnet(base, tmp_path / "unet", out)
    assert not out.exists()


def test_what_a_conversion_is_made_from_is_never_replaced(
    small_student: Path, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    teacher, own = build_unet(TINY_UNET), tmp_path / "home" / "student"
    shutil.copytree(small_student, own)
    controlnet_of(teacher).save_pretrained(tmp_path / "full")
    lora = kohya_file(teacher, tmp_path / "lora.safetensors")
    adapter = ip_adapter_file(teacher, tmp_path / "ip.safetensors")
    plan = tmp_path / "plans" / "plan.json"
    plan.parent.mkdir()
    shutil.copy(own / "unet" / "plan.json", plan)
    before = sorted(tmp_path.rglob("*"))
    weights = own / "unet" / "diffusion_pytorch_model.safetensors"
    by_folder = ("--plan", own, "--model", tiny_pipeline_folder)
    by_plan = ("--plan", plan, "--model", tiny_pipeline_folder)
    for arguments in (
        ("controlnet", tmp_path / "full", *by_folder, "--out", own),
        ("controlnet", tmp_path / "full", *by_folder, "--out", own.parent),
        ("controlnet", tmp_path / "full", *by_folder, "--out", own / "unet"),
        ("controlnet", tmp_path / "full", *by_plan, "--out", plan.parent),
        ("controlnet", tmp_path / "full", *by_plan, "--out", tiny_pipeline_folder),
        ("lora", lora, *by_folder, "--out", weights),
        ("ip-adapter", adapter, *by_folder, "--out", weights),
        ("lora", lora, "--plan", own / "unet", *by_plan[2:], "--out", weights),
    ):
        found = invoked(*arguments, "--force")
        assert found.exit_code == 2, arguments
        assert "that it is made from" in found.stderr
    assert sorted(tmp_path.rglob("*")) == before


# The student, the card and the verb -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_student(built_once: BuiltOnce, tiny_pipeline_folder: Path) -> Path:
    """A pipeline folder of the tiny model's BK-SDM-Small; do not change it."""
    source = resolve_model(str(tiny_pipeline_folder))
    plan = parse_plan("bk-small", source.architecture)
    return (
        built_once("convert-small", lambda folder: prune_pipeline(source, plan, folder / "small")) / "small"
    )


def test_the_teacher_of_a_student_is_found(small_student: Path, tmp_path: Path) -> None:
    student = student_in(small_student)
    assert student.plan.name == "bk-small"
    assert student.layout.config["mid_block_type"] is None
    moved = tmp_path / "moved"
    shutil.copytree(small_student, moved)
    for path in moved.rglob("provenance.json"):  # a student of earlier versions, whose teacher is elsewhere
        path.write_text(json.dumps({"source": "/not/here"}))
    with pytest.raises(PlanError, match="--model"):
        student_in(moved)


@pytest.mark.parametrize(
    "plan", ["bk-base", "bk-tiny", "-Dn1.R1 -Dn1.A1", "-Dn1.R2 -Dn1.A2 -Up4.R2 -Up4.A2", ""]
)
@pytest.mark.parametrize("noted", [True, False])
def test_a_plan_of_another_student_than_its_weights_is_refused(
    plan: str, noted: bool, small_student: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "student"
    shutil.copytree(small_student, copied)
    student = student_in(copied)
    other = parse_plan(plan, student.architecture)
    (copied / "unet" / "plan.json").write_text(json.dumps(other.to_json()))
    if not noted:
        told = json.loads((copied / "unet" / "provenance.json").read_text())
        del told["plan_id"]
        (copied / "unet" / "provenance.json").write_text(json.dumps(told))
    with pytest.raises(PlanError, match="another student than its weights"):
        student_in(copied)
    lora = peft_file(build_unet(TINY_UNET), tmp_path / "lora.safetensors")
    found = invoked("lora", lora, "--plan", copied, "--out", tmp_path / "out.safetensors")
    assert found.exit_code == 2
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "model", "message"),
    [
        ("bk-small", "", "no such folder"),
        ("-Md" * 5000, "", "no such folder"),
        ("bk-small -Dn1.R2", "sd-v1.4", ""),
        ("-Dn1.A1", "sd-v1.4", "Dn1"),
    ],
)
def test_plans_as_text(text: str, model: str, message: str) -> None:
    if not message:
        assert student_of(text, model).plan.text.startswith("-Dn1.R2")
        return
    with pytest.raises(PlanError, match=message):
        student_of(text, model)


def invoked(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_the_verb_says_what_became_of_the_modules(small_student: Path, tmp_path: Path) -> None:
    file = peft_file(build_unet(TINY_UNET), tmp_path / "lora.safetensors")
    out = tmp_path / "out.safetensors"
    found = invoked("lora", file, "--plan", small_student, "--out", out, "--json")
    assert found.exit_code == 0, found.output
    (row,) = json.loads(found.stdout)
    assert tuple(row) == CONVERTED_COLUMNS
    assert (row["parts"], row["kept"], row["renamed"], row["dropped"]) == (132, 76, 25, 56)
    assert "Md.A1" in row["dropped_from"]
    pipeline = StableDiffusionPipeline.from_pretrained(small_student)
    tensors = {key: tensor for key, tensor in load_file(out).items() if key.startswith("unet.")}
    save_file(tensors, tmp_path / "unet-only.safetensors")
    pipeline.load_lora_weights(tmp_path, weight_name="unet-only.safetensors")
    assert torch.equal(predicted(pipeline.unet), predicted(with_lora(materialised(small_student), out)))


def materialised(folder: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(folder).unet


def test_the_verb_converts_each_kind_by_a_plan_in_words(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    teacher = build_unet(TINY_UNET)
    controlnet_of(teacher).save_pretrained(tmp_path / "full")
    given = {
        "controlnet": tmp_path / "full",
        "ip-adapter": ip_adapter_file(teacher, tmp_path / "ip.safetensors"),
    }
    by = ("--plan", "bk-base", "--model", tiny_pipeline_folder)
    for kind, path in given.items():
        found = invoked(kind, path, *by, "--out", tmp_path / f"out-{path.name}")
        assert found.exit_code == 0, found.output
        assert (tmp_path / f"out-{path.name}").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("vae", "x", "--plan", "bk-small", "--model", "sd-v1.4", "--out", "y"),
            "lora, controlnet, ip-adapter",
        ),
        (("lora", "--plan", "bk-small", "--model", "sd-v1.4"), "KIND FILE --plan STUDENT --out"),
        ((), "KIND FILE --plan STUDENT --out"),
        (("--show", "nowhere"), "no such folder"),
    ],
)
def test_what_cannot_be_read_ends_with_one_line(arguments: tuple[str, ...], message: str) -> None:
    found = invoked(*arguments)
    assert found.exit_code == 2
    assert message in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


def test_the_compatibility_card(small_student: Path) -> None:
    found = invoked("--show", small_student, "--json")
    assert found.exit_code == 0, found.output
    rows = {row["what"]: row for row in json.loads(found.stdout)}
    assert all(tuple(row) == COMPATIBILITY_COLUMNS for row in rows.values())
    fits = {what: row["fits"] for what, row in rows.items()}
    assert fits == {
        "LoRA": "after conversion",
        "ControlNet": "after conversion",
        "IP-Adapter": "after conversion",
        "T2I-Adapter": "as it is",
        "textual inversion": "as it is",
        "VAE": "as it is",
        "scheduler": "as it is",
        "single file": "after conversion",
    }
    assert (rows["LoRA"]["kept"], rows["LoRA"]["of"], rows["LoRA"]["renamed"]) == (72, 128, 24)
    assert (rows["ControlNet"]["kept"], rows["ControlNet"]["of"]) == (8, 12)
    assert (rows["IP-Adapter"]["kept"], rows["IP-Adapter"]["of"]) == (9, 16)
    assert (rows["T2I-Adapter"]["kept"], rows["T2I-Adapter"]["of"]) == (4, 4)


@pytest.mark.parametrize(
    ("plan", "what", "fits"),
    [
        ("-Md", "LoRA", "after conversion"),
        ("-Md", "ControlNet", "as it is"),
        ("-Md", "IP-Adapter", "as it is"),
        ("-Dn2.R2 -Dn2.A2 -Up3.R2 -Up3.A2", "ControlNet", "not at all"),
        ("-Dn1.A1 -Dn1.A2", "T2I-Adapter", "not at all"),
        ("teacher", "LoRA", "as it is"),
    ],
)
def test_what_fits_follows_from_the_plan(plan: str, what: str, fits: str) -> None:
    rows = {row["what"]: row for row in compatibility(student_for(TINY_UNET, plan)).to_dict("records")}
    assert rows[what]["fits"] == fits


def test_a_teacher_that_no_plain_controlnet_copies() -> None:
    config = {**TINY_UNET, "layers_per_block": [1, 2, 2, 2]}
    rows = {row["what"]: row for row in compatibility(student_for(config, "-Md")).to_dict("records")}
    assert rows["ControlNet"]["fits"] == "not at all"
    assert "no plain ControlNet" in rows["ControlNet"]["note"]


@pytest.mark.parametrize("plan", ["bk-base", "bk-tiny", "-Dn1.A1 -Dn1.A2"])
def test_features_of_a_t2i_adapter(plan: str) -> None:
    teacher, student = build_unet(TINY_UNET), student_for(TINY_UNET, plan)
    smaller = materialise(teacher, student.plan)
    without_blocks(teacher, student)
    generator = torch.Generator().manual_seed(9)
    sizes = ((8, 16), (16, 8), (32, 4), (32, 2))
    features = [torch.randn(2, width, side, side, generator=generator) for width, side in sizes]
    row = {row["what"]: row for row in compatibility(student).to_dict("records")}["T2I-Adapter"]
    taken = [feature.clone() for feature in features]
    if row["fits"] == "not at all":
        with pytest.raises(RuntimeError):
            predicted(smaller, down_intrablock_additional_residuals=taken)
        return
    found = predicted(smaller, down_intrablock_additional_residuals=taken)
    assert torch.equal(
        found,
        predicted(teacher, down_intrablock_additional_residuals=[f.clone() for f in features[: row["kept"]]]),
    )
