"""What lies beside the weights of a student says what was written: what was changed since is refused, or told."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import prune_lab
from prune_lab.blocks import architecture_of
from prune_lab.cli import app
from prune_lab.errors import ModelFormatError, PruneLabError
from prune_lab.export.card import card_text
from prune_lab.export.students import Student
from prune_lab.models import load_model, resolve_model
from prune_lab.models import written as written_record
from prune_lab.models.streamed import load_streamed
from prune_lab.plans import parse_plan
from prune_lab.surgery import materialise, save_model
from prune_lab.surgery.writing import pipeline_with, trained_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"
Change = Callable[[Path], None]


@pytest.fixture(scope="session")
def written(built_once: Any, tiny_unet_shared: Any) -> Path:
    """A model folder that prune-lab wrote; copy it to change it."""

    def build(folder: Path) -> None:
        plan = parse_plan("bk-small", architecture_of(tiny_unet_shared))
        about = {"plan_id": plan.id, "form": plan.form}
        save_model(materialise(tiny_unet_shared, plan), folder, plan, about)

    return built_once("written-record", build)  # type: ignore[no-any-return]


@pytest.fixture
def student(written: Path, tmp_path: Path) -> Path:
    """A student of its own, free to be changed."""
    return Path(shutil.copytree(written, tmp_path / "student"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def swap(tensors: dict[str, torch.Tensor]) -> None:
    first, second = (f"mid_block.resnets.0.conv{number}.weight" for number in (1, 2))
    if first not in tensors:
        first, second = (f"up_blocks.1.resnets.0.norm1.{name}" for name in ("weight", "bias"))
    tensors[first], tensors[second] = tensors[second], tensors[first]


@pytest.mark.parametrize(
    ("setting", "value", "shown"),
    [("attention_head_dim", 4, "2"), ("norm_num_groups", 2, "4"), ("center_input_sample", True, "false")],
)
def test_a_setting_that_no_shape_shows_is_refused(
    student: Path, setting: str, value: object, shown: str
) -> None:
    resolve_model(str(student))
    edit(student / "config.json", **{setting: value})
    with pytest.raises(
        ModelFormatError, match=f"{setting} {json.dumps(value)} .* written as {shown}"
    ) as error:
        resolve_model(str(student))
    assert "\n" not in str(error.value)
    assert "set it back" in str(error.value)


def test_what_other_programs_write_into_a_config_is_no_change(student: Path) -> None:
    """They leave out what is usual or write it all, and add entries of their own; the size of pictures is free."""
    config = json.loads((student / "config.json").read_text())
    usual = inspect.signature(UNet2DConditionModel.__init__).parameters
    mine = {key: value for key, value in config.items() if key not in usual or value != usual[key].default}
    assert len(mine) < len(config)
    more = {"_diffusers_version": "9.9", "_name_or_path": "elsewhere", "decay": 0.999, "sample_size": 32}
    (student / "config.json").write_text(json.dumps(mine | more))
    assert resolve_model(str(student)).config["sample_size"] == 32


def test_swapped_tensors_are_refused(student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_weights(student, swap)
    source = resolve_model(str(student))
    for load in (lambda: load_model(source), lambda: load_streamed(student)):
        with pytest.raises(ModelFormatError, match="under other names"):
            load()
    assert not capsys.readouterr().err


def test_weights_of_another_tool_are_told_and_taken(
    student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Plain diffusers trains a student on, and saves it into its folder: the files of prune-lab stay beside it."""
    model: Any = load_model(resolve_model(str(student)))
    assert not capsys.readouterr().err
    with torch.no_grad():
        model.conv_in.bias += 0.01
    model.save_pretrained(student)
    again: Any = load_model(resolve_model(str(student)))
    assert torch.equal(again.conv_in.bias, model.conv_in.bias)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert "not the ones that prune-lab wrote" in line
    assert "another tool" in line


def test_a_folder_without_a_record_is_as_before(student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads((student / "provenance.json").read_text())
    del told["written"]
    (student / "provenance.json").write_text(json.dumps(told))
    edit(student / "config.json", attention_head_dim=4)
    change_weights(student, swap)
    load_model(resolve_model(str(student)))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("record", [[], "x", {"config": 1}, {"weights": 3, "config": None}, {"config": {}}])
def test_a_damaged_record_is_one_line(student: Path, record: object) -> None:
    edit(student / "provenance.json", written=record)
    with pytest.raises(PruneLabError, match=r"provenance\.json"):
        load_model(resolve_model(str(student)))


def test_every_writer_of_students_renews_the_record(
    student: Path, tiny_pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A student that was trained on: as a model, in a pipeline, and as the model of a pipeline."""
    model: Any = load_model(resolve_model(str(student)))
    with torch.no_grad():
        model.conv_in.bias += 0.01
    old = json.loads((student / "provenance.json").read_text())
    plan = json.loads((student / "plan.json").read_text())
    alone, inside, whole = (tmp_path / name for name in ("alone", "inside", "whole"))
    save_model(model, alone, plan, old)
    teacher = resolve_model(str(tiny_pipeline_folder))
    pipeline_with(teacher, alone, inside)
    trained_pipeline(resolve_model(str(inside)), model, whole, plan, old)
    for folder in (alone, inside, whole):
        found: Any = load_model(resolve_model(str(folder)))
        assert torch.equal(found.conv_in.bias, model.conv_in.bias)
    assert not capsys.readouterr().err


def test_a_student_can_be_saved_in_shards(student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same weights, laid out in other files, are the same weights."""
    model: Any = load_model(resolve_model(str(student)))
    (student / WEIGHTS).unlink()
    model.save_pretrained(student, max_shard_size="100KB")
    assert len(list(student.glob("*-of-*.safetensors"))) > 1
    load_model(resolve_model(str(student)))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("diffusion_pytorch_model.fp16.safetensors", "--variant fp16 reads it"),
        ("diffusion_pytorch_model.safetensors.index.fp16.json", "--variant fp16 reads it"),
        ("diffusion_pytorch_model.bin", "pickled files are never opened here"),
    ],
)
def test_other_weights_beside_those_that_are_read_are_told(
    student: Path, name: str, cure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    load_model(resolve_model(str(student)))
    assert not capsys.readouterr().err
    shutil.copyfile(student / WEIGHTS, student / name)
    load_model(resolve_model(str(student)))
    told = capsys.readouterr().err
    assert f"{name}, which prune-lab did not write and does not read here" in told
    assert cure in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("was", "now", "same"),
    [
        ({}, {"attention_head_dim": [2, 2, 2, 2]}, True),
        ({}, {"attention_head_dim": [2, 2, 2, 4]}, False),
        ({}, {"attention_head_dim": [2, 2, 2]}, False),
        ({"attention_head_dim": [2, 2, 2, 2]}, {"attention_head_dim": 2}, True),
        ({}, {"only_cross_attention": [False] * 4}, True),
        ({}, {"block_out_channels": 8}, False),  # where a number means nothing
    ],
)
def test_a_setting_in_another_form_that_means_the_same_is_no_change(
    student: Path, was: dict[str, Any], now: dict[str, Any], same: bool
) -> None:
    config = json.loads((student / "config.json").read_text())
    record = written_record._recorded(student)
    recorded = {**record, "config": {**record["config"], **was}}
    with nullcontext() if same else pytest.raises(ModelFormatError, match="set it back"):
        written_record._check_settings(student, recorded, {**config, **now})
    if same and not was:
        edit(student / "config.json", **now)
        load_model(resolve_model(str(student)))


def test_a_padded_student_that_is_pruned_again_tells_what_becomes_of_its_widths(
    tiny_unet_shared: Any, student: Path, tmp_path: Path
) -> None:
    architecture = architecture_of(tiny_unet_shared)
    plan = parse_plan("~Dn3.A1.heads=1@0 ~Up1.R1.hidden=2@0,1", architecture).built("padded")
    folder = tmp_path / "narrow"
    about = {"source": "whole", "plan": plan.text, "plan_id": plan.id, "form": plan.form}
    save_model(materialise(tiny_unet_shared, plan), folder, plan, about)
    again = prune_lab.load(folder)
    (note,) = again.prune("bk-base", tmp_path / "out", dry_run=True).notes
    assert "narrow is a padded student" in note
    assert plan.text in note
    assert "are not in the new plan" in note
    source, small = again.source, parse_plan("bk-small", architecture)
    assert f"Its parent is padded: {plan.text}" in card_text(folder, Student(architecture, small), source)
    assert not prune_lab.load(student).prune("-Dn1.A1", tmp_path / "out", dry_run=True).notes


# Plans -----------------------------------------------------------------------------------------------------------


def loses_a_block(plan: dict[str, Any]) -> None:
    plan["removed"].pop()


def is_of_other_widths(plan: dict[str, Any]) -> None:
    plan["widths"] = {"Dn1.R1.hidden": 2}


def is_another_plan(plan: dict[str, Any]) -> None:
    loses_a_block(plan)
    del plan["id"]


def has_another_form(plan: dict[str, Any]) -> None:
    plan["form"] = "neutral"


@pytest.mark.parametrize("change", [loses_a_block, is_of_other_widths, is_another_plan, has_another_form])
def test_a_plan_that_somebody_changed_is_refused(student: Path, change: Callable[[Any], None]) -> None:
    plan = json.loads((student / "plan.json").read_text())
    change(plan)
    (student / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ModelFormatError, match=r"plan\.json.* restore") as error:
        resolve_model(str(student))
    assert "\n" not in str(error.value)
    result = CliRunner().invoke(app, ["generate", str(student), "--out", str(student.parent / "x.png")])
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert "plan.json" in line


@pytest.mark.parametrize("text", ["[1]", "{}", '{"steps": ["buy milk"]}'])
def test_another_file_in_the_place_of_the_plan_is_refused_where_a_record_names_one(
    student: Path, text: str
) -> None:
    (student / "plan.json").write_text(text)
    with pytest.raises(ModelFormatError, match=r"found no plan in its plan\.json.* restore"):
        resolve_model(str(student))
    (student / "provenance.json").unlink()  # then it may be of another program
    resolve_model(str(student))


def test_tensors_are_read_by_whom_the_folder_is_read_by(student: Path) -> None:
    """Safetensors writes files that their owner alone may read."""
    usual = student.stat().st_mode & 0o666
    assert {path.stat().st_mode & 0o777 for path in student.glob("*.safetensors")} == {usual}
