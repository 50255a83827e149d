"""How long the exact search takes, against trying every native plan, both in this process.

    python -m benchmarks.search

The impacts are drawn from a seed, log-uniform from 1e-4 to 1: only the time is measured here, and that all searches
find the same impact. Brute force comes in two forms: a loop adds up and compares plan after plan, NumPy adds up all
plans at once, which wins while the space is this small and fits in memory. The solver is there for what multiplies
the space: any plan and not only native ones (2^34 for SD-v1.4), cuts, constraints and pairs; a second table has the
seconds inside HiGHS for these, where there is no brute force to compare with. Last, the exact answer and brute force
on random small networks with random rules: how often they agree.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import TypeVar
from unittest import mock

import numpy as np
from scipy.optimize import milp

import prune_lab.search.program as engine
from prune_lab.blocks import Architecture, BlockGroup, architecture_of
from prune_lab.errors import BudgetError
from prune_lab.importance import Importance, ImportanceTable
from prune_lab.models import preset_config
from prune_lab.plans import PruningPlan, native_choices, plan_of
from prune_lab.profiling import CostTable, cost_table
from prune_lab.search import (
    ANY_PLAN,
    Budget,
    Constraints,
    Effects,
    Quota,
    parse_budget,
    predicted_impact,
    search_plans,
)

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
        best: tuple[int, ...] = ()
        least = float("inf")
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
        best = np.unravel_index(int(impacts.argmin()), impacts.shape)
        return self._plan(tuple(int(option) for option in best))


@contextlib.contextmanager
def solver_clock() -> Iterator[list[float]]:
    """The seconds of every call of HiGHS inside the context."""
    seconds: list[float] = []

    def clocked(*given: object, **named: object) -> object:
        start = time.perf_counter()
        try:
            return milp(*given, **named)
        finally:
            seconds.append(time.perf_counter() - start)

    with mock.patch.object(engine, "milp", clocked):
        yield seconds


def compare(
    architecture: Architecture, costs: CostTable, importance: ImportanceTable, text: str
) -> list[str]:
    """One line of the table: all three searches for one budget, which must agree."""
    budget = parse_budget(text, architecture, costs)
    search = functools.partial(search_plans, architecture, importance, costs, [budget])
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


def random_effects(architecture: Architecture, seed: int, pairs: int = 0) -> Effects:
    """Impacts as in ``random_importance``, and so many pairs of effects around 0.1."""
    generator = np.random.default_rng(seed)
    names = [block.name for block in architecture.blocks if block.removable]
    chosen = [frozenset(generator.choice(names, 2, replace=False).tolist()) for _ in range(pairs)]
    interactions = {
        pair: float(effect) for pair, effect in zip(chosen, generator.normal(0, 0.1, pairs), strict=True)
    }
    return Effects(random_importance(architecture, seed).block_impacts(), interactions)


def solver_lines(architecture: Architecture, costs: CostTable, draws: int = 5) -> Iterator[list[str]]:
    """Lines of the second table: seconds of HiGHS for the optimum, ties included, over ``draws`` random scores."""
    quotas = tuple(Quota(stage, 3) for stage in architecture.stages)
    kinds = {
        "native": (Constraints(), 0),
        "native, 30 pairs": (Constraints(), 30),
        "any": (ANY_PLAN, 0),
        "any, 30 pairs": (ANY_PLAN, 30),
        "any, all rules": (Constraints(least_resnets=1, quotas=quotas, longest_run=4, form="own"), 0),
    }
    for kind, (constraints, pairs) in kinds.items():
        for text in BUDGETS:
            budget, seconds = parse_budget(text, architecture, costs), []
            for seed in range(draws):
                effects = random_effects(architecture, seed, pairs)
                with solver_clock() as solves:
                    search_plans(architecture, effects, costs, [budget], constraints=constraints)
                seconds.append(sum(solves))
            yield [kind, text, f"{1e3 * float(np.median(seconds)):.1f}", f"{1e3 * max(seconds):.1f}"]


# One width throughout: 12 blocks, all removable, the inner stages with their samplers too.
SMALL = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}


def agreement(instances: int = 100) -> tuple[int, int]:
    """(agreed, instances): random scores with pairs, budgets and rules, solved exactly and by trying all 4096 plans."""
    architecture = architecture_of(SMALL)
    costs = cost_table(architecture)
    names = [block.name for block in architecture.blocks]
    plans = [
        plan_of(architecture, itertools.compress(names, bits))
        for bits in itertools.product([0, 1], repeat=len(names))
    ]
    prices = [costs.of(plan) for plan in plans]
    native = {frozenset().union(*choice) for choice in itertools.product(*native_choices(architecture))}
    generator, agreed = np.random.default_rng(0), 0
    for seed in range(instances):
        effects = random_effects(architecture, seed, pairs=6)
        rules = Constraints(longest_run=int(generator.integers(2, 7)), form="native" if seed % 2 else "own")
        budget = parse_budget(f"macs<={generator.integers(40, 95)}%", architecture, costs)
        limits = rules.limits(architecture)
        least = min(
            (
                effects.of(plan.removed)
                for plan, price in zip(plans, prices, strict=True)
                if budget.allows(price)
                and all(limit.allows(plan.removed) for limit in limits)
                and (rules.form != "native" or frozenset(plan.removed) in native)
            ),
            default=None,
        )
        try:
            (found,) = search_plans(architecture, effects, costs, [budget], constraints=rules)
        except BudgetError:
            agreed += least is None
        else:
            agreed += least is not None and abs(effects.of(found.removed) - least) < 1e-9
    return agreed, instances


def main() -> None:
    """Print the tables, in milliseconds."""
    columns = ("budget", "plans", "search", "of it HiGHS", "loop", "NumPy", "loop/search", "NumPy/search")
    for model in MODELS:
        architecture = architecture_of(preset_config(model))
        costs = cost_table(architecture)
        importance = random_importance(architecture, seed=0)
        _, listed = timed(functools.partial(native_choices, architecture))
        print(f"\n{model}: listing what can leave natively took {1e3 * listed:.0f} ms, once per architecture")
        print("".join(f"{column:>14}" for column in columns))
        for text in BUDGETS:
            print("".join(f"{cell:>14}" for cell in compare(architecture, costs, importance, text)))
        print(f"\n{'plans':>18}{'budget':>14}{'HiGHS median':>14}{'HiGHS most':>14}")
        for kind, *cells in solver_lines(architecture, costs):
            print(f"{kind:>18}" + "".join(f"{cell:>14}" for cell in cells))
    print(
        "\nMilliseconds: above least of several runs, all three price the options first and found the same impact; "
        "below over five random scores."
    )
    print("exact and brute force agreed on {} of {} random small instances".format(*agreement()))


if __name__ == "__main__":
    main()
