"""Pages of committed tables: what stands in ``reports/`` is what the tables say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import (
    applications,
    applications_page,
    evidence_page,
    losses_page,
    runtimes_page,
    solver_outcomes_page,
    stage_widths,
    width_page,
)
from benchmarks.width import OUTCOME_COLUMNS, PLAN_COLUMNS, Unit, is_done, units

ROOT = Path(__file__).parent.parent


def _of_plan(way: str, equal: str, macs: float, time: float) -> tuple[object, ...]:
    return (
        "m",
        f"{way}-{equal}-65",
        way,
        equal,
        65,
        f"id-{way}-{equal}",
        3,
        macs,
        macs,
        time,
        time,
        time,
        40,
    )


PLANS = pd.DataFrame(
    [
        _of_plan("depth", "macs", 0.65, 0.6),
        _of_plan("width", "macs", 0.64, 0.75),
        _of_plan("width", "latency", 0.4, 0.6),
    ],
    columns=list(PLAN_COLUMNS),
)


def _outcome(way: str, equal: str, seed: int, after: float) -> tuple[object, ...]:
    return (
        "m",
        equal,
        65,
        seed,
        f"{way}-{equal}-65",
        f"id-{way}-{equal}",
        0.5,
        after,
        0.3,
        300,
        8,
        1.0,
        "2.13",
        "cpu",
    )


OUTCOMES = pd.DataFrame(
    [
        _outcome("depth", "macs", 0, 0.40),
        _outcome("depth", "macs", 1, 0.42),
        _outcome("width", "macs", 0, 0.35),
        _outcome("width", "macs", 1, 0.35),
        _outcome("width", "latency", 0, 0.50),
    ],
    columns=list(OUTCOME_COLUMNS),
)


def test_a_page_of_widths_compares_at_equal_cost() -> None:
    table = width_page.summary(PLANS, OUTCOMES).set_index("plan")
    assert table.loc["depth-macs-65", "more"] == pytest.approx(0.11)
    assert table.loc["depth-macs-65", "spread"] == pytest.approx(0.02)
    assert list(table.index) == ["width-macs-65", "depth-macs-65", "width-latency-65"]
    assert list(table["seeds"]) == [2, 2, 1]
    lines = list(width_page.verdicts(table.reset_index()))
    assert "equal measured time of depth: **depth 0.1100 (spread 0.0200)**, then width 0.2000." in lines[1]
    assert "equal multiply-adds: **width 0.0500 (spread 0.0000)**, then depth 0.1100" in lines[0]


def test_units_that_are_in_the_table_are_not_done_again(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.csv"
    assert not is_done(Unit("m", "macs", 65, 0), path)
    OUTCOMES.to_csv(path, index=False)
    assert is_done(Unit("m", "macs", 65, 1), path)
    assert not is_done(Unit("m", "latency", 65, 1), path)
    every = list(units(("a", "b")))
    assert (
        len(every) == len(set(every)) == 2 * 2 * (3 + 2)
    )  # models, costs; budgets, and two more seeds of one


def test_a_table_of_runtimes_says_what_was_not_measured() -> None:
    rows = [
        ("m", "eager", "teacher", 40.0, 0.0, None, None, 0.0),
        ("m", "eager", "bk-small", 24.0, -0.4, -0.45, -0.35, -0.37),
        ("m", "onnx", "teacher", 20.0, 0.0, None, None, 0.0),
    ]
    columns = [
        "model",
        "backend",
        "plan",
        "median_ms",
        "latency_change",
        "latency_low",
        "latency_high",
        "macs_change",
    ]
    lines = runtimes_page.table(pd.DataFrame(rows, columns=columns))
    assert lines[0] == "| plan | multiply-adds | eager | onnxruntime |"
    assert lines[2:] == [
        "| teacher |  | 40.0 ms | 20.0 ms |",
        "| bk-small | -37 | -40 (-45 to -35) | not measured |",
    ]


@pytest.mark.parametrize("name", ["width", "runtimes"])
def test_committed_pages_are_what_their_tables_say(name: str) -> None:
    folder = ROOT / "reports" / name
    if name == "width":
        found = width_page.page(pd.read_csv(folder / "plans.csv"), pd.read_csv(folder / "outcomes.csv"))
    else:
        found = runtimes_page.page(pd.read_csv(folder / "runtimes.csv"))
        shown = "\n".join(runtimes_page.in_readme(pd.read_csv(folder / "runtimes.csv")))
        assert shown in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (folder / "README.md").read_text(encoding="utf-8") == found


def test_the_page_of_narrower_stages_is_what_its_tables_say(tmp_path: Path) -> None:
    folder = ROOT / "reports" / "width"
    for name in ("stages.csv", "outcomes.csv", "plans.csv"):
        shutil.copyfile(folder / name, tmp_path / name)
    stage_widths.write_page(tmp_path)
    page = (folder / "STAGES.md").read_text(encoding="utf-8")
    assert (tmp_path / "STAGES.md").read_text(encoding="utf-8") == page
    assert "| 65 % | stages, by taylor: 32 48 64 64 | plain | 0.613 | 0.335 |" in page


@pytest.mark.long
def test_the_page_on_evidence_is_what_its_tables_say(tmp_path: Path) -> None:
    folder = ROOT / "reports" / "evidence"
    for path in (*folder.glob("*.csv"), folder / "rows.parquet"):
        shutil.copyfile(path, tmp_path / path.name)
    evidence_page.write_page(tmp_path)
    assert (tmp_path / "README.md").read_text() == (folder / "README.md").read_text()


@pytest.mark.parametrize("name", ["losses", "solvers"])
def test_pages_on_losses_and_solvers_are_what_their_tables_say(name: str, tmp_path: Path) -> None:
    folder = ROOT / "reports" / name
    if not (folder / "outcomes.csv").is_file():
        pytest.skip("none of its jobs is done yet")
    for path in (*folder.glob("*.csv"), folder / "rows.parquet"):
        shutil.copyfile(path, tmp_path / path.name)
    {"losses": losses_page, "solvers": solver_outcomes_page}[name].write_page(tmp_path)
    assert (tmp_path / "README.md").read_text() == (folder / "README.md").read_text()


def test_agreement_and_flips_by_hand() -> None:
    names = ["a", "b", "c", "d", "e"]
    plans = pd.DataFrame({"plan_id": names, "plan": names, "removed": names, "kind": "random"})
    plans["added_up"], plans["loss"] = [1.0, 2, 3, 4, 5], [1.0, 2, 3, 4, 5]
    plans["prior"], plans["one_shot"], plans["repaired"] = (
        [5.0, 4, 3, 2, 1],
        [1.0, 2, 3, 4, 5],
        [1.0, 2, 3, 4, 5],
    )
    ends = {"a": 0.2, "b": 0.3, "c": 0.4, "d": 0.5, "e": 0.1}  # the last ends first
    rows = pd.DataFrame(
        {"plan_id": name, "row": row, "step": 10, "seed": seed, "loss": ends[name] + noise}
        for name in names
        for row in range(4)
        for seed, noise in ((0, -0.01), (1, 0.01))
    )
    found = evidence_page.agreement(plans, rows, 10).set_index("forecast")
    assert found.loc["added-up scores", "tau"] == pytest.approx((6 - 4) / 10)
    assert found.loc["added-up scores of untrained models", "tau"] == pytest.approx((4 - 6) / 10)
    assert found.loc["added-up scores", "regret"] == pytest.approx(0.1)
    assert evidence_page.flips(plans, rows, 10)["plan_id"].tolist() == ["e"]

    # a seed that stopped before is a look of its own, and no part of the outcome or of the look of the other seeds
    at_5 = [rows.assign(step=5), rows[rows["seed"] == 0].assign(step=5, seed=7, loss=-rows["loss"])]
    both = evidence_page.agreement(plans, pd.concat([rows, *at_5]), 10).set_index("forecast")
    assert both.loc["added-up scores", "tau"] == found.loc["added-up scores", "tau"]
    assert both.loc["loss at step 5", "tau"] == pytest.approx(1)
    assert both.loc["loss at step 5, other seeds", "tau"] == pytest.approx(-1)
    some = at_5[1][at_5[1]["plan_id"] != "a"]
    assert "loss at step 5, other seeds" not in set(
        evidence_page.agreement(plans, pd.concat([rows, some]), 10)["forecast"]
    )


# Applications ------------------------------------------------------------------------------------------------------


def test_the_page_of_applications_is_what_its_tables_say() -> None:
    folder = ROOT / "reports" / "applications"
    tables = (pd.read_csv(folder / f"{name}.csv") for name in ("personal", "speed", "changed"))
    assert (folder / "README.md").read_text(encoding="utf-8") == applications_page.page(*tables)


def test_tables_of_applications_have_their_columns_and_units_are_skipped_once_done() -> None:
    folder = ROOT / "reports" / "applications"
    for name, columns in (
        ("personal", applications.PERSONAL),
        ("speed", applications.SPEED),
        ("changed", applications.CHANGED),
    ):
        table = pd.read_csv(folder / f"{name}.csv")
        assert tuple(table.columns) == columns
        first = table.iloc[0]
        assert applications.is_done(table, model=first["model"])
        assert not applications.is_done(table, model="none")
    personal = pd.read_csv(folder / "personal.csv")
    assert not personal.duplicated(["subject", "model", "way"]).any()


def test_what_a_row_says_is_in_the_page() -> None:
    rows = [
        dict(zip(applications.PERSONAL, ["s", model, way, "", *[value] * 5, *[1.0] * 12, "t"], strict=True))
        for model in applications_page.MODELS
        for way, value in (("untouched", 0.1), ("whole", 0.4), ("lora", 0.3), ("carried", 0.2))
        if (model, way) != (applications_page.TEACHER, "carried")
    ]
    rows.append(rows[0] | {"subject": "begun"})  # of which units are not done
    personal = pd.DataFrame(rows)
    personal.loc[(personal["model"] == "bk-tiny") & (personal["way"] == "whole"), "subject_likeness"] = 0.777
    speed = pd.DataFrame(columns=list(applications.SPEED))
    moved = pd.DataFrame(columns=list(applications.CHANGED))
    text = applications_page.page(personal, speed, moved)
    assert "| Tiny | 0.100 | 0.400 | 0.777 | 0.400 |" in text
    assert "begun" not in text
    assert "changed by +0.30 in the teacher" in text
    assert "Tiny +0.10 (of its own: +0.20)" in text
    assert "## Pictures changed" not in text
