"""How a model draws where nobody says: one that was distilled for few steps in these, and a line where not so asked."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import LCMScheduler
from narrow_pipelines import narrow
from PIL import Image
from typer.testing import CliRunner

import prune_lab as pl
from prune_lab.api.settings import settings_of
from prune_lab.cli import app
from prune_lab.config import RunConfig
from prune_lab.errors import BackendError, ConfigError
from prune_lab.few_steps.measuring import guidance_of
from prune_lab.models import check_draws_in, load_pipeline, resolve_model, usual_drawing


@pytest.fixture(scope="module")
def few(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as distill-steps writes it: with an LCMScheduler in the place of its own."""
    folder = tmp_path_factory.mktemp("few") / "few"
    shutil.copytree(tiny_pipeline_folder, folder)
    LCMScheduler(clip_sample=False, steps_offset=1).save_config(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "LCMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """(steps, guidance) of every call of a pipeline, which draws as ever."""
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

    found: list[tuple[int, float]] = []
    monkeypatch.setattr("prune_lab.runtime.progress._said", set())
    for kind in (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline):
        whole = kind.__call__

        def call(self: Any, *args: Any, _whole: Any = whole, **given: Any) -> Any:
            found.append((given["num_inference_steps"], given["guidance_scale"]))
            return _whole(self, *args, **given)

        call.__signature__ = inspect.signature(whole)  # type: ignore[attr-defined]
        monkeypatch.setattr(kind, "__call__", call)
    return found


def invoke(*args: object) -> str:
    found = CliRunner().invoke(app, [str(arg) for arg in args])
    assert found.exit_code == 0, found.output
    return " ".join(found.output.split())


def test_the_scheduler_says_it_loaded_or_not(
    few: Path, tiny_pipeline_folder: Path, tiny_pipeline: Any, pipeline_folder: Callable[[str], Path]
) -> None:
    for given in (resolve_model(str(few)), load_pipeline(resolve_model(str(few)))):
        usual = usual_drawing(given)
        assert (usual.steps, usual.guidance, usual.baked) == (4, 1.0, True)
    for given in (resolve_model(str(tiny_pipeline_folder)), tiny_pipeline, resolve_model("sd-v1.4")):
        assert (usual_drawing(given).steps, usual_drawing(given).guidance) == (25, 7.5)
    told = narrow("lcm", tiny_pipeline)  # whose guidance is a number that the model takes
    assert (usual_drawing(told).steps, usual_drawing(told).guidance) == (4, 8.5)
    assert (guidance_of(told, 6.0), guidance_of(load_pipeline(resolve_model(str(few))), 6.0)) == (6.0, 1.0)
    assert not usual_drawing(told).complaint("it", 4, 7.5)


def test_generate_draws_as_the_model_is_meant_to(few: Path, calls: list[Any], tmp_path: Path) -> None:
    words = ("generate", few, "--prompt", "a red cat", "--force", "--out", tmp_path / "a.png")
    assert "was distilled" not in invoke(*words)
    said = invoke(*words, "--guidance", 7.5, "--steps", 25)
    assert "asked for 25 steps and a guidance of 7.5 of few, which was distilled to draw in few steps" in said
    assert "a guidance of 2 of few" in invoke(*words, "--guidance", 2)
    pl.load(few).generate("a red cat")
    assert calls == [(4, 1.0), (25, 7.5), (4, 2.0), (4, 1.0)]


def test_a_usual_model_draws_as_ever(tiny_pipeline_folder: Path, calls: list[Any], tmp_path: Path) -> None:
    said = invoke("generate", tiny_pipeline_folder, "--prompt", "a cat", "--out", tmp_path / "a.png")
    assert calls == [(25, 7.5)]
    assert "distilled" not in said


def test_img2img_draws_each_model_as_it_is_meant(
    few: Path, tiny_pipeline_folder: Path, calls: list[Any], tmp_path: Path
) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (16, 16), (200, 30, 30)).save(picture)
    words = (
        "img2img",
        tiny_pipeline_folder,
        few,
        "--picture",
        picture,
        "--prompt",
        "a cat",
        "--scorer",
        "none",
    )
    invoke(*words, "--strengths", "0.2", "--out", tmp_path / "out")
    assert calls == [(25, 7.5), (8, 1.0)]


def test_personalise_draws_the_class_as_the_model_is_meant_to(
    few: Path, calls: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "own").mkdir()
    Image.new("RGB", (16, 16), (200, 30, 30)).save(tmp_path / "own" / "0.png")
    words = ("--images", tmp_path / "own", "--token", "red", "--class", "cat", "--template", "a {}")
    invoke("personalise", few, *words, "--steps", 1, "--class-count", 1, "--out", tmp_path / "out")
    assert calls[0] == (4, 1.0)
    assert "num_inference_steps=4, guidance_scale=1.0" in (tmp_path / "out" / "README.md").read_text()


def test_evaluate_draws_each_model_as_it_is_meant(
    few: Path, tiny_pipeline_folder: Path, tiny_scorer_folder: Path, calls: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    words = ("evaluate", tiny_pipeline_folder, few, "--prompts", tmp_path / "prompts.txt", "--seeds", 1)
    words = (*words, "--clip", tiny_scorer_folder, "--out", tmp_path / "out")
    said = invoke(*words)
    assert calls == [(25, 7.5), (4, 1.0)]
    assert "few draws in 4 steps with a guidance of 1" in said
    page = (tmp_path / "out" / "README.md").read_text()
    assert "25 steps, guidance 7.5; few: 4 steps, guidance 1" in page
    invoke(*words)
    assert len(calls) == 2  # it goes on with them
    said = invoke(*words, "--force", "--set", "evaluate.guidance=3", "--set", "evaluate.steps=2")
    assert calls[2:] == [(2, 3.0), (2, 3.0)]
    assert "a guidance of 3 of few" in said


def test_a_preset_leaves_few_steps_alone_and_says_so(
    few: Path, tiny_pipeline_folder: Path, tiny_scorer_folder: Path, calls: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    words = ("evaluate", tiny_pipeline_folder, few, "--prompts", tmp_path / "prompts.txt")
    words = (*words, "--clip", tiny_scorer_folder, "--preset", "coco30k", "--out", tmp_path / "out")
    assert "few draws in 4 steps" in invoke(*words)
    assert calls == [(25, 7.5), (4, 1.0)]


def test_settings_of_a_run_are_those_of_the_model(
    few: Path, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    def drawn(settings: RunConfig) -> tuple[float, ...]:
        how, data = settings.evaluate, settings.data
        return how.steps, how.guidance, data.steps, data.guidance

    assert drawn(settings_of(str(few), None, None, (), {})) == (4, 1.0, 4, 1.0)
    assert drawn(settings_of(str(tiny_pipeline_folder), None, None, (), {})) == (25, 7.5, 25, 7.5)
    own = settings_of(str(few), None, None, ("evaluate.guidance=7.5",), {})
    assert drawn(own) == (4, 7.5, 4, 1.0)
    assert drawn(pl.load(few).settings) == (4, 1.0, 4, 1.0)


def test_evaluate_without_a_file_says_what_contradicts(
    few: Path, tiny_scorer_folder: Path, calls: list[Any]
) -> None:
    words = ("evaluate", few, "--prompt", "a cat", "--set", f"evaluate.scorer={tiny_scorer_folder}")
    words = (*words, "--set", "probe.samples=2", "--data", "shipped", "--device", "cpu")
    assert "was distilled" not in invoke(*words)
    assert "a guidance of 5 of few" in invoke(*words, "--set", "evaluate.guidance=5")
    assert calls == [(4, 1.0), (4, 5.0)]


def test_a_model_of_few_steps_alone_does_not_draw_in_a_pipeline_of_many(
    few: Path, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(few / "unet", alone)
    check_draws_in(resolve_model(str(alone)), resolve_model(str(tiny_pipeline_folder)))  # nothing says it
    (alone / "provenance.json").write_text(json.dumps({"consistency": {"steps": 2}}))
    check_draws_in(resolve_model(str(alone)), resolve_model(str(few)))
    with pytest.raises(ConfigError, match="few steps of an LCMScheduler, in the pipeline"):
        check_draws_in(resolve_model(str(alone)), resolve_model(str(tiny_pipeline_folder)))
    with pytest.raises(ConfigError, match="few steps of an LCMScheduler"):
        pl.evaluate(
            [str(alone)], prompts="default", images=1, base=str(tiny_pipeline_folder), out=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def test_training_is_that_of_many_steps_and_such_a_model_teaches_no_few(
    few: Path, tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    words = ("--images", tmp_path / "own", "--token", "red", "--class", "cat", "--out", tmp_path / "out")
    for model, told in ((few, True), (tiny_pipeline_folder, False)):
        monkeypatch.setattr("prune_lab.runtime.progress._said", set())
        found = CliRunner().invoke(app, ["personalise", *map(str, (model, *words))])
        assert "found none; give files of" in found.output
        assert ("this training is that of models of many" in found.output) == told
    for student, more in ((few, ()), (tiny_pipeline_folder, ("--teacher", few))):
        asked = ("distill-steps", student, *more, "--data", "shipped", "--out", tmp_path / "out")
        found = CliRunner().invoke(app, [*map(str, asked)])
        assert found.exit_code == 2
        assert "distilled for few steps itself; give the model that it was distilled from" in found.output
    assert not (tmp_path / "out").exists()


def test_an_export_that_cannot_draw_few_steps_advises_no_sampler_of_many(
    few: Path, tiny_pipeline_folder: Path
) -> None:
    """DDIM, which others are advised, would draw badly with such a model, and without a word."""
    from prune_lab.export.edge.writing import _schedule

    with pytest.raises(
        BackendError, match=r"LCMScheduler.*give the one that it was distilled from"
    ) as caught:
        _schedule(load_pipeline(resolve_model(str(few))))
    assert "from_config" not in str(caught.value)
