"""Widths in a run and on the command line: scored, searched, distilled, ranked, reported and loaded again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import random_inputs
from typer.testing import CliRunner

from prune_lab.cli import app
from prune_lab.config import SETTINGS, RunConfig, SearchConfig, load_config
from prune_lab.config.declaration import CHOICES
from prune_lab.errors import ConfigError, DataError, PlanError
from prune_lab.importance import UNIT_CRITERIA, unit_impacts_from
from prune_lab.models import load_model, resolve_model
from prune_lab.plans import plan_from_json
from prune_lab.probes import load_probe, predict
from prune_lab.profiling import cost_table
from prune_lab.runs import Run
from prune_lab.session import Session
from prune_lab.surgery import bypassed
from prune_lab.workflow import compared_plans, ensure_plans, run_all
from prune_lab.workflow.widths import check_axes

QUICK = ("--set", "probe.samples=4", "--set", "score.groups=block", "--set", "score.bootstrap=1")


def run(*words: object, code: int = 0) -> str:
    found = CliRunner().invoke(app, list(map(str, words)))
    assert found.exit_code == code, found.output
    return found.stdout if code == 0 else found.stderr


@pytest.fixture(scope="module")
def searched(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("searched") / "run"
    asked = ("--axes", "depth,width", "--macs", "65%", "--set", "search.controls=bk-base", "--run", folder)
    run("search", tiny_pipeline_folder, *asked, *QUICK)
    return folder


@pytest.mark.long
def test_depth_and_width_are_searched_from_the_command_line(
    searched: Path, tiny_pipeline_folder: Path
) -> None:
    rows = json.loads(run("search", "--run", searched, "--json"))
    (row,) = (row for row in rows if row["origin"] == "search")
    assert row["macs_change"] <= -0.35
    assert (row["form"], row["native"]) == ("own", False)
    architecture = resolve_model(str(tiny_pipeline_folder)).architecture
    written = json.loads(Run(searched).plan(row["plan_id"]).read_text())
    plan = plan_from_json(written, architecture)
    assert row["narrower"] == len(plan.widths) > 0
    assert row["widths"] == " ".join(width.short for width in plan.widths)
    assert cost_table(architecture).of(plan).macs == row["macs"] <= 0.65 * architecture.total_macs
    # the prediction by hand, from the two tables of scores
    scores = pd.read_csv(searched / "importance.csv").set_index("group")["impact"]
    parts = pd.read_csv(searched / "widths" / "gate-fisher.csv").set_index(["site", "unit"])["score"]
    gone = [(one.site, unit) for one in plan.widths for unit in range(one.of) if unit not in one.kept]
    by_hand = sum(scores[name] for name in plan.removed) + sum(parts[one] for one in gone)
    assert row["predicted_impact"] == pytest.approx(by_hand)
    # searched with the scores of that run, which stays as it is
    lent = CliRunner().invoke(
        app,
        [
            "search",
            str(searched),
            "--axes",
            "depth,width",
            "--params",
            "80%",
            "--set",
            "search.controls=bk-base",
            "--json",
        ],
    )
    assert lent.exit_code == 0, lent.output
    assert "scoring" not in lent.stderr
    assert min(one["params_change"] for one in json.loads(lent.stdout)) <= -0.2
    # within its site no part stays that is worth less than one that leaves
    for one in plan.widths:
        stays = min(parts[one.site, unit] for unit in one.kept)
        assert stays >= max(parts[one.site, unit] for unit in range(one.of) if unit not in one.kept)


def test_plans_with_widths_are_compared_on_the_probe_of_a_run(
    searched: Path, tiny_pipeline_folder: Path
) -> None:
    text = "bk-base ~Dn3.A1.heads=1@1 ~Dn3.R1.hidden=2@0,3"
    frame, (plan, _) = compared_plans(Session(Run(searched)), [text, "bk-base"])
    model: Any = load_model(resolve_model(str(tiny_pipeline_folder)))
    probe = load_probe(searched / "probe.safetensors")
    whole = predict(model, probe)
    with bypassed(model, plan):
        change = (predict(model, probe) - whole).square().mean() / whole.square().mean()
    assert frame["impact"][1] == pytest.approx(float(change), rel=1e-4)
    assert frame["impact"][1] != frame["impact"][2] > 0
    shown = run("compare", searched, text).splitlines()
    assert "ra.." in next(line for line in shown if line.startswith("Dn3"))  # two stay, and are narrower
    assert "which says how many units stay" in run("compare", searched, "~Dn3.A1.heads=1", code=2)
    written = searched.parent / "plan.json"
    written.write_text(json.dumps(plan.to_json()))
    said = run("score", tiny_pipeline_folder, "--groups", written, "--samples", 4, code=2)
    assert "makes blocks narrower" in said


@pytest.mark.parametrize("criterion", ["taylor", "random"])
def test_widths_alone_and_rounded(tiny_pipeline_folder: Path, criterion: str) -> None:
    asked = ("--axes", "width", "--widths", criterion, "--round-to", 16, "--params", "85%")
    rows = json.loads(
        run("search", tiny_pipeline_folder, *asked, *QUICK, "--json", "--set", "search.controls=[]")
    )
    (row,) = rows
    assert row["removed"] == ""
    assert row["predicted_impact"] is None  # another scale than the blocks'
    architecture = resolve_model(str(tiny_pipeline_folder)).architecture
    sites = {site.name: site for site in architecture.sites}
    for text in row["widths"].split():
        name, counts = text[1:].split("=")
        left = int(counts.split("/")[0]) // sites[name].step * sites[name].size
        assert left % 16 == 0, text
    assert row["params_change"] <= -0.15


def test_parts_of_blocks_are_scored_from_the_command_line(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "parts.csv"
    shown = run("score", tiny_pipeline_folder, "--widths", "magnitude", *QUICK, "--out", out)
    frame = pd.read_csv(out)
    architecture = resolve_model(str(tiny_pipeline_folder)).architecture
    found = unit_impacts_from(frame, architecture)
    assert tuple(found) == architecture.sites
    assert all(len(values) == site.count and (values > 0).all() for site, values in found.items())
    assert set(frame["criterion"]) == {"magnitude"}
    assert set(frame["samples"]) == {0}  # of the weights alone
    # a person sees how far the units of each site are apart
    lines = {
        line.split()[1]: line.split() for line in shown.splitlines() if ".hidden" in line or ".heads" in line
    }
    site = architecture.sites[0]
    assert lines[site.name][3] == str(site.count)
    assert float(lines[site.name][5]) == pytest.approx(found[site].min(), rel=1e-3)
    assert sum(site.name in line for line in shown.splitlines()) == 1
    with pytest.raises(DataError, match="score it again"):
        unit_impacts_from(frame.drop(index=1), architecture)
    assert "leave out --criterion" in run(
        "score", tiny_pipeline_folder, "--widths", "taylor", "--criterion", "output-mse", code=2
    )


@pytest.mark.long
def test_scores_by_several_criteria_lie_beside_each_other(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    """What was scored last is not what a later search goes by; the search says what it went by."""
    folder = tmp_path / "run"
    for criterion in ("magnitude", "random"):
        run("score", tiny_pipeline_folder, "--widths", criterion, "--run", folder, *QUICK)
    for criterion in ("magnitude", "random"):
        assert set(pd.read_csv(folder / "widths" / f"{criterion}.csv")["criterion"]) == {criterion}
    assert load_config(folder / "config.toml").search.widths == "gate-fisher"
    asked = ("--axes", "width", "--params", "85%", "--set", "search.controls=[]")
    for more, words in (
        ((), "by gate-fisher"),
        (("--widths", "random"), "by random of the parts of blocks, which"),
    ):
        found = CliRunner().invoke(app, list(map(str, ("search", folder, *asked, *more))))
        assert found.exit_code == 0, found.output
        assert f"widths were searched {words}" in found.stderr
    assert "choose one of" in run("score", "--run", folder, "--widths", "l2", code=2)


def test_adapters_are_not_fitted_to_students_with_widths(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    """The rows of a LoRA of a layer would have to leave with its heads."""
    student = tmp_path / "student"
    run("prune", tiny_pipeline_folder, "--plan", "~Dn3.A1.heads=1", "--out", student)
    for plan, more in ((student, ()), ("~Dn3.A1.heads=1@0", ("--model", tiny_pipeline_folder))):
        said = run("convert", "--show", plan, *more, code=2)
        assert "makes blocks narrower" in said
        assert "train another one on the student" in said
    said = run(
        "convert", "lora", tmp_path / "none.safetensors", "--plan", student, "--out", tmp_path / "x", code=2
    )
    assert "train another one on the student" in said  # before the file is opened


def test_the_inventory_says_what_can_be_cut(tiny_pipeline_folder: Path) -> None:
    rows = {row["name"]: row for row in json.loads(run("blocks", tiny_pipeline_folder, "--json"))}
    assert rows["Dn3.R1"]["widths"] == "hidden=4"
    found = CliRunner().invoke(app, ["blocks", str(tiny_pipeline_folder), "--wide"])
    assert max(map(len, found.stdout.splitlines())) <= 120
    header = next(line for line in found.stdout.splitlines() if "widths" in line)
    assert header.index("widths") < header.index("params")
    assert "path" not in header
    assert "path" in rows["Dn3.R1"]
    assert "eights of channels of ff" in found.stderr
    written = " ".join(
        f"~Dn3.A1.{one.split('=')[0]}={one.split('=')[1]}" for one in rows["Dn3.A1"]["widths"].split()
    )
    plan = f"{written} ~Dn3.R1.hidden=2/4"
    (row,) = json.loads(
        run("prune", tiny_pipeline_folder, "--plan", plan, "--out", "x", "--dry-run", "--json")
    )
    assert row["narrower"] == 1  # the others keep all they have


def test_the_settings_know_all_criteria_of_parts() -> None:
    assert CHOICES["search.widths"] == tuple(UNIT_CRITERIA)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"solver": "greedy"}, "leave out --solver"),
        ({"count": 3}, "leave out --plans"),
        ({"form": "neutral"}, "--form own"),
        ({"widths": "magnitude"}, "not on one scale"),
        ({"budgets": ("macs<=70%, memory<=0.7x",)}, "no sum of parts"),
        ({"budgets": ("memory<=1GiB",)}, "give --params, --macs or --latency"),
    ],
)
def test_what_a_search_of_widths_cannot_do_is_said_before_any_work(
    tiny_pipeline_folder: Path, wanted: dict[str, Any], said: str
) -> None:
    search = SearchConfig(**{"axes": ("depth", "width"), "budgets": ("macs<=70%",), **wanted})
    with pytest.raises(ConfigError, match=said) as error:
        check_axes(RunConfig(model=str(tiny_pipeline_folder), search=search))
    assert "\n" not in str(error.value)


def test_the_setting_of_the_form_says_what_becomes_of_widths() -> None:
    assert (
        "blocks narrower (search.axes) is always built with code of its own"
        in SETTINGS["search.form"].meaning
    )


def test_axes_are_known_and_named_once() -> None:
    for axes in ((), ("depth", "depth"), ("height",)):
        with pytest.raises(ConfigError, match=r"search\.axes"):
            SearchConfig(axes=axes)


def test_a_model_without_widths_says_so(tmp_path: Path) -> None:
    """One group in each norm and one head in each attention: nothing of either can leave."""
    model = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=1,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    model.save_pretrained(tmp_path / "model")
    search = SearchConfig(axes=("width",), budgets=("macs<=90%",))
    with pytest.raises(PlanError, match="none is known"):
        check_axes(RunConfig(model=str(tmp_path / "model"), search=search))


AGAIN = """
import sys, torch
from diffusers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
inputs = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(model(**inputs, return_dict=False)[0], sys.argv[3])
"""


@pytest.mark.long
def test_a_plan_with_widths_is_distilled_from_the_command_line(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    """Written as a person does: how many units stay, and not which."""
    words = (
        "--set",
        "distill.steps=2",
        "--set",
        "distill.batch=2",
        "--set",
        "data.count=4",
        "--set",
        "data.steps=2",
    )
    plan = "bk-base ~Dn3.R1.hidden=2/4 ~Dn3.A1.heads=1"
    for more in ((), ("--run", tmp_path / "run")):
        out = tmp_path / f"trained{len(more)}"
        asked = ("distill", tiny_pipeline_folder, "--plan", plan, *words, *more, "--out", out, "--json")
        rows = json.loads(run(*asked))
        assert [row["status"] for row in rows] == ["done"]
        trained = resolve_model(str(out))
        assert load_model(trained).state_dict()["widths_mark"].numel() == 0


@pytest.mark.long
def test_a_run_that_searches_widths_goes_to_its_end(
    small_run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Distilled, ranked and reported; the student is the same in a fresh process that knows diffusers alone."""
    search = {"axes": ("depth", "width"), "budgets": ("macs<=65%",), "controls": ("bk-base",)}
    config = small_run_config(search=search, repair={"kind": "none"})
    folder = tmp_path / "run"
    ranking = run_all(config, folder)
    assert ranking is not None
    session = Session(Run(folder))
    (plan,) = (plan for plan in ensure_plans(session) if plan.widths)
    frame = ranking.frame().set_index("plan_id")
    row = frame.loc[plan.id]
    assert row["status"] != "left out", row["reason"]
    assert np.isfinite(
        row[["loss_before", "loss_after", "impact_one_shot", "latency_change"]].astype(float)
    ).all()
    assert row["params"] == cost_table(session.architecture).of(plan).params
    text = (folder / "report" / "index.html").read_text()
    assert f"{plan.widths[0].site} {plan.widths[0].count}" in text
    student = session.run.candidate(plan.id).distilled / "model"
    model: Any = load_model(resolve_model(str(student)))
    assert sum(one.numel() for one in model.parameters()) == row["params"]
    inputs = random_inputs(model)
    torch.save(inputs, tmp_path / "inputs")
    words = [sys.executable, "-c", AGAIN, str(student), str(tmp_path / "inputs"), str(tmp_path / "out")]
    subprocess.run(words, check=True, timeout=100)
    with torch.no_grad():
        mine = model(**inputs, return_dict=False)[0]
    assert (torch.load(tmp_path / "out", weights_only=True) - mine).abs().max() <= 1e-5
    again = run_all(config, folder)
    assert again is not None
    pd.testing.assert_frame_equal(again.frame(), ranking.frame())
