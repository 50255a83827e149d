"""Paired differences, ties, and the tournament: which candidates go on, why others are dropped, and the cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import ttest_1samp, ttest_rel

from prune_lab.errors import ConfigError, DataError
from prune_lab.ranking import (
    Difference,
    HeldoutLosses,
    Tournament,
    first_rung,
    paired_difference,
    run_tournament,
    rungs,
    tie_groups,
    tournament_from_frame,
)
from prune_lab.runtime import write_frame
from prune_lab.schemas import TOURNAMENT_COLUMNS

ROWS = np.random.default_rng(0).uniform(0.5, 1.5, 24)  # the common factor of each held-out row


def losses(level: float, noise: float = 0.0, seed: int = 0) -> NDArray[np.float64]:
    """Losses on the common rows around ``level``, with independent ``noise``."""
    return level * ROWS + noise * np.random.default_rng(seed).standard_normal(len(ROWS))


class Engine:
    """Returns the losses in ``known``, and records its calls."""

    def __init__(self, known: Mapping[str, Mapping[int, HeldoutLosses] | HeldoutLosses]) -> None:
        self.known = known
        self.asked: list[tuple[tuple[str, ...], int]] = []

    def __call__(self, names: Sequence[str], steps: int) -> dict[str, HeldoutLosses]:
        self.asked.append((tuple(names), steps))
        answers = {}
        for name in names:
            own = self.known[name]
            answers[name] = own[steps] if isinstance(own, Mapping) else own
        return answers


def fates(tournament: Tournament) -> dict[str, tuple[str, int]]:
    return {name: (verdict.fate, verdict.rung) for name, verdict in tournament.fates.items()}


# Paired differences ----------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    one, other = losses(0.31, 0.01, 1), losses(0.3, 0.01, 2)
    found = paired_difference(one, other)
    expected = ttest_1samp(one - other, 0.0).confidence_interval(0.95)
    assert found.mean == pytest.approx((one - other).mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_common_rows_tell_apart_what_two_samples_cannot() -> None:
    # a thousandth of the spread between rows, but on every row
    one, other = losses(0.301), losses(0.3)
    assert paired_difference(one, other).direction == "higher"
    assert paired_difference(other, one).direction == "lower"
    assert paired_difference(one, one).tie
    shaky = paired_difference(losses(0.3, 0.05, 1), losses(0.3, 0.05, 2))
    assert shaky.low < 0 < shaky.high
    assert shaky.direction == paired_difference(losses(0.3, 0.05, 2), losses(0.3, 0.05, 1)).direction == "tie"
    assert abs(one.mean() - other.mean()) < 0.1 * one.std() / np.sqrt(len(one))


@pytest.mark.parametrize(
    ("difference", "text"),
    [
        (Difference(0.0123, 0.0101, 0.0145), "0.0123 [0.0101, 0.0145]"),
        (Difference(0.0001, 0.00004, 0.00016), "0.00010 [0.00004, 0.00016]"),
        (Difference(-0.5, math.nan, math.nan), "-0.5000 [nan, nan]"),
        (Difference(0.0, 0.0, 0.0), "0.0000 [0.0000, 0.0000]"),
    ],
)
def test_a_difference_is_written_so_that_its_side_is_seen(difference: Difference, text: str) -> None:
    assert str(difference) == text


def test_one_row_decides_nothing() -> None:
    found = paired_difference([0.4], [0.1])
    assert found.mean == pytest.approx(0.3)
    assert math.isnan(found.low)
    assert found.tie


@pytest.mark.parametrize(("one", "other"), [([0.1, 0.2], [0.1]), ([], [])])
def test_unpaired_values_are_refused(one: list[float], other: list[float]) -> None:
    with pytest.raises(DataError, match=f"compare {len(one)} rows with {len(other)}"):
        paired_difference(one, other)


@given(
    st.lists(st.sampled_from([0.30, 0.302, 0.304, 0.31, 0.4]), min_size=1, max_size=7),
    st.sampled_from([0.001, 0.005, 0.02]),
)
@settings(deadline=None)
def test_groups_are_those_of_a_paired_t_test_against_the_leader(levels: list[float], noise: float) -> None:
    rows = {f"n{i}": losses(level, noise, seed=i) for i, level in enumerate(levels)}
    found = tie_groups(rows)
    ordered = sorted(rows, key=lambda name: rows[name].mean())
    assert list(found) == ordered
    leader, group = ordered[0], 1
    for name in ordered:
        if name != leader and ttest_rel(rows[name], rows[leader]).pvalue < 0.05:
            leader, group = name, group + 1
        assert found[name] == group


def test_equal_losses_are_one_group_and_a_constant_gap_is_none() -> None:
    same = losses(0.3)
    assert set(tie_groups({"a": same, "b": same.copy(), "c": same.copy()}).values()) == {1}
    # no spread at all in the differences: a t test would divide by zero
    assert tie_groups({"far": np.array([2.0, 3.0]), "near": np.array([1.0, 2.0])}) == {"near": 1, "far": 2}
    assert tie_groups({}) == {}
    with pytest.raises(DataError, match="tie group of b, found losses that are not finite"):
        tie_groups({"a": [0.1, 0.2], "b": [0.1, math.nan]})


# Rungs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "eta", "first", "expected"),
    [
        (400, 2, 50, (50, 100, 200, 400)),
        (500, 3, 50, (50, 150, 500)),  # 450 would save fifty steps of a few
        (2000, 3, 50, (50, 150, 450, 2000)),
        (300, 3, 100, (100, 300)),
        (300, 3, 300, (300,)),
        (300, 3, 250, (300,)),
        (1, 2, 1, (1,)),
    ],
)
def test_rungs_by_hand(steps: int, eta: int, first: int, expected: tuple[int, ...]) -> None:
    assert rungs(steps, eta, first) == expected


@given(st.integers(1, 10**5), st.integers(2, 5), st.integers(1, 10**5))
def test_rungs_rise_by_eta_and_end_at_the_end(steps: int, eta: int, first: int) -> None:
    if first > steps:
        with pytest.raises(ConfigError, match="no more than the last"):
            rungs(steps, eta, first)
        return
    found = rungs(steps, eta, first)
    assert found[-1] == steps
    assert list(found) == sorted(set(found))
    assert all(rung == first * eta**i for i, rung in enumerate(found[:-1]))


@pytest.mark.parametrize(("eta", "first"), [(1, 10), (2, 0), (0, 10)])
def test_impossible_rungs_are_refused(eta: int, first: int) -> None:
    with pytest.raises(ConfigError, match="eta must be 2 or more"):
        rungs(100, eta, first)


def test_the_first_rung_leaves_the_warm_up_behind() -> None:
    assert first_rung(500, 3, 20) == 55
    assert first_rung(500, 3, 0) == 18
    assert first_rung(50_000, 3, 500) == 1851
    assert first_rung(30, 3, 20) == 30  # too short for a tournament
    assert rungs(500, 3, first_rung(500, 3, 20)) == (55, 165, 500)


# The tournament by hand ------------------------------------------------------------------------------------------


def test_the_better_part_goes_on_and_everyone_knows_why() -> None:
    engine = Engine({name: losses(level) for name, level in zip("abcdef", (3, 1, 6, 2, 5, 4), strict=True)})
    tournament = run_tournament("abcdef", (10, 20, 40), 2, engine)
    assert engine.asked == [(tuple("abcdef"), 10), (("a", "b", "d"), 20), (("b", "d"), 40)]
    assert tournament.survivors == ("b", "d")
    assert fates(tournament) == {
        "a": ("dropped", 2),
        "b": ("kept", 3),
        "c": ("dropped", 1),
        "d": ("kept", 3),
        "e": ("dropped", 1),
        "f": ("dropped", 1),
    }
    assert (tournament.cost, tournament.full_cost) == (3 * 10 + 20 + 2 * 40, 6 * 40)
    gap = paired_difference(losses(3), losses(2))
    assert tournament.fates["a"].reason == f"at rung 2 of 3, 20 steps: worse than the last survivor by {gap}"
    assert (tournament.fates["a"].place, tournament.fates["a"].against) == (3, "d")
    at_the_end = [verdict for verdict in tournament.verdicts if verdict.rung == 3]
    assert [(one.name, one.place, one.against, one.tied) for one in at_the_end] == [
        ("b", 1, "", None),
        ("d", 2, "b", False),
    ]


def test_equal_losses_go_on_together_up_to_the_limit() -> None:
    tournament = run_tournament("abcdef", (10, 20), 3, Engine(dict.fromkeys("abcdef", losses(1.0))))
    assert tournament.survivors == tuple("abcd")
    assert tournament.fates["e"].reason == (
        "at rung 1 of 2, 10 steps: tied with the last survivor, but no more than 4 may go on"
    )
    first = {verdict.name: verdict for verdict in tournament.verdicts if verdict.rung == 1}
    assert first["d"].reason.endswith("goes on because it is tied with the last survivor")
    assert [first[name].tied for name in "abcdef"] == [True, None, True, True, True, True]
    assert run_tournament(
        "abcdef", (10, 20), 3, Engine(dict.fromkeys("abcdef", losses(1.0))), most=9
    ).survivors == (tuple("abcdef"))


def test_controls_go_on_and_take_nobodys_place() -> None:
    engine = Engine({name: losses(level) for name, level in zip("abcdxy", (1, 2, 3, 4, 0.5, 9), strict=True)})
    tournament = run_tournament("abcdxy", (10, 20), 2, engine, keep=("x", "y"))
    assert tournament.survivors == ("x", "a", "b", "y")
    places = {verdict.name: verdict.place for verdict in tournament.verdicts if verdict.rung == 2}
    assert places == {"x": None, "a": 1, "b": 2, "y": None}
    # all rivals fail: the controls are still trained to the end
    alone = run_tournament("ax", (10, 20), 2, Engine({"a": "out of memory", "x": losses(2)}), keep="x")
    assert alone.survivors == ("x",)


def test_who_fails_is_out_with_the_reason() -> None:
    nan = losses(1.0)
    nan[3] = math.nan
    engine = Engine(
        {
            "a": {10: losses(1), 20: "the loss was no longer finite at step 14", 40: losses(0)},
            "b": losses(2),
            "c": {10: nan},
            "d": losses(3),
        }
    )
    tournament = run_tournament("abcd", (10, 20, 40), 2, engine)
    assert engine.asked == [(tuple("abcd"), 10), (("a", "b"), 20), (("b",), 40)]
    assert fates(tournament) == {
        "a": ("failed", 2),
        "b": ("kept", 3),
        "c": ("failed", 1),
        "d": ("dropped", 1),
    }
    assert tournament.fates["a"].reason == "the loss was no longer finite at step 14"
    assert tournament.fates["c"].reason == "its held-out loss after 10 steps is not finite"
    assert math.isnan(tournament.fates["c"].loss)
    assert tournament.cost == 20 + 40 + 10 + 10


def test_nobody_is_left_and_the_engine_rests() -> None:
    engine = Engine({"a": "broken", "b": "broken too"})
    tournament = run_tournament("ab", (10, 20), 2, engine)
    assert len(engine.asked) == 1
    assert tournament.survivors == ()
    assert tournament.cost == 20


def test_pictures_decide_between_those_who_tie_from_the_second_rung_on() -> None:
    # e ties at the first rung, where nothing is drawn yet
    levels = {"a": 1.0, "b": 2.0, "c": 2.0, "d": 2.0, "e": 2.0, "f": 3.0, "g": 9.0, "h": 9.0}
    engine = Engine({name: losses(level) for name, level in levels.items()})
    skill = {"c": 0.3, "d": 0.2, "e": 0.3}
    asked = []

    def draw(names: Sequence[str], steps: int) -> dict[str, NDArray[np.float64]]:
        asked.append((tuple(names), steps))
        return {name: skill[name] * ROWS for name in names}

    tournament = run_tournament("abcdefgh", (10, 20, 40), 2, engine, clip_scores=draw)
    assert asked == [(("c", "d", "e"), 20)]
    assert tournament.survivors == ("a", "b", "c", "e")
    lack = paired_difference(0.3 * ROWS, 0.2 * ROWS)
    assert tournament.fates["d"].reason == (
        f"at rung 2 of 3, 20 steps: tied on loss with the last survivor, its CLIP score is lower by {lack}"
    )
    second = {verdict.name: verdict.clip for verdict in tournament.verdicts if verdict.rung == 2}
    assert second["c"] == pytest.approx(0.3 * ROWS.mean())
    assert math.isnan(second["a"])


def test_impossible_tournaments_are_refused() -> None:
    engine = Engine({"a": losses(1), "b": losses(2)})
    for names, at, eta, more, match in (
        ("aa", (10,), 2, {}, "one name"),
        ("ab", (10,), 2, {"keep": ("z",)}, "keep 'z'"),
        ("ab", (20, 10), 2, {}, r"rungs \[20, 10\]"),
        ("ab", (), 2, {}, r"rungs \[\]"),
        ("ab", (10,), 0, {}, "eta = 0"),
        ("ab", (10,), 2, {"most": 0}, "most = 0"),
    ):
        with pytest.raises(ConfigError, match=match):
            run_tournament(names, at, eta, engine, **more)  # type: ignore[arg-type]
    assert engine.asked == []
    with pytest.raises(DataError, match="held-out loss of b after 10 steps"):
        run_tournament("ab", (10,), 2, lambda names, steps: {"a": losses(1)})


def test_the_table_keeps_its_columns_and_survives_a_csv(tmp_path: Path) -> None:
    known: dict[str, HeldoutLosses] = {
        "a": losses(1),
        "b": losses(1),
        "c": losses(3),
        "d": "no memory",
        "x": losses(4),
    }
    tournament = run_tournament(
        "abcdx",
        (10, 20, 40),
        2,
        Engine(known),
        keep="x",
        clip_scores=lambda names, _: dict.fromkeys(names, ROWS),
    )
    frame = tournament.frame()
    assert tuple(frame.columns) == TOURNAMENT_COLUMNS
    assert " ".join(TOURNAMENT_COLUMNS) == (
        "rung steps name loss clip place fate tied against difference low high reason"
    )
    write_frame(tmp_path / "tournament.csv", frame)
    again = tournament_from_frame(pd.read_csv(tmp_path / "tournament.csv"))
    pd.testing.assert_frame_equal(again.frame(), frame)
    assert (again.survivors, again.cost, again.full_cost) == (
        tournament.survivors,
        tournament.cost,
        tournament.full_cost,
    )
    with pytest.raises(DataError, match="'fate'"):
        tournament_from_frame(frame.drop(columns="fate"))


# The tournament in general ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Game:
    names: tuple[str, ...]
    steps: tuple[int, ...]
    eta: int
    most: int
    keep: tuple[str, ...]
    known: dict[str, dict[int, HeldoutLosses]]


@st.composite
def games(draw: st.DrawFn) -> Game:
    names = tuple("abcdefghi"[: draw(st.integers(1, 9))])
    steps = (10, 20, 40, 80)[: draw(st.integers(1, 4))]
    noise = draw(st.sampled_from([0.0, 0.02, 0.3]))
    known: dict[str, dict[int, HeldoutLosses]] = {}
    for i, name in enumerate(names):
        known[name] = {}
        for step in steps:
            level = draw(st.sampled_from([1.0, 1.0, 1.1, 1.5, 2.0, math.nan, math.inf, 0.0]))
            known[name][step] = losses(level, noise, seed=1000 * i + step) if level else "it broke"
    keep = draw(st.sets(st.sampled_from(names)))
    return Game(names, steps, draw(st.integers(1, 4)), draw(st.integers(1, 3)), tuple(sorted(keep)), known)


@given(games())
@settings(deadline=None, max_examples=150)
def test_everyone_has_one_fate_and_nothing_is_wasted(game: Game) -> None:
    engine = Engine(game.known)

    def run(engine: Engine) -> Tournament:
        return run_tournament(game.names, game.steps, game.eta, engine, keep=game.keep, most=game.most)

    tournament = run(engine)
    pd.testing.assert_frame_equal(run(Engine(game.known)).frame(), tournament.frame())
    assert tuple(tournament.fates) == game.names

    # the engine is asked rung by rung, about all who are in and nobody else
    assert [steps for _, steps in engine.asked] == list(game.steps[: len(engine.asked)])
    going = set(game.names)
    taken, before = 0, 0
    for rung, (asked, steps) in enumerate(engine.asked, start=1):
        assert set(asked) == going
        taken += len(asked) * (steps - before)
        before = steps
        verdicts = [one for one in tournament.verdicts if one.rung == rung]
        assert {one.name for one in verdicts} == going
        assert len(verdicts) == len(going)
        going = {one.name for one in verdicts if one.kept}

        whole = [one for one in verdicts if one.fate != "failed"]
        assert [one.loss for one in whole] == sorted(one.loss for one in whole)
        for one in verdicts:
            answer = game.known[one.name][steps]
            usable = not isinstance(answer, str) and bool(np.isfinite(answer).all())
            assert (one.fate == "failed") == (not usable)
            assert one.reason or one.kept
        assert all(one.kept for one in whole if one.name in game.keep)
        rivals = [one for one in whole if one.name not in game.keep]
        kept = [one for one in rivals if one.kept]
        if rung == len(game.steps):
            assert kept == rivals
        elif rivals:
            quota = math.ceil(len(rivals) / game.eta)
            assert kept[:quota] == rivals[:quota]
            assert quota <= len(kept) <= game.most * quota
            assert all(one.tied for one in kept[quota:])
            # whoever ties is dropped only for want of room
            assert len(kept) == game.most * quota or not any(one.tied for one in rivals if not one.kept)
    assert tournament.cost == taken <= tournament.full_cost
    assert set(tournament.survivors) == (going if len(engine.asked) == len(game.steps) else set())


@given(games())
@settings(deadline=None, max_examples=50)
def test_with_everyone_kept_it_is_the_order_at_the_end(game: Game) -> None:
    known = {name: {step: losses(ord(name), 0.1, ord(name)) for step in game.steps} for name in game.names}
    tournament = run_tournament(game.names, game.steps, 1, Engine(known))
    last = {name: float(np.mean(known[name][game.steps[-1]])) for name in game.names}
    assert tournament.survivors == tuple(sorted(game.names, key=last.__getitem__))
    assert tournament.cost == tournament.full_cost
    assert {verdict.fate for verdict in tournament.verdicts} == {"kept"}
