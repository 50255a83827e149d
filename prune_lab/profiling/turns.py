"""Timing in turns: what is compared is timed in the same rounds, so a busy minute changes no result.

A machine is faster at one moment than at another. Timed one after the other, two calls differ by that too. In turns
each round times every call once, and a call is compared with the first of its own round: whatever slows the whole
round cancels out of the ratio, and the median over the rounds ignores those in which the machine changed half-way.

The order within a round is drawn anew each time. In a fixed order A B A B every call has the same predecessor, whose
data it finds in the caches, and something that disturbs the machine at regular intervals can meet the same call each
time; both would look like a difference. Drawn, they are noise, which the interval shows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd

from prune_lab.errors import DataError
from prune_lab.profiling.latency import Latency, check_runs, latency_of
from prune_lab.runtime import track
from prune_lab.schemas import ROUNDS_COLUMNS

Processes = Literal["one process", "own processes"]
Verdict = Literal["faster", "slower", "undecided"]
TimedCall = Callable[[], float]  # does the work once and gives its milliseconds

LEVEL = 0.95  # of every interval in here
LEAST_ROUNDS = 6  # fewer values have no interval for their median at this level


# Intervals -------------------------------------------------------------------------------------------------


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """(low, high): two of the ``values`` between which the median of what they were drawn from lies, at ``LEVEL``.

    The k-th smallest and the k-th largest, with the largest k that keeps the level: the true median is outside only if
    fewer than k of n fair coins fall on one side. Nothing is assumed of the distribution. None for fewer than six.
    """
    ordered, n = sorted(values), len(values)
    outside, k = 0.0, 0
    while k < n and outside + math.comb(n, k) / 2**n <= (1 - LEVEL) / 2:
        outside += math.comb(n, k) / 2**n
        k += 1
    return None if k == 0 else (ordered[k - 1], ordered[n - k])


@dataclass(frozen=True, slots=True)
class Change:
    """How much longer a call takes than the one it is compared with, as a fraction; below zero it is faster.

    The median of the ratios of paired times, less one, with its 95 % interval; no interval where there are fewer than
    six pairs.
    """

    change: float
    low: float | None
    high: float | None
    rounds: int

    @property
    def verdict(self) -> Verdict:
        """Faster or slower where the interval says so; undecided where it contains no change, or is not known."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "undecided"
        return "faster" if self.high < 0 else "slower"

    @property
    def half_width(self) -> float:
        """Half the width of the interval; infinite where it is not known."""
        return math.inf if self.low is None or self.high is None else (self.high - self.low) / 2


def change_of(times: Sequence[float], others: Sequence[float]) -> Change:
    """How ``times`` relate to ``others``, pair by pair."""
    changes = [mine / other - 1 for mine, other in zip(times, others, strict=True)]
    low, high = median_interval(changes) or (None, None)
    return Change(statistics.median(changes), low, high, len(changes))


# Turns -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ComparedLatency:
    """The time of a call by itself, how it compares with the first call of its rounds, and where both were made."""

    latency: Latency
    change: Change
    processes: Processes

    @property
    def timed(self) -> str:
        """How it was timed, for a table: ``in turns, one process``."""
        return f"in turns, {self.processes}"

    def columns(self) -> dict[str, object]:
        """Its cells of REDUCTION_LATENCY_COLUMNS, by name."""
        own = {name: getattr(self.latency, name) for name in ("median_ms", "p10_ms", "p90_ms", "runs")}
        return own | {
            "latency_change": self.change.change,
            "latency_low": self.change.low,
            "latency_high": self.change.high,
            "latency_verdict": self.change.verdict,
            "timed": self.timed,
        }


@dataclass(frozen=True, slots=True)
class Turns:
    """Milliseconds of several calls that were timed in turns; the first is what the others are compared with."""

    names: tuple[str, ...]
    times: tuple[tuple[float, ...], ...]  # by round, in order of the names
    warmup: int
    processes: Processes

    def of(self, name: str) -> tuple[float, ...]:
        """Milliseconds of the call ``name``, round by round."""
        place = self.names.index(name)
        return tuple(row[place] for row in self.times)

    def latency(self, name: str) -> Latency:
        """The time of the call ``name`` by itself."""
        return latency_of(self.of(name), self.warmup)

    def change(self, name: str) -> Change:
        """How the call ``name`` compares with the first, by the ratios within each round."""
        return change_of(self.of(name), self.of(self.names[0]))

    def compared(self) -> dict[str, ComparedLatency]:
        """All calls by name, the first, which is compared with itself, too."""
        return {
            name: ComparedLatency(self.latency(name), self.change(name), self.processes)
            for name in self.names
        }

    @property
    def half_width(self) -> float:
        """Half the width of the widest interval of a change."""
        return max((self.change(name).half_width for name in self.names[1:]), default=0.0)

    def frame(self) -> pd.DataFrame:
        """One row per round and call, columns ROUNDS_COLUMNS without the first."""
        rows = [
            (number, name, milliseconds, self.warmup, self.processes)
            for number, row in enumerate(self.times, 1)
            for name, milliseconds in zip(self.names, row, strict=True)
        ]
        return pd.DataFrame(rows, columns=list(ROUNDS_COLUMNS[1:]))


def turns_of_frame(frame: pd.DataFrame) -> Turns:
    """The turns that ``Turns.frame`` gave. Raises DataError when a column or a time is missing."""
    try:
        names = tuple(dict.fromkeys(map(str, frame["name"])))
        table = frame.pivot(index="round", columns="name", values="milliseconds")[list(names)]
        (warmup,), (processes,) = frame["warmup"].unique(), frame["processes"].unique()
    except (KeyError, ValueError) as error:
        raise DataError(
            f"asked to read times of rounds, found {error} wrong in them; time them again"
        ) from None
    if table.isna().any(axis=None) or len(table) < 2 or processes not in get_args(Processes):
        raise DataError("asked to read times of rounds, found some missing; time them again")
    times = tuple(tuple(map(float, row)) for row in table.to_numpy())
    return Turns(names, times, int(warmup), processes)


def time_in_turns(
    calls: Mapping[str, TimedCall],
    *,
    rounds: int = 20,
    warmup: int = 3,
    seed: int = 0,
    mark: float | None = None,
    processes: Processes = "one process",
) -> Turns:
    """The times of all ``calls`` in the same rounds, after ``warmup`` calls of each that are not recorded.

    Each round calls every one once, in an order drawn from ``seed``. With ``mark`` it ends as soon as no interval of a
    change is wider than ``mark`` to either side of its middle, at the latest after ``rounds``. ``processes`` is noted
    in the result: where the calls do their work. Raises ConfigError for fewer than two rounds.
    """
    check_runs(rounds, warmup)
    names, generator = tuple(calls), np.random.default_rng(seed)
    for call in calls.values():
        for _ in range(warmup):
            call()
    times: list[tuple[float, ...]] = []
    for _ in track(range(rounds), "timing in turns"):
        took = {names[place]: calls[names[place]]() for place in generator.permutation(len(names))}
        times.append(tuple(took[name] for name in names))
        found = Turns(names, tuple(times), warmup, processes)
        if mark is not None and found.half_width <= mark:
            break
    return found
