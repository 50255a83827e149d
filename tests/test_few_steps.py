"""Few steps: which schedulers fit, what is compared with what, the frontier, the levers, the page of the table."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler, PNDMScheduler
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import prune_lab as pl
from benchmarks.few_steps import draw_page
from prune_lab.cli import app
from prune_lab.errors import BudgetError, ConfigError, DataError, RunError
from prune_lab.evaluation import generate
from prune_lab.few_steps.frontier import baseline_of, best_by_lever, frontier, latency_limit, lever_of
from prune_lab.few_steps.measuring import Configuration, configurations, draw_in, guidance_of, psnr
from prune_lab.few_steps.schedulers import SCHEDULERS, fitting_scheduler
from prune_lab.models import load_pipeline, resolve_model
from prune_lab.profiling import Turns
from prune_lab.report.few_steps import lever_lines, steps_page
from prune_lab.runtime import duration_text
from prune_lab.schemas import FEW_STEPS_COLUMNS, FEW_STEPS_WORK_COLUMNS
from prune_lab.workflow.few_steps import StepsAsked, _Comparison
from prune_lab.workflow.few_steps_work import StepsWork, Work

ROOT = Path(__file__).resolve().parents[1]
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO = {
    **BETAS,
    "rescale_betas_zero_snr": True,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}

# Schedulers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_a_scheduler_mixes_noise_as_the_models_own_or_is_left_out(name: str) -> None:
    for own in (PNDMScheduler(**BETAS, skip_prk_steps=True), DDIMScheduler(**BETAS, clip_sample=False)):
        found, why = fitting_scheduler(name, own)
        assert not why
        assert torch.allclose(found.alphas_cumprod, own.alphas_cumprod)
        assert found.config.get("prediction_type", "epsilon") == "epsilon"
        assert not found.config.get("clip_sample")  # latents reach beyond one


def test_settings_of_the_own_scheduler_are_kept_even_where_they_are_defaults() -> None:
    own = DDIMScheduler(**ZERO, clip_sample=False)
    for name in ("dpmsolver++", "unipc", "euler", "lcm"):
        found, why = fitting_scheduler(name, own)
        assert (why, found.config["prediction_type"]) == ("", "v_prediction")
        assert found.config["timestep_spacing"] == "trailing"
        assert found.config["rescale_betas_zero_snr"]


def test_one_with_another_schedule_of_noise_is_left_out_with_the_reason() -> None:
    found, why = fitting_scheduler("pndm", DDIMScheduler(**ZERO))
    assert found is None
    assert why == "its schedule of noise is another than the one that the model was trained on"


def test_models_of_a_flow_get_schedulers_of_a_flow() -> None:
    own = FlowMatchEulerDiscreteScheduler(shift=3.0)
    found, _ = fitting_scheduler("dpmsolver++", own)
    assert (found.config["use_flow_sigmas"], found.config["flow_shift"]) == (True, 3.0)
    assert fitting_scheduler("ddim", own) == (None, "the model goes by flow matching, which it does not know")
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    assert "size of the picture" in fitting_scheduler("unipc", dynamic)[1]


def test_a_student_of_few_steps_draws_by_its_own_scheduler_alone() -> None:
    own = LCMScheduler(**BETAS)
    assert "distilled for the few steps" in fitting_scheduler("dpmsolver++", own)[1]
    assert type(fitting_scheduler("own", own)[0]) is LCMScheduler


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="'heun'; known are own, dpmsolver"):
        fitting_scheduler("heun", PNDMScheduler())


# Configurations -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline_folder: Path) -> Any:
    found = load_pipeline(resolve_model(str(tiny_pipeline_folder)))
    found.set_progress_bar_config(disable=True)
    return found


def test_what_is_compared_and_what_is_left_out(pipeline: Any) -> None:
    found, lines = configurations({"tiny": pipeline}, ("own", "pndm", "ddim"), (2, 4), (2,), 6)
    assert [(one.scheduler, one.steps, one.reuse) for one in found] == [
        *(("own", 2, 1), ("own", 2, 2), ("own", 4, 1), ("own", 4, 2)),
        *(("ddim", 2, 1), ("ddim", 2, 2), ("ddim", 4, 1), ("ddim", 4, 2), ("own", 6, 1)),
    ]
    assert lines == ["tiny: pndm is left out, it is what own is"]
    found, lines = configurations({"tiny": pipeline}, ("own",), (2, 1500), (), 2)
    assert [(one.scheduler, one.steps) for one in found] == [("own", 2)]
    assert "1500 steps of own are left out, its scheduler is one of 1,000 timesteps, which" in lines[0]


def test_more_steps_than_the_scheduler_has_are_left_out(pipeline: Any) -> None:
    found, lines = configurations({"tiny": pipeline}, ("lcm",), (4, 60), (), 8)
    assert [(one.scheduler, one.steps) for one in found] == [("lcm", 4), ("own", 8)]
    assert len(lines) == 1
    assert lines[0].startswith("tiny: 60 steps of lcm are left out")


def test_one_step_is_left_out_where_the_pipeline_cannot_take_it(
    pipeline_folder: Callable[[str], Path],
) -> None:
    """PixArt's takes it for that of a model which was distilled for one step; of others diffusers raises IndexError."""
    pixart = load_pipeline(resolve_model(str(pipeline_folder("pixart"))))
    _, lines = configurations({"pixart": pixart}, ("own", "lcm"), (2,), (), 2)
    assert (
        "pixart: lcm is left out, the pipeline steps by a DPMSolverMultistepScheduler, found a LCM"
        in lines[0]
    )
    found, lines = configurations({"pixart": pixart}, ("own", "ddim"), (1, 2), (), 2)
    assert {(one.scheduler, one.steps) for one in found} == {("own", 2), ("ddim", 1), ("ddim", 2)}
    assert "with which a PixArtAlphaPipeline draws in two steps or more" in "".join(lines)
    with pytest.raises(ConfigError, match="draws in two steps or more; give more, 25 are usual"):
        generate(pixart, ["a cat"], [0], steps=1, guidance=1.0)
    draw_in(pixart, Configuration("pixart", "ddim", 1), ["a cat"], [0], guidance=1.0)


def test_pictures_are_those_of_plain_diffusers_and_passes_are_counted(pipeline: Any) -> None:
    own = pipeline.scheduler
    drawn = draw_in(
        pipeline, Configuration("tiny", "ddim", 4), ("a red cat", "a dog"), (3,), guidance=2.0, batch=1
    )
    assert (drawn.passes, drawn.whole) == (4, 4)
    assert pipeline.scheduler is own
    plain = type(pipeline)(
        **{**pipeline.components, "scheduler": fitting_scheduler("ddim", own)[0]},
        requires_safety_checker=False,
    )
    plain.set_progress_bar_config(disable=True)
    wanted = plain(
        ["a dog"],
        num_inference_steps=4,
        guidance_scale=2.0,
        generator=[torch.Generator().manual_seed(3)],
        output_type="pt",
    ).images
    assert torch.equal((wanted[0] * 255).round().to(torch.uint8), drawn.pictures[1])


def test_reuse_does_not_go_from_one_picture_to_the_next(pipeline: Any) -> None:
    how = Configuration("tiny", "ddim", 5, 2)
    together = draw_in(pipeline, how, ("a red cat", "a dog"), (3,), guidance=2.0, batch=1)
    alone = draw_in(pipeline, how, ("a dog",), (3,), guidance=2.0)
    assert torch.equal(together.pictures[1:], alone.pictures)
    assert (together.passes, together.whole) == (alone.passes, alone.whole) == (5, 3)
    plain = draw_in(pipeline, Configuration("tiny", "ddim", 5), ("a dog",), (3,), guidance=2.0)
    assert not torch.equal(plain.pictures, alone.pictures)


def test_guidance_is_that_of_the_pipeline(pipeline: Any) -> None:
    assert guidance_of(pipeline, 5.0) == 5.0
    few = type(pipeline).from_pipe(pipeline, scheduler=LCMScheduler(steps_offset=1))
    assert guidance_of(few, 5.0) == 1.0


def test_likeness_in_decibels() -> None:
    one = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert psnr(one, one + 51) == pytest.approx(20 * torch.log10(torch.tensor(5.0)).item(), abs=1e-4)


# The frontier ---------------------------------------------------------------------------------------------------------


def made_up() -> pd.DataFrame:
    rows = [
        ("big", "own", 25, 1, "", 1000.0, 0.60),
        ("big", "own", 8, 1, "", 400.0, 0.55),
        ("big", "ddim", 8, 1, "", 410.0, 0.50),
        ("big", "own", 25, 2, "", 600.0, 0.54),
        ("small", "own", 25, 1, "", 500.0, 0.57),
        ("small", "own", 4, 1, "", 100.0, 0.40),
        ("big", "own", 50, 1, "many", 2000.0, 0.60),
    ]
    names = ["model", "scheduler", "steps", "reuse", "role", "median_ms", "clip"]
    table = pd.DataFrame(rows, columns=names)
    table["psnr_teacher"] = 10.0
    table["latency_change"] = table["median_ms"] / 1000 - 1
    table["clip_change"] = table["clip"] - 0.6
    table["clip_low"], table["clip_high"] = table["clip_change"] - 0.04, table["clip_change"] + 0.04
    baseline = baseline_of(table)
    table["lever"] = [lever_of(row, baseline) for _, row in table.iterrows()]
    return table


def test_no_row_of_the_frontier_is_beaten_and_every_other_is() -> None:
    table = made_up()
    found = frontier(table)
    assert found["median_ms"].tolist() == [100, 400, 500, 1000]

    def beats(one: Any, other: Any) -> bool:
        as_good = one["median_ms"] <= other["median_ms"] and one["clip"] >= other["clip"]
        return as_good and (one["median_ms"] < other["median_ms"] or one["clip"] > other["clip"])

    for index, row in table.iterrows():
        beaten = any(beats(other, row) for _, other in table.iterrows())
        assert beaten == (index not in found.index)


def test_the_baseline_is_the_first_model_in_the_most_steps_that_were_asked_for() -> None:
    table = made_up()
    assert baseline_of(table)["median_ms"] == 1000
    assert table["lever"].tolist() == [
        *("none", "fewer steps", "fewer steps + scheduler", "reuse", "other model"),
        *("other model + fewer steps", "more steps"),
    ]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("200ms", 200), ("0.2s", 200), ("0.5x", 500), ("1x", 1000)],
)
def test_limits_are_read(text: str, wanted: float) -> None:
    assert latency_limit(text, made_up()) == wanted


@pytest.mark.parametrize("text", ["200", "fast", "0x", "-1ms", "0.5 of it"])
def test_other_limits_are_refused(text: str) -> None:
    with pytest.raises(BudgetError, match="cannot read the latency"):
        latency_limit(text, made_up())


def test_the_levers_that_meet_a_limit_best_first() -> None:
    found = best_by_lever(made_up(), "500ms")
    assert found["lever"].tolist() == [
        *("other model", "fewer steps", "fewer steps + scheduler", "other model + fewer steps"),
    ]
    lines = lever_lines(made_up(), "0.5x")
    assert lines[0].startswith(
        "pull first: other model (small, 25 steps by own), the fewest changes that keep"
    )
    assert lines[-1] == "not within it alone: reuse (at best 600 ms, 0.60x)"
    assert lever_lines(made_up(), "0.5x", 1) == [*lines[:2], lines[-1]]
    assert (
        "fewer steps (big, 8 steps by own), the best of those within it, all of which"
        in lever_lines(made_up(), "410ms")[0]
    )
    assert lines[1].startswith(
        "other model: small, 25 steps by own, reuse none: 500 ms (0.50x), CLIP score 0.570"
    )
    assert lever_lines(made_up(), "50ms")[0] == "nothing that was measured is within 50ms"
    assert lever_lines(made_up(), "50ms")[1].startswith("not within it alone: ")


def test_a_wide_interval_alone_recommends_nothing() -> None:
    table = made_up()
    table.loc[2, ["clip_low", "clip_high"]] = (-0.5, 0.3)  # what the row before beats in time and quality
    assert lever_lines(table, "450ms")[0].startswith(
        "pull first: fewer steps (big, 8 steps by own), the best"
    )
    table.loc[5, ["clip_low", "clip_high"]] = (-0.5, 0.3)  # what none beats
    assert lever_lines(table, "450ms")[0] == (
        "pull first: other model + fewer steps (small, 4 steps by own), the fewest changes that keep the CLIP score, "
        "as far as its interval tells: it may lose up to 0.500 of 0.600, more --images tell"
    )


def _turn_sign(folder: Path, name: str) -> None:
    """Turn the sign of one tensor of the model in ``folder``."""
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    tensors[name] = -tensors[name]
    save_file(tensors, path, {"format": "pt"})


# The whole ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tiny_scorer_folder: Path, tmp_path: Path) -> list[str]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\na dog\na red cat\n")  # one of them twice
    return [
        *("--steps", "2,3", "--schedulers", "own,ddim", "--reuse", "2", "--many", "4", "--images", "3"),
        *("--rounds", "2", "--prompts", str(prompts), "--scorer", str(tiny_scorer_folder), "--device", "cpu"),
    ]


@pytest.mark.long
def test_the_verb_writes_a_table_a_figure_and_a_page_and_goes_on(
    tiny_pipeline_folder: Path, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, out = tmp_path / "student", tmp_path / "out"
    pl.load(str(tiny_pipeline_folder)).prune("bk-small", student)
    args = ["steps", str(tiny_pipeline_folder), str(student), "--out", str(out), *asked]
    found = CliRunner().invoke(app, [*args, "--latency", "0.9x", "--json"])
    assert found.exit_code == 0, found.output
    rows = json.loads(found.stdout)
    assert tuple(rows[0]) == FEW_STEPS_COLUMNS
    assert len(rows) == 2 * (2 * 2 * 2 + 1)
    by_name = {(row["model"], row["scheduler"], row["steps"], row["reuse"]): row for row in rows}
    assert {row["pictures"] for row in rows} == {2}
    many = by_name[tiny_pipeline_folder.name, "own", 4, 1]
    assert (many["role"], many["psnr_own"], many["psnr_teacher"]) == ("many", *(many["psnr_own"],) * 2)
    assert many["psnr_own"] == pytest.approx(88.13, abs=0.01)  # the same pictures
    assert by_name["student", "ddim", 3, 2]["passes"] == 3
    assert by_name["student", "ddim", 3, 2]["whole"] == 2
    assert by_name["student", "own", 4, 1]["psnr_teacher"] < 60 < by_name["student", "own", 4, 1]["psnr_own"]
    assert any(row["best"] for row in rows)
    assert "within 0.9x" in found.stderr
    for name in ("steps.csv", "rounds.csv", "environment.json", "steps.png", "pictures.png", "README.md"):
        assert (out / name).is_file()
    monkeypatch.setattr("prune_lab.workflow.few_steps.draw_in", None)  # nothing is drawn or timed again
    monkeypatch.setattr("prune_lab.workflow.few_steps.time_pictures", None)
    again = CliRunner().invoke(app, [*args, "--json"])
    assert json.loads(again.stdout) == rows


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--steps", "0"], "asked for steps = 0; give at least 1"),
        (["--steps", "many"], "give whole numbers, such as --steps 4,8"),
        (["--reuse", "1"], "asked for reuse = 1; give at least 2"),
        (["--schedulers", "best"], "known are own, dpmsolver++"),
        (["--images", "9"], "found 3 prompts; ask for fewer images"),
        (["--guidance", "0"], "asked for guidance = 0.0; give at least 1"),
        (["--latency", "fast"], "cannot read the latency 'fast'"),
    ],
)
def test_mistakes_are_told_in_one_line(
    tiny_pipeline_folder: Path, asked: list[str], tmp_path: Path, changes: list[str], said: str
) -> None:
    out = tmp_path / "out"
    found = CliRunner().invoke(app, ["steps", str(tiny_pipeline_folder), "--out", str(out), *asked, *changes])
    assert found.exit_code == 2, found.output
    assert said in found.output
    assert not out.exists()


def test_a_folder_of_somebody_else_is_left_alone(
    tiny_pipeline_folder: Path, asked: list[str], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("README.md", "steps.csv", "environment.json"):
        (tmp_path / "mine" / name).write_text("{}")
    arguments = ["steps", str(tiny_pipeline_folder), "--out", str(tmp_path / "mine"), *asked]
    found = CliRunner().invoke(app, arguments)
    assert (found.exit_code, found.output.count("\n")) == (2, 1)
    assert "found something there that prune-lab did not write" in found.output
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".steps.lock").touch()  # left by a process before it drew anything
    found = CliRunner().invoke(app, [*arguments[:3], str(tmp_path / "killed"), *asked])
    assert "remove .steps.lock there" in found.output  # of a process that nobody knows
    assert {path.name: path.read_text() for path in (tmp_path / "mine").iterdir()} == dict.fromkeys(
        ("README.md", "steps.csv", "environment.json"), "{}"
    )


def test_what_was_drawn_or_timed_by_other_parts_or_elsewhere_is_made_again(
    tiny_pipeline_folder: Path, tiny_scorer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pipelines of one U-Net whose VAEs differ; one scorer after another in one folder; other threads."""
    other, scorer = tmp_path / "other", tmp_path / "scorer"
    shutil.copytree(tiny_pipeline_folder, other)
    shutil.copytree(tiny_scorer_folder, scorer)
    _turn_sign(other / "vae", "decoder.conv_out.weight")

    def compared(seed: int = 0) -> _Comparison:
        asked = StepsAsked(images=1, prompts="default", scorer=str(scorer), many=2, seed=seed)
        sources = [resolve_model(str(one)) for one in (tiny_pipeline_folder, other)]
        return _Comparison(sources, asked, tmp_path / "out", torch.device("cpu"), torch.float32)

    first = compared()
    configuration, another = (Configuration(name, "own", 2) for name in first.digests)
    assert first._key(configuration) != first._key(another)
    own = configuration.name
    shown = tmp_path / "out" / "pictures" / f"{own.replace('/', '-')}.png"
    pictures = []
    for seed in (0, 1, 0):  # the scores of a seed are never beside the pictures of another
        compared(seed).quality(configuration)
        pictures.append(shown.read_bytes())
    assert pictures[0] == pictures[2] != pictures[1]
    times = [Turns((own,), ((value,), (value,)), 1, "one process") for value in (1.0, 2.0)]
    monkeypatch.setattr("prune_lab.workflow.few_steps.time_pictures", lambda *_, **__: times.pop(0))
    assert first.times([configuration]).latency(own).median_ms == 1
    assert first.times([configuration]).latency(own).median_ms == 1
    first.environment = dataclasses.replace(first.environment, num_threads=77)
    assert first.times([configuration]).latency(own).median_ms == 2
    _turn_sign(scorer, "visual_projection.weight")
    assert compared()._key(configuration) != first._key(configuration)


def test_models_that_cannot_be_compared_are_refused(
    tiny_pipeline_folder: Path, pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model = pl.load(str(tiny_pipeline_folder))
    with pytest.raises(RunError, match="with itself"):
        model.few_steps(str(tiny_pipeline_folder), out=tmp_path / "out", images=1)
    with pytest.raises(RunError, match="alone; give a pipeline folder"):
        pl.load(str(tiny_pipeline_folder / "unet")).few_steps(out=tmp_path / "out", images=1)
    with pytest.raises(DataError, match="which reads no text"):
        pl.load(str(pipeline_folder("ddpm"))).few_steps(out=tmp_path / "out", images=1)
    with pytest.raises(ConfigError, match="'colour' of few steps; known are steps, schedulers"):
        model.few_steps(out=tmp_path / "out", colour=1)


def test_the_committed_page_is_what_its_table_says(tmp_path: Path) -> None:
    folder = ROOT / "reports" / "steps"
    table, conditions = (
        pd.read_csv(folder / "steps.csv"),
        json.loads((folder / "environment.json").read_text()),
    )
    assert tuple(table.columns) == FEW_STEPS_COLUMNS
    findings = (folder / "FINDINGS.md").read_text(encoding="utf-8").splitlines()
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert page == steps_page(table, conditions, findings, pictures=True)
    for name in ("steps.csv", "rounds.csv", "environment.json", "FINDINGS.md"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert draw_page(tmp_path).read_text() == steps_page(table, conditions, findings)
    assert (tmp_path / "steps.png").is_file()
    assert all((folder / name).stat().st_size < 300_000 for name in ("steps.png", "pictures.png"))


# How much there is to do ----------------------------------------------------------------------------------------


def _work(speed: float | None, *drawn: int, reuse: int = 1) -> StepsWork:
    """Two configurations of 4 and 10 steps, of passes of 1000 multiply-adds, two a step; three pictures are timed."""
    parts = [
        Work(Configuration("m", "own", steps, one), count, 3, 2000.0 * steps)
        for steps, one, count in zip((4, 10), (1, reuse), drawn, strict=True)
    ]
    return StepsWork(tuple(parts), 5, speed)


def test_what_there_is_to_do_is_counted_before() -> None:
    drawing, timing, estimate = _work(1e4, 5, 5, reuse=2).lines
    assert drawing == "to draw: 2 configurations, 5 pictures of each: 10 pictures in 70 steps"
    assert timing == "to time: 2 configurations, 3 pictures of each: 6 pictures in 42 steps, in turns"
    # (5 + 3) pictures of 4 and of 10 steps, 2000 multiply-adds each, 10,000 a second
    assert estimate.startswith(f"estimate: {duration_text(8 * 14 * 2000 / 1e4)}, by the multiply-adds")
    assert "passes that reuse are counted as whole ones" in estimate
    assert "reuse" not in _work(1e4, 5, 5).lines[2]
    assert (
        _work(1e4, 0, 5).lines[0]
        == "to draw: 1 configuration, 5 pictures of each: 5 pictures in 50 steps; 1 more drawn already"
    )
    assert _work(None, 0, 5).lines[2] == "estimate: time unknown before the first pictures"
    assert _work(1e4, 0, 0).lines[0] == "to draw: nothing, all there is (2 configurations) is drawn already"
    done = StepsWork((Work(Configuration("m", "own", 4), 0, 0, 1.0),), 5, None)
    assert done.lines == ("to draw: nothing, all there is (1 configuration) is drawn already",)
    assert done.frame()[["state", "pictures"]].values.tolist() == [["done", 0]]
    frame = _work(1e4, 0, 5).frame()
    assert tuple(frame.columns) == FEW_STEPS_WORK_COLUMNS
    assert list(frame["estimate_seconds"]) == pytest.approx([3 * 4 * 0.2, 8 * 10 * 0.2])


def test_the_first_pictures_tell_how_long_the_rest_takes() -> None:
    line = _work(None, 5, 5).after(Configuration("m", "own", 4), 10.0)
    # 20 picture steps took 10 s; left are 50 to draw, and 42 to time
    assert line.startswith("about 46 s left at the pace of the first 5 pictures (m/own/4/1, 10 s); encoding")
    alone = StepsWork((Work(Configuration("m", "own", 4), 5, 0, 1.0),), 5, None)
    assert alone.after(Configuration("m", "own", 4), 10.0) == ""


@pytest.mark.long
def test_how_much_there_is_to_draw_is_said_and_a_dry_run_writes_nothing(
    tiny_pipeline_folder: Path, asked: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    args = ["steps", str(tiny_pipeline_folder), "--out", str(out), *asked, "--reuse", ""]
    found = CliRunner().invoke(app, [*args, "--dry-run", "--json"])
    assert found.exit_code == 0, found.output
    assert not out.exists()
    rows = json.loads(found.stdout)
    assert tuple(rows[0]) == FEW_STEPS_WORK_COLUMNS
    assert {row["state"] for row in rows} == {"to do"}
    drawn = [(row["pictures"], row["steps"]) for row in rows]
    pictures, steps = sum(count for count, _ in drawn), sum(count * each for count, each in drawn)
    assert f"{pictures} pictures in {steps} steps" in found.stderr
    assert "note: estimate: " in found.stderr
    found = CliRunner().invoke(app, [*args, "--rounds", "2"])
    assert found.exit_code == 0, found.output
    assert f"{pictures} pictures in {steps} steps" in found.stderr
    assert re.search(r"about .* left at the pace of the first 3 pictures \(", found.stderr)
    assert f"all there is ({len(rows)} configurations) is drawn already" in (
        CliRunner().invoke(app, [*args, "--dry-run"]).stderr
    )
    for grid in (out / "drawn").glob(
        "*.png"
    ):  # one is lost: it, and what it is compared with, are drawn again
        if json.loads(grid.with_suffix(".json").read_text())["configuration"].endswith("/own/3/1"):
            grid.unlink()
    rows = json.loads(CliRunner().invoke(app, [*args, "--dry-run", "--json"]).stdout)
    assert {row["steps"]: row["pictures"] for row in rows if row["scheduler"] == "own"} == {3: 3, 2: 0, 4: 3}
