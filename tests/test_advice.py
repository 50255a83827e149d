"""What a mistake is answered with holds: it comes before anything is done, and what it advises works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from families_seen import PAGE
from tiny_models import TINY_TRANSFORMERS, tiny_config
from typer.testing import CliRunner

from prune_lab.blocks import architecture_of
from prune_lab.cli import app
from prune_lab.config import DataConfig, RunConfig, SearchConfig, to_toml
from prune_lab.errors import BackendError, DataError, ModelNotFoundError, UnsupportedModelError
from prune_lab.export import CONVERSIONS, Student, export_single_file
from prune_lab.export.edge.parts import drawing_of
from prune_lab.families import FAMILIES
from prune_lab.families.adapter_names import has_additions
from prune_lab.forms import layout_of
from prune_lab.models import load_pipeline, resolve_model
from prune_lab.plans import parse_plan
from prune_lab.probes.latents import check_side, picture_side
from prune_lab.runs import Run
from prune_lab.session import Session
from prune_lab.workflow import check_drawing


def mistake(*words: object) -> str:
    """The one line in which the command line refuses ``words``."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 2, (result.output, result.exception)
    (line,) = result.stderr.strip().splitlines()
    return line


# The size of what is drawn -------------------------------------------------------------------------------------------


def refusal(check: Callable[[], object]) -> str:
    try:
        check()
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["sd3", "flux", "pixart"])
def test_a_size_that_is_not_drawn_is_refused_from_the_files_alone(
    kind: str, pipeline_folder: Callable[[str], Path]
) -> None:
    """As the pipeline that is loaded refuses it, whatever patches and pixels a latent has."""
    source = resolve_model(str(pipeline_folder(kind)))
    pipeline = load_pipeline(source)
    answers = set()
    for side in (*range(1, 34), picture_side(pipeline)):
        settings = RunConfig(model=source.text, data=DataConfig(resolution=side))
        found = refusal(lambda: check_drawing(settings, source, "drawn"))  # noqa: B023
        assert found == refusal(lambda: check_side(pipeline, side))  # noqa: B023
        answers.add(bool(found))
    assert answers == {True, False}


@pytest.mark.long
def test_a_run_that_cannot_draw_its_size_is_not_estimated(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    model, data = str(tiny_pipeline_folder), DataConfig(resolution=7)
    settings = RunConfig(model=model, data=data, search=SearchConfig(budgets=()))
    (tmp_path / "job.toml").write_text(to_toml(settings))
    line = mistake("run", "--config", tmp_path / "job.toml", "--dry-run")
    assert "7 pixels per side" in line
    assert "multiples of" in line


# Runs and where they are called from ---------------------------------------------------------------------------------


def started(folder: Path, model: str) -> Run:
    run = Run(folder)
    run.folder.mkdir()
    run.config.write_text(to_toml(RunConfig(model=model)))
    return run


@pytest.mark.parametrize("words", [("rank",), ("search", "--macs", "90%"), ("score", "--run")])
def test_a_run_is_used_from_another_folder(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model lies elsewhere as seen from there; the line says so, and no other model is proposed alone."""
    run = started(tmp_path / "mine", "t-pixart")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    verb, *more = words
    line = mistake(verb, *more, run.folder) if more == ["--run"] else mistake(verb, run.folder, *more)
    assert f"the run {run.folder}" in line
    assert "'t-pixart' as seen from the folder in which the run was started" in line
    with pytest.raises(ModelNotFoundError, match="call prune-lab in that other folder"):
        _ = Session(run).source


def test_a_model_that_nobody_recorded_is_not_said_to_be_elsewhere(tmp_path: Path) -> None:
    run = started(tmp_path / "mine", "reference")
    line = mistake("score", "t-pixart", "--run", run.folder)
    assert "as seen from" not in line


def test_a_run_is_evaluated_by_its_option(tmp_path: Path) -> None:
    run = started(tmp_path / "mine", "reference")
    assert f"give --run {run.folder}" in mistake("evaluate", run.folder)


# What is known of U-Nets alone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(TINY_TRANSFORMERS)[::6])
def test_what_is_known_of_unets_alone_sends_nobody_round(name: str, tmp_path: Path) -> None:
    """A folder is not advised to who gave one, nor a format that is refused in its turn."""
    config = tiny_config(name)
    architecture = architecture_of(config)
    block = next(block for block in architecture.blocks if block.removable)
    plan = parse_plan(f"-{block.name}", architecture).built("own")
    student = Student(architecture, plan)
    said = []
    for convert in CONVERSIONS.values():
        with pytest.raises(UnsupportedModelError) as refused:
            convert(student, tmp_path / "given.safetensors", tmp_path / "out")
        said.append(str(refused.value))
    exported = []
    for one in (config, layout_of(architecture, plan).config):
        source: Any = SimpleNamespace(config=one, text="mine", has_weights=True)
        with pytest.raises(UnsupportedModelError) as refused:
            export_single_file(source, tmp_path / "out.safetensors")
        exported.append(str(refused.value))
    for line in (*said, *exported):
        assert "this is known of a UNet2DConditionModel alone" in line
        assert "work with its diffusers folder" not in line
    assert all("train another one on the student" in line for line in said)


def test_a_runtime_does_not_send_to_a_format_that_is_refused(pipeline_folder: Callable[[str], Path]) -> None:
    pipeline = load_pipeline(resolve_model(str(pipeline_folder("wan"))))
    with pytest.raises(BackendError) as refused:
        drawing_of(pipeline)
    assert "single-file" not in str(refused.value)
    assert "use it in diffusers" in str(refused.value)


def test_the_page_of_families_says_what_is_known_of_one_class_alone() -> None:
    [name] = [name for name in FAMILIES if has_additions({"_class_name": name})]
    said = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert f"`convert` and `export --to single-file` are known of a `{name}` alone" in said
