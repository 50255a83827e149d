"""The 0-1 program of a search space, solved by HiGHS (``scipy.optimize.milp``) to gap 0.

One variable z per option of a level, and x_b = sum of the options with block b: 1 when b is gone. What depends on
several blocks being gone together, samplers and interactions, is a product of x's. Within a level it is linear in z;
across levels it is a variable y of its own, y <= x_b for each block and y >= sum x_b - (n - 1). With these

    minimise  sum impact_b x_b + sum impact_ij y_ij
    with      at most one option of each level,   sum saving_b x_b + sum saving_s y_s >= total - limit,
              least <= sum_{b in rule} x_b <= most,   distance(x, x') >= d for every plan x' that is cut off.

The activation memory of a plan is its own peak and no sum. It never grows when more is removed, so a budget on memory
starts as a bound that every plan within it meets (weights and the least peak there is), and each answer over the budget
adds a row: its peak stays as high as long as the blocks that make it stay. The last answer is the best plan of all.

HiGHS computes in floating point, so every answer is priced again exactly, and cut off where it is over a budget.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from prune_lab.errors import DataError
from prune_lab.profiling import ActivationTable, Metric, sampler_groups
from prune_lab.search.budgets import Budget
from prune_lab.search.effects import Effects
from prune_lab.search.space import Removed, Space

_OPTIMAL, _INFEASIBLE = 0, 2  # scipy.optimize.milp's status

# HiGHS stops at an absolute gap of 1e-6: objectives are scaled to this size so that the gap is 1e-10 of the largest.
_SCALE = 1e4
_RESOLUTION = 2e-10  # of the largest effect: impacts closer than this are equal to the solver

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Row:
    """One linear rule over the variables: low <= coefficients @ variables <= high."""

    coefficients: Vector
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class LinearBound:
    """Excludes plans that differ from this one in fewer than ``distance`` blocks."""

    removed: Removed
    distance: int = 1


@dataclass(frozen=True, slots=True)
class Floor:
    """The least that a plan may leave of one cost."""

    metric: Metric
    least: float


class _Peaks:
    """The peaks of activations in one space, which never grow when more is removed."""

    def __init__(self, table: ActivationTable, blocks: Iterable[str]) -> None:
        self.table = table
        self.blocks = tuple(blocks)
        self.highest = table.peak(())
        self.lowest = table.peak(self.blocks)

    @property
    def spread(self) -> int:
        """From the lowest to the highest."""
        return self.highest - self.lowest

    def kept(self, removed: Removed) -> tuple[int, Removed]:
        """The peak without ``removed``, and blocks beside them: as long as these stay, no plan has a lower peak."""
        peak, largest = self.table.peak(removed), set(removed)
        for block in self.blocks:
            if self.table.peak(largest | {block}) >= peak:
                largest.add(block)
        return peak, frozenset(self.blocks) - largest

    def left(self, removed: Removed) -> tuple[int, Removed]:
        """The peak without ``removed``, and blocks among them: once these are gone, no plan has a higher peak."""
        peak, smallest = self.table.peak(removed), set(removed)
        for block in sorted(removed):
            if self.table.peak(smallest - {block}) <= peak:
                smallest.remove(block)
        return peak, frozenset(smallest)


class Program:
    """The variables of one search space with the rules that never change; budgets and cuts come with each question."""

    def __init__(self, space: Space, effects: Effects) -> None:
        self.space = space
        options = [
            (level, option) for level, choices in enumerate(space.levels) for option in choices if option
        ]
        self._options = [option for _, option in options]
        members = sorted(frozenset().union(*self._options)) if options else []
        products = [frozenset(group.blocks) for group in sampler_groups(space.architecture)]
        products += [blocks for blocks, _ in space.costs.together if blocks not in products]
        products += [pair for pair in effects.interactions if pair not in products]
        self._level_of = {block: level for level, option in options for block in option}
        self._products = [blocks for blocks in products if blocks.issubset(members) and self._crosses(blocks)]
        self.size = len(options) + len(self._products)
        self._gone = {
            block: self._over_options([block in option for option in self._options]) for block in members
        }
        self._rows = [*self._one_per_level(options), *self._linked(), *self._limited()]
        impacts = self._impacts(effects)
        largest = float(np.abs(impacts).max(initial=0.0)) or 1.0
        self.objective = impacts * (_SCALE / largest)
        self.resolution = _RESOLUTION * largest

    @functools.cached_property
    def _peaks(self) -> _Peaks:
        assert self.space.costs.activations is not None  # a budget on memory has been read with them
        return _Peaks(self.space.costs.activations, self.blocks)

    # Expressions: vectors over the variables -----------------------------------------------------------------

    def gone(self, block: str) -> Vector:
        """1 when ``block`` is gone."""
        return self._gone.get(block, np.zeros(self.size))

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks that can go, by name."""
        return tuple(self._gone)

    def together(self, blocks: Removed) -> Vector:
        """1 when all of ``blocks`` are gone."""
        if blocks in self._products:
            vector = np.zeros(self.size)
            vector[len(self._options) + self._products.index(blocks)] = 1.0
            return vector
        return self._over_options([blocks <= option for option in self._options])

    def savings(self, metric: Metric) -> Vector:
        """The share of the teacher's cost that is saved, times _SCALE; of memory, what is saved of the weights."""
        column = "weight_bytes" if metric == "memory" else metric
        costs = self.space.costs
        amounts = {part.name: getattr(part, column) for part in (*costs.parts, *costs.layers)}
        saved = np.zeros(self.size)
        for block, gone in self._gone.items():
            saved += amounts[block] * gone
        for group in sampler_groups(self.space.architecture):
            saved += sum(amounts[name] for name in group.samplers) * self.together(frozenset(group.blocks))
        for blocks, part in costs.together:
            saved += getattr(part, column) * self.together(blocks)
        return saved * self._scale(metric)

    def values(self, removed: Removed) -> Vector:
        """The variables when exactly these blocks are gone."""
        parts = {removed & frozenset().union(*level) for level in self.space.levels}
        values = [option in parts for option in self._options]
        return np.concatenate([values, [blocks <= removed for blocks in self._products]]).astype(np.float64)

    def _impacts(self, effects: Effects) -> Vector:
        missing = sorted(block for block in self._gone if block not in effects.impacts)
        if missing:
            raise DataError(
                f"asked for the impact of removing any of {len(self._gone)} blocks, found no score of "
                f"{', '.join(missing)}; score all single blocks of this model first, or keep these"
            )
        impacts = np.zeros(self.size)
        for block, gone in self._gone.items():
            impacts += effects.impacts[block] * gone
        for pair, effect in effects.interactions.items():
            impacts += effect * self.together(pair)
        return impacts

    def _over_options(self, values: Sequence[bool]) -> Vector:
        return np.concatenate([np.array(values, dtype=np.float64), np.zeros(self.size - len(self._options))])

    def _sum(self, blocks: Iterable[str]) -> Vector:
        """How many of ``blocks`` are gone."""
        return sum(map(self.gone, blocks), np.zeros(self.size))

    def _crosses(self, blocks: Iterable[str]) -> bool:
        return len({self._level_of[block] for block in blocks}) > 1

    # Rules ---------------------------------------------------------------------------------------------------

    def _one_per_level(self, options: list[tuple[int, Removed]]) -> list[Row]:
        return [
            Row(self._over_options([of == level for of, _ in options]), 0.0, 1.0)
            for level in range(len(self.space.levels))
        ]

    def _linked(self) -> list[Row]:
        rows = []
        for blocks in self._products:
            y, xs = self.together(blocks), [self.gone(block) for block in sorted(blocks)]
            rows += [Row(y - x, -np.inf, 0.0) for x in xs]
            rows.append(Row(sum(xs, np.zeros(self.size)) - y, -np.inf, len(blocks) - 1.0))
        return rows

    def _limited(self) -> list[Row]:
        return [
            Row(self._sum(limit.blocks) - self._sum(limit.against), limit.least, limit.most)
            for limit in self.space.limits
        ]

    def _scale(self, metric: Metric) -> float:
        return _SCALE / (self._total(metric) or 1.0)

    def _total(self, metric: Metric) -> float:
        return self.space.costs.total.amount(metric)

    def _bounded(self, budget: Budget) -> Row:
        """What every plan within the budget meets, and of memory some others."""
        metric = budget.metric
        most = self._total(metric) - (self._peaks.spread if metric == "memory" else 0) - budget.limit
        return Row(self.savings(metric), most * self._scale(metric), np.inf)

    def _near(self, floor: Floor) -> Row:
        """What every plan that leaves at least ``floor`` meets, and of memory some others."""
        saved = self._total(floor.metric) - floor.least
        return Row(self.savings(floor.metric), -np.inf, saved * self._scale(floor.metric))

    def _distant(self, cut: LinearBound) -> Row:
        change = sum(
            (-gone if block in cut.removed else gone for block, gone in self._gone.items()),
            np.zeros(self.size),
        )
        # Blocks of the plan that are no variables here stay in every other plan: they are distance already.
        return Row(change, cut.distance - len(cut.removed), np.inf)

    # Questions -----------------------------------------------------------------------------------------------

    def including(self, removed: Removed) -> Row:
        """Plans that remove at least these blocks."""
        return Row(sum(map(self.gone, removed), np.zeros(self.size)), len(removed), np.inf)

    def ceiling(self, removed: Removed) -> Row:
        """Plans with no more predicted impact than this one."""
        return Row(self.objective, -np.inf, float(self.objective @ self.values(removed)))

    def least(
        self,
        objective: Vector,
        budgets: Sequence[Budget],
        cuts: Sequence[LinearBound] = (),
        extra: Sequence[Row] = (),
        floors: Sequence[Floor] = (),
    ) -> Removed | None:
        """What to remove for the least ``objective`` within the budgets, or None when nothing meets them.

        A plan that cannot be built, or is over a budget, by its own peak of memory or by less than the solver's
        tolerance, is cut off and the program solved again, so what comes back is within every budget exactly.
        """
        rows = [*self._rows, *map(self._bounded, budgets), *map(self._distant, cuts), *extra]
        rows += map(self._near, floors)
        while True:
            removed = self._solved(objective, rows)
            wrong = [] if removed is None else self._violations(removed, budgets, floors)
            if not wrong:
                return removed
            rows += wrong

    def cheapest(
        self,
        metric: Metric,
        budgets: Sequence[Budget],
        cuts: Sequence[LinearBound] = (),
        extra: Sequence[Row] = (),
    ) -> Removed | None:
        """What to remove to leave the least of ``metric`` within the budgets, or None when nothing meets them."""
        best, fewest = None, -self.savings(metric)
        better = self.least(fewest, budgets, cuts, extra)
        while better is not None:
            best = better
            if metric != "memory":
                break
            # The lightest weights need not have the lowest peak: look for less than that until there is none.
            less = Budget(metric, self.amount(best, metric) - 1, "")
            better = self.least(fewest, [*budgets, less], cuts, extra)
        return best

    def amount(self, removed: Removed, metric: Metric) -> int | float:
        """What is left of ``metric`` without these blocks, exactly."""
        return self.space.costs.of(self.space.plan(removed)).amount(metric)

    def _violations(self, removed: Removed, budgets: Sequence[Budget], floors: Sequence[Floor]) -> list[Row]:
        """Rows that cut these blocks off where nothing is built without them, or that breaks a budget or a floor."""
        if not self.space.can_be_built(removed):
            return [self._distant(LinearBound(removed))]
        cost = self.space.costs.of(self.space.plan(removed))
        over = [budget for budget in budgets if not budget.allows(cost)]
        under = [
            floor for floor in floors if floor.metric == "memory" and cost.amount("memory") < floor.least
        ]
        rows = [self._peak_stays(removed, budget) for budget in over if budget.metric == "memory"]
        rows += [self._peak_sinks(removed, floor) for floor in under]
        return [*rows, self._distant(LinearBound(removed))] if over or under else []

    def _peak_stays(self, removed: Removed, budget: Budget) -> Row:
        """The weights have to do while all blocks stay that make the peak as high as without ``removed``."""
        peak, blocks = self._peaks.kept(removed)
        gone = sum(map(self.gone, blocks), np.zeros(self.size))
        scale = self._scale("memory")
        saved = self._total("memory") - self._peaks.highest + peak - budget.limit
        return Row(
            self.savings("memory") + gone * ((peak - self._peaks.lowest) * scale), saved * scale, np.inf
        )

    def _peak_sinks(self, removed: Removed, floor: Floor) -> Row:
        """The weights have to do once all blocks are gone that make the peak as low as without ``removed``."""
        peak, blocks = self._peaks.left(removed)
        gone = sum(map(self.gone, blocks), np.zeros(self.size))
        scale, drop = self._scale("memory"), self._peaks.highest - peak
        saved = self._total("memory") + (len(blocks) - 1) * drop - floor.least
        return Row(self.savings("memory") + gone * (drop * scale), -np.inf, saved * scale)

    def _solved(self, objective: Vector, rows: Sequence[Row]) -> Removed | None:
        if not self.size:  # nothing can be removed: either that is a plan or there is none
            return frozenset() if all(row.low <= 0 <= row.high for row in rows) else None
        choices = np.arange(self.size) < len(self._options)
        answer = milp(
            objective,
            integrality=choices.astype(np.float64),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(
                np.array([row.coefficients for row in rows]),
                np.array([row.low for row in rows]),
                np.array([row.high for row in rows]),
            ),
            options={"mip_rel_gap": 0.0},
        )
        if answer.status == _INFEASIBLE:
            return None
        if answer.status != _OPTIMAL:
            raise RuntimeError(f"HiGHS stopped without an answer: {answer.message}")
        chosen = [option for option, value in zip(self._options, answer.x, strict=False) if value > 0.5]
        return frozenset().union(*chosen)
