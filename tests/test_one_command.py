"""A whole job in one command: settings by model and device, the estimate before the start, and the recipes."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import BuiltOnce
from typer.testing import CliRunner, Result

from prune_lab.blocks import block_groups
from prune_lab.cli import app
from prune_lab.config import AUTO, RunConfig, load_config, recipe_names, recipe_path
from prune_lab.families import example_inputs
from prune_lab.models import load_model, resolve_model
from prune_lab.runs import Run
from prune_lab.runtime import pick_dtype
from prune_lab.workflow import estimate, macs_per_second, settings_for, steps_frame
from prune_lab.workflow.sizing import memory_of
from prune_lab.workflow.starting import first_affected


def answer(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def stub(run: Run) -> Path:
    """In place of the report, which takes longer to draw than all the rest."""
    run.report_dir.mkdir(exist_ok=True)
    run.report.write_text("a stub")
    return run.report


# What makes a job quick, and leaves its kind as it is.
QUICK = {
    "distill.steps": 2,
    "distill.batch": 2,
    "distill.warmup": 0,
    "distill.trackers": "[]",
    "rank.eta": 0,
    "data.count": 8,
    "data.steps": 1,
    "probe.samples": 4,
    "probe.timesteps": 2,
    "probe.drawn": 2,
    "probe.steps": 1,
    "score.groups": "block",
    "score.bootstrap": 5,
    "search.count": 1,
    "evaluate.steps": 1,
    "evaluate.prompts": "a cat",
    "profile.runs": 2,
    "profile.warmup": 0,
}


def job(model: object, folder: Path, *more: object) -> tuple[object, ...]:
    quick = [word for name, value in QUICK.items() for word in ("--set", f"{name}={value}")]
    return ("run", model, "--params", "80%", "--run", folder, "--device", "cpu", *quick, *more)


def student_of(folder: Path, model: Path) -> None:
    answer("prune", model, "--plan", "bk-base", "--out", folder)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["pipeline", "student"])
def test_a_strangers_model_goes_through_without_toml_and_data(
    kind: str,
    tiny_pipeline_folder: Path,
    built_once: BuiltOnce,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("prune_lab.workflow.ranking.write_report", stub)
    model, folder = tiny_pipeline_folder, tmp_path / "run"
    if kind == "student":
        model = built_once("one-student", lambda where: student_of(where, tiny_pipeline_folder))
    first = answer(*job(model, folder), "--json")
    ranking = pd.DataFrame(json.loads(first.stdout))
    # BK-SDM's three plans are controls of a full model; a student has none.
    assert set(ranking["origin"]) == {"teacher", "search"} | ({"control"} if kind == "pipeline" else set())
    assert ranking["status"].isin(["teacher", "ranked"]).all()
    assert ranking["loss_after"].notna().all()
    assert ranking[["clip_before", "clip_after"]].isna().all(axis=None)  # nobody judges pictures
    told = [line for line in first.stderr.splitlines() if line.startswith(("probe:", "train:", "validate:"))]
    assert len(told) == 3
    assert all("drawn by the model" in line for line in told)
    assert "scorer:   none" in first.stderr
    shown = first.stderr.splitlines()
    assert 'search.budgets = ["params<=80%"]' in shown[: shown.index(told[0])]
    assert any(line.startswith("estimate: ") for line in shown[: shown.index(told[0])])
    written = load_config(folder / "config.toml")
    assert (written.search.budgets, written.distill.steps) == (("params<=80%",), 2)
    # The same command again computes nothing, and steps alone find their way.
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    answer(*job(model, folder))
    again = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert {path.name for path in again if before.get(path) != again[path]} == set()
    pictures = json.loads(answer("evaluate", "--run", folder, "--json").stdout)
    assert {row["clip"] for row in pictures} == {None}


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    found = answer(
        "run", tiny_pipeline_folder, "--latency", "0.7x", "--run", tmp_path / "run", "--dry-run", "--json"
    )
    rows = {row["step"]: row for row in json.loads(found.stdout)}
    assert {row["state"] for row in rows.values()} == {"to do"}
    assert rows["distilled"]["estimate_seconds"] is not None
    assert 'search.budgets = ["latency<=0.7x"]' in found.stderr
    assert not (tmp_path / "run").exists()
    assert "--run DIR" in answer("run", tiny_pipeline_folder, code=2).stderr
    unknown = answer("run", "--run", tmp_path / "run", code=2).stderr
    assert "give MODEL" in unknown
    assert "found no such folder" in unknown
    refused = answer("run", tiny_pipeline_folder, "--macs", "0%", "--run", tmp_path / "run", code=2)
    assert "error: " in refused.stderr
    assert not (tmp_path / "run").exists()


LEFT_OUT = {"repaired", "data", "distilled", "shares", "pictures", "ranking"}


@pytest.mark.parametrize(
    "verb",
    [
        ("score",),
        ("run", "--macs", "90%"),
        ("run", "--macs", "90%", "--dry-run"),
        ("distill", "--plan", "bk-base"),
    ],
)
def test_pictures_for_a_model_alone_are_refused_and_not_left_out_without_a_word(
    verb: tuple[str, ...], tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    name, *more = verb
    (tmp_path / "pictures").mkdir()
    place = ("--data", tmp_path / "pictures", "--run", tmp_path / "run")
    found = answer(name, tiny_pipeline_folder / "unet", *more, *place, code=2)
    line = found.stderr.strip().splitlines()[-1]
    asked = "distil students of" if name == "distill" else "use the pictures"
    assert line.startswith(f"error: asked to {asked}")
    assert "U-Net alone" in line
    assert "pipeline" in line.split("give", 1)[1]
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_a_model_alone_promises_neither_training_nor_pictures(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    alone = tiny_pipeline_folder / "unet"
    found = answer("run", alone, "--params", "90%", "--run", tmp_path / "run", "--dry-run", "--json")
    rows = {row["step"]: row for row in json.loads(found.stdout)}
    assert {name for name, row in rows.items() if row["state"] == "left out"} == LEFT_OUT
    assert {row["estimate_seconds"] for name, row in rows.items() if name in LEFT_OUT} == {None}
    assert "training" not in found.stderr
    (why,) = [line for line in found.stderr.splitlines() if "left out" in line]
    assert all(name in why for name in LEFT_OUT)
    assert "give the folder of the whole pipeline" in why


@pytest.mark.long
def test_a_run_of_a_model_alone_does_what_its_dry_run_says(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = job(tiny_pipeline_folder / "unet", folder, "--json")
    planned = json.loads(answer(*command, "--dry-run").stdout)
    done = json.loads(answer(*command).stdout)
    states = {"to do": "done", "left out": "left out"}
    assert {row["step"]: row["state"] for row in done} == {
        row["step"]: states[row["state"]] for row in planned
    }
    assert (folder / "report" / "index.html").is_file()
    assert any((folder / "candidates").iterdir())
    assert {row["state"] for row in json.loads(answer("doctor", folder, "--json").stdout)} <= {
        "done",
        "left out",
    }


def test_nothing_of_the_libraries_is_said_at_the_head_of_a_run(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    heard: list[str] = []
    logger, handler = logging.getLogger("diffusers"), logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        answer("run", tiny_pipeline_folder, "--params", "90%", "--run", tmp_path / "run", "--dry-run")
    finally:
        logger.removeHandler(handler)
    assert heard == []


@pytest.mark.parametrize("name", ["data.limit=24", "data.caption_column=text", "data.outside=true"])
@pytest.mark.parametrize("model", ["reference", "drawing"])
def test_a_setting_of_own_pictures_is_refused_for_others(
    tiny_pipeline_folder: Path, tmp_path: Path, name: str, model: str
) -> None:
    instead = {"reference": "distill.pictures", "drawing": "data.count"}[model]
    named = "reference" if model == "reference" else tiny_pipeline_folder
    for dry in ((), ("--dry-run",)):
        refused = answer("run", named, "--run", tmp_path / "run", "--set", name, *dry, code=2).stderr
        assert refused.count("\n") == 1
        assert f"asked for {name.split('=', maxsplit=1)[0]}" in refused
        assert "data.source" in refused
        assert (instead in refused) == ("limit" in name)
    assert not (tmp_path / "run").exists()


# Settings by model and device --------------------------------------------------------------------------------------


@pytest.mark.long
def test_settings_follow_from_the_size_of_model_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    full = resolve_model("sd-v1.5").architecture
    small = resolve_model("reference").architecture
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    on_gpu = settings_for(full, gpu, 24 * 2**30, "pictures")
    assert (on_gpu.dtype, on_gpu.distill.batch, on_gpu.rank.eta) == ("bfloat16", 64, 3)
    assert (on_gpu.data.source, on_gpu.search.controls, on_gpu.device) == ("pictures", (AUTO,), "cuda")
    slow = settings_for(full, cpu, 64 * 2**30)
    assert (slow.dtype, slow.distill.steps, slow.search.controls) == ("float32", 40, ())
    assert settings_for(small, gpu, 24 * 2**30).dtype == "float32"
    assert settings_for(small, cpu, 8 * 2**30).distill.steps == 200
    # Activations are given up where they do not fit: four samples beside one student.
    assert [settings_for(full, gpu, size * 2**30).distill.gradient_checkpointing for size in (80, 20)] == [
        False,
        True,
    ]


def test_an_estimate_counts_the_passes_of_each_step(small_run_config: Callable[..., RunConfig]) -> None:
    config = small_run_config(
        data={"source": "", "count": 10, "steps": 5, "guidance": 7.5},
        probe={"samples": 6, "drawn": 3, "steps": 4},
        score={"groups": ("block",)},
        search={"budgets": ("params<=50%",), "controls": ("bk-tiny",)},
        distill={"steps": 20, "batch": 3, "validate_every": 10},
        evaluate={"prompts": ("a", "b"), "steps": 2, "guidance": 2.0},
    )
    architecture = resolve_model(config.model).architecture
    macs = architecture.total_macs
    found = estimate(
        config, architecture, "drawn", dtype=torch.float32, speed=macs, free=2**34
    )  # a pass a second
    assert found.seconds["data"] == pytest.approx(10 * 5 * 2)
    assert found.seconds["probe"] == pytest.approx(3 * 4 * 2)
    assert found.seconds["scores"] == pytest.approx(6 * len(block_groups(architecture, "block")) / 1.7)
    assert found.seconds["plans"] == 0
    # Two students of half the size at most: teacher, and forward and backward of the student.
    half = int(architecture.total_params * 0.5) / architecture.total_params
    assert found.seconds["distilled"] == pytest.approx(
        2 * 20 * 3 * (1 + 3 * half) + 6 * 2 * (2 + 2) * half, rel=1e-3
    )
    assert found.seconds["pictures"] == pytest.approx(2 * 2 * 2 * (1 + 4 * half), rel=1e-3)
    own = estimate(config, architecture, "own", dtype=torch.float32, speed=None, free=2**34)
    assert own.seconds == {}
    assert "time unknown" in own.line
    assert found.disk > own.disk


# Recipes -----------------------------------------------------------------------------------------------------------

CARDS = {"24gb": 24 * 10**9, "80gb": 80 * 10**9}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long if name.startswith("sdxl") else ())
        for name in recipe_names()
    ],
)
def test_a_recipe_fits_into_its_card(name: str) -> None:
    config = load_config(recipe_path(name))
    architecture = resolve_model(config.model).architecture
    shares = [
        float(text.removeprefix("params<=").removesuffix("%")) / 100
        for text in config.search.budgets
        if text.endswith("%")
    ]
    share = max(shares, default=0.6741)  # of Base, the largest of BK-SDM's students
    how = config.distill
    memory = memory_of(
        architecture,
        dtype=pick_dtype(config.dtype),
        checkpointing=how.gradient_checkpointing,
        free=CARDS[name.split("-")[1]],
        share=share,
    )
    assert memory.fit(how.together, how.micro_batch) == (how.together, how.micro_batch)
    assert how.batch % how.micro_batch == 0
    assert (how.precision, config.device) == ("bfloat16", "cuda")
    if not name.startswith("sdxl"):  # the published settings, arXiv:2305.15798 and its code
        assert (how.learning_rate, how.weight_decay, how.caption_dropout) == (5e-5, 1e-2, 0.0)
        assert how.batch in (64, 256) if name.startswith("sd15") else how.batch == 128


def test_recipes_are_listed_shown_and_refused_for_other_models(tmp_path: Path) -> None:
    rows = json.loads(answer("run", "--recipe", "list", "--json").stdout)
    assert [row["recipe"] for row in rows] == list(recipe_names())
    assert len(rows) == 6
    shown = answer("run", "--recipe", "sd15-24gb", "--dry-run", "--json")
    assert "distill.batch = 64" in shown.stderr
    assert "estimate: " in shown.stderr
    assert answer("run", "sd-v1.4", "--recipe", "sd15-24gb", "--dry-run", "--json").stdout == shown.stdout
    refused = answer("run", "sdxl-base", "--recipe", "sd15-24gb", "--run", tmp_path / "run", code=2)
    assert "these fit: sdxl-24gb, sdxl-80gb" in refused.stderr
    assert "there are sd15-24gb" in answer("run", "--recipe", "sd3", "--dry-run", code=2).stderr
    assert not (tmp_path / "run").exists()


# Settings that are read earlier than they are declared ---------------------------------------------------------------


def test_a_tournament_that_asks_for_clip_reads_how_pictures_are_drawn(
    small_run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    plain = small_run_config()
    played = dataclasses.replace(plain, rank=dataclasses.replace(plain.rank, eta=2))
    scored = small_run_config(score={"also": ("image-change",)})
    drawn = small_run_config(data={"source": ""})
    changed = ["evaluate.prompts"]
    assert first_affected(changed, plain) == "pictures"
    assert first_affected(changed, played) == "distilled"
    assert first_affected(changed, scored) == "scores"
    assert first_affected(["evaluate.guidance"], drawn) == "probe"
    assert len(steps_frame(played, tmp_path / "none"))


@pytest.mark.parametrize("seed", [2**63, 10**30])
def test_a_seed_beyond_64_bits_is_refused(seed: int, tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    for verb in (("score", tiny_pipeline_folder), ("run", tiny_pipeline_folder)):
        found = answer(*verb, "--seed", seed, "--run", tmp_path / "run", code=2)
        assert f"asked for --seed {seed}; a seed is a whole number from 0 to {2**63 - 1}" in found.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_the_largest_seed_works(tiny_pipeline_folder: Path) -> None:
    quick: tuple[Any, ...] = ("--samples", 2, "--groups", "stage", "--set", "score.bootstrap=1")

    def impacts(seed: int) -> list[float]:
        found = answer(
            "score", tiny_pipeline_folder, "--seed", seed, *quick, "--set", "probe.steps=1", "--json"
        )
        return [row["impact"] for row in json.loads(found.stdout)]

    largest = 2**63 - 1
    first = impacts(largest)
    assert len(first) > 1
    assert impacts(largest) == first
    assert impacts(largest - 1) != first  # nor is it cut off, as 64-bit floats cut it


def test_the_speed_of_a_small_model_is_measured_on_itself() -> None:
    """Its operators take longer to start than to compute, so a convolution of SD's size says too little."""
    cpu, small = torch.device("cpu"), resolve_model("reference").architecture
    inputs = example_inputs(small.config, batch=2, tokens=small.tokens)
    unet = load_model(resolve_model("reference"))
    times = []
    with torch.inference_mode():
        for _ in range(3):
            start = time.perf_counter()
            unet(**inputs)
            times.append(time.perf_counter() - start)
    expected = 2 * small.total_macs / min(times)
    found = macs_per_second(small, cpu, torch.float32)
    assert expected / 4 < found < expected * 4
    assert macs_per_second(resolve_model("sd-v1.5").architecture, cpu, torch.float32) > found
