"""The command line: what each verb prints, writes and returns, and how it ends when something is wrong."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import BuiltOnce
from PIL import Image
from typer.testing import CliRunner, Result

import prune_lab
from prune_lab import exit_codes, schemas
from prune_lab.cli import app
from prune_lab.cli.output import emit
from prune_lab.config import (
    SETTINGS,
    ProbeConfig,
    RunConfig,
    changed_settings,
    load_config,
    to_toml,
)
from prune_lab.config.toml import config_from_toml
from prune_lab.errors import RunError
from prune_lab.exit_codes import EXIT_CODES
from prune_lab.runs import Run
from prune_lab.tables import DECISIVE_COLUMNS, Table, records, short_plan, shown_cell, shown_columns
from prune_lab.zero_shot.gates import FAILED, PASSED, UNDECIDED

pytestmark = pytest.mark.usefixtures("blank_figures")

# arXiv:2305.15798: parameters of the published U-Nets, exact; MACs of the paper in G
PAPER = {
    "teacher": (859_520_964, 339.0),
    "bk-base": (579_384_964, 223.9),
    "bk-small": (482_346_884, 217.9),
    "bk-tiny": (323_384_964, 205.2),
}


def answer(*arguments: object, code: int = 0) -> Result:
    """What the command line answers to ``arguments``; a crash is raised here."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def table(*arguments: object) -> list[dict[str, Any]]:
    """The JSON that the verb prints: all of stdout, and a list of objects."""
    rows = json.loads(answer(*arguments, "--json").stdout)
    assert isinstance(rows, list)
    assert all(isinstance(row, dict) for row in rows)
    return rows


def mistake(*arguments: object) -> str:
    """The one line on stderr that the command ends with, exit code 2 and nothing on stdout."""
    result = answer(*arguments, code=2)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert result.stderr.strip().endswith(lines[0])
    return lines[0]


# Looking at a model ----------------------------------------------------------------------------------------------


def test_blocks_of_a_preset() -> None:
    rows = table("blocks", "sd-v1.4")
    assert {"name", "path", "kind", "params", "macs", "removable", "reason"} <= set(rows[0])
    assert [sum(row["kind"] == kind for row in rows) for kind in ("resnet", "attention")] == [22, 16]
    assert sum(row["removable"] for row in rows) == 34
    assert all(type(row["params"]) is int and type(row["macs"]) is int for row in rows)
    assert [row["name"] for row in rows if row["reason"]] == ["Dn2.R1", "Dn3.R1", "Up3.R1", "Up4.R1"]
    assert next(row["path"] for row in rows if row["name"] == "Dn2.A1") == "down_blocks.1.attentions.0"


def test_the_reduction_table_of_the_paper() -> None:
    plans = [word for name in list(PAPER)[1:] for word in ("--plan", name)]
    rows = table("profile", "sd-v1.4", *plans)
    assert [row["plan"] for row in rows] == list(PAPER)
    for row in rows:
        params, macs = PAPER[row["plan"]]
        assert type(row["params"]) is int
        assert type(row["macs"]) is int
        assert row["params"] == params
        assert row["paper_macs"] / 1e9 == pytest.approx(macs, abs=0.05)
        assert row["macs"] > row["paper_macs"]
        assert row["params_change"] == pytest.approx(params / PAPER["teacher"][0] - 1)
        assert "median_ms" not in row  # a preset has no weights: structure only


@pytest.mark.long
def test_profile_of_a_pipeline_folder(tiny_pipeline_folder: Path) -> None:
    timed = table(
        "profile", tiny_pipeline_folder, "--plan", "-Dn1.R2 -Dn1.A2", "--runs", 2, "--device", "cpu"
    )
    assert [row["plan"] for row in timed] == ["teacher", "-Dn1.R2 -Dn1.A2"]
    assert timed[0]["median_ms"] > 0
    untimed = table("profile", tiny_pipeline_folder, "--blocks", "--no-latency")
    assert len(untimed) == 38 + 6 + 1  # blocks, samplers, rest
    assert sum(row["params"] for row in untimed) == timed[0]["params"]
    parts = table("profile", tiny_pipeline_folder, "--pipeline", "--steps", 3, "--runs", 2, "--device", "cpu")
    assert [row["part"] for row in parts] == ["text_encoder", "unet", "vae_decoder", "total"]
    assert sum(row["share"] for row in parts[:-1]) == pytest.approx(1)


def test_tables_for_people(tiny_pipeline_folder: Path) -> None:
    text = answer("blocks", tiny_pipeline_folder).stdout
    assert "Dn2.R1" in text
    assert "changes the width" in text
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)


def test_missing_values_and_whole_numbers_in_json() -> None:
    frame = pd.DataFrame(
        {"rank": [1, None], "loss": [0.5, float("nan")], "plan": ["a", None], "ok": [True, False]}
    )
    assert records(frame) == [
        {"rank": 1, "loss": 0.5, "plan": "a", "ok": True},
        {"rank": None, "loss": None, "plan": None, "ok": False},
    ]
    assert type(records(frame)[0]["rank"]) is int
    nullable = pd.DataFrame({"rank": pd.array([3, None], dtype="Int64")})
    assert records(nullable) == [{"rank": 3}, {"rank": None}]


def test_the_line_of_each_verb_is_whole() -> None:
    help_text = answer("--help").stdout
    lines = help_text.split("Commands:")[1].split("Exit codes")[0].strip().splitlines()
    assert len(lines) > 20  # a line per verb
    assert not [line for line in lines if not line.endswith(".") or line.endswith("...")]


def test_exit_codes_have_one_home_and_help_names_all() -> None:
    told = " ".join(answer("--help").stdout.split())
    for code, meaning in EXIT_CODES.items():
        assert f"{code}: {meaning}." in told
    # the gates, which tell CI, and the answers to signals are among them
    assert (PASSED, FAILED, UNDECIDED) == (exit_codes.DONE, exit_codes.NO, exit_codes.UNDECIDED)
    assert {2, 130, 143} <= set(EXIT_CODES)


# Making things ---------------------------------------------------------------------------------------------------


def test_prune_writes_a_pipeline_that_plain_diffusers_loads(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    out = tmp_path / "small"
    (row,) = table("prune", tiny_pipeline_folder, "--plan", "bk-small", "--out", out, "--dry-run")
    assert not out.exists()
    assert row["written"] is False
    (row,) = table("prune", tiny_pipeline_folder, "--plan", "bk-small", "--out", out)
    pipeline = StableDiffusionPipeline.from_pretrained(out)
    assert sum(parameter.numel() for parameter in pipeline.unet.parameters()) == row["params"]
    assert row["blocks_removed"] == 17
    assert pipeline.unet.mid_block is None
    assert "--force" in mistake("prune", tiny_pipeline_folder, "--plan", "bk-tiny", "--out", out)
    told = answer("prune", tiny_pipeline_folder, "--plan", "bk-tiny", "--out", out, "--force").stderr
    loaded: dict[str, Any] = {}
    exec(told.split("in Python: ")[1].splitlines()[0], loaded)
    assert len(loaded["pipeline"].unet.down_blocks) == 3
    assert len(StableDiffusionPipeline.from_pretrained(out).unet.down_blocks) == 3

    picture = tmp_path / "cat.png"
    drawing = (
        "generate",
        out,
        "--prompt",
        "a cat",
        "--out",
        picture,
        "--seed",
        0,
        "--steps",
        2,
        "--device",
        "cpu",
    )
    result = answer(*drawing)
    assert result.stdout == ""
    first = picture.read_bytes()
    with Image.open(picture) as image:
        assert image.size == (32, 32)
    assert "--force" in mistake(*drawing)
    answer(*drawing, "--force")
    assert picture.read_bytes() == first  # a seed is a seed
    answer(*drawing, "--force", "--count", 2)
    with Image.open(picture) as image:
        assert image.size == (32 + 2 + 32, 32)
    assert ".png" in mistake("generate", out, "--prompt", "a cat", "--out", tmp_path / "cat.jpeg")


@pytest.mark.long
def test_score_alone_writes_its_table(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.csv"
    options = ("--groups", "stages", "--samples", 4, "--device", "cpu", "--out", out)
    rows = table("score", tiny_pipeline_folder, *options)
    frame = pd.read_csv(out)
    assert list(frame["group"]) == [row["group"] for row in rows]
    assert set(frame["kind"]) == {"stage"}
    assert set(frame["samples"]) == {4}
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.long
def test_a_race_says_what_every_block_was_measured_on(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    options = ["--groups", "blocks", "--samples", 16, "--set", "probe.timesteps=4", "--device", "cpu"]
    options += ["--criterion", "output-mse", "--criterion", "similarity"]
    options += ["--set", "score.race=0.3", "--set", "score.channels_last=true"]
    rows = table("score", tiny_pipeline_folder, *options, "--run", tmp_path / "run")
    raced = [row["samples"] for row in rows if row["criterion"] == "output-mse"]
    assert 2 <= min(raced) < 16
    # A race at 0.3 of the naive cost cannot have measured more than 0.3 x 2.4 of all samples: suffixes are half a pass.
    assert sum(raced) < 0.72 * 16 * 38
    assert {row["samples"] for row in rows if row["criterion"] == "similarity"} == {16}
    assert load_config(tmp_path / "run" / "config.toml").score.race == 0.3


def test_scores_by_several_criteria_of_any_plans_on_own_prompts(
    small_run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    (tmp_path / "plans.txt").write_text("-Dn1.R2 -Dn1.A2  # a pair\nbk-tiny\n")
    (tmp_path / "prompts.csv").write_text("prompt,kind\na cat,animals\na dog,animals\nrain,weather\n")
    (tmp_path / "job.toml").write_text(to_toml(small_run_config(evaluate={"prompts": ("x",)})))
    run = tmp_path / "run"
    options = ["--config", tmp_path / "job.toml", "--run", run, "--device", "cpu", "--set", "score.batch=0"]
    options += ["--criterion", "output-mse", "--criterion", "clip-score", "--criterion", "similarity"]
    options += ["--groups", tmp_path / "plans.txt", "--groups", "inner", "--set", "probe.timesteps=2"]
    options += ["--set", f"probe.prompts={tmp_path / 'prompts.csv'}", "--set", "dtype=float32"]
    options += ["--set", "score.guidance=4"]
    rows = table("score", *options)
    names = ["-Dn1.R2 -Dn1.A2", "bk-tiny", "Md", "Dn4+Md+Up1"]
    assert [row["group"] for row in rows] == names * 3
    assert [row["criterion"] for row in rows[::4]] == ["output-mse", "clip-score", "similarity"]
    assert {row["samples"] for row in rows} == {3}
    assert sorted(row["rank"] for row in rows[:2]) == [1, 2]  # of the two plans, by the first criterion
    assert [one["with"] for one in rows[4]["agreement"]] == ["output-mse", "similarity"] * 2
    assert {one["over"]: one["count"] for one in rows[4]["agreement"]} == {"plans": 2, "inner stages": 2}
    parts = pd.read_csv(run / "importance_parts.csv")
    assert set(parts.loc[parts["criterion"] == "clip-score", "of"]) == {"animals", "weather"}
    assert "timesteps" in set(parts["part"])


@pytest.mark.long
def test_all_criteria_compared_with_each_other_and_with_plans(
    small_run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    (tmp_path / "job.toml").write_text(to_toml(small_run_config(evaluate={"prompts": ("a", "b")})))
    out = tmp_path / "compared"
    rows = table("score", "--config", tmp_path / "job.toml", "--compare", "--out", out)
    assert [row["criterion"] for row in rows[:2]] == ["output-mse", "output-cosine"]
    assert len(rows) == 14
    assert rows[0]["leader_spearman"] == 1
    costs = {row["criterion"]: row["forwards"] for row in rows}
    assert costs["random"] == 0
    assert costs["gate-fisher"] == 2 * 4  # samples
    assert costs["clip-score"] == 35 * 2  # the teacher and every block, two prompts, one step
    assert 4 * 34 / 2.5 < costs["output-mse"] == costs["output-cosine"] < 4 * 34 / 1.3
    assert all(-1 <= row["impact_spearman"] <= 1 for row in rows)
    assert all(row["outcome_spearman"] is None for row in rows)  # nothing was distilled
    assert len(pd.read_csv(out / "agreement.csv")) == len(rows) * len(rows) + len(rows)
    assert len(pd.read_csv(out / "additivity.csv")) >= 40
    assert "Spearman" in (out / "README.md").read_text()
    steady = pd.read_csv(out / "stability.csv")
    assert steady.loc[steady["part"] == "noise", "of"].unique().tolist() == ["seed 1", "seed 2"]
    assert "are the same with other noise" in (out / "README.md").read_text()
    drawn = pd.read_csv(out / "scores.csv")
    assert drawn.loc[drawn["criterion"] == "image-change", "psnr"].notna().all()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (("--criterion", "mse"), "choose one of: output-mse"),
        (("--criterion", "output-mse", "--criterion", "best"), "choose one of: output-mse"),
        (("--groups", "layers"), "score.groups"),
        (("--groups", "missing.txt"), "missing.txt"),
        (("--set", "score.batch=many"), "whole number"),
        (("--set", "dtype=int8"), "one of float32"),
        (("--set", "score.guidance=-1"), "zero or more"),
        (("--set", "score.race=2"), "a share from 0 to 1"),
        (
            ("--set", "score.race=0.2", "--criterion", "taylor"),
            "race by denoising-loss, output-cosine, output-mse",
        ),
        (("--set", "score.race=0.0001", "--samples", "4"), "give a budget of"),
        (("--set", "probe.prompts=missing.csv"), "give a .txt file"),
        (("--set", "probe.prompts=missing.doc"), "give a .txt file"),
    ],
)
def test_a_score_that_cannot_be_had_is_refused(
    tiny_pipeline_folder: Path, options: tuple[str, ...], wanted: str
) -> None:
    assert wanted in mistake("score", tiny_pipeline_folder, *options)


def test_a_bare_unet_has_no_pictures_to_score(tiny_pipeline_folder: Path) -> None:
    scoring = ("score", tiny_pipeline_folder / "unet", "--samples", 2)
    assert "clip-score generates images" in mistake(*scoring, "--criterion", "clip-score")
    assert "guidance 4" in mistake(*scoring, "--set", "score.guidance=4")


# A run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config_file(small_run_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small_run_config(
        score={"groups": ("block",)},
        search={"budgets": ("params<=60%",)},
        distill={"steps": 1, "pictures": 2},
        evaluate={"prompts": ("a cat",), "guidance": 7.5},
    )
    path = tmp_path_factory.mktemp("config") / "job.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run_folder(built_once: BuiltOnce, config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose report is a stub: drawing it takes longer than all the rest."""

    def stub(run: Run) -> Path:
        run.report_dir.mkdir(exist_ok=True)
        run.report.write_text("a stub")
        return run.report

    def finish(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("prune_lab.workflow.ranking.write_report", stub)
            rows = table("run", "--config", config_file, "--run", folder)
        assert {row["origin"] for row in rows} == {"teacher", "control", "search"}

    finished = built_once("finished-by-the-verb", finish)
    return Path(shutil.copytree(finished, tmp_path_factory.mktemp("runs") / "one"))


@pytest.mark.long
def test_run_reports_and_resumes(run_folder: Path, config_file: Path) -> None:
    assert (run_folder / "report" / "index.html").stat().st_size > 0
    ranking = (run_folder / "ranking.csv").stat().st_mtime_ns
    result = answer("run", "--config", config_file, "--run", run_folder)
    assert (run_folder / "ranking.csv").stat().st_mtime_ns == ranking
    assert "index.html" in result.stderr
    assert "bk-tiny" in result.stdout


def test_dry_run_says_what_is_left(run_folder: Path, config_file: Path, tmp_path: Path) -> None:
    states = {
        row["step"]: row["state"]
        for row in table("run", "--config", config_file, "--run", run_folder, "--dry-run")
    }
    assert set(states.values()) == {"done", "not asked for"}  # nothing is to be repaired
    assert list(states)[:3] == ["blocks", "probe", "scores"]
    rows = table("run", "--config", config_file, "--run", tmp_path / "new", "--dry-run")
    assert {row["state"] for row in rows} == {"to do", "not asked for"}
    assert not (tmp_path / "new").exists()


@pytest.mark.long
def test_every_step_alone_on_a_run(run_folder: Path) -> None:
    assert len(table("score", "--run", run_folder)) == 38
    plans = table("search", "--run", run_folder)
    assert plans[0]["plan"] == "bk-tiny"
    assert all(type(plan["params"]) is int for plan in plans)
    recovered = table("distill", "--run", run_folder, "--plan", "bk-tiny")
    assert {row["status"] for row in recovered} == {"done"}
    assert len(table("evaluate", "--run", run_folder)) == 1 + 2 * len(plans)
    ranked = table("rank", "--run", run_folder)
    assert [type(row["rank"]) for row in ranked] == [int] * len(ranked)
    page = Path(answer("report", run_folder).stdout.strip())
    assert page == run_folder / "report" / "index.html"
    assert "bk-tiny" in page.read_text(encoding="utf-8")
    compared = table("compare", run_folder, "--model", load_config(run_folder / "config.toml").model)
    assert len(compared) == 1 + len(ranked)


def test_search_alone_with_scores_from_a_file(
    run_folder: Path, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "plans.json"
    scores = run_folder / "importance.csv"
    options = ("--importance", scores, "--params", "60%", "--plans", 2, "--out", out)
    answered = answer("search", tiny_pipeline_folder, *options, "--json")
    rows = json.loads(answered.stdout)
    found = [row for row in rows if row["origin"] == "search"]
    assert len(found) == 2
    assert all(row["params_change"] <= -0.4 for row in found)
    assert found[0]["predicted_impact"] <= found[1]["predicted_impact"]
    assert [plan["id"] for plan in json.loads(out.read_text())] == [row["plan_id"] for row in rows]
    pruned = tmp_path / "pruned"
    told = shlex.split(answered.stderr.rsplit(": ", 1)[1])
    assert told[:3] == ["prune-lab", "prune", str(tiny_pipeline_folder)]
    (row,) = table(*told[1:-1], pruned)
    assert row["params"] == found[0]["params"]
    assert f"{out}#1" in mistake("prune", tiny_pipeline_folder, "--plan", out, "--out", pruned, "--force")


def test_evaluate_judges_folders(
    run_folder: Path, tiny_pipeline_folder: Path, tmp_path: Path, config_file: Path
) -> None:
    unet = next((run_folder / "candidates").iterdir()) / "pruned"
    options = ("--config", config_file, "--base", tiny_pipeline_folder, "--prompt", "a dog")
    rows = table("evaluate", tiny_pipeline_folder, unet, *options)
    assert [row["model"] for row in rows] == [str(tiny_pipeline_folder), str(unet)]
    assert all(row["loss"] > 0 and -1 <= row["clip"] <= 1 for row in rows)


# Settings ----------------------------------------------------------------------------------------------------------


def test_every_setting_is_shown_with_its_meaning_and_who_reads_it() -> None:
    rows = table("config", "--show")
    assert [row["setting"] for row in rows] == list(SETTINGS)
    steps = next(row for row in rows if row["setting"] == "distill.steps")
    assert (steps["default"], steps["read_by"]) == (500, "distilled")
    assert all(row["meaning"] for row in rows)
    assert "value" not in steps
    text = answer("config", "--show").stdout
    assert "steps of AdamW" in text
    assert '["block", "pair", "stage"]' in text
    assert max(map(len, text.splitlines())) <= 120  # no terminal: it may go to a file or a pager


def test_settings_are_shown_with_the_values_that_a_job_would_have(
    config_file: Path, run_folder: Path
) -> None:
    asked = ("--set", "distill.steps=7", "--set", "search.keep=Md")
    rows = {row["setting"]: row for row in table("config", "--show", "--config", config_file, *asked)}
    assert [rows["distill.steps"][name] for name in ("value", "default")] == [7, 500]
    assert rows["search.keep"]["value"] == ["Md"]
    assert rows["probe.samples"]["value"] == load_config(config_file).probe.samples
    of_run = {row["setting"]: row for row in table("config", "--show", "--run", run_folder)}
    assert of_run["probe.samples"]["value"] == load_config(run_folder / "config.toml").probe.samples
    printed = answer("config", "--config", config_file, *asked).stdout
    assert changed_settings(load_config(config_file), config_from_toml(printed)) == (
        "search.keep",
        "distill.steps",
    )


@pytest.mark.parametrize(
    ("assignments", "wanted"),
    [
        (("distill.step=5",), "did you mean distill.steps?"),
        (("steps=5",), "did you mean probe.steps or data.steps or distill.steps or evaluate.steps?"),
        (("distill.steps=many",), "distill.steps = 'many' cannot be used; it must be a whole number"),
        (("distill.steps=0",), "a whole number of at least 1"),
        (("search.solver=exakt",), "one of exact, interactions"),
        (("score.groups=[block, pair]",), 'a list in TOML, such as ["one", "two"]'),
        (("distill.steps",), "write table.key=value, such as distill.steps=200"),
        (("distill.steps=5", "distill.steps=6"), "give it once"),
    ],
)
def test_settings_are_checked_like_the_toml(
    assignments: tuple[str, ...], wanted: str, config_file: Path, tmp_path: Path
) -> None:
    words = [word for text in assignments for word in ("--set", text)]
    assert wanted in mistake("run", "--config", config_file, "--run", tmp_path / "run", *words)
    assert wanted in mistake("config", "--show", *words)
    assert not (tmp_path / "run").exists()


def test_a_setting_given_by_an_option_too_is_refused(tiny_pipeline_folder: Path) -> None:
    asked = ("score", tiny_pipeline_folder, "--samples", 4, "--set", "probe.samples=5")
    assert "probe.samples = 4 and probe.samples = 5; give it once" in mistake(*asked)


def test_a_run_is_not_evaluated_with_other_settings(run_folder: Path) -> None:
    assert "give models instead" in mistake("evaluate", "--run", run_folder, "--set", "evaluate.steps=2")


def test_a_plan_that_begins_with_a_dash_is_no_option(tiny_pipeline_folder: Path) -> None:
    """Compared for the model before it, or for --model, with what comes before and behind."""
    plans = ["-Dn1.A2", "bk-base", "-Dn1.R2 -Dn1.A2"]
    rows = table("compare", tiny_pipeline_folder, *plans)
    assert [row["name"] for row in rows] == [str(tiny_pipeline_folder), *plans]
    assert [row["kind"] for row in rows] == ["model", *["plan"] * 3]
    assert table("compare", plans[0], plans[2], "--model", tiny_pipeline_folder) == [
        rows[0],
        rows[1],
        rows[3],
    ]
    behind = answer("compare", "--json", "--model", tiny_pipeline_folder, "--", plans[0])
    assert json.loads(behind.stdout) == rows[:2]
    assert "no option" in mistake("compare", tiny_pipeline_folder, "--jsn").lower().replace(
        "such option", "option"
    )


@pytest.mark.parametrize("verb", ["profile", "prune", "distill", "score", "blocks"])
def test_a_plan_without_its_option_is_met_with_what_to_write(verb: str, tiny_pipeline_folder: Path) -> None:
    line = mistake(verb, tiny_pipeline_folder, "-Dn1.R2 -Dn1.A2")
    assert "-Dn1.R2 -Dn1.A2" in line
    takes = "--plan" in answer(verb, "--help").stdout
    assert ('write --plan "-Dn1.R2 -Dn1.A2"' in line) == takes


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        (("score", "reference", "--timesteps", "4"), "--set probe.timesteps=VALUE"),
        (("score", "reference", "--bootstrap", "10"), "--set score.bootstrap=VALUE"),
        (("score", "reference", "--precision", "bfloat16"), "--set dtype=VALUE"),
        (("score", "reference", "--channels-last"), "--set score.channels_last=true"),
        (("score", "reference", "--no-compile"), "--set score.compile=false"),
        (("search", "reference", "--budget", "macs<=60%"), "--set search.budgets=VALUE"),
        (("search", "reference", "--samples", "2"), "--set probe.samples=VALUE"),
        (("search", "reference", "--count", "2"), "--plans"),
        (("search", "reference", "--any"), "--form own"),
        (("search", "reference", "--longest-run", "2"), "--set search.longest_run=VALUE"),
        (("data", "reference", "--out", "x", "--variants", "2"), "--set data.variants=VALUE"),
        (("distill", "reference", "--loss-variant", "raw"), "--set distill.loss_variant=VALUE"),
        (("evaluate", "reference", "--steps", "3"), "--set evaluate.steps=VALUE"),
        (("rank", "runs/mine", "--address", "auto"), "--set engine.address=VALUE"),
        (("rank", "runs/mine", "--first", "10"), "--set rank.first=VALUE"),
    ],
)
def test_an_option_that_a_verb_had_once_is_met_with_what_to_write(
    words: tuple[str, ...], instead: str
) -> None:
    line = mistake(*words)
    assert line == f"error: prune-lab {words[0]} has no option {line.split()[6].rstrip(';')}; write {instead}"


# Tables ------------------------------------------------------------------------------------------------------------

COLUMNS_OF = {
    "blocks": (*schemas.BLOCK_COLUMNS, "widths"),
    "reductions": (*schemas.REDUCTION_COLUMNS, "form", *schemas.REDUCTION_LATENCY_COLUMNS),
    "block costs": schemas.BLOCK_PROFILE_COLUMNS,
    "pipeline": schemas.PIPELINE_COLUMNS,
    "scores": schemas.IMPORTANCE_COLUMNS,
    "width scores": schemas.WIDTH_SCORE_COLUMNS,
    "plans": schemas.PLANS_COLUMNS,
    "site scores": schemas.SITE_SCORE_COLUMNS,
    "comparison": schemas.COMPARISON_COLUMNS,
    "plans compared": schemas.COMPARISON_COLUMNS,
    "recovery": schemas.RECOVERY_SUMMARY_COLUMNS,
    "pictures": schemas.PICTURES_COLUMNS,
    "ranking": (*schemas.RANKING_COLUMNS, "form"),
    "steps": schemas.DRY_RUN_COLUMNS,
    "seconds": schemas.STEP_SECONDS_COLUMNS,
    "parts": schemas.PARTS_COLUMNS,
    "rungs": schemas.TOURNAMENT_COLUMNS,
    "choices": schemas.CHOICE_COLUMNS,
    "wider budgets": schemas.WIDER_COLUMNS,
    "surprises": schemas.SURPRISE_COLUMNS,
    "picture changes": schemas.PICTURE_CHANGE_COLUMNS,
    "personal": schemas.PERSONAL_COLUMNS,
    "sweep": schemas.SWEEP_COLUMNS,
    "sweep means": schemas.SWEEP_MEAN_COLUMNS,
}


@pytest.mark.parametrize("kind", COLUMNS_OF)
def test_a_person_is_shown_six_columns_that_are_there(kind: str) -> None:
    assert set(DECISIVE_COLUMNS[kind]) <= set(COLUMNS_OF[kind])
    columns = shown_columns(kind, [dict.fromkeys(COLUMNS_OF[kind], 1)])
    assert len(columns) - len({"narrower", "removed"}.intersection(columns)) <= 6


def test_columns_without_a_value_make_room() -> None:
    row = {"plan": "bk-small", "params_change": -0.4, "macs_change": -0.3, "latency_change": None}
    row |= {"predicted_impact": 0.5, "form": "own", "blocks_removed": 17}
    assert shown_columns("plans", [row]) == [name for name in row if name != "latency_change"]


def test_how_many_widths_are_narrower_is_shown_where_any_are() -> None:
    """Also beside times, which take most of the six places; a table of whole blocks does not speak of widths."""
    row: dict[str, object] = {"plan": "a", "blocks_removed": 0, "narrower": 32, "params_change": -0.3}
    row |= {"macs_change": -0.35, "latency_change": -0.2, "measured_change": -0.2, "predicted_impact": 0.5}
    for kind in ("plans", "pruned"):
        assert "narrower" in shown_columns(kind, [row, row | {"narrower": 0}])
        assert "narrower" not in shown_columns(kind, [row | {"narrower": 0}])
    assert "predicted_impact" in shown_columns("plans", [row])


def test_a_table_of_timed_plans_is_no_wider_than_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    removed = " ".join(f"Dn{level}.R2" for level in range(1, 13))
    row: dict[str, object] = {"plan": "search-latency-0.75x-1", "removed": removed, "blocks_removed": 12}
    row |= {"narrower": 0, "params_change": -0.3, "macs_change": -0.35, "latency_change": -0.2}
    row |= {"measured_change": -0.2, "predicted_impact": 0.5, "form": "native", "origin": "search"}
    emit("plans", [row, row], as_json=False, wide=False, title="Plans")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    assert "12: Dn1.R2 Dn2.R2 Dn3.R2 ... 9 more" in lines[5]
    emit("plans", [{"plan": "bk-base", "params_change": -0.3}], as_json=False, wide=False, title="Plans")
    assert "params change" in capsys.readouterr().out  # a narrow one has each name in a line


def test_long_plans_are_cut_in_a_table_and_whole_in_json(tiny_pipeline_folder: Path) -> None:
    plan = "-Dn1.R2 -Dn1.A2 -Dn2.R2 -Dn2.A2 -Dn3.R2 -Dn3.A2 -Up2.R2 -Up2.A2 -Up3.R2 -Up3.A2 -Up4.R2 -Up4.A2 -Md.A1"
    words = ("profile", tiny_pipeline_folder, "--plan", plan, "--no-latency")
    _, row = json.loads(answer(*words, "--json").stdout)
    assert row["plan"] == plan
    assert shown_cell("plan", row) == f"-Dn1.R2 -Dn1.A2 -Dn2.R2 ... 10 more ({row['plan_id']})"
    assert (
        repr(Table("reductions", pd.DataFrame([row])))
        .splitlines()[1]
        .startswith("-Dn1.R2 -Dn1.A2 -Dn2.R2 ... 10")
    )
    wide = " ".join(f"~Dn{level}.R1.hidden=12/16@0-{level},7-17" for level in range(1, 9))
    assert short_plan(f"bk-base {wide}") == "bk-base ~Dn1.R1.hidden=12/16 ~Dn2.R1.hidden=12/16 ... 6 more"
    for other in ("a/long/folder with spaces/" * 5, plan[:90]):
        assert short_plan(other) == other


def test_a_table_of_plans_says_which_blocks_leave() -> None:
    row = {"plan": "search-1", "removed": "Dn1.R2 Dn1.A2 Dn2.R2 Dn2.A2 Md.R1", "blocks_removed": 5}
    row |= {"narrower": 2, "widths": "~Dn3.R1.hidden=2/4 ~Dn3.A1.ff=8/64"}
    assert shown_columns("plans", [row])[:3] == ["plan", "removed", "narrower"]
    assert shown_cell("removed", row) == "5: Dn1.R2 Dn1.A2 Dn2.R2 ... 2 more"
    assert shown_cell("widths", row) == row["widths"]
    assert shown_cell("removed", row | {"removed": "Md.A1", "blocks_removed": 1}) == "1: Md.A1"
    assert "removed" not in shown_columns("plans", [row | {"removed": "", "blocks_removed": 0}])


def test_the_widest_table_and_its_help_agree(tiny_pipeline_folder: Path) -> None:
    shown, told = (
        answer("blocks", *words).stdout for words in ((tiny_pipeline_folder, "--wide"), ("--help",))
    )
    assert "what a screen holds; --json has all" in shown
    assert "of blocks what a screen holds" in " ".join(re.sub(r"[│\s]+", " ", told).split())


def test_names_are_whole_and_fit_into_the_terminal(
    tiny_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = "-Dn1.R2 -Dn1.A2 -Dn2.R2 -Dn2.A2 -Dn3.R2 -Dn3.A2 -Up2.R2 -Up2.A2 -Up3.R2 -Up3.A2 -Up4.R2 -Up4.A2"
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setenv("COLUMNS", "120")
    words = ("profile", tiny_pipeline_folder, "--plan", plan, "--no-latency")
    narrow, wide = answer(*words).stdout, answer(*words, "--wide").stdout
    assert max(len(re.sub(r"\x1b\[[\d;]*m", "", line)) for line in narrow.splitlines()) <= 120
    assert "…" not in narrow
    assert all(name in narrow for name in plan.split())
    assert "--wide shows all" in narrow
    assert "native" in wide
    assert "native" not in narrow


# Mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line_and_exit_2(
    tiny_pipeline_folder: Path, config_file: Path, run_folder: Path, tmp_path: Path
) -> None:
    assert "nowhere" in mistake("blocks", "nowhere")
    assert "Dn9" in mistake("profile", "sd-v1.4", "--plan", "-Dn9.R1", "--no-latency")
    assert "Dn2.R1" in mistake("prune", tiny_pipeline_folder, "--plan", "-Dn2.R1", "--out", tmp_path / "x")
    assert "weights" in mistake("prune", "sd-v1.4", "--plan", "bk-base", "--out", tmp_path / "x")
    assert "cuda" in mistake("score", tiny_pipeline_folder, "--device", "cuda:77")
    assert "--run" in mistake("score")
    assert "config.toml" in mistake("rank", "--run", tmp_path)
    assert "no.toml" in mistake("run", "--config", tmp_path / "no.toml", "--run", tmp_path / "r")
    scores = ("--importance", run_folder / "importance.csv")
    assert "params<=1" in mistake("search", tiny_pipeline_folder, *scores, "--params", "1")
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "r").exists()


def test_a_seed_given_is_the_seed_of_everything(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(session: object) -> None:
        raise RunError("asked to stop right after the settings were written")

    monkeypatch.setattr("prune_lab.workflow.pipeline.check_settings", stop)
    assert "right after" in mistake("run", "--config", config_file, "--run", tmp_path / "run", "--seed", 7)
    written = load_config(tmp_path / "run" / "config.toml")
    assert (written.seed, written.probe.seed, written.distill.seed) == (7, 7, 7)


def test_other_settings_than_the_run_was_made_with(
    run_folder: Path, config_file: Path, tmp_path: Path
) -> None:
    config = load_config(config_file)
    other = tmp_path / "other.toml"
    other.write_text(to_toml(dataclasses.replace(config, probe=ProbeConfig(samples=5, timesteps=2))))
    assert "probe.samples" in mistake("run", "--config", other, "--run", run_folder)


@pytest.mark.parametrize(
    "arguments",
    [["blocks"], ["blocks", "a", "b"], ["nonsense"], ["profile", "sd-v1.4", "--batch", "0"], ["prune", "x"]],
)
def test_usage_errors_exit_2(arguments: list[str]) -> None:
    result = answer(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("prune_lab.api.workplace.configured_model", broken)
    with pytest.raises(ZeroDivisionError, match="ours"):
        answer("blocks", "sd-v1.4")


def test_an_interrupt_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prune_lab.api.workplace.configured_model", interrupted)
    result = answer("blocks", "sd-v1.4", code=130)
    assert "same command again" in result.stderr


def test_version() -> None:
    assert answer("--version").stdout.strip() == prune_lab.__version__


def test_python_m_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["somewhere/__main__.py", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("prune_lab", run_name="__main__")
    assert (ended.value.code, capsys.readouterr().out.strip()) == (0, prune_lab.__version__)


@pytest.mark.parametrize(
    "verb",
    [
        *("blocks", "profile", "score", "search", "prune", "distill", "cache", "config"),
        *("rank", "evaluate", "generate", "report", "run", "compare"),
    ],
)
def test_every_verb_has_help(verb: str) -> None:
    assert "Usage" in answer(verb, "--help").stdout


# As a program ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [("prune", "--out", "x"), ("distill", "--out", "x"), ("profile",)])
def test_a_file_without_the_plan_is_refused_before_a_model_is_read(tmp_path, verb):
    plans, config = tmp_path / "plans.json", tmp_path / "config.json"
    plans.write_text(json.dumps([{"architecture": "x", "removed": ["Md.A1"], "names": ["search-0"]}]))
    config.write_text('{"_class_name": "UNet2DConditionModel"}')
    told = mistake(*verb, tmp_path / "no-model", "--plan", f"{plans}#99")
    assert told.endswith(f"asked for the plan '99' of {plans}, which has none such; it has #1 search-0")
    told = mistake(*verb, tmp_path / "no-model", "--plan", f"{config}#1")
    assert f"asked to read {config}, found no list of removed blocks in it" in told
    told = mistake(*verb, tmp_path / "no-model", "--plan", f"{plans}#1")
    assert "no-model" in told  # this one is there


def test_what_distilling_leaves_beside_a_student_is_told(tmp_path):
    from prune_lab.cli.output import left_beside

    folder = tmp_path / "a student.run"
    (folder / "candidates").mkdir(parents=True)
    (folder / "candidates" / "weights").write_bytes(bytes(3 * 2**20))
    told = left_beside(folder, shown=True)
    assert f"'{folder}' (3 MiB)" in told
    assert f"rm -r '{folder}'" in told
    assert f"prune-lab report '{folder}'" in told
    assert "\n" not in told


def program(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The installed program in a process of its own."""
    script = Path(sys.executable).with_name("prune-lab")
    command = (
        [str(script)] if script.exists() else [sys.executable, "-c", "from prune_lab.cli import main; main()"]
    )
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.long
def test_the_program_prints_json_and_nothing_else(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config))
    found = program("blocks", path, "--json")
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    assert len(json.loads(found.stdout)) == 38


def test_the_program_exits_2(tmp_path: Path) -> None:
    found = program("run", "--config", tmp_path / "no.toml", "--run", tmp_path / "run")
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1
