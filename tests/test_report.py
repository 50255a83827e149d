"""The report against a made-up run folder: what is on the page is what is in the files, and nothing else."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from conftest import BuiltOnce
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image
from synthetic_run import DROPPED_REASON, LEFT_OUT_REASON, NAMES, PLANS, STARRED, STEPS, plan_id, write_run

from benchmarks.report import grow
from prune_lab.errors import ConfigError, DataError, RunError
from prune_lab.report import write_report
from prune_lab.report.charts import draw_curves, draw_importance, draw_prediction, draw_quality_plane
from prune_lab.report.document import Chart, LiveMap, Table, Text
from prune_lab.report.figures import (
    DARK,
    LIGHT,
    Theme,
    freeze_layout,
    impact_scale,
    plan_styles,
    save_png,
    svg_uri,
)
from prune_lab.report.format import (
    amount,
    change_with_interval,
    count,
    loss_or_score,
    percent_change,
    short_number,
)
from prune_lab.report.maps import draw_block_map, draw_plan_maps, map_cells
from prune_lab.report.picture_grids import Column, draw_comparison
from prune_lab.report.sections import report_sections
from prune_lab.report.shown import shown_in_figures
from prune_lab.report.tables import (
    CURVE_COLUMNS,
    MAP_COLUMNS,
    PlanRow,
    block_map_frame,
    curve_frame,
    dropped,
    importance_frame,
    measured,
    not_dropped,
    read_run,
    unranked,
)
from prune_lab.report.tournament import draw_tournament, space_labels
from prune_lab.runs import Run
from prune_lab.tables import Plot

VOID = {"meta", "link", "img", "source", "br", "hr", "input"}


@pytest.fixture(scope="session")
def whole(built_once: BuiltOnce) -> Run:
    """A complete run with its report written; read only."""
    return Run(built_once("reported", lambda folder: write_report(Run(write_run(folder)))))


@pytest.fixture
def fresh(tmp_path: Path) -> Run:
    """A complete run without a report, to be damaged."""
    return Run(write_run(tmp_path / "run"))


class Page(HTMLParser):
    """Every tag of a page in order, with a check that each is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.words += data

    def values(self, name: str) -> list[str]:
        return [value for _, attrs in self.tags if (value := attrs.get(name)) is not None]


# Tables ----------------------------------------------------------------------------------------------------------


def test_frames_have_their_columns(whole: Run) -> None:
    tables = read_run(whole)
    assert tables.blocks is not None
    assert tuple(block_map_frame(tables.blocks, tables.importance).columns) == MAP_COLUMNS
    assert tuple(curve_frame(tables).columns) == CURVE_COLUMNS


def test_a_block_without_a_score_is_unknown_not_zero(whole: Run) -> None:
    tables = read_run(whole)
    assert tables.blocks is not None
    assert tables.importance is not None
    without = tables.importance[tables.importance["group"] != "Dn3.A1"]
    frame = block_map_frame(tables.blocks, without).set_index("name")
    assert list(frame.index) == list(NAMES)
    assert frame.loc[frame["impact"].isna()].index.tolist() == ["Dn3.A1"]
    scores = tables.importance[tables.importance["kind"] == "block"].set_index("group")["impact"]
    assert frame["impact"].drop("Dn3.A1").to_dict() == scores.drop("Dn3.A1").to_dict()


def test_curves_hold_every_logged_value_once(whole: Run) -> None:
    curves = curve_frame(read_run(whole))
    for name in PLANS:
        logged = pd.read_csv(whole.candidate(plan_id(name)).recovery)
        for part in ("task", "output", "feature", "validation"):
            line = curves[(curves["plan"] == name) & (curves["part"] == part)]
            assert line["value"].tolist() == logged[part].dropna().tolist()


def test_teacher_competes_with_nobody_and_failures_are_left_out(whole: Run) -> None:
    ranking = read_run(whole).ranking
    assert ranking is not None
    assert set(measured(ranking)["plan"]) == set(PLANS)
    assert unranked(ranking)["plan"].tolist() == ["search-params-bk-small-1"]
    assert dropped(ranking)["plan"].tolist() == ["bk-tiny"]
    assert "bk-tiny" not in set(not_dropped(ranking)["plan"])


def test_plan_ids_that_look_like_numbers_stay_text(fresh: Run) -> None:
    ranking = pd.read_csv(fresh.ranking)
    ranking[ranking["plan"] != "teacher"].to_csv(
        fresh.ranking, index=False
    )  # no word left in the column of ids
    tables = read_run(fresh)
    assert {plan.id for plan in tables.plans} == {plan_id(name) for name in PLANS}
    assert {plan.label for plan in tables.plans} == set(PLANS)


@pytest.mark.parametrize(
    ("words", "value", "text"),
    [
        (count, 859520964, "859,520,964"),
        (count, float("nan"), "\u2013"),
        (amount, 338_749_194_240, "339\u202fG"),
        (amount, 8_770_000, "8.77\u202fM"),
        (amount, 999_600, "1.00\u202fM"),
        (amount, 12, "12"),
        (percent_change, -0.3259, "\u221232.6\u202f%"),
        (percent_change, 0.0, "±0.0\u202f%"),
        (percent_change, -0.0001, "±0.0\u202f%"),
        (loss_or_score, 0.08613, "0.0861"),
        (loss_or_score, None, "\u2013"),
        (short_number, 1.23e-4, "1.2e-4"),
        (short_number, 9.0e-5, "9e-5"),
        (short_number, 0, "0"),
        (short_number, 0.31234, "0.31"),
        (short_number, 123.4, "123"),
    ],
)
def test_numbers_in_words(words: object, value: object, text: str) -> None:
    assert callable(words)
    assert words(value) == text


# Figures ---------------------------------------------------------------------------------------------------------


def frame_of(stages: dict[str, str]) -> pd.DataFrame:
    """The blocks of a U-Net whose stages are given in order of execution, with the lane and row of each stage."""
    depth = sum(stage.startswith("Dn") for stage in stages)
    lanes = {"Dn": "left", "Md": "middle", "Up": "right"}

    def row_of(stage: str) -> int:
        level = int(stage[2:] or 0)
        return {"Dn": level - 1, "Md": depth, "Up": depth - level}[stage[:2]]

    rows = [
        (f"{stage}.{one}", stage, lanes[stage[:2]], row_of(stage), i)
        for stage, text in stages.items()
        for i, one in enumerate(text.split())
    ]
    return pd.DataFrame(rows, columns=["name", "stage", "lane", "row", "position"])


@pytest.mark.parametrize(
    "stages",
    [
        {
            "Dn1": "R1 R2",
            "Dn2": "R1 A1 R2 A2",
            "Md": "R1 A1 R2",
            "Up1": "R1 A1 R2 A2 R3 A3",
            "Up2": "R1 R2 R3",
        },
        {
            "Dn1": "R1 A1",
            "Dn2": "R1 A1",
            "Dn3": "R1",
            "Up1": "R1 R2",
            "Up2": "R1 A1 R2 A2",
            "Up3": "R1 A1 R2 A2",
        },
        {"Dn1": "R1", "Md": "R1 A1 R2", "Up1": "R1 R2"},
    ],
)
def test_map_is_a_u_without_overlaps(stages: dict[str, str]) -> None:
    frame = frame_of(stages)
    cells, labels = map_cells(frame)
    at = {cell.name: cell for cell in cells}
    assert list(at) == list(frame["name"])
    for one, other in combinations(cells, 2):
        assert abs(one.x - other.x) >= 0.92 or abs(one.y - other.y) >= 0.66
    depth = sum(stage.startswith("Dn") for stage in stages)
    for level in range(1, depth + 1):
        assert at[f"Dn{level}.R1"].y == at[f"Up{depth + 1 - level}.R1"].y == 1 - level
    if "Md" in stages:
        assert at["Md.R1"].y < min(cell.y for cell in cells if not cell.name.startswith("Md"))
    assert {text for text, *_ in labels} == set(stages)


def patches(figure: object) -> list[FancyBboxPatch]:
    return [p for axes in figure.axes for p in axes.patches if isinstance(p, FancyBboxPatch)]  # type: ignore[attr-defined]


def test_block_map_shows_every_block_in_the_colour_of_its_impact(whole: Run) -> None:
    tables = read_run(whole)
    assert tables.blocks is not None
    frame = block_map_frame(tables.blocks, tables.importance)
    figure = draw_block_map(frame, LIGHT)
    drawn = patches(figure)
    assert len(drawn) == len(NAMES)
    # more valuable must be darker on paper, whatever the colour map
    darkness = [sum(patch.get_facecolor()[:3]) for patch in drawn]
    order = frame["impact"].to_numpy()
    assert darkness[int(order.argmax())] < darkness[int(order.argmin())]
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert sum(text.endswith("*") for text in texts) == len(STARRED)
    assert short_number(frame["impact"].iloc[0]) in texts


def test_plan_maps_outline_exactly_the_removed_blocks(whole: Run) -> None:
    tables = read_run(whole)
    assert tables.blocks is not None
    styles = plan_styles(tables.plans)
    figure = draw_plan_maps(block_map_frame(tables.blocks, tables.importance), tables.plans, styles, LIGHT)
    for axes, plan in zip(figure.axes, tables.plans, strict=False):
        boxes = [patch for patch in axes.patches if isinstance(patch, FancyBboxPatch)]
        hollow = {name for name, box in zip(NAMES, boxes, strict=True) if box.get_facecolor()[3] == 0}
        assert hollow == set(plan.removed) == set(PLANS[plan.label])
        edges = {box.get_edgecolor() for box in boxes if box.get_facecolor()[3] == 0}
        assert edges == {to_rgba(styles[plan.id].color)}


def test_every_plan_has_one_look_of_its_own(whole: Run) -> None:
    plans = read_run(whole).plans
    assert [plan.label for plan in plans] == [
        "bk-base",
        "bk-small",
        "bk-tiny",
        "search-params-bk-base-1",
        "search-params-bk-small-1",
    ]
    styles = plan_styles(plans)
    assert len({style.color for style in styles.values()}) == len(plans)
    assert {styles[plan_id(name)].marker for name in PLANS if name.startswith("bk")} == {"o"}
    assert "o" not in {styles[plan_id(name)].marker for name in PLANS if name.startswith("search")}


def test_ten_plans_can_be_told_apart_by_colour_alone() -> None:
    plans = [
        PlanRow(f"{i:012x}", f"plan {i}", "search" if i > 2 else "control", ("Md.A1",)) for i in range(10)
    ]
    assert len({style.color for style in plan_styles(plans).values()}) == 10


def test_importance_is_drawn_where_the_numbers_are(whole: Run) -> None:
    importance = read_run(whole).importance
    assert importance is not None
    figure = draw_importance(importance, DARK)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "Single blocks",
        "Residual-attention pairs",
        "Whole stages",
    ]
    for axes, kind in zip(figure.axes, ("block", "pair", "stage"), strict=True):
        frame = importance_frame(importance, kind)
        points = axes.collections[-1].get_offsets()
        assert np.allclose(points[:, 0], frame["impact"])
        assert (np.diff(points[:, 1]) < 0).all()  # most valuable on top
        names = [label.get_text().rstrip("*") for label in axes.get_yticklabels()]
        assert names == frame["group"].tolist()


@pytest.mark.parametrize("impact", [0.0, -1e-3])
def test_an_impact_of_zero_or_less_is_said_in_words(whole: Run, impact: float) -> None:
    importance = read_run(whole).importance
    assert importance is not None
    importance.loc[importance["group"] == "Md.A1", ["impact", "low"]] = [impact, -1.0]
    figure = draw_importance(importance, LIGHT)
    assert sum(text.get_text() == "≤ 0" for axes in figure.axes for text in axes.texts) == 1
    assert impact_scale(importance["impact"])(impact) == 0


def test_quality_plane_places_candidates_before_and_after(whole: Run) -> None:
    tables = read_run(whole)
    assert tables.ranking is not None
    figure = draw_quality_plane(tables.ranking, plan_styles(tables.plans), LIGHT)
    loss_by_macs = figure.axes[0]
    points = {tuple(point) for marks in loss_by_macs.collections for point in np.asarray(marks.get_offsets())}
    for row in measured(tables.ranking).itertuples():
        assert (row.macs, row.loss_before) in points
        assert row.plan == "search-params-bk-small-1" or (row.macs, row.loss_after) in points
    assert loss_by_macs.get_yscale() == "log"
    stairs = loss_by_macs.lines[0].get_ydata()
    assert (np.diff(stairs) <= 0).all()  # paying more never gives less
    assert stairs[-1] == tables.ranking["loss_after"].min()


def test_losses_that_hardly_differ_are_shown_on_a_plain_axis(whole: Run) -> None:
    tables = read_run(whole)
    assert tables.ranking is not None
    ranking = tables.ranking.assign(loss_before=0.11, loss_after=0.1)
    figure = draw_quality_plane(ranking, plan_styles(tables.plans), LIGHT)
    assert figure.axes[0].get_yscale() == "linear"
    assert "(log)" not in figure.axes[0].get_ylabel()


def test_a_dropped_candidate_is_pale_and_no_part_of_the_front(whole: Run) -> None:
    tables = read_run(whole)
    assert tables.ranking is not None
    # were it compared, its loss after fewer steps would be the best of all
    ranking = tables.ranking.copy()
    ranking.loc[ranking["plan"] == "bk-tiny", "loss_after"] = 0.01
    styles = plan_styles(tables.plans)
    axes = draw_quality_plane(ranking, styles, LIGHT).axes[0]
    assert min(axes.lines[0].get_ydata()) > 0.01
    heights = [(float(np.ma.filled(marks.get_offsets(), np.nan)[0, 1]), marks) for marks in axes.collections]
    marks = {height: marks.get_alpha() for height, marks in heights}
    assert marks[0.01] is not None
    assert marks[0.0991] is None
    after = draw_prediction(ranking, styles, LIGHT).axes[1]
    assert sum(bool(np.isfinite(marks.get_offsets()).all()) for marks in after.collections) == 3


def test_the_tournament_ends_each_line_where_its_candidate_ended(whole: Run) -> None:
    tables = read_run(whole)
    assert tables.tournament is not None
    styles = plan_styles(tables.plans)
    axes = draw_tournament(tables.tournament, tables.plans, styles, LIGHT).axes[0]
    lines = {line.get_color(): line for line in axes.lines if line.get_marker() not in ("None", None)}
    ends = {plan.label: max(lines[styles[plan.id].color].get_xdata()) for plan in tables.plans[:4]}
    assert ends == {"bk-base": 300, "bk-small": 300, "bk-tiny": 100, "search-params-bk-base-1": 300}
    assert styles[plan_id("search-params-bk-small-1")].color not in lines
    crosses = [tuple(marks.get_offsets()[0]) for marks in axes.collections]
    assert crosses == [(100, 0.2105)]
    named = [text.get_text() for text in axes.texts]
    assert sorted(named) == ["bk-base", "bk-small", "search-params-bk-base-1"]


def test_a_run_without_a_tournament_shows_none(fresh: Run) -> None:
    fresh.tournament.unlink()
    parts = [part for section in report_sections(read_run(fresh)) for part in section.parts]
    assert "tournament" not in {part.name for part in parts if isinstance(part, Chart)}
    assert "Every verdict of the tournament" not in {p.caption for p in parts if isinstance(p, Table)}


def test_ties_of_the_first_are_said(fresh: Run) -> None:
    ranking = pd.read_csv(fresh.ranking)
    ranking.loc[ranking["plan"] == "bk-base", "tie_group"] = 1
    ranking.to_csv(fresh.ranking, index=False)
    summary = report_sections(read_run(fresh))[0].parts[0]
    assert isinstance(summary, Text)
    said = "By held-out loss search-params-bk-base-1 is tied with bk-base."
    assert said in summary.sentences


def test_names_are_moved_apart_in_their_order() -> None:
    assert space_labels([0.3, 0.1, 0.12, 0.11], 0.05).tolist() == pytest.approx([0.3, 0.1, 0.2, 0.15])
    assert space_labels([], 0.1).tolist() == []


def test_curves_end_where_a_candidate_stopped(whole: Run) -> None:
    tables = read_run(whole)
    styles = plan_styles(tables.plans)
    figure = draw_curves(curve_frame(tables), tables.plans, styles, LIGHT)
    task = next(axes for axes in figure.axes if axes.get_title(loc="left").startswith("Task"))
    ends = {line.get_color(): max(line.get_xdata()) for line in task.lines}
    assert ends[styles[plan_id("search-params-bk-small-1")].color] == 40
    assert ends[styles[plan_id("bk-base")].color] == 300


def test_the_same_figure_gives_the_same_bytes(whole: Run) -> None:
    tables = read_run(whole)
    assert tables.blocks is not None
    frame = block_map_frame(tables.blocks, tables.importance)
    figures = [draw_block_map(frame, theme) for theme in (LIGHT, LIGHT, DARK)]
    first, second, dark = (svg_uri(figure, freeze_layout(figure)) for figure in figures)
    assert first == second
    assert first != dark


# Many candidates --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(built_once: BuiltOnce) -> Run:
    """A run of 120 candidates without a report; read only."""

    def build(folder: Path) -> None:
        grow(Run(write_run(folder)), 120)

    return Run(built_once("many", build))


def test_of_many_candidates_figures_show_controls_front_and_best(many: Run) -> None:
    tables = read_run(many)
    drawn = shown_in_figures(tables)
    ids = {plan.id for plan in drawn.plans}
    ranking = pd.read_csv(many.ranking, dtype={"plan_id": "str"}).query("origin != 'teacher'")
    front = ranking[ranking["pareto"].astype(str) == "True"].sort_values("params")["plan_id"]
    assert len(front) > 20
    assert {plan_id(name) for name in PLANS if name.startswith("bk-")} <= ids
    assert set(ranking.sort_values("rank")["plan_id"].head(20)) <= ids
    assert {front.iloc[0], front.iloc[-1]} <= ids
    assert 23 <= len(ids) <= 43
    assert [plan.id for plan in tables.plans if plan.id in ids] == [plan.id for plan in drawn.plans]
    assert set(drawn.recoveries) <= ids
    sections = {section.key: section for section in report_sections(tables)}
    words = [part.sentences[0] for part in sections["candidates"].parts if isinstance(part, Text)]
    assert words == [
        f"Figures show {len(ids)} of 120 candidates: the controls, the Pareto front and the best 20. The tables hold "
        "all of them."
    ]
    parts = [part for section in sections.values() for part in section.parts]
    rows = {part.caption: len(part.rows) for part in parts if isinstance(part, Table)}
    assert rows["Removed blocks of each candidate"] == 120
    assert rows["Ranking"] == 121
    assert rows["Every verdict of the tournament"] == len(pd.read_csv(many.tournament))
    charts = [part for part in parts if isinstance(part, Chart)]
    assert sum(chart.name.startswith("pictures-") for chart in charts) == 3
    live = next(part for part in parts if isinstance(part, LiveMap))
    assert len(live.data["plans"]) == len(ids) + 1
    # one sentence does not name a hundred
    summary = sections["summary"].parts[0]
    assert isinstance(summary, Text)
    assert max(map(len, summary.sentences)) < 2500
    assert re.search(r"and \d+ more\.", " ".join(summary.sentences))


def test_the_others_are_dots_and_a_few_are_all_shown(many: Run, whole: Run) -> None:
    tables = read_run(many)
    assert tables.ranking is not None
    styles = plan_styles(shown_in_figures(tables).plans)
    rows = measured(tables.ranking)
    hidden = rows[~rows["plan_id"].isin(list(styles))]
    axes = draw_quality_plane(tables.ranking, styles, LIGHT).axes[0]
    sizes = {len(marks.get_offsets()) for marks in axes.collections}
    assert sizes == {1, len(not_dropped(hidden))}
    few = read_run(whole)
    assert shown_in_figures(few) is few


@pytest.mark.long
def test_a_report_of_five_hundred_is_written_in_time(tmp_path: Path) -> None:
    run = Run(write_run(tmp_path / "run"))
    grow(run, 500)
    started = time.process_time()
    page = write_report(run)
    assert time.process_time() - started < 45  # about 20 s; a busy machine is slower
    assert page.stat().st_size < 15e6
    words = Page(page.read_text()).words
    for plan in run.plan_ids():
        assert plan in words


# Pages -----------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_from_elsewhere(whole: Run) -> None:
    text = whole.report.read_text()
    page = Page(text)
    assert [attrs for tag, attrs in page.tags if tag == "script"] == [
        {"type": "application/json", "id": "live-data"},  # the numbers of the live map
        {},  # and what looks them up, tested in test_live_map
    ]
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    sources = page.values("src") + page.values("srcset")
    assert len(sources) == 2 * 9  # nine figures in two appearances
    assert all(source.startswith("data:image/") for source in sources)
    anchors = page.values("href")
    assert anchors
    assert {anchor.removeprefix("#") for anchor in anchors} <= set(page.values("id"))
    assert not re.search(r"url\(|@import|https?://(?!arxiv)", re.sub(r"data:[^\"]+", "", text))
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [a for _, a in page.tags]
    for query in ("prefers-color-scheme: dark", "@media print"):
        assert query in text


def test_embedded_figures_are_whole_svg_files(whole: Run) -> None:
    for source in Page(whole.report.read_text()).values("src"):
        root = ElementTree.fromstring(base64.b64decode(source.partition("base64,")[2]))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert len(list(root.iter())) > 50


def test_every_picture_is_described(whole: Run) -> None:
    page = Page(whole.report.read_text())
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")


def test_the_page_says_what_the_tables_say(whole: Run) -> None:
    words = Page(whole.report.read_text()).words
    reductions = pd.read_csv(whole.reductions)
    for row in reductions.itertuples():
        assert f"{row.params:,}" in words
        if row.plan != "teacher":
            assert f"\u2212{abs(100 * row.params_change):.1f}\u202f%" in words
    ranking = pd.read_csv(whole.ranking)
    for value in ranking["loss_after"].dropna():
        assert f"{value:.4f}" in words
    assert LEFT_OUT_REASON in words
    assert DROPPED_REASON in words
    assert "4 candidates ranked, 1 of them dropped by the tournament before the end." in words
    assert "0.0006 [-0.0011, 0.0023]" in words
    assert "1,204.5\u202fs" in words
    assert "add 108, silu 68" in words
    assert "38.1 to 43.9\u202fms" in words
    assert "An Imaginary CPU" in words
    assert "Made-up run <for> tests & typography" in words
    assert not re.search(r"\bnan\b|\bNone\b|<NA>", words)
    assert "Not run yet" not in words


def test_markdown_shows_the_same_with_files_beside_it(whole: Run) -> None:
    text = (whole.report_dir / "report.md").read_text()
    assert "data:" not in text
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(pictures) == 9
    for name in pictures:
        with Image.open(whole.report_dir / name) as picture:
            assert picture.convert("L").getextrema()[0] < 128  # something is drawn on the white
    for name in re.findall(r"\(([a-z_-]+\.csv)\)", text):
        assert (whole.report_dir / name).exists()
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        widths = {len(re.split(r"(?<!\\)\|", line)) for line in table.strip().splitlines()}
        assert len(widths) == 1
    headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert headings == [section.title for section in report_sections(read_run(whole))]


def test_tables_beside_the_page_are_the_tables_of_the_run(whole: Run) -> None:
    for source in (
        *(whole.blocks, whole.importance, whole.costs, whole.reductions, whole.ranking),
        whole.tournament,
    ):
        assert (whole.report_dir / source.name).read_bytes() == source.read_bytes()
    assert not list(whole.report_dir.glob("*.tmp"))


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    run = Run(write_run(tmp_path / "run", upto="costs"))
    for path in (run.blocks, run.importance):
        path.unlink()  # fewer figures to draw
    evil = "<script>alert(1)</script>|`x`"
    frame = pd.read_csv(run.reductions)
    frame["plan"] = frame["plan"].replace("bk-base", evil)
    frame.to_csv(run.reductions, index=False)
    page = Page(write_report(run).read_text())
    assert "script" not in {tag for tag, _ in page.tags}
    assert evil in page.words
    assert "<script" not in (run.report_dir / "report.md").read_text().replace("\\<", "")


COMMANDS = {"score": "score", "plans": "search", "distill": "distill", "rank": "rank"}


@pytest.mark.parametrize("step", list(STEPS)[1:])
def test_a_run_that_is_under_way_says_what_is_missing(tmp_path: Path, step: str) -> None:
    run = Run(write_run(tmp_path / "run", upto=step))
    sections = report_sections(read_run(run))
    notes = " ".join(
        sentence
        for section in sections
        for part in section.parts
        if isinstance(part, Text) and part.note
        for sentence in part.sentences
    )
    order = list(STEPS)
    for other, verb in COMMANDS.items():
        assert (f"`prune-lab {verb}" in notes) == (order.index(other) > order.index(step)) or (
            verb == "rank" and step == "rank"  # the pictures are drawn by the same verb
        )
    assert ("costs have not been counted. `prune-lab run --config" in notes) == (order.index(step) < 3)
    assert all(section.parts for section in sections)


def test_a_run_of_blocks_only_has_a_page(tmp_path: Path) -> None:
    run = Run(write_run(tmp_path / "run", upto="blocks"))
    page = Page(write_report(run).read_text())
    assert "has 38 blocks (22 residual, 16 attention); 34 of them can be removed" in page.words
    assert "This run is not complete" in page.words
    assert len(page.values("src")) == 1


def test_unknown_cells_are_dashes(whole: Run) -> None:
    tables = [part for s in report_sections(read_run(whole)) for part in s.parts if isinstance(part, Table)]
    ranking = next(table for table in tables if table.caption == "Ranking")
    failed = dict(
        zip(
            ranking.header,
            next(row for row in ranking.rows if row[2] == "search-params-bk-small-1"),
            strict=True,
        )
    )
    assert failed["Rank"] == failed["Loss after"] == failed["CLIP after"] == "\u2013"
    assert failed["Tie group"] == failed["On the front"] == "\u2013"
    assert failed["Status"] == "failed"
    assert failed["Loss before"] == "0.1200"


def test_pictures_of_captions_are_compared_too(fresh: Run) -> None:
    text = re.sub(r"prompts = .*", "prompts = []", fresh.config.read_text())
    fresh.config.write_text(text)
    pictures = next(section for section in report_sections(read_run(fresh)) if section.key == "pictures")
    assert [type(part).__name__ for part in pictures.parts] == ["Text", "Chart"]
    assert "captions of held-out pictures" in pictures.parts[0].sentences[0]


def test_a_picture_that_is_gone_is_named(fresh: Run) -> None:
    (fresh.teacher_pictures / "2.png").unlink()
    with pytest.raises(
        DataError, match=r"teacher/2\.png, found no such file; delete .*teacher and run again"
    ):
        write_report(fresh)


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"found none of config.toml.*prune-lab run"):
        write_report(Run(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_named(fresh: Run) -> None:
    intact = fresh.importance.read_text()
    fresh.importance.write_text(intact.replace("impact", "impakt", 1))
    with pytest.raises(DataError, match=r"importance\.csv, found no column impact; delete it"):
        write_report(fresh)
    fresh.importance.write_text("")
    with pytest.raises(DataError, match=r"importance\.csv, found an empty file"):
        write_report(fresh)
    fresh.importance.write_text(intact)
    fresh.config.write_text("model = ")
    with pytest.raises(ConfigError, match=r"config\.toml: this is not TOML"):
        write_report(fresh)
    assert not fresh.report_dir.exists()


def test_a_ranking_of_plans_that_are_gone_is_refused(fresh: Run) -> None:
    fresh.plan(plan_id("bk-tiny")).unlink()
    with pytest.raises(DataError, match=f"ranks the plan {plan_id('bk-tiny')}, found no such file"):
        write_report(fresh)


@pytest.mark.usefixtures("blank_figures")
def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    run = Run(write_run(tmp_path / "run", upto="blocks"))
    first = write_report(run).read_text()
    assert write_report(run).read_text() == first
    write_run(tmp_path / "other", upto="score")
    shutil.copy(tmp_path / "other" / "importance.csv", run.importance)
    assert "with the least impact" in write_report(run).read_text()


def test_reporting_does_not_load_torch() -> None:
    code = (
        "import sys, prune_lab.report; sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("cells", "wanted"),
    [
        ((-0.245, -0.26, -0.231), "\u221224.5\u202f% (\u221226.0 to \u221223.1)"),
        ((-0.012, -0.05, 0.021), "\u22121.2\u202f% (\u22125.0 to +2.1), undecided"),
        ((-0.012, None, math.nan), "\u22121.2\u202f%, undecided"),
        ((None, None, None), "\u2013"),
    ],
)
def test_a_change_of_time_says_its_interval_or_that_it_is_undecided(
    cells: tuple[object, object, object], wanted: str
) -> None:
    assert change_with_interval(*cells) == wanted


def test_times_of_the_ranking_and_of_the_controls_come_with_their_intervals(whole: Run) -> None:
    page = (whole.report_dir / "report.md").read_text(encoding="utf-8")
    # Base removes 14 blocks of 1 ms each, of 40 ms.
    assert page.count("\u221235.0\u202f% (\u221241.0 to \u221229.0)") == 2
    assert "in turns, one process, cpu float32, 64 x 64, batch 1" in page


@pytest.mark.parametrize(
    "prompt",
    [
        "\u72d0\u72f8\u3068\u6708",
        "costs $5 or $6",
        r"$\frac$ {",
        "\U0001f98a \u0e01\u0e34\u0e19",
        "a\u0301\u200f",
    ],
)
def test_a_text_of_any_alphabet_is_drawn_silently(
    tmp_path: Path, prompt: str, recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]
) -> None:
    columns = [Column("", prompt, prompt, (np.zeros((8, 8, 3), np.uint8),))]

    def draw(theme: Theme) -> Figure:
        return draw_comparison(columns, [prompt], {}, theme)

    figure = draw(LIGHT)
    area = freeze_layout(figure)
    assert svg_uri(figure, area).startswith("data:image/svg+xml")
    save_png(figure, tmp_path / "drawn.png", area)
    Plot(draw).save(tmp_path / "shown.png")
    assert Plot(draw)._repr_html_().startswith("<picture>")
    assert [str(one.message) for one in recwarn] == []
    assert capfd.readouterr().err == ""


# Forms of students ------------------------------------------------------------------------------------------------


def test_the_page_says_how_each_student_is_built(fresh: Run) -> None:
    for name, form in (("bk-base", "own"), ("bk-small", "neutral")):
        path = fresh.plan(plan_id(name))
        path.write_text(json.dumps(json.loads(path.read_text()) | {"form": form}))
    sections = {section.key: section.parts for section in report_sections(read_run(fresh))}
    tables = {
        item.caption: [dict(zip(item.header, row, strict=True)) for row in item.rows]
        for items in sections.values()
        for item in items
        if isinstance(item, Table)
    }
    ranked = {row["Plan"]: row["Form"] for row in tables["Ranking"]}
    wanted = dict.fromkeys(PLANS, "native") | {"bk-base": "own", "bk-small": "neutral"}
    assert ranked == {"teacher": "", **wanted}
    assert {row["Plan"]: row["Form"] for row in tables["Removed blocks of each candidate"]} == wanted
    saved = {row["Plan"]: row["Form"] for row in tables["reference"]}
    assert (saved["bk-base"], saved["bk-small"], saved["bk-tiny"]) == ("own", "neutral", "native")
    assert {row["Form"] for row in tables["sd-v1.4"][1:]} == {"native"}  # another model, not of this run
    words = " ".join(" ".join(item.sentences) for item in sections["ranking"] if isinstance(item, Text))
    assert "trust_remote_code=True" in words
    assert "stay and do nothing" in words


def test_the_page_says_the_size_that_multiply_adds_are_of(fresh: Run) -> None:
    costs = pd.read_csv(fresh.costs)
    costs.assign(size="512 x 512 pixels, 77 tokens").to_csv(fresh.costs, index=False)
    sections = {section.key: section.parts for section in report_sections(read_run(fresh))}
    chart = next(item for item in sections["costs"] if isinstance(item, Chart))
    assert "one forward pass at 512 x 512 pixels, 77 tokens" in chart.caption
