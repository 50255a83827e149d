"""Timing in turns: scripted durations, intervals counted by hand, and child processes that wait for their turn."""

from __future__ import annotations

import io
import json
import random
import weakref
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune_lab.blocks import Architecture, architecture_of
from prune_lab.errors import ConfigError, DataError, DeviceError, NonNativePlanError
from prune_lab.plans import parse_plan
from prune_lab.profiling import Service, fits_into_one_process, own_process, random_model, time_plans
from prune_lab.profiling.own_process import TimingProcess
from prune_lab.profiling.turns import Change, change_of, median_interval, time_in_turns, turns_of_frame

# Intervals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "k"),
    # By the table of the sign test: the largest k with 2 P(X < k) <= 0.05 for n fair coins.
    [(5, 0), (6, 1), (8, 1), (9, 2), (12, 3), (20, 6), (25, 8)],
)
def test_the_interval_of_a_median_by_the_sign_test(n: int, k: int) -> None:
    values = [float(value) for value in range(1, n + 1)]
    random.Random(0).shuffle(values)
    assert median_interval(values) == (None if k == 0 else (k, n - k + 1))


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    drawn = random.Random(1)
    found = [median_interval([drawn.gauss(3, 1) for _ in range(12)]) for _ in range(20_000)]
    share = sum(low < 3 < high for low, high in filter(None, found)) / len(found)
    assert share == pytest.approx(0.961, abs=0.005)  # exactly 1 - 2 (1 + 12 + 66) / 4096 = 0.961


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (-0.3, -0.1, "faster"),
        (0.1, 0.2, "slower"),
        (-0.1, 0.1, "undecided"),
        (-0.1, 0.0, "undecided"),
        (None, None, "undecided"),
    ],
)
def test_verdicts(low: float | None, high: float | None, wanted: str) -> None:
    assert Change(-0.05, low, high, 9).verdict == wanted


@given(st.lists(st.floats(0.1, 10), min_size=6, max_size=30), st.floats(0.1, 10))
def test_a_machine_that_changes_between_rounds_changes_nothing(speeds: list[float], ratio: float) -> None:
    found = change_of([ratio * speed for speed in speeds], speeds)
    assert found.change == pytest.approx(ratio - 1)
    assert (found.low, found.high) == (pytest.approx(ratio - 1),) * 2


# Turns -----------------------------------------------------------------------------------------------------


class Machine:
    """A machine on which calls take as long as they are told to, times its slowness at that moment."""

    def __init__(self, slowness: Callable[[int], float] = lambda call: 1.0) -> None:
        self.slowness = slowness
        self.order: list[str] = []

    def call(self, name: str, milliseconds: float) -> Callable[[], float]:
        def timed() -> float:
            self.order.append(name)
            return milliseconds * self.slowness(len(self.order))

        return timed


def test_a_slow_minute_in_the_middle_changes_nothing() -> None:
    # Timed one after the other, ten calls each, the teacher would have had all of the slow minute.
    slow = Machine(lambda call: 5.0 if 12 < call <= 33 else 1.0)
    turns = time_in_turns(
        {"teacher": slow.call("teacher", 40), "student": slow.call("student", 30)}, warmup=0
    )
    change = turns.change("student")
    assert (change.change, change.low, change.high) == (pytest.approx(-0.25),) * 3
    assert (change.rounds, change.verdict) == (20, "faster")
    assert turns.latency("teacher").p90_ms == pytest.approx(200)  # the minute is seen in the times themselves


def test_noise_leaves_it_undecided() -> None:
    drawn = random.Random(3)
    noisy = Machine(lambda call: drawn.lognormvariate(0, 0.4))
    turns = time_in_turns({"a": noisy.call("a", 40), "b": noisy.call("b", 39.9)}, rounds=12)
    assert turns.change("b").verdict == "undecided"
    few = time_in_turns({"a": Machine().call("a", 40), "b": Machine().call("b", 20)}, rounds=5)
    change = few.change("b")
    assert (change.change, change.low, change.verdict) == (-0.5, None, "undecided")  # too few for an interval


def test_every_round_calls_each_once_in_an_order_of_its_own() -> None:
    machine = Machine()
    calls = {name: machine.call(name, 1) for name in "abc"}
    turns = time_in_turns(calls, rounds=12, warmup=2, seed=4)
    assert machine.order[:6] == list("aabbcc")
    rounds = [tuple(machine.order[start : start + 3]) for start in range(6, len(machine.order), 3)]
    assert len(rounds) == 12
    assert all(sorted(order) == list("abc") for order in rounds)
    assert len(set(rounds)) > 3
    assert (turns.names, turns.warmup, turns.processes) == (("a", "b", "c"), 2, "one process")
    with pytest.raises(ConfigError, match="at least 2"):
        time_in_turns(calls, rounds=1)


def test_it_stops_when_the_intervals_are_narrow_enough() -> None:
    drawn = random.Random(0)

    def rounds_needed(noise: float) -> int:
        machine = Machine(lambda call: drawn.uniform(1 - noise, 1 + noise))
        calls = {"a": machine.call("a", 40), "b": machine.call("b", 30), "c": machine.call("c", 20)}
        return len(time_in_turns(calls, rounds=60, mark=0.01).times)

    assert rounds_needed(0.0) == 6
    assert 6 < rounds_needed(0.03) < 60
    assert rounds_needed(0.5) == 60


def test_turns_are_written_and_read_back() -> None:
    machine = Machine(lambda call: 1 + call / 7)
    turns = time_in_turns({"teacher": machine.call("t", 40), "12e4": machine.call("s", 30)}, rounds=3)
    frame = turns.frame()
    assert turns_of_frame(frame) == turns
    for damaged in (frame.drop(columns="round"), frame[:-1], frame[:2], pd.concat([frame, frame])):
        with pytest.raises(DataError, match="time them again"):
            turns_of_frame(damaged)


# U-Nets in turns -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tiny_unet_shared: Any) -> Architecture:
    return architecture_of(tiny_unet_shared)


def test_plans_in_one_process_share_their_weights_and_leave_the_unet_alone(tiny_unet: Any) -> None:
    architecture, service = architecture_of(tiny_unet), Service(latent=8, tokens=5)
    plans = {name: parse_plan(name, architecture) for name in ("bk-base", "bk-tiny")}
    before = {path: id(module) for path, module in tiny_unet.train().named_modules()}
    tensors = {name: tensor.data_ptr() for name, tensor in tiny_unet.state_dict().items()}
    turns = time_plans(architecture, plans, service, rounds=6, warmup=1, model=tiny_unet)
    assert turns.names == ("teacher", "bk-base", "bk-tiny")
    assert turns.processes == "one process"
    assert {path: id(module) for path, module in tiny_unet.named_modules()} == before
    assert {name: tensor.data_ptr() for name, tensor in tiny_unet.state_dict().items()} == tensors
    assert tiny_unet.training
    assert all(milliseconds > 0 for row in turns.times for milliseconds in row)
    with pytest.raises(NonNativePlanError):
        time_plans(architecture, {"wild": parse_plan("-Dn1.A1", architecture)}, service)


def test_what_does_not_fit_is_foretold(tiny: Architecture) -> None:
    weights = 4 * tiny.total_params
    assert fits_into_one_process(tiny, Service(latent=8), free=1 << 40)
    assert not fits_into_one_process(tiny, Service(latent=8), free=weights)
    assert fits_into_one_process(tiny, Service(latent=8), free=weights, loaded=True)
    assert not fits_into_one_process(
        tiny, Service(latent=64, batch=64), free=2 * weights
    )  # activations count


def test_a_process_answers_turn_by_turn_and_lets_the_weights_go(
    tiny: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    seen: list[int] = []

    def watched(*arguments: Any, **settings: Any) -> Any:
        seen.append(sum(one() is not None for one in alive))
        unet = random_model(*arguments, **settings)
        alive.append(weakref.ref(unet))
        return unet

    monkeypatch.setattr("prune_lab.profiling.random_weights.random_model", watched)
    process = TimingProcess(tiny.config, Service(latent=8, tokens=5), warmup=1, seed=0, calls=2)
    orders, answers = io.StringIO(json.dumps(process._job) + "\nturn\nturn\n\nturn\n"), io.StringIO()
    own_process._serve(orders, answers)
    found = [json.loads(line) for line in answers.getvalue().splitlines()]
    told = ["milliseconds", "cpu_milliseconds", "peak_bytes"]
    assert [list(answer) for answer in found] == [told] * 2  # the empty line ended it
    assert all(answer["milliseconds"] > 0 for answer in found)
    assert seen == [0, 0]
    broken = json.dumps({**process._job, "config": {**process._job["config"], "in_channels": "many"}})
    answers = io.StringIO()
    own_process._serve(io.StringIO(f"{broken}\nturn\nturn\n"), answers)
    assert [list(json.loads(line)) for line in answers.getvalue().splitlines()] == [["error"]] * 2


@pytest.mark.long
def test_what_does_not_fit_takes_turns_in_processes_of_its_own(
    tiny: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prune_lab.profiling.timed_plans.free_bytes", lambda device: 2 * tiny.total_params)
    plans = {"bk-tiny": parse_plan("bk-tiny", tiny)}
    turns = time_plans(tiny, plans, Service(latent=8, tokens=5), rounds=2, warmup=0)
    assert turns.compared()["bk-tiny"].timed == "in turns, own processes"
    assert all(milliseconds > 0 for row in turns.times for milliseconds in row)


@pytest.mark.long
def test_a_process_of_its_own_says_what_failed_and_ends(tiny: Architecture) -> None:
    with TimingProcess({**tiny.config, "in_channels": "many"}, Service(), warmup=0, seed=0) as process:
        child = process._child
        assert child is not None
        with pytest.raises(DeviceError, match="in a process of its own, where it failed"):
            process.turn()
        assert child.poll() is None  # it waits on
        child.kill()
        child.wait()
        with pytest.raises(DeviceError, match="the process ended"):
            process.turn()
    assert process._child is None
