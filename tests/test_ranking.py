"""Who is ranked, in which order, who ties, who is on the Pareto front, and who is left out with which reason."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune_lab.errors import DataError
from prune_lab.ranking import CandidateResult, rank, ranking_from_frame
from prune_lab.ranking.results import pareto_front
from prune_lab.runtime import write_frame
from prune_lab.schemas import RANKING_COLUMNS


def result(plan: str, loss: float = math.nan, **more: object) -> CandidateResult:
    first = CandidateResult(
        plan=plan,
        plan_id=f"id-{plan}",
        origin="control",
        blocks_removed=3,
        params=100,
        macs=1000,
        paper_macs=900,
        loss_after=loss,
        steps=50,
    )
    return dataclasses.replace(first, **more)  # type: ignore[arg-type]


TEACHER = result("teacher", 0.1, origin="teacher", steps=0, params=200, macs=2000, blocks_removed=0)


def plans(*results: CandidateResult) -> list[tuple[str, int | None, str]]:
    return [(entry.result.plan, entry.rank, entry.status) for entry in rank(results).entries]


def test_candidates_are_ordered_by_loss_then_clip_then_size_after_the_teacher() -> None:
    found = plans(
        result("c", 0.3, clip_after=0.2),
        result("no-clip", 0.3),
        result("b", 0.3, clip_after=0.4),
        result("large", 0.25, params=150),
        result("small", 0.25, params=120),
        TEACHER,
    )
    assert found == [
        ("teacher", 0, "teacher"),
        ("small", 1, "ranked"),
        ("large", 2, "ranked"),
        ("b", 3, "ranked"),
        ("c", 4, "ranked"),
        ("no-clip", 5, "ranked"),
    ]


def test_everyone_else_stays_with_a_reason() -> None:
    ranking = rank(
        [
            result("nan", failure="the loss was no longer finite at step 4"),
            result("good", 0.3),
            result("short", 0.2, steps=20),
            result("also", 0.4),
            result("unmeasured"),
            result("wild", left_out="no plain diffusers model"),
        ]
    )
    assert [(p.result.plan, p.status, p.reason) for p in ranking.entries] == [
        ("good", "ranked", ""),
        ("also", "ranked", ""),
        ("nan", "failed", "the loss was no longer finite at step 4"),
        ("short", "left out", "distilled for 20 steps, the ranking compares 50"),
        ("unmeasured", "left out", "its held-out loss after distillation was not measured"),
        ("wild", "left out", "no plain diffusers model"),
    ]
    assert [p.rank for p in ranking.entries] == [1, 2, None, None, None, None]
    assert [p.pareto for p in ranking.entries[2:]] == [None] * 4


def test_one_long_training_does_not_push_the_others_out() -> None:
    found = plans(result("a", 0.3), result("b", 0.4), result("long", 0.1, steps=500))
    assert found == [("a", 1, "ranked"), ("b", 2, "ranked"), ("long", None, "left out")]


def test_the_dropped_follow_the_survivors_by_how_far_they_came() -> None:
    ranking = rank(
        [
            result("early-good", 0.2, steps=50, rung=1, dropped="worse at rung 1"),
            result("best", 0.3, steps=400, rung=3),
            result("late-worse", 0.9, steps=150, rung=2, dropped="worse at rung 2"),
            result("late", 0.8, steps=150, rung=2, dropped="worse at rung 2", params=1, macs=1),
            result("second", 0.4, steps=400, rung=3),
            result("early", 0.5, steps=50, rung=1, dropped="worse at rung 1"),
            result("broken", steps=150, rung=2, failure="it broke"),
            TEACHER,
        ]
    )
    assert [(p.result.plan, p.rank, p.status, p.reason) for p in ranking.entries] == [
        ("teacher", 0, "teacher", ""),
        ("best", 1, "ranked", ""),
        ("second", 2, "ranked", ""),
        ("late", 3, "dropped", "worse at rung 2"),
        ("late-worse", 4, "dropped", "worse at rung 2"),
        ("early-good", 5, "dropped", "worse at rung 1"),
        ("early", 6, "dropped", "worse at rung 1"),
        ("broken", None, "failed", "it broke"),
    ]
    # a loss after fewer steps is no point of the front, however small the model
    assert [p.pareto for p in ranking.entries] == [True, True, False, None, None, None, None, None]


def test_many_dropped_do_not_push_the_survivors_out() -> None:
    few = [result(f"d{i}", 0.5, steps=50, rung=1, dropped="worse") for i in range(5)]
    found = plans(*few, result("a", 0.3, steps=400, rung=2))
    assert found[0] == ("a", 1, "ranked")
    assert {status for _, _, status in found[1:]} == {"dropped"}


def with_rows(plan: str, *heldout: float, **more: object) -> CandidateResult:
    return result(plan, sum(heldout) / len(heldout), heldout=heldout, **more)


def test_ties_share_a_group_whatever_their_ranks() -> None:
    ranking = rank(
        [
            with_rows("far", 0.51, 0.62, 0.73),
            with_rows("best", 0.10, 0.20, 0.30),
            with_rows("tied", 0.11, 0.19, 0.31),
            result("unknown", 0.4),
            with_rows("twin", 0.10, 0.20, 0.30),
            with_rows("dropped", 0.1, 0.2, 0.4, steps=20, rung=1, dropped="worse"),
            with_rows("dropped too", 0.1, 0.2, 0.41, steps=20, rung=1, dropped="worse"),
            TEACHER,
        ]
    )
    assert [(p.result.plan, p.rank, p.tie_group) for p in ranking.entries] == [
        ("teacher", 0, None),
        ("best", 1, 1),
        ("twin", 2, 1),
        ("tied", 3, 1),
        ("unknown", 4, None),
        ("far", 5, 2),
        # after fewer steps they are compared with each other alone
        ("dropped", 6, 3),
        ("dropped too", 7, 3),
    ]
    assert ranking.frame()["tie_group"].isna().tolist() == [
        True,
        False,
        False,
        False,
        True,
        False,
        False,
        False,
    ]


def test_rows_that_are_not_the_same_are_not_paired() -> None:
    with pytest.raises(DataError, match="compare 3 rows with 2"):
        rank([with_rows("a", 0.1, 0.2), with_rows("b", 0.1, 0.2, 0.3)])


def test_a_plan_counts_once() -> None:
    with pytest.raises(DataError, match="id-a twice"):
        rank([result("a", 0.1), result("a", 0.2)])


def test_the_front_by_hand() -> None:
    points = {
        "cheap": (10, 10, 0.5),
        "dear and good": (20, 20, 0.2),
        "beaten": (20, 20, 0.3),
        "few parameters, many macs": (5, 30, 0.5),
        "twin of cheap": (10, 10, 0.5),
        "worse than cheap in parameters alone": (11, 10, 0.5),
    }
    results = [result(plan, loss, params=params, macs=macs) for plan, (params, macs, loss) in points.items()]
    assert pareto_front(results) == {
        "id-cheap",
        "id-dear and good",
        "id-few parameters, many macs",
        "id-twin of cheap",
    }


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=9))
def test_the_front_beats_the_rest_and_nobody_on_it_is_beaten(points: list[tuple[int, int, int]]) -> None:
    results = [
        result(str(i), float(loss), params=params, macs=macs) for i, (params, macs, loss) in enumerate(points)
    ]
    front = pareto_front(results)
    assert front

    def beats(left: tuple[int, int, int], right: tuple[int, int, int]) -> bool:
        no_worse = left[0] <= right[0] and left[1] <= right[1] and left[2] <= right[2]
        return no_worse and left != right

    for i, point in enumerate(points):
        beaten = any(beats(other, point) for j, other in enumerate(points) if f"id-{j}" in front)
        assert beaten != (f"id-{i}" in front)


def test_the_table_keeps_its_columns_and_survives_a_csv(tmp_path: Path) -> None:
    ranking = rank(
        [
            TEACHER,
            result("a", 0.3, median_ms=1.5, impact_one_shot=0.01, loss_before=0.1 + 0.2),
            result("b", failure="it broke, badly"),
            with_rows("c", 0.1, 0.2, rung=2),
            with_rows("d", 0.1, 0.2, rung=1, steps=20, dropped="at rung 1 of 2: worse"),
        ]
    )
    frame = ranking.frame()
    assert tuple(frame.columns) == RANKING_COLUMNS
    assert " ".join(RANKING_COLUMNS) == (
        "rank tie_group plan plan_id origin blocks_removed params macs paper_macs median_ms latency_change "
        "latency_low latency_high impact_one_shot "
        "loss_before loss_after clip_before clip_after steps rung pareto status reason"
    )
    assert frame["plan"].tolist() == ["teacher", "c", "a", "d", "b"]
    assert frame["rank"].isna().tolist() == [False, False, False, False, True]
    assert frame["steps"].tolist() == [0, 50, 50, 20, 50]
    assert frame["rung"].fillna(0).tolist() == [0, 2, 0, 1, 0]
    assert frame.loc[4, ["median_ms", "loss_after", "clip_after"]].isna().all()
    write_frame(tmp_path / "ranking.csv", frame)
    again = ranking_from_frame(pd.read_csv(tmp_path / "ranking.csv"))
    pd.testing.assert_frame_equal(again.frame(), frame)
    assert [entry.status for entry in again.entries] == ["teacher", "ranked", "ranked", "dropped", "failed"]
    assert again.entries[4].result.failure == "it broke, badly"
    assert again.entries[3].result.dropped == again.entries[3].reason == "at rung 1 of 2: worse"
    assert [entry.tie_group for entry in again.entries] == [None, 1, None, 2, None]
    with pytest.raises(DataError, match="'pareto'"):
        ranking_from_frame(frame.drop(columns="pareto"))


def test_a_ranking_of_nobody_is_an_empty_table() -> None:
    assert list(rank([]).frame().columns) == list(RANKING_COLUMNS)
