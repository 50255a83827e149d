"""``prune-lab doctor``: it names what is missing, damaged, stale or left over in a run, and changes nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import prune_lab as pl
from prune_lab.cli import app
from prune_lab.config import RunConfig
from prune_lab.runs import Manifests, Run
from prune_lab.runs.manifest_files import file_digest, read_manifest
from prune_lab.runtime import write_json
from prune_lab.runtime.holders import temporary_beside
from prune_lab.workflow import forget, start_run
from prune_lab.workflow.steps import STEPS

FOLLOWS = "{} would be made again; what was made from it follows where that changes it"


@pytest.fixture
def copied(finished: Run, tmp_path: Path) -> Run:
    return Run(Path(shutil.copytree(finished.folder, tmp_path / "run")))


def examined(run: Run, exit_code: int = 1) -> list[dict[str, Any]]:
    """The rows of ``doctor RUN --json`` that are not well; the run stays as it was."""
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    found = CliRunner().invoke(app, ["doctor", str(run.folder), "--json"])
    assert found.exit_code == exit_code, found.output
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == before
    rows: list[dict[str, Any]] = json.loads(found.stdout)
    return [row for row in rows if row["state"] not in ("done", "not asked for")]


def test_a_finished_run_is_well(finished: Run) -> None:
    assert examined(finished, 0) == []
    assert set(pl.open_run(finished.folder).doctor().frame()["state"]) == {"done", "not asked for"}


def test_what_is_wrong_is_named_with_its_step(copied: Run) -> None:
    plan_id = copied.plan_ids()[0]
    paths = copied.candidate(plan_id)
    copied.costs.write_text(copied.costs.read_text() + "\n")
    (paths.pruned / "config.json").unlink()
    paths.heldout.write_bytes(b"\0")
    temporary_beside(copied.costs).write_text("half")
    (copied.candidates_dir / ("0" * 12)).mkdir()
    rows = examined(copied)
    assert {(row["step"], row["state"], row["why"]) for row in rows} == {
        ("costs", "redo", "costs.csv was changed"),
        ("candidates", "redo", f"candidates/{plan_id}/pruned/config.json is missing"),
        ("distilled", "redo", f"candidates/{plan_id}/heldout.csv was changed"),
        ("candidates", "may follow", FOLLOWS.format(f"candidates/{plan_id}/pruned")),
        ("pictures", "may follow", FOLLOWS.format(f"candidates/{plan_id}/pruned")),
        ("ranking", "may follow", FOLLOWS.format("costs.csv")),
        ("report", "may follow", FOLLOWS.format(f"candidates/{plan_id}/distilled/model/config.json")),
        ("files", "left over", "of a writer that was stopped"),
        ("files", "left over", "no plan of this run has that id; remove the folder if nobody needs it"),
    }
    labels = {row["of"] for row in rows if row["step"] == "distilled"}
    assert labels == {label for label in labels if label}


def test_half_of_a_training_is_no_damage(copied: Run) -> None:
    plan_id = copied.plan_ids()[0]
    forget(copied, "distilled", plan_ids=[plan_id])
    paths = copied.candidate(plan_id)
    paths.distilled.mkdir()
    paths.checkpoint.write_bytes(b"half")
    found = [row for row in examined(copied) if row["step"] == "distilled"]
    assert [(row["state"], row["why"]) for row in found] == [("to do", "goes on from its checkpoint")]


@pytest.mark.parametrize("content", [None, "", "[distill\n", "[distill]\nstep = 3\n"])
def test_settings_that_cannot_be_read_are_refused_with_the_cure(copied: Run, content: str | None) -> None:
    if content is None:
        copied.config.unlink()
    else:
        copied.config.write_text(content)
    copied.ranking.unlink()
    rows = examined(copied)
    (settings,) = [row for row in rows if row["step"] == "settings"]
    assert settings["state"] == "refused"
    assert f"run --config FILE.toml --run {copied.folder}" in settings["why"]
    assert ("ranking", "ranking.csv is missing") in {(row["step"], row["why"]) for row in rows}


def test_an_edited_setting_is_named(copied: Run) -> None:
    copied.config.write_text(copied.config.read_text().replace("bootstrap = 20", "bootstrap = 21"))
    copied.environment.write_text("{")
    rows = examined(copied)
    assert {row["of"] for row in rows if row["step"] == "settings"} == {"score.bootstrap", "environment.json"}
    assert {"scores", "ranking"} <= {row["step"] for row in rows}


@pytest.mark.parametrize("how", ["delete", "cut", "another part", "another run"])
def test_another_record_of_what_lies_outside_is_named_and_written_anew(
    copied: Run, finished_config: RunConfig, how: str
) -> None:
    path = copied.folder / "manifests" / "origins.json"
    manifest = read_manifest(path)
    assert manifest is not None
    if how == "delete":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif how == "another part":
        shutil.copy(random.Random().choice(sorted(copied.folder.glob("manifests/[!o]*.json"))), path)
    else:
        write_json(path, dataclasses.replace(manifest, run="0" * 16).as_dict())
    (row,) = examined(copied)
    assert row["why"].startswith("manifests/origins.json is ")
    start_run(finished_config, copied.folder)
    assert examined(copied, 0) == []


@pytest.mark.parametrize("size", [0, 7, 2**33])
def test_other_times_of_the_steps_are_named(copied: Run, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def digest(path: Path) -> str:
        read.append(path.name)
        return file_digest(path)

    monkeypatch.setattr("prune_lab.runs.manifests.file_digest", digest)
    with copied.steps.open("r+b") as file:
        file.truncate(size)
    assert [row["why"] for row in examined(copied)] == ["steps.csv was changed"]
    assert "steps.csv" not in read  # it may be endless


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        found = CliRunner().invoke(app, ["doctor", str(folder)])
        assert (found.exit_code, found.stderr.count("\n")) == (2, 1)


# One rule for those that read ---------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content))] ^= 1
    path.write_bytes(content)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def written_files(run: Run) -> list[Path]:
    """The files that steps wrote, without pages and manifests."""
    return sorted(path for path in Manifests(run.folder).listed if run.report_dir not in path.parents)


@pytest.mark.parametrize("damage", [_flip, Path.unlink, pytest.param(_pipe, marks=pytest.mark.long)])
def test_what_the_doctor_would_have_made_again_is_not_shown(
    copied: Run, damage: Callable[[Path], None]
) -> None:
    plan_id = copied.plan_ids()[0]
    weights = copied.candidate(plan_id).distilled_model / "diffusion_pytorch_model.safetensors"
    files = {
        copied.ranking,
        weights,
        copied.candidate(plan_id).profile,
        *random.sample(written_files(copied), 1),
    }
    if damage is Path.unlink:
        files.add(copied.environment)
    for path in sorted(files):
        kept = path.with_name(".kept")
        shutil.copy2(path, kept)
        damage(path)
        name = path.relative_to(copied.folder).as_posix()
        commands = [["report", str(copied.folder)], ["compare", str(copied.folder)]]
        if copied.candidates_dir in path.parents:
            commands.append(
                ["compare", str(copied.candidates_dir / path.relative_to(copied.candidates_dir).parts[0])]
            )
        for command in commands:
            found = CliRunner().invoke(app, command)
            assert (found.exit_code, found.stderr.count("\n"), name in found.stderr) == (2, 1, True), (
                command,
                name,
                found.output,
            )
            assert f"prune-lab run --run {copied.folder}" in found.stderr
            assert "delete" not in found.stderr
        assert any(row["state"] == "redo" and name in row["why"] for row in examined(copied)), name
        path.unlink(missing_ok=True)
        kept.rename(path)


@pytest.mark.long
def test_what_a_run_makes_again_was_named_by_the_doctor(copied: Run) -> None:
    paths = [copied.candidate(plan_id).profile for plan_id in copied.plan_ids()]
    for path in (random.choice(paths), random.choice(written_files(copied))):
        _flip(path)
    told = {row["step"] for row in examined(copied) if row["state"] in ("redo", "may follow")}
    assert {"candidates", "ranking", "report"} <= told
    found = CliRunner().invoke(app, ["run", "--run", str(copied.folder)])
    assert found.exit_code == 0, found.output
    made = set(re.findall(r"^(?:note: )?(\w+)(?: of .*)?: redone, ", found.stderr, re.MULTILINE))
    assert "candidates" in made
    assert made <= told
    assert examined(copied, 0) == []


@pytest.mark.parametrize("step", [step.name for step in STEPS])
def test_every_row_of_the_doctor_has_a_name_of_its_own(copied: Run, step: str) -> None:
    forget(copied, step)
    named = [(row["step"], row["of"]) for row in examined(copied)]
    assert len(set(named)) == len(named)
