"""The run folder: paths, what counts as done, and which folders are read."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from prune_lab.errors import ConfigError, RunError
from prune_lab.runs import FORMAT, CandidatePaths, PathIn, Run, load_run_config, open_run

PLAN_ID = "0123456789ab"


def paths_of(place: Run | CandidatePaths) -> dict[str, Path]:
    names = [name for name, _ in inspect.getmembers(type(place), lambda value: isinstance(value, PathIn))]
    return {name: getattr(place, name) for name in names}


def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert {name: path.relative_to(tmp_path).as_posix() for name, path in paths_of(run).items()} == {
        "config": "config.toml",
        "lock": "writer.lock",
        "environment": "environment.json",
        "blocks": "blocks.csv",
        "probe": "probe.safetensors",
        "importance": "importance.csv",
        "importance_parts": "importance_parts.csv",
        "criteria": "criteria.csv",
        "width_scores_dir": "widths",
        "scores_dir": "scores",
        "comparison_dir": "comparison",
        "costs": "costs.csv",
        "reductions": "reductions.csv",
        "pipeline_profile": "pipeline.csv",
        "data": "data.safetensors",
        "data_dir": "data",
        "captions": "captions.safetensors",
        "choices": "choices.json",
        "sources": "sources.json",
        "validation": "validation.safetensors",
        "plans_dir": "plans",
        "searched": "plans/searched.csv",
        "searches": "plans/searches.csv",
        "gates": "plans/gates.csv",
        "gate_steps": "plans/gate_steps.csv",
        "evolution_dir": "plans/evolution",
        "latency": "latency.json",
        "latency_rounds": "latency_rounds.csv",
        "candidates_dir": "candidates",
        "picture_prompts": "pictures/prompts.csv",
        "curves_dir": "curves",
        "teacher_pictures": "pictures/teacher",
        "ranking": "ranking.csv",
        "repairs": "repairs.csv",
        "tournament": "tournament.csv",
        "steps": "steps.csv",
        "report_dir": "report",
        "report": "report/index.html",
    }
    candidate = run.candidate(PLAN_ID)
    home = tmp_path / "candidates" / PLAN_ID
    assert candidate.folder == home
    assert {name: path.relative_to(home).as_posix() for name, path in paths_of(candidate).items()} == {
        "plan": "plan.json",
        "pruned": "pruned",
        "profile": "profile.json",
        "repair": "repair.csv",
        "repaired": "repaired",
        "kept": "kept.json",
        "recovery": "recovery.csv",
        "heldout": "heldout.csv",
        "grids": "grids",
        "checkpoint": "distilled/checkpoint.safetensors",
        "distilled": "distilled",
        "distilled_model": "distilled/model",
        "pictures_pruned": "pictures/pruned",
        "pictures_distilled": "pictures/distilled",
    }
    assert run.plan(PLAN_ID) == tmp_path / "plans" / f"{PLAN_ID}.json"


def test_asking_for_paths_writes_nothing(tmp_path: Path) -> None:
    run = open_run(tmp_path / "new", must_exist=False)
    paths_of(run)
    run.candidate(PLAN_ID)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("plan_id", ["", "../../etc", "0123456789AB", "0123456789abc", "0123456789ab/x"])
def test_only_ids_become_folder_names(tmp_path: Path, plan_id: str) -> None:
    for ask in (Run(tmp_path).plan, Run(tmp_path).candidate):
        with pytest.raises(RunError, match="12 hexadecimal digits"):
            ask(plan_id)


def test_done_means_there_and_not_empty(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert not run.done(run.blocks)
    run.blocks.touch()
    assert not run.done(run.blocks)
    run.blocks.write_text("name\n")
    assert run.done(run.blocks)

    folder = run.candidate(PLAN_ID).pruned
    folder.mkdir(parents=True)
    assert not run.done(folder)
    (folder / "config.json").write_text("{}")
    assert run.done(folder)


def test_a_missing_step_is_named_with_its_verb(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(RunError, match=r"no importance.csv yet; make it with: prune-lab score --run"):
        run.needs(run.importance, "score")
    run.importance.write_text("group\n")
    assert run.needs(run.importance, "score") == run.importance


def test_plan_ids_are_those_written_down(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.plan_ids() == ()
    run.plans_dir.mkdir()
    for name in ("ffffffffffff.json", f"{PLAN_ID}.json", f".{PLAN_ID}.json.x.tmp", "notes.json", "notes.txt"):
        (run.plans_dir / name).write_text("{}")
    assert run.plan_ids() == (PLAN_ID, "ffffffffffff")


def test_a_run_that_must_exist_does(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="found nothing there"):
        open_run(tmp_path / "missing", must_exist=True)
    with pytest.raises(RunError, match=r"folder without config.toml"):
        open_run(tmp_path, must_exist=True)
    a_file = tmp_path / "file"
    a_file.touch()
    with pytest.raises(RunError, match="found a file"):
        open_run(a_file, must_exist=False)


def test_runs_of_version_0_1_are_refused_in_one_line(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.config.write_text("")
    run.environment.write_text(json.dumps({"python": "3.11.7", "model_digest": "0123"}))
    for must_exist in (True, False):
        with pytest.raises(
            RunError, match=rf"format 1, not {FORMAT}.*start a new run folder, or use the version that wrote"
        ) as caught:
            open_run(tmp_path, must_exist=must_exist)
        assert "\n" not in str(caught.value)
    run.environment.write_text(json.dumps({"format": FORMAT}))
    assert open_run(tmp_path, must_exist=True) == run


def test_damaged_settings_are_told_from_missing_ones(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(RunError, match=r"no config\.toml yet"):
        load_run_config(run)
    run.config.write_text("steps = \n")
    with pytest.raises(ConfigError, match="not TOML"):
        load_run_config(run)
