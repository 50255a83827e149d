"""Ranking by successive halving in a run, and the verbs that distil: what they train, drop, resume and write."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import BuiltOnce
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import prune_lab.engines.local as local
from prune_lab.cli import app
from prune_lab.config import RankConfig, RunConfig, load_config
from prune_lab.distill import load_heldout, load_recovery
from prune_lab.runs import CandidatePaths, Run, open_run
from prune_lab.session import Session, ensure_data, training_and_validation
from prune_lab.workflow import (
    ensure_candidates,
    ensure_distilled,
    ensure_ranking,
    ensure_scores,
    start_run,
)

PLANS = ("bk-base", "bk-small", "bk-tiny", "-Dn1.R2 -Dn1.A2 -Up4.R2 -Up4.A2")


@pytest.fixture(scope="session")
def config(small_run_config: Callable[..., RunConfig]) -> RunConfig:
    """Four plans, rungs at 2 and 4 steps."""
    return small_run_config(
        probe={"samples": 8, "timesteps": 4},
        score={"batch": 8, "bootstrap": 20, "groups": ("block",)},
        search={"controls": PLANS},
        distill={"steps": 4, "learning_rate": 1e-3, "validate_every": 4},
        rank={"eta": 2, "first": 2},
        evaluate={"guidance": 2.0},
    )


def student_weights(paths: CandidatePaths) -> dict[str, torch.Tensor]:
    return load_file(paths.distilled_model / "diffusion_pytorch_model.safetensors")


def equal(one: CandidatePaths, other: CandidatePaths) -> bool:
    left, right = student_weights(one), student_weights(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="session")
def built(built_once: BuiltOnce, config: RunConfig) -> Path:
    """The folder of a run with scores and four candidates that nobody has trained; copy it to go on."""

    def build(folder: Path) -> None:
        session = Session(start_run(config, folder))
        ensure_scores(session)
        ensure_candidates(session)
        ensure_data(session)

    return built_once("tournament-built", build)


@pytest.fixture(scope="session")
def played(built_once: BuiltOnce, built: Path) -> Run:
    """A run whose tournament has been played; read it, copy it to change it."""

    def play(folder: Path) -> None:
        shutil.copytree(built, folder)
        ensure_distilled(Session(Run(folder)))

    return Run(built_once("tournament-played", play))


def started(built: Path, config: RunConfig, folder: Path) -> Run:
    """A copy of ``built`` in ``folder`` that goes on with the settings ``config``."""
    shutil.copytree(built, folder)
    return start_run(config, folder)


# The tournament ----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_half_of_them_go_on_and_wasted_work_is_none(
    played: Run, built: Path, config: RunConfig, tmp_path: Path
) -> None:
    frame = pd.read_csv(played.tournament)
    assert frame.groupby("rung")["steps"].unique().map(list).tolist() == [[2], [4]]
    first = frame[frame["rung"] == 1]
    assert set(first["name"]) == set(played.plan_ids())
    kept = set(first.loc[first["fate"] == "kept", "name"])
    assert 2 <= len(kept) <= 4
    assert set(frame.loc[frame["rung"] == 2, "name"]) == kept
    whole = started(built, dataclasses.replace(config, rank=RankConfig()), tmp_path / "whole")
    ensure_distilled(Session(whole))
    for plan_id in played.plan_ids():
        paths, recovery = played.candidate(plan_id), load_recovery(played.candidate(plan_id).folder)
        assert recovery is not None
        assert recovery.steps == (4 if plan_id in kept else 2)
        assert not paths.checkpoint.exists()
        if plan_id in kept:  # as if it had never been looked at on the way
            assert equal(paths, whole.candidate(plan_id))
        losses = load_heldout(paths.folder)
        row = first.set_index("name").loc[plan_id]
        assert row["loss"] == pytest.approx(losses.loc[2].mean())


@pytest.mark.long
def test_who_is_kept_are_the_best_by_paired_losses(played: Run) -> None:
    rows = pd.read_csv(played.tournament)
    rows = rows[rows["rung"] == 1].set_index("name")
    order = rows["loss"].sort_values().index
    last = order[1]
    losses = {name: load_heldout(played.candidate(name).folder).loc[2].to_numpy() for name in order}
    for name in order[2:]:
        gaps = losses[name] - losses[last]
        from scipy import stats

        low = stats.t.interval(0.95, len(gaps) - 1, gaps.mean(), gaps.std(ddof=1) / np.sqrt(len(gaps)))[0]
        assert (rows.loc[name, "fate"] == "dropped") == (low > 0) or rows.loc[name, "reason"].startswith(
            "at rung 1 of 2, 2 steps: tied with the last survivor, but"
        )


@pytest.mark.long
def test_an_interrupted_tournament_decides_the_same(
    played: Run, built: Path, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(built, config, tmp_path / "again")
    train_to = local.train_to

    def stopping(session: Session, candidates: Any, steps: int, **more: Any) -> None:
        if steps == 4:
            raise KeyboardInterrupt
        train_to(session, candidates, steps, **more)

    with monkeypatch.context() as patch:
        patch.setattr(local, "train_to", stopping)
        with pytest.raises(KeyboardInterrupt):
            ensure_distilled(Session(run))
    assert not run.done(run.tournament)
    ensure_distilled(Session(run))
    pd.testing.assert_frame_equal(pd.read_csv(run.tournament), pd.read_csv(played.tournament))
    assert all(equal(run.candidate(one), played.candidate(one)) for one in run.plan_ids())


@pytest.mark.long
def test_the_ranking_names_everyone(played: Run, tmp_path: Path) -> None:
    run = Run(Path(shutil.copytree(played.folder, tmp_path / "run")))
    ensure_scores(Session(run))
    ranking = ensure_ranking(Session(run))
    frame = ranking.frame()
    assert set(frame["plan_id"]) == {"teacher", *run.plan_ids()}
    candidates = frame[frame["plan_id"] != "teacher"]
    assert candidates["rank"].tolist() == [1, 2, 3, 4]
    assert candidates["tie_group"].notna().all()
    rungs = pd.read_csv(run.tournament).groupby("name")["rung"].max()
    assert dict(zip(candidates["plan_id"], candidates["rung"], strict=True)) == rungs.to_dict()
    for entry in ranking.entries:
        if entry.status == "dropped":
            assert entry.reason.startswith("at rung 1 of 2, 2 steps: ")
            assert entry.result.steps == 2


# Own pictures ------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_pictures(tmp_path: Path) -> Path:
    """Twenty captioned pictures of one colour each, as a folder that ``datasets`` reads."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for number in range(20):
        Image.new("RGB", (40, 32), (10 * number, 250 - 10 * number, 128)).save(folder / f"{number:02}.png")
        rows.append(json.dumps({"file_name": f"{number:02}.png", "text": f"shade {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


def test_own_pictures_are_held_out_and_never_trained_on(
    config: RunConfig, own_pictures: Path, tmp_path: Path
) -> None:
    data = dataclasses.replace(config.data, source=str(own_pictures))
    run = start_run(dataclasses.replace(config, data=data), tmp_path / "run")
    training, validation = training_and_validation(Session(run))
    # A quarter of the pictures is for the probe, a quarter for validation: eight rows of five pictures.
    assert (len(training), len(validation)) == (10, 8)
    everything = torch.arange(10)
    means = training.rows(everything, torch.zeros(10, dtype=torch.int64)).mean.flatten(1)
    noise_free = validation.noisy.flatten(1)
    assert torch.cdist(means, means).fill_diagonal_(1).min() > 1e-6  # all pictures differ
    schedule = Session(run).pipeline.scheduler
    kept = schedule.alphas_cumprod[validation.timesteps].reshape(-1, 1)
    clean = (noise_free - (1 - kept).sqrt() * validation.noise.flatten(1)) / kept.sqrt()
    assert torch.cdist(clean, means).min() > 1e-3


# Verbs -------------------------------------------------------------------------------------------------------------


def answer(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.mark.long
def test_distill_a_model_with_own_pictures(
    tiny_pipeline_folder: Path, own_pictures: Path, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    out = tmp_path / "student"
    words = ["distill", tiny_pipeline_folder, "--plan", "bk-tiny", "--data", own_pictures, "--steps", 3]
    words += [
        "--batch",
        2,
        "--set",
        "distill.loss_variant=normalised",
        "--device",
        "cpu",
        "--out",
        out,
        "--json",
    ]
    toml = tmp_path / "small.toml"
    toml.write_text(f"model = {json.dumps(str(tiny_pipeline_folder))}\n[probe]\nsamples = 8\ntimesteps = 4\n")
    # settings that have no flag come from the TOML, and then the plans do too
    toml.write_text(
        toml.read_text() + '[search]\nbudgets = []\ncontrols = ["bk-tiny"]\n[profile]\nruns = 2\n'
    )
    (row,) = json.loads(answer(*words, "--config", toml).stdout)
    assert (row["plan"], row["status"], row["steps"]) == ("bk-tiny", "done", 3)
    pipeline = StableDiffusionPipeline.from_pretrained(out)
    picture = pipeline("shade 3", num_inference_steps=1, output_type="np").images[0]
    assert picture.shape == (32, 32, 3)
    run = open_run(out.with_name("student.run"), must_exist=True)
    assert load_config(run.config).distill.loss_variant == "normalised"
    (plan_id,) = run.plan_ids()
    trained = student_weights(run.candidate(plan_id))
    assert all(torch.equal(tensor, pipeline.unet.state_dict()[name]) for name, tensor in trained.items())
    assert (run.curves_dir / "distillation").is_dir()
    cut = load_file(run.candidate(plan_id).pruned / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(cut[name], trained[name]) for name in cut)
    assert "asked to write the folder" in answer(*words, "--config", toml, code=2).stderr


@pytest.mark.long
def test_rank_by_budget(built: Path, config: RunConfig, tmp_path: Path) -> None:
    run = started(built, dataclasses.replace(config, rank=RankConfig()), tmp_path / "run")
    words = ["rank", run.folder, "--budget-steps", 4, "--eta", 2, "--set", "rank.first=2", "--json"]
    rows = json.loads(answer(*words).stdout)
    assert next(row["status"] for row in rows) == "teacher"
    assert {row["steps"] for row in rows[1:]} <= {2, 4}
    assert (run.tournament).is_file()
    assert load_config(run.config).rank.eta == 2
    assert json.loads(answer(*words).stdout) == rows
    other = ["rank", run.folder, "--budget-steps", 5, "--eta", 2, "--set", "rank.first=2"]
    assert "--force to redo it from the step 'distilled'" in answer(*other, code=2).stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("distill", "reference"), "give --out DIR or --run DIR"),
        (("distill", "reference", "--out", "x"), "give --plan, such as"),
        (
            ("distill", "reference", "--out", "x", "--plan", "bk-tiny", "--set", "distill.loss_variant=y"),
            "one of raw, norm",
        ),
        (("rank", "reference"), "found no run folder there"),
        (("rank",), "give RUN"),
    ],
)
def test_mistakes_cost_one_line(
    words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in answer(*words, code=2).stderr
    assert not list(tmp_path.iterdir())
