"""Pictures that models change, and masks that they fill: tiny pipelines of kinds that can; others are refused."""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from narrow_pipelines import narrow
from PIL import Image
from typer.testing import CliRunner

import prune_lab as pl
from prune_lab.applications import (
    SweepSettings,
    change_picture,
    changing_pipeline,
    check_strength,
    picture_embeddings,
    read_own_mask,
    read_own_picture,
    sweep_means,
    sweeps,
)
from prune_lab.applications.sweep_means import COMPARED
from prune_lab.applications.sweeps import file_names
from prune_lab.cli import app
from prune_lab.errors import ConfigError, DataError, UnsupportedModelError
from prune_lab.models import load_pipeline, load_scorer, resolve_model
from prune_lab.probes import encode_pixels, picture_side
from prune_lab.schemas import SWEEP_COLUMNS, SWEEP_MEAN_COLUMNS
from prune_lab.tables import Table, cell_text, shown_cell, shown_columns

HOW: dict[str, Any] = {"steps": 4, "guidance": 2.0}


def invoke(*args: object, fails: bool = False) -> str:
    found = CliRunner().invoke(app, [str(arg) for arg in args])
    assert found.exit_code == (2 if fails else 0), found.output
    return found.output


def a_picture(side: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(0, 255, (3, 4, 4), generator=generator, dtype=torch.uint8)
    return rows.repeat_interleave(side // 4, 1).repeat_interleave(side // 4, 2)


@pytest.fixture
def tiny(tiny_pipeline_folder: Path) -> Any:
    return load_pipeline(resolve_model(str(tiny_pipeline_folder)))


# One picture ----------------------------------------------------------------------------------------------------------


def test_it_is_what_plain_diffusers_draws(tiny: Any) -> None:
    picture = a_picture(picture_side(tiny))
    found = change_picture(tiny, picture, "a red cat", (5,), strength=0.5, **HOW)
    plain = StableDiffusionImg2ImgPipeline(
        **{**tiny.components, "safety_checker": None}, requires_safety_checker=False
    )
    plain.set_progress_bar_config(disable=True)
    wanted = plain(
        "a red cat",
        image=picture[None] / 255,
        strength=0.5,
        num_inference_steps=4,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images
    assert (found.float() / 255 - wanted).abs().max() < 1 / 255


def test_seeds_decide_and_not_the_batch_and_nothing_of_the_pipeline_changes(tiny: Any) -> None:
    picture, scheduler = a_picture(picture_side(tiny)), tiny.scheduler
    both = change_picture(tiny, picture, "a cat", (1, 2), strength=0.75, **HOW)
    alone = change_picture(tiny, picture, "a cat", (2,), strength=0.75, **HOW)
    assert torch.equal(both[1], alone[0])
    assert not torch.equal(both[0], both[1])
    assert tiny.scheduler is scheduler


@pytest.mark.parametrize("kind", ["sdxl", "image-to-image", "lcm"])
def test_other_kinds_of_u_nets_change_pictures(kind: str, tiny: Any) -> None:
    pipeline = narrow(kind, tiny)
    assert changing_pipeline(pipeline, mask=False)[1]
    picture = a_picture(picture_side(pipeline))
    found = change_picture(pipeline, picture, "a cat", (1,), strength=0.5, **HOW)
    assert found.shape == (1, *picture.shape)


@pytest.mark.parametrize(
    ("kind", "takes_picture"),
    [
        ("pixart", False),
        pytest.param("sd3", True, marks=pytest.mark.long),
        pytest.param("flux", True, marks=pytest.mark.long),
    ],
)
def test_transformers_change_pictures(
    kind: str, takes_picture: bool, pipeline_folder: Callable[[str], Path]
) -> None:
    pipeline = load_pipeline(resolve_model(str(pipeline_folder(kind))))
    assert changing_pipeline(pipeline, mask=False)[1] == takes_picture
    picture = a_picture(picture_side(pipeline))
    found = [change_picture(pipeline, picture, "a cat", (1,), strength=s, **HOW) for s in (0.25, 1.0)]
    assert found[0].shape == (1, *picture.shape)
    assert not torch.equal(*found)


def test_steps_that_begin_late_are_those_of_the_pipeline_for_pictures(tiny: Any) -> None:
    """The way for pipelines without a class for pictures gives, with the same latents and noise, the same picture."""
    import prune_lab.applications.image_to_image as module

    side = picture_side(tiny)
    pixels = a_picture(side)[None].float() / 255
    latents = encode_pixels(tiny, pixels * 2 - 1)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    late = module._noisy(tiny, pixels, [torch.Generator().manual_seed(0)], 4, 2)
    plain = StableDiffusionImg2ImgPipeline(
        **{**tiny.components, "safety_checker": None}, requires_safety_checker=False
    )
    plain.scheduler = type(tiny.scheduler).from_config(tiny.scheduler.config)
    plain.scheduler.set_timesteps(4)
    timesteps, left = plain.get_timesteps(4, 0.5, "cpu")
    assert left == 2
    assert torch.allclose(late, plain.scheduler.add_noise(latents, noise, timesteps[:1]), atol=1e-6)
    with module._fresh_scheduler(tiny):
        module._begin_late(tiny.scheduler, 2)
        tiny.scheduler.set_timesteps(4)
        assert torch.equal(tiny.scheduler.timesteps, timesteps)


def test_a_model_that_knows_the_noise_gives_the_picture_back(pipeline_folder: Callable[[str], Path]) -> None:
    """Of PixArt, whose steps are begun late here: where it predicts the noise that was added, nothing changes, at any
    strength.
    """
    pipeline: Any = load_pipeline(resolve_model(str(pipeline_folder("pixart"))))
    picture = a_picture(picture_side(pipeline))
    latents = encode_pixels(pipeline, picture[None].float() / 127.5 - 1)
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample.detach()
    wanted = (decoded / 2 + 0.5).clamp(0, 1)
    noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(1))[None]

    def known(*_: Any, **__: Any) -> tuple[torch.Tensor]:
        return (torch.cat([noise, torch.zeros_like(noise)], dim=1),)

    pipeline.transformer.forward = known
    for strength in (0.1, 0.5, 0.9):
        found = change_picture(pipeline, picture, "a cat", (1,), strength=strength, steps=20, guidance=1.0)
        assert (found.float() / 255 - wanted).abs().max() < 0.02, strength


# Masks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "nine channels"])
def test_only_what_is_masked_is_drawn_anew(kind: str, tiny: Any) -> None:
    """What is not masked comes out as in a picture in which nothing was to be drawn; of nine channels it is shown."""
    pipeline = narrow("inpainting", tiny) if kind == "nine channels" else tiny
    side = picture_side(pipeline)
    picture, mask = a_picture(side), torch.zeros(side, side, dtype=torch.bool)
    mask[:, side // 2 :] = True
    found = change_picture(pipeline, picture, "a cat", (1, 2), strength=1.0, mask=mask, **HOW)
    assert found.shape == (2, 3, side, side)
    inside = (found[0].float() - found[1].float()).abs().mean(0)
    if (
        kind == "plain"
    ):  # latents outside are put back after every step; a decoder looks a few pixels over the border
        assert inside[:, : side // 4].mean() < 0.25 * inside[:, side // 2 :].mean()
    else:
        other = change_picture(pipeline, 255 - picture, "a cat", (1, 2), strength=1.0, mask=mask, **HOW)
        assert not torch.equal(found, other)  # the picture is read


@pytest.mark.parametrize(
    ("kind", "mask", "said"),
    [
        ("inpainting", False, "give one with --mask"),
        ("editing", False, "edits by instruction"),
        ("controlnet", False, "for its ControlNet"),
    ],
)
def test_kinds_that_cannot_are_refused_by_name(kind: str, mask: bool, said: str, tiny: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        changing_pipeline(narrow(kind, tiny), mask=mask)


def test_others_are_refused_by_name(pipeline_folder: Callable[[str], Path], tiny: Any) -> None:
    pixart = load_pipeline(resolve_model(str(pipeline_folder("pixart"))))
    with pytest.raises(UnsupportedModelError, match=r"PixArtAlphaPipeline.*no pipeline that inpaints"):
        changing_pipeline(pixart, mask=True)
    with pytest.raises(UnsupportedModelError, match="starts from no latents"):
        changing_pipeline(load_pipeline(resolve_model(str(pipeline_folder("ddpm")))), mask=False)
    with pytest.raises(DataError, match=r"takes \(3, "):
        change_picture(tiny, a_picture(4), "a cat", (1,), strength=0.5, **HOW)


@pytest.mark.parametrize(
    ("strength", "said"), [(0.0, "above 0"), (1.5, "above 0"), (float("nan"), "above 0")]
)
def test_a_strength_out_of_range_is_refused(strength: float, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_strength(strength, 10)


def test_a_strength_that_takes_no_step_is_refused() -> None:
    assert check_strength(0.5, 25) == 12
    with pytest.raises(ConfigError, match=r"takes none of them; give 0\.1 or more"):
        check_strength(0.05, 10)
    for steps in (3, 7, 30, 1000):  # what is advised is taken
        with pytest.raises(ConfigError) as caught:
            check_strength(0.5 / steps, steps)
        advised = str(caught.value).partition("; give ")[2].split()[0]
        assert check_strength(float(advised), steps) == 1


def test_what_would_be_drawn_into_one_file_is_refused() -> None:
    for twice in (
        {"strengths": (0.5, 0.3, 0.50)},
        {"strengths": (0.12345671, 0.12345672)},
        {"seeds": (1, 1)},
    ):
        with pytest.raises(ConfigError, match="twice, which would be drawn into one file"):
            SweepSettings(prompt="a cat", **twice)  # type: ignore[arg-type]


# The verb -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(a_picture(32).permute(1, 2, 0).numpy()).save(path)
    return path


@pytest.mark.long
def test_models_side_by_side(
    tiny_pipeline_folder: Path, tiny_scorer_folder: Path, picture: Path, tmp_path: Path
) -> None:
    """A student with code of its own beside its teacher: a row each, the teacher's as near to itself as can be."""
    student, out = tmp_path / "student", tmp_path / "out"
    invoke("prune", tiny_pipeline_folder, "--plan", "-Dn1.A1 -Up1.R1", "--form", "own", "--out", student)
    words = (
        "img2img",
        tiny_pipeline_folder,
        student,
        "--picture",
        picture,
        "--prompt",
        "a red cat",
        "--steps",
        4,
    )
    words = (*words, "--strengths", "0.25,0.75", "--count", 2, "--scorer", tiny_scorer_folder, "--out", out)
    invoke(*words)
    frame = pd.read_csv(out / "sweep.csv")
    assert tuple(frame.columns) == SWEEP_COLUMNS
    assert (
        list(frame["passes"]) == [2, 2, 4, 4] * 2
    )  # of PNDM, which takes its second step twice, 5 of 4 at strength 1
    assert all((out / name).is_file() for name in frame["file"])
    assert (out / "sweep.png").is_file()
    teacher, own = frame[: len(frame) // 2], frame[len(frame) // 2 :]
    assert (teacher["from_first"] == 0).all()
    assert (own["from_first"] > 0).all()
    assert frame[["clip", "likeness", "pixel_error"]].notna().all().all()
    assert frame["kept_error"].isna().all()
    assert "--force" in invoke(*words, fails=True)
    invoke(*words, "--force")


def test_a_mask_by_the_verb(tiny_pipeline_folder: Path, picture: Path, tmp_path: Path) -> None:
    mask, out = tmp_path / "mask.png", tmp_path / "out"
    half = Image.new("L", (32, 32), 0)
    half.paste(255, (16, 0, 32, 32))
    half.save(mask)
    words = ("img2img", tiny_pipeline_folder, "--picture", picture, "--prompt", "a cat", "--steps", 4)
    answered = CliRunner().invoke(
        app, [*map(str, words), "--strengths", "1", "--mask", str(mask), "--out", str(out), "--json"]
    )
    [row] = json.loads(answered.stdout)
    assert row["kept_error"] is not None
    assert (row["seed"], "seeds" in row) == (0, False)
    assert sorted(path.name for path in out.glob("[!.]*.*")) == [
        "given.png",
        "sweep.csv",
        "sweep.png",
    ]  # of one seed
    assert row["clip"] is None  # nothing here knows what a tiny model draws
    Image.new("L", (32, 32), 0).save(mask)
    with pytest.raises(DataError, match="nothing white"):
        read_own_mask(mask, 16)


def test_bad_pictures_are_refused_before_a_model_is_loaded(
    tiny_pipeline_folder: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("load_pipeline", "load_scorer"):
        monkeypatch.setattr(f"prune_lab.applications.sweeps.{name}", lambda *_, **__: pytest.fail("loaded"))
    broken, black = tmp_path / "broken.png", tmp_path / "black.png"
    broken.write_bytes(picture.read_bytes()[:50])
    Image.new("L", (32, 32), 0).save(black)

    def said(picture: Path, *words: object) -> str:
        args = ("img2img", tiny_pipeline_folder, "--picture", picture, "--prompt", "a cat", *words)
        return " ".join(invoke(*args, "--out", tmp_path / "out", fails=True).split())

    assert "found none that can be read" in said(broken)
    assert "found none that can be read" in said(picture, "--mask", broken)
    assert "no such file" in said(picture, "--mask", tmp_path / "none.png")
    assert "nothing white in it" in said(picture, "--mask", black)
    assert "takes none of them" in said(picture, "--steps", 2, "--strengths", "0.2")
    assert "a number above 0" in said(picture, "--strengths", "0.5,2")
    assert not (tmp_path / "out").exists()


def test_bad_input_is_refused_in_one_line(tiny_pipeline_folder: Path, picture: Path, tmp_path: Path) -> None:
    def said(*words: object) -> str:
        found = invoke("img2img", tiny_pipeline_folder, *words, "--out", tmp_path / "out", fails=True)
        assert not (tmp_path / "out").exists()
        return " ".join(found.split())

    assert "no such file" in said("--picture", tmp_path / "none.png", "--prompt", "a cat")
    assert "towards what" in said("--picture", picture, "--prompt", " ")
    assert "numbers such as" in said("--picture", picture, "--prompt", "a cat", "--strengths", "weak")
    assert "takes none of them" in said(
        "--picture", picture, "--prompt", "a cat", "--steps", 2, "--strengths", "0.2"
    )
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    assert "found none that can be read" in said("--picture", broken, "--prompt", "a cat")


# Several seeds --------------------------------------------------------------------------------------------------------


def swept(seeds: int, models: int = 2) -> pd.DataFrame:
    """A sweep as it may come out: two strengths; of the second model CLIP scores are far below, likeness is as before,
    and what the mask keeps is a little worse.
    """
    rng = np.random.default_rng(5)
    rows = []
    for model in range(models):
        for strength in (0.3, 0.8):
            common = np.random.default_rng(int(10 * strength)).normal(
                0, 0.05, seeds
            )  # of the noise, of both models
            clip = 0.3 + common - 0.2 * model + rng.normal(0, 0.01, seeds)
            likeness = 0.8 + common + rng.normal(0, 0.01, seeds)
            kept = 0.01 + common**2 + 0.1 * model + rng.normal(0, 0.001, seeds)
            for seed in range(seeds):
                file = f"{model}/strength-{strength}-seed-{seed}.png"
                cells = (clip[seed], likeness[seed], 0.25, kept[seed], 0.1 * model * seed, 2.0 + seed)
                rows.append((f"m{model}", strength, 7 + seed, "a cat", 4, file, *cells))
    return pd.DataFrame(rows, columns=list(SWEEP_COLUMNS))


def test_means_and_differences_over_seeds_are_those_of_scipy() -> None:
    frame = swept(6)
    found = sweep_means(frame.sample(frac=1, random_state=1).sort_values("model", kind="stable"))
    assert tuple(found.columns) == SWEEP_MEAN_COLUMNS
    assert sorted(zip(found["model"], found["strength"], strict=True)) == [
        (model, strength) for model in ("m0", "m1") for strength in (0.3, 0.8)
    ]
    assert set(found["seeds"]) == {6}
    for row in found.to_dict("records"):
        own, first = (
            frame[(frame["model"] == model) & (frame["strength"] == row["strength"])]
            for model in (row["model"], "m0")
        )
        for name in ("clip", "likeness", "pixel_error", "kept_error"):
            assert row[name] == pytest.approx(statistics.mean(own[name]))
            assert row[f"{name}_spread"] == pytest.approx(statistics.stdev(own[name]), abs=1e-12)
            if row["model"] == "m0":
                assert math.isnan(row[f"{name}_difference"])
                assert row[f"{name}_verdict"] == ""
            elif name != "pixel_error":  # the same everywhere
                interval = scipy.stats.ttest_rel(own[name], first[name]).confidence_interval(0.95)
                assert (row[f"{name}_low"], row[f"{name}_high"]) == pytest.approx(tuple(interval))
        assert row["from_first"] == pytest.approx(own["from_first"].mean())
        assert row["seconds"] == pytest.approx(4.5)
    verdicts = found[found["model"] == "m1"][[f"{name}_verdict" for name in COMPARED]]
    for row in verdicts.to_dict("records"):
        assert list(row.values()) == ["worse", "not told apart", "not told apart", "worse"]


def test_of_what_was_not_measured_there_is_no_mean() -> None:
    frame = swept(3).assign(clip=np.nan, likeness=np.nan, kept_error=np.nan)
    found = sweep_means(frame)
    assert found[["clip", "clip_spread", "clip_difference", "kept_error"]].isna().all().all()
    assert set(found["clip_verdict"]) == {""}
    assert found["pixel_error"].notna().all()
    row = Table("sweep means", found).records()[-1]
    assert shown_columns("sweep means", [row]) == ["model", "strength", "pixel_error", "from_first"]


def test_a_mean_is_shown_with_its_spread_and_marked_where_it_is_not_told_apart() -> None:
    first, *_, last = Table("sweep means", sweep_means(swept(6))).records()
    assert re.fullmatch(r"0\.\d+ ± 0\.0\d+", shown_cell("clip", first))
    assert re.fullmatch(r"0\.\d+ ± 0\.0\d+", shown_cell("clip", last))  # worse
    assert re.fullmatch(r"0\.\d+ ± 0\.0\d+ ~", shown_cell("likeness", last))
    assert shown_cell("strength", last) == "0.8"
    assert shown_cell("clip", last | {"clip_spread": None}) == cell_text("clip", last["clip"])


def test_many_seeds_are_drawn_a_few_at_a_time(
    tiny_pipeline_folder: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same pictures, passes and table as with all at once; the sheet has room for some."""
    monkeypatch.setattr("prune_lab.applications.sweeps._AT_ONCE", 2)
    batches: list[tuple[int, ...]] = []
    real = sweeps.change_picture

    def change(*given: Any, **how: Any) -> torch.Tensor:
        batches.append(tuple(given[3]))
        return real(*given, **how)

    monkeypatch.setattr(sweeps, "change_picture", change)
    how: dict[str, Any] = {"prompt": "a red cat", "steps": 2, "strengths": (0.5, 1.0), "guidance": 2.0}
    found = pl.img2img(tiny_pipeline_folder, picture=picture, out=tmp_path / "out", seeds=range(3, 10), **how)
    assert batches == [(3, 4), (5, 6), (7, 8), (9,)] * 2
    pipeline = load_pipeline(resolve_model(str(tiny_pipeline_folder)))
    own = read_own_picture(picture, picture_side(pipeline))
    wanted = real(pipeline, own, "a red cat", range(3, 10), strength=0.5, steps=2, guidance=2.0)
    assert np.array_equal(found.columns[1].pictures[:7], wanted.permute(0, 2, 3, 1).numpy())
    assert len(found.labels) == 14
    assert len(found.plot().figure().axes[0].images) == 2 * 12  # of six seeds, beside what was given
    assert list(found.data["passes"]) == [2] * 7 + [3] * 7  # PNDM takes its second step twice
    assert "sweep.png shows 12 of 14 pictures of each model, those of the first seeds" in found.notes
    assert found.means is not None
    assert [(row["strength"], row["seeds"]) for row in found.means.records()] == [(0.5, 7), (1.0, 7)]
    assert pd.read_csv(tmp_path / "out" / "means.csv").shape == (2, len(SWEEP_MEAN_COLUMNS))


def test_seeds_by_the_verb(tiny_pipeline_folder: Path, picture: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_pipeline_folder, copy)
    words = ("img2img", tiny_pipeline_folder, copy, "--picture", picture, "--prompt", "a cat", "--steps", 2)
    words = (*words, "--strengths", "1", "--out", tmp_path / "out")
    said = " ".join(invoke(*words, "--seeds", 3).split())
    assert "± " in said
    assert f"~: not told apart from {tiny_pipeline_folder}, the 95 % interval" in said
    assert "3 seeds tell little apart; 5 or more tell much more" in said
    answered = CliRunner().invoke(app, [*map(str, words), "--count", "3", "--json", "--force"])
    first, second = json.loads(answered.stdout)
    assert second["pixel_error_verdict"] == "not told apart"  # a copy
    assert (second["from_first"], second["from_first_spread"], second["seeds"]) == (0, 0, 3)
    assert first["pixel_error_verdict"] == ""
    assert "a whole number from 1" in invoke(*words, "--seeds", 0, "--force", fails=True)


def test_a_model_beside_itself_and_a_folder_in_use_are_refused(
    tiny_pipeline_folder: Path, picture: Path, tmp_path: Path
) -> None:
    words = ("--picture", picture, "--prompt", "a cat", "--out", tmp_path / "out")
    said = invoke("img2img", tiny_pipeline_folder, tiny_pipeline_folder, *words, fails=True)
    assert "twice, whose pictures would be the same; give it once" in " ".join(said.split())
    lock = {"host": "elsewhere", "process": 7, "started": 1, "since": "2026"}
    (tmp_path / ".out.lock").write_text(json.dumps(lock))
    said = invoke("img2img", tiny_pipeline_folder, *words, fails=True)
    assert "which process 7 on elsewhere since 2026 is doing now; wait for its end" in " ".join(said.split())
    assert not (tmp_path / "out").exists()


def test_names_of_files_are_told_apart() -> None:
    assert file_names(["a/small", "b/small", "me/my model"]) == ("small-1", "small-2", "my-model")
    for names in (["a/small-1", "a/small", "b/small"], ["a/Small", "b/small"], ["a", "b/a", "a-2", "c/a"]):
        assert len({name.lower() for name in file_names(names)}) == len(names)


def test_embeddings_are_those_of_the_whole_scorer(tiny_scorer_folder: Path) -> None:
    model, inputs = load_scorer(str(tiny_scorer_folder))
    pictures = torch.stack([a_picture(32), 255 - a_picture(32)])
    with torch.no_grad():
        wanted = model(pixel_values=inputs.pictures(pictures), **inputs.captions(["a", "b"])).image_embeds
    assert torch.allclose(picture_embeddings((model, inputs), pictures, batch=1), wanted, atol=1e-6)
