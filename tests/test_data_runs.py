"""Training data of the user's own in a run and on the command line: settings, the step `data`, the verb `data`."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training_images import CACHED
from typer.testing import CliRunner

from prune_lab.cli import app
from prune_lab.config import DataConfig, RunConfig
from prune_lab.distill import LatentCache, LiveData, Subset, training_data
from prune_lab.errors import ConfigError, DataError
from prune_lab.models import load_pipeline, resolve_model
from prune_lab.runs import Run
from prune_lab.session import ensure_data
from prune_lab.workflow import Session, forget, start_run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"crop": "left"}, "center, random"),
        ({"format": "int8"}, "float32, float16"),
        ({"variants": 2}, "at most 1 without random crops or flips"),
        ({"variants": 3, "flip": True}, "at most 2 without random crops"),
        ({"variants": 1, "flip": True}, "at least 2 for flips"),
        ({"shard": 0}, "at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DataConfig(**settings)


def test_variants_follow_from_crop_and_flip() -> None:
    found = [
        DataConfig(crop=crop, flip=flip).num_variants
        for crop in ("center", "random")
        for flip in (False, True)
    ]
    assert found == [1, 2, 4, 4]
    assert math.isclose(DataConfig(crop="random", variants=9).num_variants, 9)


def data_files(run: Run) -> list[str]:
    """What the step data has written, by its manifest."""
    return list(json.loads((run.folder / "manifests" / "data.json").read_text())["outputs"])


def test_a_run_trains_on_the_pictures_it_names(
    tiny_pipeline: Any, tiny_pipeline_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    config = RunConfig(
        model=str(tiny_pipeline_folder),
        device="cpu",
        data=dataclasses.replace(CACHED, source=str(image_folder)),
    )
    run = start_run(config, tmp_path / "run")
    data = ensure_data(Session(run))
    assert isinstance(data, LatentCache)
    assert data.folder == run.data_dir
    assert not run.data.exists()
    assert "data/cache.json" in data_files(run)
    shutil.rmtree(image_folder)
    assert ensure_data(Session(run)).digest == data.digest  # from the run alone

    ready = dataclasses.replace(config, data=DataConfig(source=str(run.data_dir)))
    found = ensure_data(Session(start_run(ready, tmp_path / "ready")))
    assert isinstance(found, Subset)  # rows for the probe and the held-out loss are kept back
    assert found.data.digest == data.digest
    assert not (tmp_path / "ready" / "data").exists()
    assert data_files(Run(tmp_path / "ready")) == []
    with pytest.raises(DataError, match=r"data\.limit = 2"):
        training_data(tiny_pipeline, dataclasses.replace(ready.data, limit=2), tmp_path)
    changed = load_pipeline(resolve_model(str(tiny_pipeline_folder)))
    with torch.no_grad():
        changed.vae.encoder.conv_in.weight *= 1.1
    with pytest.raises(DataError, match="other encoders"):
        training_data(changed, ready.data, tmp_path)
    rounded = load_pipeline(resolve_model(str(tiny_pipeline_folder)), dtype=torch.bfloat16)
    assert isinstance(training_data(rounded, ready.data, tmp_path), LatentCache)
    forget(run, "data")
    assert not run.data_dir.exists()


def test_without_the_cache_a_run_encodes_in_the_loop(
    tiny_pipeline_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    data = dataclasses.replace(CACHED, source=str(image_folder), cached=False)
    run = start_run(RunConfig(model=str(tiny_pipeline_folder), device="cpu", data=data), tmp_path / "run")
    assert isinstance(ensure_data(Session(run)), LiveData)
    assert not run.data_dir.exists()
    assert data_files(run) == []


def test_the_verb_builds_finishes_and_refuses(
    tiny_pipeline_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    def ask(*more: str) -> Any:
        verb = ["data", str(tiny_pipeline_folder), "--out", str(tmp_path / "cache"), "--device", "cpu"]
        return CliRunner().invoke(app, [*verb, *more])

    found = ask(
        "--data", str(image_folder), "--set", "data.shard=4", "--set", "data.format=float16", "--json"
    )
    assert found.exit_code == 0, found.output
    (row,) = json.loads(found.stdout)
    assert (row["rows"], row["left_out"], row["variants"], row["shards"], row["encoded"]) == (7, 0, 1, 2, 7)
    assert row["bytes"] == LatentCache.load(tmp_path / "cache").bytes
    refused = ask("--data", str(image_folder), "--set", "data.shard=4")
    assert refused.exit_code == 2
    assert "format float16 there, float32 here" in refused.stderr
    assert ask("--data", str(image_folder), "--set", "data.shard=4", "--force").exit_code == 0
    assert "finished cache" in ask("--data", str(tmp_path / "cache")).stderr
    assert "give --data" in ask().stderr


def test_help_answers_without_the_heavy_libraries() -> None:
    code = (
        "import sys; sys.argv = ['prune-lab', 'data', '--help']\n"
        "from prune_lab.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'datasets', 'accelerate', 'pandas'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert found.returncode == 0, found.stderr
    assert "--data" in found.stdout
