"""What a user is told is so: whom models are compared with, how long it takes, what to type next, what was left out."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import TINY_UNET, BuiltOnce, figures_left_blank
from synthetic_run import write_run
from tiny_models import tiny_config
from typer.testing import CliRunner

import prune_lab as pl
from prune_lab.api import making
from prune_lab.blocks import Architecture, architecture_of
from prune_lab.cli import app
from prune_lab.config import RunConfig, to_toml
from prune_lab.errors import NonNativePlanError, RunError, UnsupportedModelError
from prune_lab.export import card, export_single_file, student_in
from prune_lab.export.students import Student
from prune_lab.families import is_own
from prune_lab.forms import layout_of
from prune_lab.models import resolve_model
from prune_lab.plans import native_layout, parse_plan
from prune_lab.profiling import cost_table
from prune_lab.report import write_report
from prune_lab.report.page import _to_paste
from prune_lab.report.sections import _of_ranked
from prune_lab.runs import Run
from prune_lab.runtime import progress, track
from prune_lab.search import Constraints, parse_budget
from prune_lab.surgery import prune_pipeline
from prune_lab.workflow import compared_with, estimate, searching

UNET2D: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}

# Compared with the right model ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(built_once: BuiltOnce, tiny_pipeline_folder: Path, tiny_unet_shared: Any) -> Path:
    """The student of test_students_used, built once for both."""
    plan = parse_plan("bk-small", architecture_of(tiny_unet_shared))
    source = resolve_model(str(tiny_pipeline_folder))
    return built_once("student", lambda folder: prune_pipeline(source, plan, folder))


def test_a_student_is_compared_with_the_model_that_stands_first(
    student: Path, tiny_pipeline_folder: Path
) -> None:
    table = pl.compare(tiny_pipeline_folder, student, "bk-tiny")
    assert str(tiny_pipeline_folder) in table.title
    frame = table.frame().set_index("kind")
    costs = cost_table(resolve_model(str(tiny_pipeline_folder)).architecture)
    written = student_in(student, str(tiny_pipeline_folder)).plan
    cut = frame.loc["model"].iloc[1]
    assert cut["macs_change"] == pytest.approx(costs.of(written).macs / costs.total.macs - 1)
    assert (cut["blocks_removed"], cut["native"]) == (len(written.removed), True)
    assert frame.loc["model"].iloc[0]["macs_change"] == 0


def test_of_a_student_that_stands_first_it_is_the_teacher(
    student: Path, tiny_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert compared_with([str(student)]) == (str(student), ())  # its teacher is not here
    (tmp_path / tiny_pipeline_folder.name).symlink_to(tiny_pipeline_folder)
    monkeypatch.chdir(tmp_path)
    assert compared_with([str(student)]) == (tiny_pipeline_folder.name, (str(student),))
    (tmp_path / tiny_pipeline_folder.name).unlink()
    (tmp_path / tiny_pipeline_folder.name).symlink_to(student)  # another model of the name
    assert compared_with([str(student)])[0] == str(student)


def test_where_no_model_stands_first_it_is_that_of_the_run_or_the_shipped_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text('model = "transformer"\n')
    assert compared_with([str(run), "-B2"]) == ("transformer", (str(run), "-B2"))
    assert compared_with(["bk-small"]) == ("reference", ("bk-small",))


# The command to copy -------------------------------------------------------------------------------------------------


NAMED = "models/flux"


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        (NAMED, NAMED),
        ("../models/flux", "PATH/TO/flux"),
        ("{here}/models/flux", "PATH/TO/flux"),
        ("{elsewhere}/sd", "PATH/TO/sd"),
        ("reference", "reference"),
        ("someone/their-model", "someone/their-model"),
    ],
)
def test_the_command_of_the_report_names_the_model_from_where_it_is_pasted(
    model: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere = tmp_path / "work", tmp_path / "private"
    (here / "models" / "flux").mkdir(parents=True)
    (elsewhere / "sd").mkdir(parents=True)
    monkeypatch.chdir(here)
    named = model.format(here=here, elsewhere=elsewhere)
    assert _to_paste(named) == wanted
    if model != NAMED:  # a page of one is enough
        return
    run = Run(write_run(here / "runs" / "mine", upto="costs"))
    text = run.config.read_text()
    run.config.write_text(re.sub(r"(?m)^model = .*$", f'model = "{named}"', text))
    with figures_left_blank():
        page = write_report(run).read_text()
    data = re.search(r'id="live-data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert json.loads(data[1])["model"] == wanted
    assert str(tmp_path) not in page


# Estimates -----------------------------------------------------------------------------------------------------------


def test_an_estimate_is_of_the_size_that_is_drawn() -> None:
    architecture = architecture_of(tiny_config("WanTransformer3DModel"))
    config = RunConfig(model="wan")
    how: dict[str, Any] = {"dtype": torch.float32, "speed": 1e9, "free": 2**34}
    whole = estimate(config, architecture, "drawn", **how)
    small = estimate(config, architecture, "drawn", **how, latent=4)
    share = cost_table(architecture, latent=4).total.macs / architecture.total_macs
    assert share < 0.1
    for step in ("scores", "data", "distilled", "pictures"):
        assert small.seconds[step] == pytest.approx(share * whole.seconds[step])
    # what a process of its own and the figures take has nothing to do with the size
    assert share * whole.seconds["candidates"] + 1 < small.seconds["candidates"] < whole.seconds["candidates"]
    assert small.seconds["report"] == whole.seconds["report"] > 1
    assert small.memory < whole.memory


def test_timing_that_takes_long_says_so_and_how_it_takes_less(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr(making, "note", heard.append)
    monkeypatch.setattr(making, "SMALL_MACS", 0)
    architecture = architecture_of(UNET2D)
    speed = architecture.total_macs / 40  # 40 seconds a pass
    monkeypatch.setattr(making, "macs_per_second", lambda *_, **__: speed)
    source: Any = SimpleNamespace(architecture=architecture)
    making._note_long_timing(source, {}, {}, 45, "480 x 480 pixels, 21 latent frames")
    making._note_long_timing(source, {}, {}, 1, "480 x 480 pixels")
    (line,) = heard
    assert "about 30 min" in line
    assert "--resolution or --frames take less" in line


def test_a_run_of_a_toml_is_estimated_too(
    small_run_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job.toml").write_text(to_toml(small_run_config()))

    def run_all(*_: object, **__: object) -> None:
        raise RunError("far enough")

    monkeypatch.setattr("prune_lab.workflow.run_all", run_all)
    found = CliRunner().invoke(
        app, ["run", "--config", str(tmp_path / "job.toml"), "--run", str(tmp_path / "run")]
    )
    assert found.stderr.startswith("estimate: ")


# Plans of another form -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def architecture() -> Architecture:
    return architecture_of(TINY_UNET)


@pytest.mark.parametrize(
    ("cheap", "budget", "said"),
    [
        ("-Dn1.R1 -Up1.R1 -Up2.R1 -Dn1.A1 -Up2.A1", "macs<=95%", True),
        ("bk-base", "macs<=bk-base", False),
        ("bk-base", "macs<=95%", False),  # a fourth of an impact that is next to nothing already
    ],
)
def test_a_far_better_plan_of_another_form_is_worth_a_line(
    architecture: Architecture, cheap: str, budget: str, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Single blocks leave few stages natively: where others of theirs are dear, own code is far better."""
    heard: list[str] = []
    monkeypatch.setattr(searching, "note", heard.append)
    impacts = {block.name: 1.0 for block in architecture.blocks if block.removable}
    impacts |= dict.fromkeys(parse_plan(cheap, architecture).removed, 0.001)
    costs = cost_table(architecture)
    budgets = (parse_budget(budget, architecture, costs),)
    table: Any = SimpleNamespace(block_impacts=lambda: impacts)
    question: Any = SimpleNamespace(
        problem=(architecture, costs, budgets),
        importance=table,
        constraints=Constraints(),
        asked=budget,
    )
    monkeypatch.setattr(
        searching, "predicted_impact", lambda plan, _: sum(impacts[name] for name in plan.removed)
    )
    native = searching.search_plans(architecture, table, costs, budgets)
    searching._note_better_form(question, native)
    assert bool(heard) == said
    assert all("--form own" in line and budget in line for line in heard)


# What is judged ------------------------------------------------------------------------------------------------------


def test_what_evaluate_cannot_measure_has_a_reason(pipeline_folder: Any) -> None:
    folder = str(pipeline_folder("ddpm"))
    found = CliRunner().invoke(
        app, ["evaluate", folder, folder, "--json", "--prompt", "a", "--set", "evaluate.steps=1"]
    )
    assert found.exit_code == 0, found.output
    rows = json.loads(found.stdout)
    assert len(rows) == 2
    for row in rows:
        assert row["loss"] is row["clip"] is None
        assert re.fullmatch(r"loss: .*--data DIR.*; clip: .*reads no text.*", row["not_measured"])
    assert "guidance" not in found.stderr
    assert found.stderr.count("probe:") == 1


# Messages ------------------------------------------------------------------------------------------------------------


def test_an_export_that_no_form_makes_possible_does_not_ask_for_another_form(tmp_path: Path) -> None:
    architecture = architecture_of(UNET2D)
    own = layout_of(architecture, parse_plan("-Md.A1", architecture).built("own")).config
    assert is_own(own)
    source: Any = SimpleNamespace(has_weights=True, config=own, text="small")
    with pytest.raises(UnsupportedModelError, match="alone: use its folder in diffusers"):
        export_single_file(source, tmp_path / "x.safetensors")


@pytest.mark.parametrize("removed", ["-Dn1.R2", "-Up4.R2", "-Up4.R2 -Up4.R3", "-Dn2.R2 -Dn1.R1"])
def test_what_a_refused_plan_is_told_to_remove_makes_the_stages_fit(
    architecture: Architecture, removed: str
) -> None:
    with pytest.raises(NonNativePlanError) as refused:
        native_layout(architecture, parse_plan(removed, architecture))
    told = re.search(r"remove (\d) more in (\w+), or (\d) fewer in (\w+)", str(refused.value))
    assert told is not None, refused.value
    kept = _kept(refused)
    kept[told[2]] -= int(told[1])
    down, up = sorted(kept, key=lambda stage: stage.startswith("Up"))
    assert kept[up] == kept[down] + 1
    assert told[1] == told[3]
    assert {told[2], told[4]} == set(kept)


def _kept(refused: pytest.ExceptionInfo[NonNativePlanError]) -> dict[str, int]:
    found = re.search(r"(\w+) would keep (\d) residual blocks and (\w+) (\d)", str(refused.value))
    assert found is not None
    return {found[1]: int(found[2]), found[3]: int(found[4])}


# Names ---------------------------------------------------------------------------------------------------------------


def test_a_plan_has_a_title_that_a_person_reads(architecture: Architecture) -> None:
    assert parse_plan("bk-small", architecture).title == "bk-small"
    assert parse_plan("-Dn1.R2 -Dn1.A2", architecture).title == "-Dn1.R2 -Dn1.A2"
    long = parse_plan("bk-tiny", architecture)
    assert dataclasses.replace(long, names=()).title == long.id


def test_a_step_with_nothing_to_do_is_not_told() -> None:
    written: list[str] = []
    token = progress._reporter.set(progress.Lines(written.append, lambda: 0.0))
    try:
        assert list(track([], "building candidates")) == []
        assert list(track([1], "timing")) == [1]
    finally:
        progress._reporter.reset(token)
    assert {line.split(":")[0] for line in written} == {"timing"}


def test_a_card_says_where_the_plan_lies_and_names_the_blocks(
    student: Path, tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = student_in(student, str(tiny_pipeline_folder))
    text = card.card_text(student, built, resolve_model(str(tiny_pipeline_folder)))
    assert "The plan is in `unet/plan.json`" in text
    assert "in `unet/provenance.json`" in text
    drawn: list[Any] = []
    monkeypatch.setattr(card, "save_png", lambda figure, *_: drawn.append(figure))
    plain = parse_plan("-Dn1.R2 -Dn1.A2", built.architecture)
    card.write_map(tmp_path / "map.png", Student(built.architecture, plain))
    (axes,) = drawn[0].axes
    assert axes.get_title(loc="left").startswith("-Dn1.R2 -Dn1.A2")
    words = [one.get_text() for one in axes.texts]
    assert words.count("R2") == 9  # of the stages of this U-Net
    assert len(list(filter(None, words))) == 38 + len(built.architecture.stages)


def test_savings_of_a_model_without_named_plans_are_those_of_its_ranking() -> None:
    teacher = pd.DataFrame(
        [{"model": "flux", "plan": "teacher", "blocks_removed": 0, "params": 100, "params_change": 0.0}]
    ).assign(macs=200, macs_change=0.0, paper_macs=50, paper_macs_change=0.0, uncounted="", median_ms=3.0)
    ranked = pd.DataFrame(
        [
            {"origin": "teacher", "plan": "teacher", "blocks_removed": 0, "params": 100},
            {"origin": "search", "plan": "best", "blocks_removed": 3, "params": 80},
        ]
    ).assign(macs=[200, 100], paper_macs=[50, 40], median_ms=[3.0, 2.0])
    found = _of_ranked(teacher, ranked)
    assert found["plan"].tolist() == ["teacher", "best"]
    assert found["params_change"].tolist() == pytest.approx([0, -0.2])
    assert found["macs_change"].tolist() == pytest.approx([0, -0.5])
    assert "median_ms" not in found
