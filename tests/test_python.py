"""The package from Python: what ``import prune_lab as pl`` offers, and what shows itself in a notebook."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

import prune_lab as pl
from prune_lab.cli import app
from prune_lab.errors import ConfigError, NonNativePlanError, PlanError, RunError
from prune_lab.profiling import cost_table
from prune_lab.runs import Run
from prune_lab.search import parse_budget, predicted_impact, search_plans
from prune_lab.session import read_scores
from prune_lab.workflow import surprises_frame

# What is offered ---------------------------------------------------------------------------------------------------


def test_what_is_offered_is_there_and_nothing_else() -> None:
    assert set(pl.__all__) <= set(dir(pl))
    assert all(getattr(pl, name) is not None for name in pl.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'prune'; it offers Evaluation, Model, "):
        _ = pl.prune  # type: ignore[attr-defined]


def test_an_unknown_theme_or_kind_of_file_is_refused(results: pl.RunResults, tmp_path: Path) -> None:
    plot = results.blocks.plot()
    assert plot.save(tmp_path / "map.svg", "dark").read_bytes().startswith(b"<?xml")
    with pytest.raises(ConfigError, match="theme 'pink'; give light or dark"):
        plot.figure("pink")
    with pytest.raises(ConfigError, match=r"ends in \.png, \.svg or \.pdf"):
        plot.save(tmp_path / "map.jpg")
    assert [path.name for path in tmp_path.iterdir()] == ["map.svg"]


# A run -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(finished: Run) -> pl.RunResults:
    return pl.open_run(finished.folder)


DRAWN = ("blocks", "scores", "parts", "costs", "plans", "losses", "rungs", "ranking", "surprises")
TABLES = (*DRAWN, "criteria", "reductions", "pipeline", "seconds", "picture_changes")


class Cells(HTMLParser):
    """The texts of the cells of a table, row by row; fails on what is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag in ("img", "source", "br"):
            return
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_gates_that_were_not_learnt_are_refused(results: pl.RunResults) -> None:
    with pytest.raises(RunError, match="plans that exact has searched; learn them with: prune-lab search"):
        _ = results.gates


@pytest.mark.parametrize("name", TABLES)
def test_every_table_of_a_run_shows_itself(results: pl.RunResults, name: str) -> None:
    table: pl.Table = getattr(results, name)
    frame, rows = table.frame(), Cells(table._repr_html_()).rows
    assert len(frame) == len(table) > 0
    assert 1 < len(rows[0]) <= 6 + ("removed" in rows[0])  # which is not counted: it says what the plan is
    assert len(rows) == 1 + min(40, len(frame))
    assert {cell.replace(" ", "_") for cell in rows[0]} <= set(frame.columns)
    assert repr(table).splitlines()[1].split()[0] == rows[0][0].replace(" ", "_")
    frame["new"] = 0
    assert "new" not in table.frame()
    if name in DRAWN:
        assert isinstance(table.plot().figure("dark"), Figure)
    else:
        with pytest.raises(RunError, match="has no figure; use its frame"):
            table.plot()


def pictures_in(text: str, mime: str) -> list[NDArray[np.uint8]]:
    """The pictures in the HTML ``text``, each (H, W, 3)."""
    found = re.findall(rf"data:{mime};base64,([^\"]+)", text)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one))).convert("RGB")) for one in found]


def test_a_figure_is_dark_on_light_or_light_on_dark(results: pl.RunResults) -> None:
    dark, light = (
        one.astype(float) / 255 for one in pictures_in(results.scores.plot()._repr_html_(), "image/png")
    )
    assert light[0, 0].mean() > 0.9 > 0.2 > dark[0, 0].mean()  # the surface, opaque on any page
    assert light.min() < 0.3
    assert dark.max() > 0.7
    assert "prefers-color-scheme: dark" in results.scores.plot()._repr_html_()


def test_words_of_a_user_are_text_and_no_markup() -> None:
    frame = pd.DataFrame(
        {"model": ["<b>&"], "pictures": [3], "loss": [np.nan], "clip": [0.25], "clip_low": [0.2]}
    )
    table = pl.Table("quality", frame, "<i>")
    html = table._repr_html_()
    assert Cells(html).rows == [["model", "pictures", "clip", "clip low"], ["<b>&", "3", "0.25", "0.2"]]
    assert "<b>&<" not in html
    assert "<i>" not in html


def test_what_was_not_run_yet_is_named(finished: Run, tmp_path: Path) -> None:
    shutil.copy(finished.config, tmp_path / "config.toml")
    shutil.copy(finished.blocks, tmp_path / "blocks.csv")
    results = pl.open_run(tmp_path)
    assert repr(results).endswith(", found so far: blocks")
    assert len(results.blocks) == 38
    for name, verb in (("scores", "score"), ("plans", "search"), ("losses", "distill"), ("ranking", "rank")):
        with pytest.raises(RunError, match=f"has no .* yet; make (it|them) with: prune-lab {verb} "):
            getattr(results, name)
    with pytest.raises(RunError, match="asked for the run folder"):
        pl.open_run(tmp_path / "nothing")


# Questions to a run ------------------------------------------------------------------------------------------------


def test_why_a_block_stays_or_goes_is_the_price_of_the_other_choice(results: pl.RunResults) -> None:
    plan = next(one for one in results.plans if one.plan.origin == "search")
    table = results.why(plan)
    frame = table.frame().set_index("block")
    assert list(frame.index) == results.blocks.frame()["name"].tolist()
    assert set(frame.index[frame["removed"]]) == set(plan.removed)
    assert frame["extra_impact"].min() >= -1e-9  # the plan is the best, so no other choice is better
    fixed = results.blocks.frame().set_index("name")["removable"]
    assert frame.loc[~fixed, "reason"].str.startswith("cannot be removed: it changes").all()
    impacts = results.scores.frame().query("kind == 'block'").set_index("group")["impact"]
    decided = frame[frame["extra_impact"].notna()]
    for row in decided.itertuples():
        other = row.instead.replace("-", " ").split() if row.instead else []
        assert (row.Index in other) is not row.removed
        extra = impacts[other].sum() - impacts[list(plan.removed)].sum()
        assert row.extra_impact == pytest.approx(extra, abs=1e-6)


def test_a_wider_budget_buys_what_a_search_under_it_finds(results: pl.RunResults) -> None:
    architecture = results.session.architecture
    row = results.wider(0.25, "macs<=60%").frame().iloc[0]
    costs, scores = cost_table(architecture), read_scores(results.run)
    now, then = (
        search_plans(architecture, scores, costs, [parse_budget(text, architecture, costs)])[0]
        for text in ("macs<=60%", "macs<=75%")
    )
    assert row["plan"] == then.text
    assert row["come_back"].split() == [name for name in now.removed if name not in then.removed]
    assert row["impact_change"] == pytest.approx(
        predicted_impact(then, scores) / predicted_impact(now, scores) - 1
    )
    assert results.wider().frame()["budget"].tolist() == ["params<=bk-base", "macs<=bk-tiny"]


def test_surprises_are_places_lost_between_score_and_outcome() -> None:
    ranking = pd.DataFrame(
        {
            "plan": ["a", "b", "c", "d", "teacher"],
            "plan_id": ["1", "2", "3", "4", "teacher"],
            "status": ["ranked", "ranked", "ranked", "dropped", "teacher"],
            "impact_one_shot": [0.1, 0.2, 0.3, 0.05, 0.0],
            "loss_before": [1.0, 1.0, 1.0, 1.0, 0.1],
            "loss_after": [0.9, 0.5, 0.4, 0.3, 0.1],
        }
    )
    found = surprises_frame(ranking)
    assert found[["plan", "places_lost"]].values.tolist() == [["a", 2], ["b", 0], ["c", -2]]


def test_rungs_without_a_tournament_are_the_validations(results: pl.RunResults) -> None:
    rungs, losses = results.rungs.frame(), results.losses.frame()
    heldout = losses[(losses["part"] == "validation") & (losses["step"] > 0)]
    assert len(rungs) == len(heldout)
    assert set(rungs["name"]) == set(heldout["plan"])
    for _, rung in rungs.groupby("rung"):
        assert rung.sort_values("loss")["place"].tolist() == rung["place"].tolist()
        assert rung["place"].min() == 1


def test_pictures_are_the_most_changed_first(results: pl.RunResults, finished: Run) -> None:
    frame = results.picture_changes.frame()
    row = frame.iloc[0]
    folder = finished.candidate(row["plan_id"]).folder / "pictures" / row["weights"]
    drawn, wanted = (
        np.asarray(Image.open(place / row["file"])).astype(float)
        for place in (folder, finished.teacher_pictures)
    )
    assert row["difference"] == pytest.approx(np.sqrt(((drawn - wanted) ** 2).mean()) / 255)
    assert frame["difference"].is_monotonic_decreasing
    states = 2 * len(list(finished.candidates_dir.iterdir()))
    assert len(frame) == states * len(finished_prompts := set(frame["prompt"]))
    assert finished_prompts == {"a red cat", "a dog"}


def test_pictures_show_as_a_grid(results: pl.RunResults, finished: Run) -> None:
    grid = results.pictures("bk-tiny", weights=["distilled"])
    html = grid._repr_html_()
    rows = Cells(html).rows
    assert rows[0] == ["", "teacher", "bk-tiny distilled"]
    assert [row[0] for row in rows[1:]] == ["a red cat", "a dog"]
    shown = pictures_in(html, "image/jpeg")
    assert len(shown) == 4
    wanted = [np.asarray(Image.open(finished.teacher_pictures / name)) for name in grid.frame()["file"][:2]]
    for place, picture in enumerate(wanted):  # the first of each row is the teacher's, nearly: it is a JPEG
        assert np.corrcoef(picture.ravel(), shown[2 * place].ravel())[0, 1] > 0.9
    assert isinstance(grid.plot().figure(), Figure)
    assert len(Cells(results.pictures(prompts=["a dog"])._repr_html_()).rows) == 2
    with pytest.raises(RunError, match="the prompts of this run: a red cat; a dog"):
        results.pictures(prompts=["a cow"])


def test_a_plan_shows_its_price_and_its_map(results: pl.RunResults) -> None:
    plan = results.plan("bk-tiny")
    html = plan._repr_html_()
    costs = plan.costs.frame()
    assert f"{costs['params'].iloc[-1]:,} parameters ({costs['params_change'].iloc[-1]:+.1%})" in html
    assert f"{len(plan.removed)} blocks removed" in html
    assert "can be built" in html
    assert len(pictures_in(html, "image/png")) == 2
    assert plan == results.plan(plan.text) == results.plan(plan.id)
    with pytest.raises(PlanError, match="no plan of this run"):
        results.plan("-Md.A1")


def test_a_student_of_a_run_is_a_plain_model(results: pl.RunResults, finished: Run) -> None:
    from diffusers import UNet2DConditionModel

    student, plan = results.student("bk-tiny"), results.plan("bk-tiny")
    assert sum(one.numel() for one in student.parameters()) == plan.costs.frame()["params"].iloc[-1]
    folder = finished.candidate(plan.id).distilled_model
    plain = UNet2DConditionModel.from_pretrained(folder, local_files_only=True)
    assert all(
        torch.equal(one, other) for one, other in zip(student.parameters(), plain.parameters(), strict=True)
    )


# The command line ----------------------------------------------------------------------------------------------------


def test_the_command_line_says_what_python_says(
    finished: Run, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    model, folder, out = pl.load(tiny_pipeline_folder), str(finished.folder), tmp_path / "out"
    plans = ("bk-tiny", "-Dn1.R2 -Dn1.A2")
    asked = {
        ("blocks", model.source.text): model.blocks(),
        ("profile", model.source.text, "--no-latency", "--plan", plans[0], "--plan", plans[1]): model.profile(
            *plans, latency=False
        ),
        ("prune", model.source.text, "--plan", plans[0], "--out", str(out), "--dry-run"): model.prune(
            plans[0], out, dry_run=True
        ),
        ("compare", folder, plans[0]): pl.compare(folder, plans[0]),
        ("compare", folder, "--model", model.source.text): pl.compare(folder, model=model.source.text),
    }
    for words, table in asked.items():
        told = CliRunner().invoke(app, [*words, "--json"])
        assert told.exit_code == 0, told.output
        assert json.loads(told.stdout) == table.records(), words


# A model -----------------------------------------------------------------------------------------------------------

QUICK = {"probe.samples": 4, "probe.timesteps": 2, "score.bootstrap": 10, "device": "cpu"}


def test_a_model_is_asked_without_weights() -> None:
    model = pl.load("sd-v1.4")
    assert repr(model) == "sd-v1.4: 859,520,964 parameters, 38 blocks, 34 of them can be removed"
    assert len(model.blocks()) == 38
    plan = model.plan("bk-small")
    assert (len(plan.removed), plan.reason) == (17, "")
    assert plan.costs.frame()["params"].tolist() == [859_520_964, 482_346_884]
    frame = model.profile(plan, "-Dn1.R2 -Dn1.A2").frame()
    assert frame["plan"].tolist() == ["teacher", "bk-small", "-Dn1.R2 -Dn1.A2"]
    assert frame["params"].tolist()[1] == 482_346_884
    with pytest.raises(RunError, match="asked for the run folder"):
        _ = model.results
    assert pl.load("sd-v1.4", settings={"search.budgets": []}).settings.search.budgets == ()
    with pytest.raises(ConfigError, match="there is no setting sampels; did you mean"):
        model.score(sampels=3)
    with pytest.raises(ConfigError, match=r"probe\.samples"):
        model.score(samples="many")


@pytest.mark.long  # a proof in a process of its own, and pictures of five models
def test_the_whole_job_in_python(
    tiny_pipeline_folder: Path, tiny_scorer_folder: Path, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    quick = {
        **QUICK,
        "data.source": "shipped",
        "evaluate.scorer": str(tiny_scorer_folder),
        "evaluate.prompts": ["a cat"],
        "evaluate.steps": 1,
        "evaluate.guidance": 1.0,
        "profile.runs": 2,
        "distill.trackers": [],
    }
    model = pl.load(tiny_pipeline_folder, settings=quick)
    scores = model.score()
    plans = model.search(params="80%", controls=["bk-base"], keep=["Md"])
    why = model.results.why(plans[1]).frame().set_index("block")
    assert why.loc["Md.A1", "reason"] == "no plan within the budget and the rules can remove it"
    assert plans[0].label == "bk-base"
    assert scores.frame()["impact"].tolist() == model.results.scores.frame()["impact"].tolist()
    best = plans[1]
    assert best.costs.frame()["params"].iloc[-1] <= 0.8 * best.costs.frame()["params"].iloc[0]
    written = model.prune(best, tmp_path / "small")
    assert written.frame()["plan_id"].tolist() == [best.id]
    student = pl.load_student(tmp_path / "small")
    assert isinstance(student, StableDiffusionPipeline)
    assert sum(one.numel() for one in student.unet.parameters()) == best.costs.frame()["params"].iloc[-1]
    recovery = model.distill(best, steps=2, batch=2, pictures=4, warmup=1, validate_every=1)
    assert recovery.frame()["plan_id"].tolist() == [best.id]
    with pytest.raises(NonNativePlanError):
        model.distill("-Dn1.R2 -Dn1.A2")
    extra = model.plan("bk-tiny")
    assert set(model.distill(extra).frame()["plan_id"]) == {best.id, extra.id}
    ranking = model.rank().frame()
    assert set(ranking.loc[ranking["status"] == "ranked", "plan_id"]) == {best.id, extra.id}
    assert model.evaluate("a dog").frame()["pictures"].tolist() == [1]
    assert model.data(tmp_path / "drawn", count=3, steps=1, batch=3).frame()["rows"].tolist() == [3]
    grid = model.generate("a cat", "a dog", count=2, steps=1, guidance=1.0)
    assert len(pictures_in(grid._repr_html_(), "image/jpeg")) == 4
    folder = model.folder
    del model
    assert not folder.exists()


def test_a_named_folder_keeps_its_results(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    settings = {**QUICK, "data.source": "shipped"}
    first = pl.load(tiny_pipeline_folder, run=tmp_path / "run", settings=settings).score(groups=["block"])
    again = pl.load(tiny_pipeline_folder, run=tmp_path / "run")
    assert again.score().frame().equals(first.frame())
    with pytest.raises(RunError, match=r"was made with other settings of probe\.samples"):
        again.score(samples=5)
    assert len(again.search(params="90%", controls=["bk-base"])) == 2
    assert pl.open_run(tmp_path / "run").scores.frame().equals(first.frame())
