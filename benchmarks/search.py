"""How long the exact search takes, against trying every native plan, both in this process.

    python -m benchmarks.search

The impacts are drawn from a seed, log-uniform from 1e-4 to 1: only the time is measured here, and that all searches
find the same impact. Brute force comes in two forms: a loop adds up and compares plan after plan, NumPy adds up all
plans at once, which wins while the space is this small and fits in memory. The solver is there for what multiplies
the space: more levels, cuts and constraints.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

import prune_lab.search as engine
from prune_lab.blocks import Architecture, BlockGroup, architecture_of
from prune_lab.importance import Importance, ImportanceTable
from prune_lab.models import preset_config
from prune_lab.plans import PruningPlan, native_choices, plan_of
from prune_lab.profiling import CostTable, cost_table
from prune_lab.search import Budget, parse_budget, predicted_impact

MODELS = ("sd-v1.4", "sdxl-base")
BUDGETS = ("params<=68%", "params<=57%", "macs<=66%")
MOST_PLANS = 5_000_000  # beyond this the loop takes minutes

Answer = TypeVar("Answer")


def timed(call: Callable[[], Answer], repeats: int = 1) -> tuple[Answer, float]:
    """The last answer of ``call`` and the least time it took, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        answer = call()
        times.append(time.perf_counter() - start)
    return answer, min(times)


def random_importance(architecture: Architecture, seed: int) -> ImportanceTable:
    """Impacts from 1e-4 to 1, drawn from ``seed``."""
    exponents = np.random.default_rng(seed).uniform(-4, 0, size=len(architecture.blocks))
    entries = tuple(
        Importance(BlockGroup(block.name, "block", (block.name,)), impact, impact, impact, 1)
        for block, impact in zip(architecture.blocks, (10.0**exponents).tolist(), strict=True)
    )
    return ImportanceTable(entries, criterion="output-mse", probe="", model=architecture.signature)


class BruteForce:
    """Every native plan of an architecture, as one option per level with its impact and cost."""

    def __init__(self, architecture: Architecture, importance: ImportanceTable, costs: CostTable) -> None:
        self.architecture = architecture
        self.levels = native_choices(architecture)
        plans = [[plan_of(architecture, blocks) for blocks in level] for level in self.levels]
        self.impacts = [[predicted_impact(plan, importance) for plan in level] for level in plans]
        self.prices = [[costs.of(plan) for plan in level] for level in plans]
        self.total = costs.total

    def _savings(self, budget: Budget) -> list[list[int]]:
        whole = getattr(self.total, budget.metric)
        return [[whole - getattr(price, budget.metric) for price in level] for level in self.prices]

    def _plan(self, choice: tuple[int, ...]) -> PruningPlan:
        chosen = (level[option] for level, option in zip(self.levels, choice, strict=True))
        return plan_of(self.architecture, frozenset().union(*chosen))

    def plain(self, budget: Budget) -> PruningPlan:
        """The best plan, by looking at every one."""
        needed = getattr(self.total, budget.metric) - budget.limit
        options = [
            list(zip(range(len(level)), level, saved, strict=True))
            for level, saved in zip(self.impacts, self._savings(budget), strict=True)
        ]
        best, least = (), float("inf")
        for combination in itertools.product(*options):
            if sum(saved for _, _, saved in combination) >= needed:
                impact = sum(impact for _, impact, _ in combination)
                if impact < least:
                    best, least = tuple(option for option, _, _ in combination), impact
        return self._plan(best)

    def vectorised(self, budget: Budget) -> PruningPlan:
        """The best plan, by adding up all of them at once."""
        needed = getattr(self.total, budget.metric) - budget.limit
        impacts = functools.reduce(np.add.outer, [np.array(level) for level in self.impacts])
        saved = functools.reduce(np.add.outer, [np.array(level) for level in self._savings(budget)])
        impacts[saved < needed] = np.inf
        return self._plan(np.unravel_index(int(impacts.argmin()), impacts.shape))


@contextlib.contextmanager
def solver_clock() -> Iterator[list[float]]:
    """The seconds of every call of HiGHS inside the context."""
    seconds: list[float] = []
    solver = engine.milp

    def clocked(*given: object, **named: object) -> object:
        start = time.perf_counter()
        try:
            return solver(*given, **named)
        finally:
            seconds.append(time.perf_counter() - start)

    engine.milp = clocked
    try:
        yield seconds
    finally:
        engine.milp = solver


def compare(
    architecture: Architecture, costs: CostTable, importance: ImportanceTable, text: str
) -> list[str]:
    """One line of the table: all three searches for one budget, which must agree."""
    budget = parse_budget(text, architecture, costs)
    search = functools.partial(engine.search_plans, architecture, importance, costs, [budget])
    (found,), searched = timed(search, repeats=5)
    with solver_clock() as solves:
        search()
    # Pricing the options is part of the search, so it is added to both brute forces.
    brute, priced = timed(functools.partial(BruteForce, architecture, importance, costs), repeats=3)
    count = math.prod(len(level) for level in brute.levels)
    assert count <= MOST_PLANS, f"{count:,} plans are too many to try"
    by_numpy, at_once = timed(functools.partial(brute.vectorised, budget), repeats=5)
    by_loop, one_by_one = timed(functools.partial(brute.plain, budget), repeats=2)
    for other in (by_numpy, by_loop):
        assert abs(predicted_impact(found, importance) - predicted_impact(other, importance)) < 1e-9
    times = [searched, sum(solves), priced + one_by_one, priced + at_once]
    ratios = [f"{(priced + brute_force) / searched:.2f}x" for brute_force in (one_by_one, at_once)]
    return [text, f"{count:,}", *(f"{1e3 * seconds:.1f}" for seconds in times), *ratios]


def main() -> None:
    """Print the table, in milliseconds."""
    columns = ("budget", "plans", "search", "of it HiGHS", "loop", "NumPy", "loop/search", "NumPy/search")
    for model in MODELS:
        architecture = architecture_of(preset_config(model))
        costs = cost_table(architecture, counter="meta")
        importance = random_importance(architecture, seed=0)
        _, listed = timed(functools.partial(native_choices, architecture))
        print(f"\n{model}: listing what can leave natively took {1e3 * listed:.0f} ms, once per architecture")
        print("".join(f"{column:>14}" for column in columns))
        for text in BUDGETS:
            print("".join(f"{cell:>14}" for cell in compare(architecture, costs, importance, text)))
    print(
        "\nMilliseconds, least of several runs; all three price the options first and found the same impact."
    )


if __name__ == "__main__":
    main()
