"""The model card of a student: its own and not the parent's, true to the plan, and its lines of Python draw."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import BuiltOnce
from huggingface_hub import metadata_load
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from prune_lab.assets import reference_folder
from prune_lab.cli import app
from prune_lab.config import RepairConfig
from prune_lab.distill import load_recovery
from prune_lab.errors import PlanError
from prune_lab.export import card, student_in, write_card
from prune_lab.export.card import card_text
from prune_lab.export.students import Student
from prune_lab.models import resolve_model
from prune_lab.plans import parse_plan, plan_from_json
from prune_lab.profiling import Change
from prune_lab.runs import Run
from prune_lab.runtime import write_json
from prune_lab.session import Session
from prune_lab.workflow import distilling, ensure_plans, plan_named, plan_times, save_students
from prune_lab.workflow.students import RepairVerdict

PARENTS_CARD = """---
license: creativeml-openrail-m
tags: [cats]
---
# The parent

Draws cats like no other.
"""


@pytest.fixture(scope="module")
def small(built_once: BuiltOnce, tiny_pipeline_folder: Path) -> Path:
    """A student that the command line wrote, of a parent with a card; do not change it."""

    def build(folder: Path) -> None:
        shutil.copytree(tiny_pipeline_folder, folder / "parent")
        (folder / "parent" / "README.md").write_text(PARENTS_CARD)
        asked = ["prune", str(folder / "parent"), "--plan", "bk-small", "--out", str(folder / "small")]
        found = CliRunner().invoke(app, asked)
        assert found.exit_code == 0, found.output

    return built_once("card", build) / "small"


def code_of(folder: Path) -> str:
    (code,) = re.findall(
        r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    return str(code)


def run_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Execute the card's lines in ``folder``, as they stand."""
    monkeypatch.chdir(folder)
    exec(compile(code_of(folder), "README.md", "exec"), {})


def test_the_card_is_the_students_own(small: Path) -> None:
    text = (small / "README.md").read_text(encoding="utf-8")
    assert "cats" not in text
    assert "# parent without 17 of 38 blocks" in text
    assert "-Dn1.R2 -Dn1.A2" in text
    assert str(small.parent) not in text
    head = metadata_load(small / "README.md")
    assert head is not None
    assert head["license"] == "creativeml-openrail-m"
    assert "license_name" not in head
    assert head["library_name"] == "diffusers"
    assert head["pipeline_tag"] == "text-to-image"
    assert "base_model" not in head  # the parent is a folder and not on the hub
    with Image.open(small / "block_map.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 600


@pytest.mark.parametrize(
    ("text", "there", "absent"),
    [
        (
            "~Dn3.A1.heads=1@0 ~Up1.R1.hidden=2@0,1",
            (
                "# parent with 2 widths narrower",
                "with the units that are gone set to 0 by at most",
                "after the blocks were made narrower",
                "execution; the bar in",
            ),
            ("without 0", "bypassed", "removed"),
        ),
        (
            "-Dn1.R2 ~Dn3.A1.heads=1@0",
            (
                "# parent without 1 of 38 blocks, 1 width narrower",
                "these blocks bypassed and the units that are gone set to 0 by at most",
                "after the blocks were removed and made narrower",
                "were removed; the bar in",
            ),
            (),
        ),
        (
            "-Dn1.R2",
            (
                "# parent without 1 of 38",
                "these blocks bypassed by at most",
                "after the blocks were removed:",
            ),
            ("narrower", "set to 0", "the bar"),
        ),
    ],
)
def test_the_card_speaks_of_what_was_done(
    small: Path, text: str, there: tuple[str, ...], absent: tuple[str, ...]
) -> None:
    """Of blocks that were removed where any were, of widths where any are narrower."""
    source = resolve_model(str(small.parent / "parent"))
    plan = dataclasses.replace(parse_plan(text, source.architecture), form="own")
    card = card_text(small, Student(source.architecture, plan, small), source)
    said = card.partition("## What fits")[0]
    for words in there:
        assert words in said
    for words in absent:
        assert words not in said.replace("`removed`", "")


def test_its_figures_are_those_of_the_model(small: Path) -> None:
    from diffusers import UNet2DConditionModel

    text = (small / "README.md").read_text(encoding="utf-8")
    sizes = [
        sum(
            parameter.numel()
            for parameter in UNet2DConditionModel.from_pretrained(folder / "unet").parameters()
        )
        for folder in (small.parent / "parent", small)
    ]
    (row,) = [line for line in text.splitlines() if line.startswith("| parameters")]
    change = f"\u2212{100 * (1 - sizes[1] / sizes[0]):.1f}\u202f%"
    assert row == f"| parameters | {sizes[0]:,} | {sizes[1]:,} | {change} |"
    assert "| LoRA | after conversion | 72 of 128 |" in text
    assert "| ControlNet | after conversion | 8 of 12 |" in text
    assert "Nothing was trained" in text
    assert f"with {sizes[1]:,} parameters in the U-Net" in text


def test_its_lines_draw_as_they_stand(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(small, folder)
    run_card(folder, monkeypatch)
    with Image.open(folder / "picture.png") as picture:
        assert picture.size == (32, 32)


def test_the_folder_alone_knows_its_teacher(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(small, folder)
    provenance = json.loads((folder / "unet" / "provenance.json").read_text())
    assert provenance["teacher_config"]["layers_per_block"] == 2
    (folder / "unet" / "provenance.json").write_text(json.dumps(provenance | {"source": "nowhere"}))
    assert student_in(folder).plan.name == "bk-small"


@pytest.mark.usefixtures("blank_figures")
def test_the_lines_name_the_variant(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["prune", str(small.parent / "parent"), "--plan", "bk-base", "--out", str(tmp_path / "half")]
    found = CliRunner().invoke(app, [*asked, "--variant", "fp16", "--dtype", "float16"])
    assert found.exit_code == 0, found.output
    assert '(".", variant="fp16")' in code_of(tmp_path / "half")
    run_card(tmp_path / "half", monkeypatch)


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("kind", ["StableDiffusionInpaintPipeline", "StableDiffusionImg2ImgPipeline"])
def test_the_lines_for_other_pipelines_draw(
    kind: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(small, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": kind}))
    source = resolve_model(str(small.parent / "parent"))
    write_card(folder, parse_plan("bk-small", source.architecture), source)
    run_card(folder, monkeypatch)
    assert (folder / "picture.png").is_file()


@pytest.mark.usefixtures("blank_figures")
def test_a_unet_alone(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, out = small.parent / "parent" / "unet", tmp_path / "unet"
    found = CliRunner().invoke(app, ["prune", str(parent), "--plan", "bk-base", "--out", str(out)])
    assert found.exit_code == 0, found.output
    run_card(out, monkeypatch)
    head = metadata_load(out / "README.md")
    assert head is not None
    assert head["license"] == "other"
    assert "Not known: no card of unet" in (out / "README.md").read_text()


@pytest.mark.usefixtures("blank_figures")
def test_a_parent_on_the_hub_is_linked(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(small, folder)
    source = dataclasses.replace(resolve_model(str(small.parent / "parent")), text="someone/their-model")
    training = {"steps": 100, "held-out loss after distillation": "0.31"}
    write_card(folder, parse_plan("bk-small", source.architecture), source, training)
    head, text = metadata_load(folder / "README.md"), (folder / "README.md").read_text()
    assert head is not None
    assert head["base_model"] == "someone/their-model"
    assert "# someone/their-model without" in text
    assert "| steps | 100 |" in text
    assert "Nothing was trained" not in text


@pytest.mark.usefixtures("blank_figures")
def test_a_model_that_does_not_say_its_size(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(small, folder)
    source = resolve_model(str(small.parent / "parent"))
    unsized = dataclasses.replace(source, config={**source.config, "sample_size": None})
    write_card(folder, parse_plan("bk-small", unsized.architecture), unsized)
    old, new = ((path / "README.md").read_text().splitlines() for path in (small, folder))
    (row,) = [line for line in old if line.startswith("| parameters")]
    assert row in new


@pytest.mark.long
def test_a_distilled_student_tells_its_training(finished: Run, tmp_path: Path) -> None:
    session = Session(finished)
    (folder,) = save_students(session, tmp_path / "student", only=("bk-base",))
    text = (folder / "README.md").read_text(encoding="utf-8")
    plan = plan_named(ensure_plans(session), "bk-base", session)
    recovery = load_recovery(finished.candidate(plan.id).folder)
    assert recovery is not None
    assert f"| steps | {recovery.steps} |" in text
    assert f"| held-out loss after distillation | {recovery.after:.4g} |" in text
    assert f"| samples per step | {session.config.distill.batch} |" in text
    assert "every tensor equals that of the model that was saved" in text
    assert "Nothing was trained" not in text
    assert not [path for path in ("/tmp", str(finished.folder)) if path in text]
    assert student_in(folder).plan.id == plan.id


@pytest.mark.parametrize(
    ("repair", "kept", "there", "row"),
    [
        ("none", None, "held-out loss after the cut", None),
        (
            "best",
            False,
            "held-out loss after the cut",
            "best: tried and not kept, as the held-out loss did not fall",
        ),
        ("shift", True, "held-out loss after the cut and its repair", "shift: kept, before any training"),
    ],
)
def test_a_loss_is_named_by_what_it_was_measured_after(
    finished: Run, tmp_path: Path, repair: str, kept: bool | None, there: str, row: str | None
) -> None:
    run = Run(shutil.copytree(finished.folder, tmp_path / "run"))
    session = Session(run)
    config = dataclasses.replace(session.config, repair=RepairConfig(kind=repair))
    plan = plan_named(ensure_plans(session), "bk-base", session)
    if kept is not None:
        write_json(run.candidate(plan.id).kept, dataclasses.asdict(RepairVerdict(kept, 2.0, 1.0, 4)))
    session.__dict__["config"] = config
    told = distilling._training(session, plan)
    assert told.get("repair of the cut") == row
    assert [name for name in told if name.startswith("held-out loss after the cut")] == [there]
    notes = distilling.distilled_notes(session, only=(plan.id,))
    assert any("--set repair.kind=none" in note for note in notes) == bool(kept)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_another_number_format_than_the_parents_is_told(tmp_path: Path, dtype: str) -> None:
    parent, student = tmp_path / "parent.safetensors", tmp_path / "student.safetensors"
    save_file({"a": torch.zeros(8, 4, dtype=getattr(torch, dtype)), "step": torch.zeros(2)}, parent)
    save_file({"a": torch.zeros(8, 2), "step": torch.zeros(2)}, student)
    said = distilling.number_format_text([parent], [student])
    if dtype == "float32":
        assert said == ""
    else:
        assert said == (
            "float32, in which students are trained; the parent's is float16: load it with torch_dtype=torch.float16"
        )


def test_a_time_measured_anew_stands_beside_that_of_the_search(
    finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(finished)
    found = plan_named(ensure_plans(session), "bk-base", session)
    searched = "0.725x of the teacher's, in turns, 20 rounds, cpu float32"
    plan = dataclasses.replace(found, timed=searched)
    changes = {plan.id: Change(-0.118, None, None, 5)}
    monkeypatch.setattr(plan_times, "timed_changes", lambda session: changes)
    told = plan_times.with_time(session, plan).timed
    assert told.startswith("0.882x of the teacher's, in turns, 5 rounds, ")
    assert told.endswith(f"; the search that found the plan measured {searched}")
    note = plan_times.timed_anew(session, plan)
    assert "0.882x" in note
    assert "0.725x" in note
    assert "SLOWER" not in note  # no budget is known
    budget = dataclasses.replace(plan, timed=f"{searched}, for a budget of 0.750x")
    assert plan_times.timed_anew(session, budget).endswith("; here it is SLOWER than the 0.750x asked for")
    assert plan_times.with_time(session, plan, share=0.75).timed.count(", for a budget of 0.750x;") == 1
    again = dataclasses.replace(plan, timed=told)
    assert plan_times.with_time(session, again).timed.count("0.725x") == 1
    assert plan_times.timed_anew(session, found) == ""
    changes.clear()
    assert plan_times.timed_anew(session, plan) == ""
    assert plan_times.with_time(session, plan).timed == searched


def test_the_licence_of_a_model_that_ships_is_that_of_the_package(small: Path) -> None:
    source = resolve_model("reference")
    student = Student(source.architecture, parse_plan("bk-small", source.architecture), small)
    text = card_text(small, student, source)
    assert "\nlicense: apache-2.0\n" in text
    assert "Apache-2.0, that of prune-lab, with which the parent ships." in text
    assert "Not known" not in text


@pytest.mark.usefixtures("blank_figures")
@pytest.mark.parametrize("card", ["---\nlicense: [\n---\n", "no front matter", ""])
def test_a_parents_card_that_says_nothing(card: str, small: Path, tmp_path: Path) -> None:
    parent, folder = tmp_path / "parent", tmp_path / "moved"
    shutil.copytree(small.parent / "parent", parent)
    shutil.copytree(small, folder)
    (parent / "README.md").write_text(card)
    source = resolve_model(str(parent))
    write_card(folder, parse_plan("bk-small", source.architecture), source)
    head = metadata_load(folder / "README.md")
    assert head is not None
    assert (head["license"], head["license_name"]) == ("other", "not-stated")


@pytest.mark.long
def test_a_student_of_the_shipped_model_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "student"
    found = CliRunner().invoke(
        app, ["prune", str(reference_folder()), "--plan", "bk-base", "--out", str(out)]
    )
    assert found.exit_code == 0, found.output
    run_card(out, monkeypatch)
    assert (out / "picture.png").is_file()


def test_a_card_says_what_the_search_measured(tiny_pipeline_folder: Path) -> None:
    source = resolve_model(str(tiny_pipeline_folder))
    plan = parse_plan("bk-small", source.architecture)
    timed = dataclasses.replace(
        plan, timed="0.665x of the teacher's, in turns, 20 rounds, cpu float32, openvino"
    )
    read = plan_from_json(json.loads(json.dumps(timed.to_json())), source.architecture)
    assert read.timed == timed.timed
    assert "timed" not in plan.to_json()
    said = card._costs(Student(source.architecture, read))
    assert f"One pass takes, as measured, {timed.timed}." in said
    assert "Latency was not measured" not in said
    assert read.built("neutral").timed == ""  # another form takes another time
    assert "Latency was not measured." in card._costs(Student(source.architecture, plan))


def test_the_time_of_a_plan_in_a_file_is_one_line_of_text(tiny_pipeline_folder: Path) -> None:
    architecture = resolve_model(str(tiny_pipeline_folder)).architecture
    value = parse_plan("bk-small", architecture).to_json()
    with pytest.raises(PlanError, match="other things than text"):
        plan_from_json(value | {"timed": 3}, architecture)
    assert "\n" not in plan_from_json(value | {"timed": "a\n# b" * 1000}, architecture).timed
    assert len(plan_from_json(value | {"timed": "a\n# b" * 1000}, architecture).timed) < 400
