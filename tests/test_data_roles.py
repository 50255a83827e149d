"""Where probe, training rows, held-out rows and scorer of a run come from, for the shipped model and for others."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from prune_lab.assets import load_pictures, reference_folder
from prune_lab.config import DataConfig, RunConfig
from prune_lab.distill import LatentCache, Subset, draw_cache
from prune_lab.errors import ConfigError, DataError
from prune_lab.models import choose_scorer, of_shipped_family, resolve_model
from prune_lab.prompts import Prompts
from prune_lab.report.tables import read_run
from prune_lab.session import data_roles, ensure_data, ensure_probe
from prune_lab.workflow import Session, ensure_scores, start_run

SIDE = 32  # pixels, of the tiny pipeline


@pytest.fixture(scope="module")
def dozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve noise pictures of the tiny model's size, a caption beside each."""
    folder = tmp_path_factory.mktemp("dozen")
    draws = np.random.default_rng(0)
    for number in range(12):
        pixels = draws.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"picture {'abcdefghijkl'[number]}")
    return folder


def of_strangers(config: RunConfig, source: str, **data: Any) -> RunConfig:
    """``config`` with these pictures, as a user who says nothing else would have it."""
    unsaid = dataclasses.replace(config.evaluate, prompts=(), scorer="")
    changed = dataclasses.replace(config.data, source=source, **data)
    return dataclasses.replace(config, data=changed, evaluate=unsaid)


def test_a_dozen_pictures_are_divided_and_none_is_used_twice(
    small_run_config: Callable[..., RunConfig], dozen: Path, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    dozen = Path(shutil.copytree(dozen, tmp_path / "dozen"))  # it moves away in the end
    config = of_strangers(small_run_config(probe={"samples": 6, "timesteps": 3}), str(dozen))
    run = start_run(config, tmp_path / "run")
    session = Session(run)
    lines = [role.line for role in data_roles(session).roles]
    probe, data, validation = ensure_probe(session), ensure_data(session), session.validation
    assert isinstance(data, LatentCache)
    parts = [set(probe.captions), set(data.captions), set(validation.captions)]
    assert [len(part) for part in parts] == [3, 6, 3]
    assert len(set.union(*parts)) == 12
    assert set(session.prompts) == parts[2]
    # Each row is noise on the latents of the picture that its caption stands beside, by plain diffusers.
    plain = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder, safety_checker=None)
    schedule = DDPMScheduler.from_config(plain.scheduler.config)
    files = {path.read_text(): path.with_suffix(".png") for path in dozen.glob("*.txt")}
    for row, caption in enumerate(probe.captions):
        pixels = torch.from_numpy(np.array(Image.open(files[caption]))).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            latent = plain.vae.encode(pixels).latent_dist.mode() * plain.vae.config.scaling_factor
        noisy = schedule.add_noise(latent, probe.noise[row : row + 1], probe.timesteps[row : row + 1])
        torch.testing.assert_close(probe.noisy[row : row + 1], noisy, rtol=1e-4, atol=1e-5)
    assert len(probe) == 6  # two timesteps of each picture
    # Four lines, in the file of the run and for the report.
    assert [line.split(":")[0] for line in lines] == ["probe", "train", "validate", "scorer"]
    assert all(str(dozen) in line for line in lines[:3])
    for line, count in zip(lines, (3, 6, 3), strict=False):
        assert line.endswith(f", {count} pictures of {SIDE} pixels")
    assert "none" in lines[3]
    assert [role["count"] for role in json.loads(run.sources.read_text())] == [3, 6, 3, None]
    assert [role["name"] for role in read_run(run).roles] == ["probe", "train", "validate", "scorer"]
    # The same again from the run alone, and the same parts in another run.
    again = Session(start_run(config, tmp_path / "again"))
    assert ensure_probe(again).digest == probe.digest
    gone = Session(run)
    dozen.rename(tmp_path / "gone")
    assert ensure_data(gone).digest == data.digest
    assert gone.validation.digest == validation.digest
    assert gone.prompts == session.prompts
    assert [role.line for role in data_roles(gone).roles] == lines


def test_a_model_without_pictures_draws_its_own(
    small_run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = of_strangers(small_run_config(probe={"drawn": 3, "steps": 1}), "", count=9, steps=1)
    session = Session(start_run(config, tmp_path / "run"))
    probe = ensure_probe(session)
    assert not session.run.data_dir.exists()  # the probe alone is drawn for a score
    data, validation = ensure_data(session), session.validation
    assert isinstance(data, Subset)
    drawn = LatentCache.load(session.run.data_dir)
    assert len(drawn) == 9
    parts = [set(probe.captions), set(data.captions), set(validation.captions), set(session.prompts)]
    assert [len(part) for part in parts] == [3, 7, 2, 8]
    assert len(set.union(*parts)) == sum(map(len, parts))
    assert not set.union(*parts) & set(load_pictures("heldout")["caption"])
    words = [role.line for role in data_roles(session).roles]
    assert all("drawn by the model in 1 steps" in line for line in words[:3])
    assert ["3 pictures" in words[0], "7 pictures" in words[1], "2 pictures" in words[2]] == [True] * 3


def test_the_shipped_pictures_are_another_models_only_when_asked_for(
    small_run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    session = Session(start_run(of_strangers(small_run_config(), "shipped"), tmp_path / "run"))
    assert all("emoji of 64 pixels" in role.line for role in data_roles(session).roles[:3])
    assert set(ensure_probe(session).captions) <= set(load_pictures("heldout")["caption"])
    own = Session(start_run(RunConfig(), tmp_path / "reference"))
    assert [role.line.split(":")[1].strip() for role in data_roles(own).roles] == [
        "held-out pictures of the package, 64 pictures of 64 pixels",
        "training pictures of the package, 2,048 pictures of 64 pixels",
        "held-out pictures of the package, 64 pictures of 64 pixels",
        "reference (it ships with the model)",
    ]


# Who is of the family, and who judges ------------------------------------------------------------------------------


def copied(folder: Path, **changed: float) -> Path:
    """The shipped pipeline in ``folder``, the weights of some of its parts times a factor."""
    shutil.copytree(reference_folder(), folder)
    for part, factor in changed.items():
        (path,) = (folder / part).glob("*.safetensors")
        tensors = {name: tensor * factor for name, tensor in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    return folder


def test_students_of_the_shipped_model_are_known_by_what_they_draw_with(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    def known(folder: Path) -> bool:
        return of_shipped_family(resolve_model(str(folder)))

    assert of_shipped_family(resolve_model("reference"))
    assert known(copied(tmp_path / "student", unet=1.5))
    assert not known(copied(tmp_path / "encoder", text_encoder=1.5))
    assert not known(copied(tmp_path / "vae", vae=1.5))
    assert not known(tiny_pipeline_folder)
    assert not known(reference_folder() / "unet")  # it has no text encoder to know it by


def test_the_shipped_scorer_judges_the_shipped_model_alone(
    tiny_pipeline_folder: Path, tiny_scorer_folder: Path
) -> None:
    stranger = resolve_model(str(tiny_pipeline_folder))
    assert choose_scorer("", resolve_model("reference")).text == "reference"
    assert choose_scorer("none", resolve_model("reference")).text == ""
    assert choose_scorer(str(tiny_scorer_folder), stranger).text == str(tiny_scorer_folder)
    none = choose_scorer("", stranger)
    assert (none.text, none.name) == ("", "none")
    assert "evaluate.scorer" in none.reason
    with pytest.raises(ConfigError, match="judges the shipped models alone"):
        choose_scorer("reference", stranger)


def test_the_clip_of_the_text_encoder_is_taken_from_the_hubs_cache(
    tiny_pipeline_folder: Path, tiny_scorer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_pipeline_folder, tmp_path / "sd"))
    config = folder / "text_encoder" / "config.json"
    size = {"vocab_size": 49408, "num_hidden_layers": 12, "hidden_size": 768}
    source = resolve_model(str(folder))
    config.write_text(json.dumps(json.loads(config.read_text()) | size))
    assert "openai/clip-vit-large-patch14" in choose_scorer("", source).reason
    repository = tmp_path / "hub" / "models--openai--clip-vit-large-patch14"
    shutil.copytree(tiny_scorer_folder, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = choose_scorer("", source)
    assert found.name == "openai/clip-vit-large-patch14"
    assert found.text == str(repository / "snapshots" / "abc")


def test_without_a_scorer_the_criterion_that_needs_one_is_refused_before_any_work(
    small_run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = of_strangers(small_run_config(score={"criterion": "clip-score"}), "shipped")
    run = start_run(config, tmp_path / "run")
    with pytest.raises(ConfigError, match="found no scorer"):
        ensure_scores(Session(run))
    assert not run.probe.exists()


def test_too_few_pictures_are_refused(
    small_run_config: Callable[..., RunConfig], dozen: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for name in ("00", "01"):
        for suffix in (".png", ".txt"):
            shutil.copy(dozen / f"{name}{suffix}", few)
    session = Session(start_run(of_strangers(small_run_config(), str(few)), tmp_path / "run"))
    with pytest.raises(DataError, match="at least three images"):
        ensure_probe(session)


def test_rows_of_a_finished_cache_have_its_size(
    small_run_config: Callable[..., RunConfig], tiny_pipeline: Any, tmp_path: Path
) -> None:
    drawn = DataConfig(count=6, steps=1, resolution=48)
    draw_cache(tiny_pipeline, Prompts(tuple("abcdef"), ("",) * 6), drawn, tmp_path / "cache")
    run = start_run(of_strangers(small_run_config(), str(tmp_path / "cache")), tmp_path / "run")
    assert [role.size for role in data_roles(Session(run)).roles] == [48, 48, 48, None]
