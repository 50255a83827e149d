"""Training data that the model draws itself: against plain diffusers, stopped, shared among processes, refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from prune_lab.cli import app
from prune_lab.config import DataConfig
from prune_lab.distill import (
    LatentCache,
    build_cache,
    draw_cache,
    preview,
    source_of,
    split_rows,
    training_data,
)
from prune_lab.distill.drawing import check_draws_from_text, drawn_prompts
from prune_lab.errors import DataError, UnsupportedModelError
from prune_lab.models import load_pipeline, resolve_model
from prune_lab.probes import encode_captions
from prune_lab.prompts import Prompts
from prune_lab.runtime import generator_for

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = Prompts(
    ("a cat", "two dogs", "rain", "an owl", "a fox"), ("animal", "animal", "", "animal", "animal")
)
DRAWN = DataConfig(count=7, steps=2, guidance=3.0, shard=3, batch=2, seed=4)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.fixture(scope="module")
def drawn(tiny_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    """Seven pictures in three shards; read it only."""
    return draw_cache(tiny_pipeline, PROMPTS, DRAWN, tmp_path_factory.mktemp("drawn") / "cache").cache


def test_every_picture_is_what_plain_diffusers_draws(
    drawn: LatentCache, tiny_pipeline: Any, tiny_pipeline_folder: Path
) -> None:
    plain = diffusers.StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder)
    plain.set_progress_bar_config(disable=True)
    assert [shard.rows for shard in drawn.shards] == [3, 3, 1]
    rows = drawn.rows(torch.arange(7), torch.zeros(7, dtype=torch.int64))
    assert rows.log_variance is None
    for row, caption in enumerate(drawn.captions):
        wanted = plain(
            caption,
            num_inference_steps=2,
            guidance_scale=3.0,
            generator=generator_for(4, "drawn picture", row),
            output_type="latent",
        ).images[0]
        torch.testing.assert_close(rows.mean[row], wanted)
    torch.testing.assert_close(rows.embeddings, encode_captions(tiny_pipeline, drawn.captions)[0])
    assert set(drawn.captions[:5]) == set(drawn.captions) == set(PROMPTS.texts)
    kinds = dict(zip(PROMPTS.texts, PROMPTS.kinds, strict=True))
    assert drawn.kinds == tuple(kinds[caption] for caption in drawn.captions)


def test_a_picture_does_not_depend_on_the_batch(
    drawn: LatentCache, tiny_pipeline: Any, tmp_path: Path
) -> None:
    alone = draw_cache(tiny_pipeline, PROMPTS, dataclasses.replace(DRAWN, batch=1), tmp_path / "cache").cache
    everything = torch.arange(7), torch.zeros(7, dtype=torch.int64)
    torch.testing.assert_close(alone.rows(*everything).mean, drawn.rows(*everything).mean)
    assert alone.provenance == drawn.provenance


def test_the_provenance_is_in_the_index(drawn: LatentCache) -> None:
    index = json.loads((drawn.folder / "cache.json").read_text(encoding="utf-8"))
    found = index["recipe"]
    assert found["prompts"] == PROMPTS.digest
    assert (found["steps"], found["guidance"], found["seed"], found["side"]) == (2, "3", 4, 32)
    assert found["sampler"].startswith("PNDMScheduler ")
    assert set(index["versions"]) == {"prune_lab", "torch", "diffusers", "transformers"}
    assert index["source"] == "pictures that the model draws for 5 prompts"


def test_drawn_data_divide_into_parts_without_common_prompts(drawn: LatentCache) -> None:
    split = split_rows(drawn.captions, drawn.pictures, probe=8, validate=8)
    parts = [{drawn.captions[row] for row in part} for part in (split.train, split.probe, split.validate)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 5
    assert not split.shared_captions


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import prune_lab.distill.sharding as sharding
from prune_lab.cli import main
whole = sharding._write_shard
def dying(path, *more):
    if path.name == "shard-00001.safetensors":
        os.kill(os.getpid(), signal.SIGKILL)
    whole(path, *more)
sharding._write_shard = dying
main()
"""
VERB = (
    *("--count", "7", "--steps", "2", "--guidance", "3", "--batch", "2", "--seed", "4"),
    *("--set", "data.shard=3", "--device", "cpu", "--json"),
)


@pytest.fixture
def verb(tiny_pipeline_folder: Path, tmp_path: Path) -> list[str]:
    """The command that draws the data of ``drawn``, without its folder."""
    rows = [f"{text},{kind}" for text, kind in zip(PROMPTS.texts, PROMPTS.kinds, strict=True)]
    (tmp_path / "prompts.csv").write_text("\n".join(["prompt,kind", *rows]), encoding="utf-8")
    return ["data", str(tiny_pipeline_folder), "--prompts", str(tmp_path / "prompts.csv"), *VERB]


@pytest.mark.long
def test_a_kill_costs_one_shard_and_changes_nothing(
    drawn: LatentCache, verb: list[str], tmp_path: Path
) -> None:
    command = [*verb, "--out", str(tmp_path / "cache")]
    code = f"import sys; sys.argv = {['prune-lab', *command]!r}\n{KILLED}"
    found = subprocess.run([sys.executable, "-c", code], timeout=120, check=False)
    assert found.returncode == -signal.SIGKILL
    there = [
        name for name in files(tmp_path / "cache") if not name.startswith(".")
    ]  # locks and temporary files
    assert there == ["shard-00000.safetensors"]
    resumed = CliRunner().invoke(app, [*command, "--pictures", "2"])
    assert resumed.exit_code == 0, resumed.output
    (row,) = json.loads(resumed.stdout)
    assert (row["rows"], row["encoded"], row["shards"]) == (7, 4, 3)
    assert files(tmp_path / "cache") == files(drawn.folder)
    pictures = sorted((tmp_path / "cache/pictures").glob("*.png"))
    assert [path.name for path in pictures] == ["00000.png", "00001.png"]
    with Image.open(pictures[0]) as image:
        assert image.size == (32, 32)


@pytest.mark.long
def test_two_processes_draw_the_cache_of_one(drawn: LatentCache, verb: list[str], tmp_path: Path) -> None:
    command = ["prune-lab", *verb, "--out", str(tmp_path / "cache")]
    code = f"import sys; sys.argv = {command!r}; from prune_lab.cli import main; main()"
    (tmp_path / "verb.py").write_text(code, encoding="utf-8")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    found = subprocess.run(
        [*launch, "--main_process_port", "0", str(tmp_path / "verb.py")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert files(tmp_path / "cache") == files(drawn.folder)


def test_settings_without_a_source_let_the_model_draw(
    drawn: LatentCache, tiny_pipeline: Any, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS.texts), encoding="utf-8")
    settings = dataclasses.replace(DRAWN, prompts=str(tmp_path / "prompts.txt"))
    assert training_data(tiny_pipeline, settings, tmp_path / "cache").digest == drawn.digest
    ready = training_data(tiny_pipeline, DataConfig(source=str(drawn.folder)), tmp_path / "other")
    assert ready.digest == drawn.digest
    changed = load_pipeline(resolve_model(str(tiny_pipeline.config._name_or_path)))
    with torch.no_grad():
        changed.text_encoder.get_input_embeddings().weight[0] += 1
    with pytest.raises(DataError, match="other encoders"):
        training_data(changed, DataConfig(source=str(drawn.folder)), tmp_path / "other")


def test_another_size_is_drawn_where_it_is_asked_for(tiny_pipeline: Any, tmp_path: Path) -> None:
    settings = dataclasses.replace(DRAWN, count=2, resolution=48)
    cache = draw_cache(tiny_pipeline, PROMPTS, settings, tmp_path / "cache").cache
    assert cache.rows(torch.tensor([1]), torch.tensor([0])).mean.shape == (1, 4, 24, 24)
    assert cache.check(tiny_pipeline) is cache
    folder = preview(tiny_pipeline, cache, 5)
    assert len(list(folder.glob("*.png"))) == 2
    with pytest.raises(DataError, match="multiples of 2; give 48"):
        draw_cache(tiny_pipeline, PROMPTS, dataclasses.replace(settings, resolution=47), tmp_path / "odd")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": 3}, "steps 2 there, 3 here"),
        ({"guidance": 1.0}, "guidance 3 there, 1 here"),
        ({"seed": 5}, "seed 4 there, 5 here"),
    ],
)
def test_a_cache_drawn_otherwise_is_refused_by_name(
    change: dict[str, Any], says: str, drawn: LatentCache, tiny_pipeline: Any
) -> None:
    with pytest.raises(DataError, match=says):
        draw_cache(tiny_pipeline, PROMPTS, dataclasses.replace(DRAWN, **change), drawn.folder)


def test_other_weights_prompts_or_samplers_are_refused(
    drawn: LatentCache, tiny_pipeline: Any, image_folder: Path
) -> None:
    others = Prompts(PROMPTS.texts[:4], PROMPTS.kinds[:4])
    with pytest.raises(DataError, match=r"prompts \w{16} there"):
        draw_cache(tiny_pipeline, others, DRAWN, drawn.folder)
    changed = load_pipeline(resolve_model(str(tiny_pipeline.config._name_or_path)))
    changed.scheduler = diffusers.DDIMScheduler.from_config(changed.scheduler.config)
    with torch.no_grad():
        changed.unet.conv_in.weight *= 1.1
    with pytest.raises(DataError, match=r"model \w{16} there, .*sampler PNDM.* there, DDIM"):
        draw_cache(changed, PROMPTS, DRAWN, drawn.folder)
    pictures = DataConfig(source=str(image_folder), shard=3, batch=2)
    with pytest.raises(DataError, match="of pictures that a model drew there, of given pictures here"):
        build_cache(tiny_pipeline, source_of(pictures), pictures, drawn.folder)


def test_prompts_are_shown_in_a_mixed_order_and_again() -> None:
    shown = drawn_prompts(PROMPTS, 12, 0)
    assert shown.texts[:5] == shown.texts[5:10] != PROMPTS.texts
    assert shown.texts[:3] == drawn_prompts(PROMPTS, 3, 0).texts
    assert set(shown.texts) == set(PROMPTS.texts)


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("StableDiffusionPipeline", ""),
        ("StableDiffusionXLPipeline", ""),
        ("LatentConsistencyModelPipeline", ""),
        ("StableDiffusionInpaintPipeline", "image and mask_image"),
        ("StableDiffusionInstructPix2PixPipeline", "image"),
        ("StableDiffusionImg2ImgPipeline", "image"),
        ("StableDiffusionControlNetPipeline", "image"),
        ("StableDiffusionUpscalePipeline", "image"),
        ("StableDiffusionDepth2ImgPipeline", "image"),
        ("StableDiffusionImageVariationPipeline", "image"),
    ],
)
def test_a_pipeline_that_needs_more_than_a_prompt_is_refused(name: str, needs: str) -> None:
    if not needs:
        check_draws_from_text(getattr(diffusers, name))
        return
    with pytest.raises(UnsupportedModelError, match=f"{name} .* it draws from {needs}; .*--data"):
        check_draws_from_text(getattr(diffusers, name))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ((), "give --prompts default"),
        (("--count", "3"), "give --prompts default"),
        (("--data", "x", "--steps", "3"), "asked for data.steps and for the pictures x"),
        (
            ("--prompts", "default", "--crop", "random"),
            "asked for data.crop of pictures that the model draws",
        ),
        (("--prompts", "gone.txt"), "No such file"),
        (
            ("--prompts", "default", "--steps", "2000"),
            "asked for data.steps = 2,000, found a scheduler of 1,000 timesteps",
        ),
        (("--prompts", "default", "--seed", "-1"), "asked for --seed -1"),
    ],
)
def test_the_verb_refuses_before_any_work(
    more: tuple[str, ...], says: str, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    verb = ["data", str(tiny_pipeline_folder), "--out", str(tmp_path / "cache"), *more]
    found = CliRunner().invoke(app, verb)
    assert (found.exit_code, len(found.stderr.splitlines())) == (2, 1)
    assert says in found.stderr
    assert not (tmp_path / "cache").exists()


def test_the_verb_refuses_such_a_pipeline_before_it_is_loaded(
    tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_pipeline_folder, tmp_path / "model")
    path = tmp_path / "model/model_index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(index | {"_class_name": "StableDiffusionImg2ImgPipeline"}), encoding="utf-8")
    monkeypatch.setattr("prune_lab.api.data.load_pipeline", None)
    verb = ["data", str(tmp_path / "model"), "--prompts", "default", "--out", str(tmp_path / "cache")]
    found = CliRunner().invoke(app, verb)
    assert (found.exit_code, len(found.stderr.splitlines())) == (2, 1)
    assert "StableDiffusionImg2ImgPipeline to draw" in found.stderr


def test_the_old_name_of_the_verb_says_the_new_one() -> None:
    found = CliRunner().invoke(app, ["cache", "reference", "--data", "x", "--out", "y"])
    assert (found.exit_code, len(found.stderr.splitlines())) == (2, 1)
    assert "prune-lab data MODEL --data DIR --out DIR" in found.stderr
