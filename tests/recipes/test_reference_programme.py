"""What makes the reference model: its command line, its recipe in TOML, all of it in small, the report."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPModel
from typer.testing import CliRunner

from prune_lab.assets import decode_pictures, load_pictures, reference_folder
from prune_lab.errors import ConfigError, DataError
from prune_lab.probes import make_probe, predict
from recipes.reference_model.__main__ import app
from recipes.reference_model.build import train_reference
from recipes.reference_model.evaluate import (
    Sampling,
    as_float32,
    evaluate_reference,
    loss_by_timestep,
    thinned,
)
from recipes.reference_model.settings import read_recipe

TINY_RECIPE = """
[tokenizer]
vocabulary = 700
length = 12
[autoencoder]
channels = [8, 8, 8]
groups = 4
[autoencoder_training]
steps = 2
batch = 4
[clip]
text_width = 16
text_layers = 1
picture_width = 16
picture_layers = 1
heads = 2
patch = 16
shared = 16
[clip_training]
steps = 2
batch = 8
[text_encoder_training]
steps = 2
batch = 4
[denoiser]
channels = [8, 8, 8, 8]
heads = 2
groups = 4
text_width = 16
[denoiser_training]
steps = 2
batch = 4
"""


def test_reference_verbs_have_help() -> None:
    assert "--assets" in CliRunner().invoke(app, ["evaluate", "--help"]).stdout
    assert "--work" in CliRunner().invoke(app, ["train", "--help"]).stdout


@pytest.mark.long
def test_a_mistake_ends_the_programme_with_one_line_and_exit_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "recipes.reference_model", "train", "--work", str(tmp_path / "work")]
    found = subprocess.run(
        [*command, "--config", str(tmp_path / "no.toml")],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (found.returncode, found.stdout) == (2, "")
    line = found.stderr.strip()
    assert line.startswith("error: the recipe ")
    assert line.count("\n") == 0
    assert not (tmp_path / "work").exists()


def test_many_processes_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    answer = CliRunner().invoke(
        app, ["train", "--work", str(tmp_path), "--config", str(tmp_path / "no.toml")]
    )
    assert answer.exit_code == 2
    assert "without accelerate launch" in answer.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[denoiser]\nchanels = [1]", "no setting 'chanels'; did you mean channels"),
        ("[unet]\nsteps = 1", r"section \[unet\]"),
        ("denoiser = 3", "must be a table"),
        ("[clip]\ntext_width = 64", "make them equal"),
        ("[clip_training]\nsteps = 0", "steps=0"),
        ("[denoiser_objective]\ndeaf = 1.5", "deaf=1.5.*shares"),
        ("[denoiser_objective]\nnoisier = 0", "noisier=0.*above 0"),
        ("[clip", "cannot be read"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_reason(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises((ConfigError, DataError), match=message):
        read_recipe(tmp_path / "r.toml")


@pytest.mark.long
def test_the_whole_recipe_builds_a_loadable_model_and_resumes(tmp_path: Path) -> None:
    train = load_pictures("train")
    pictures = tmp_path / "out" / "pictures"
    pictures.mkdir(parents=True)
    train.iloc[:24].to_parquet(pictures / "train.parquet")
    train.iloc[24:32].to_parquet(pictures / "heldout.parquet")
    (pictures / "ATTRIBUTION.md").write_text("as shipped")
    (tmp_path / "tiny.toml").write_text(TINY_RECIPE)
    build = {"config": tmp_path / "tiny.toml", "out": tmp_path / "out"}
    train_reference(tmp_path / "work", **build)
    built = StableDiffusionPipeline.from_pretrained(tmp_path / "out" / "reference", local_files_only=True)
    assert built.unet.config.block_out_channels == [8, 8, 8, 8]
    CLIPModel.from_pretrained(tmp_path / "out" / "scorer", local_files_only=True)
    assert {path.stem for path in (tmp_path / "out" / "curves").iterdir()} == {
        "autoencoder",
        "clip",
        "text_encoder",
        "denoiser",
    }

    # Run again with the finished parts there and the checkpoints gone: nothing is trained a second time.
    for checkpoint in (tmp_path / "work").glob("*.ckpt.safetensors"):
        checkpoint.unlink()
    shutil.rmtree(tmp_path / "out" / "reference")
    options = [word for name, path in build.items() for word in (f"--{name}", str(path))]
    answer = CliRunner().invoke(app, ["train", "--work", str(tmp_path / "work"), *options])
    assert answer.exit_code == 0, answer.output
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "out" / "reference", local_files_only=True)
    assert all(
        torch.equal(value, again.unet.state_dict()[name]) for name, value in built.unet.state_dict().items()
    )
    assert not list((tmp_path / "work").glob("*.ckpt.safetensors"))

    metrics = evaluate_reference(
        tmp_path / "report",
        assets=tmp_path / "out",
        curves=tmp_path / "out" / "curves",
        sampling=Sampling(steps=1),
    )
    assert metrics["pictures"] == {"train": 24, "heldout": 8}
    assert metrics["denoiser"]["rows"] == metrics["impacts"]["rows"] == 8
    assert metrics["training"]["denoiser"]["steps"] == 2
    page = (tmp_path / "report" / "README.md").read_text()
    assert "What falls short" in page  # two steps teach nothing, and the page says so
    assert all((tmp_path / "report" / name).is_file() for name in re.findall(r"\((\w+\.png)\)", page))


@pytest.mark.long
def test_loss_by_timestep_puts_every_row_in_its_bucket() -> None:
    pipeline, rows = as_float32(reference_folder()), load_pictures("heldout").iloc[:48]
    probe = make_probe(
        pipeline,
        decode_pictures(rows),
        rows["caption"].tolist(),
        rows["group"].tolist(),
        timesteps=16,
        seed=1,
    )
    frame = loss_by_timestep(pipeline.unet, probe)
    assert frame["rows"].sum() == len(probe)
    wanted = (predict(pipeline.unet, probe) - probe.target).square().mean()
    whole = (frame["loss"] * frame["rows"]).sum() / frame["rows"].sum()
    assert whole == pytest.approx(float(wanted), rel=1e-5)


def test_a_thinned_curve_keeps_its_means_and_its_last_step() -> None:
    curve = pd.DataFrame({"step": range(25), "loss": [float(step) for step in range(25)]})
    thin = thinned(curve)
    assert thin["step"].tolist() == [9, 19, 24]
    assert thin["loss"].tolist() == [4.5, 14.5, 22.0]
    pd.testing.assert_frame_equal(thinned(thin), thin)
