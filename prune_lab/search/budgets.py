"""Budgets: how much of the teacher a plan may leave, and what every part of it costs.

Parameters and multiply-adds are counted and exactly additive over blocks. Latency and memory have to be measured; here
they are prices per part that the caller brings along, additive by assumption (a block's time depends a little on what
runs before it), so a plan within such a budget is one to measure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from types import MappingProxyType
from typing import Literal, TypeAlias, cast, get_args

from prune_lab.blocks import Architecture
from prune_lab.errors import BudgetError, DataError, PruneLabError
from prune_lab.plans import PruningPlan, parse_plan, removed_samplers
from prune_lab.profiling import CostTable, PlanCost

Counted = Literal["params", "macs", "paper_macs"]
Metric = Literal["params", "macs", "paper_macs", "latency_ms", "memory"]
COUNTED: tuple[Counted, ...] = get_args(Counted)
METRICS: tuple[Metric, ...] = get_args(Metric)

_NAMES: Mapping[str, Metric] = {metric: metric for metric in METRICS} | {"latency": "latency_ms"}
_THOUSANDS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_TIMES = {"": 1, "ms": 1, "s": 10**3, "us": Decimal("1e-3")}  # in ms
_BYTES = (
    _THOUSANDS
    | {f"{prefix}B": size for prefix, size in _THOUSANDS.items()}
    | {f"{prefix}iB": 1024**power for power, prefix in enumerate("kMGT", start=1)}
)
_UNITS = MappingProxyType({"latency_ms": _TIMES, "memory": _BYTES} | dict.fromkeys(COUNTED, _THOUSANDS))


# Prices --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PartPrices:
    """What the parts of a U-Net cost in every metric that a budget can name.

    ``costs`` has parameters and multiply-adds. ``latency`` (ms) and ``memory`` (bytes) hold one price for every block,
    every sampler and ``rest``, of the same names as in ``costs``; None where nothing was measured. Raises DataError
    when a part has no price or one that is not a finite number.
    """

    costs: CostTable
    latency: Mapping[str, float] | None = None
    memory: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for what, prices in (("latency", self.latency), ("memory", self.memory)):
            if prices is None:
                continue
            wrong = [part for part in self._parts() if not math.isfinite(prices.get(part, math.nan))]
            if wrong:
                raise DataError(
                    f"asked to price plans by {what}, found no finite price of {', '.join(wrong)}; give one for every "
                    "block, sampler and the rest"
                )

    @property
    def architecture(self) -> Architecture:
        """The U-Net that is priced."""
        return self.costs.architecture

    def of_part(self, name: str, metric: Metric) -> int | float:
        """The price of one block, one sampler or ``rest``. Raises BudgetError when the metric was not measured."""
        if metric in COUNTED:
            return cast(int, getattr(self.costs.cost(name), metric))
        return self._measured(metric)[name]

    def total(self, metric: Metric) -> int | float:
        """The price of the whole U-Net. Raises BudgetError when the metric was not measured."""
        return self.without((), metric)

    def without(self, parts: Collection[str], metric: Metric) -> int | float:
        """The price of what is left without the blocks and samplers ``parts``; exact for a counted metric."""
        if metric in COUNTED:
            return sum(
                cast(int, getattr(cost, metric)) for cost in self.costs.costs if cost.name not in parts
            )
        prices = self._measured(metric)
        # Correctly rounded, so that a plan's price does not depend on an order.
        return math.fsum(prices[part] for part in self._parts() if part not in parts)

    def of(self, plan: PruningPlan, metric: Metric) -> int | float:
        """The price of what ``plan`` leaves, samplers that leave with it gone."""
        return self.without({*plan.removed, *removed_samplers(self.architecture, plan)}, metric)

    def of_all(self, plan: PruningPlan) -> Mapping[Metric, int | float]:
        """The price of what ``plan`` leaves in every metric there is."""
        absent = {"latency_ms": self.latency is None, "memory": self.memory is None}
        return MappingProxyType({m: self.of(plan, m) for m in METRICS if not absent.get(m, False)})

    def _parts(self) -> list[str]:
        return [cost.name for cost in self.costs.costs]

    def _measured(self, metric: Metric) -> Mapping[str, float]:
        prices = self.latency if metric == "latency_ms" else self.memory
        if prices is None:
            what = "latency" if metric == "latency_ms" else "memory"
            raise BudgetError(
                f"asked for a budget on {what}, found no {what} of the blocks; measure a {what} table of this model "
                "first, or give params or macs"
            )
        return prices


Costs: TypeAlias = CostTable | PartPrices


def prices_from(costs: Costs) -> PartPrices:
    """The prices that ``costs`` is, or has."""
    return costs if isinstance(costs, PartPrices) else PartPrices(costs)


# Budgets ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that a plan may leave of one cost: ``metric`` of the student <= ``limit``.

    The limit of a counted metric is a whole number, of ``latency_ms`` in milliseconds, of ``memory`` in bytes.
    """

    metric: Metric
    limit: int | float
    text: str  # as it was asked for

    def allows(self, cost: PlanCost) -> bool:
        """Whether a student of that cost is within the budget, which is on a counted metric."""
        return int(getattr(cost, self.metric)) <= self.limit

    def allows_plan(self, plan: PruningPlan, costs: Costs) -> bool:
        """Whether what ``plan`` leaves is within the budget. Raises BudgetError when the metric was not measured."""
        return prices_from(costs).of(plan, self.metric) <= self.limit


def split_budgets(text: str) -> tuple[str, ...]:
    """The single budgets in ``text``: ``macs<=65%, params<=6,000,000`` is two of them.

    A comma inside a number is followed by digits, one between budgets by the name of a metric.
    """
    return tuple(re.split(r",(?!\s*\d)", text))


def parse_budget(text: str, architecture: Architecture, costs: Costs) -> Budget:
    """The budget that ``text`` describes: ``macs<=66%``, ``params<=482346884`` or ``params<=bk-small``.

    On the left params, macs (attention products included), paper_macs (without them), latency or memory; on the right
    a share of the teacher's (``66%``, ``0.66x``), a number, or a plan whose cost is the limit (``bk-small``,
    ``as:bk-small``). k, M, G, T are powers of 1000; times are in ms (or us, s), memory in bytes (or kB, MiB and
    their like). Raises BudgetError for anything else, and for latency or memory that was not measured.
    """
    match = re.fullmatch(r"\s*([\w-]+)\s*<=\s*(?:as:)?\s*(.+?)\s*", text)
    metric = _NAMES.get(match[1].replace("-", "_")) if match else None
    if not match or metric is None:
        raise BudgetError(
            f"cannot read the budget {text!r}; write params, macs, paper_macs, latency or memory, then <= and a share, "
            "a number or a plan, for example 'macs<=66%', 'params<=482346884', 'latency<=0.7x' or 'params<=bk-small'"
        )
    prices, value = prices_from(costs), match[2]
    total = prices.total(metric)
    number = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?|\.\d+)\s*([a-zA-Z]*|%)", value)
    amount = Decimal(re.sub("[_,]", "", number[1])) if number else Decimal(0)
    units = _UNITS[metric]
    limit: Decimal | int | float
    if number and not number[2] and 0 < amount < 1 and metric != "latency_ms":  # 0.5 ms is a time
        raise BudgetError(
            f"cannot use the budget {text!r}: {value} is a share without its unit; "
            f"write {(100 * amount).normalize():f}% or {value}x"
        )
    if number and number[2] in ("%", "x"):
        limit = amount * Decimal(total) / (100 if number[2] == "%" else 1)
    elif number and number[2] in units:
        limit = amount * units[number[2]]
    else:
        try:
            plan = parse_plan(value, architecture)
        except PruneLabError as error:
            known = ", ".join(filter(None, units))
            raise BudgetError(
                f"cannot read {value!r} in the budget {text!r} as a share or a number (with {known} or nothing after "
                f"it), and as a plan: {error}"
            ) from None
        limit = prices.of(plan, metric)
    return Budget(metric, math.floor(limit) if metric in COUNTED else float(limit), f"{metric}<={value}")


def within(plan: PruningPlan, budgets: Sequence[Budget], costs: Costs) -> bool:
    """Whether what ``plan`` leaves is within all ``budgets``."""
    return all(budget.allows_plan(plan, costs) for budget in budgets)
