"""Budgets: how much of the teacher a plan may leave, in parameters, multiply-adds, milliseconds or bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from prune_lab.blocks import Architecture
from prune_lab.config.budget_texts import (
    COUNTED,
    BudgetWords,
    Metric,
    read_budget,
    service_named,
    split_budgets,
)
from prune_lab.errors import BudgetError, PruneLabError
from prune_lab.plans import PruningPlan, parse_plan
from prune_lab.profiling import CostTable, PlanCost
from prune_lab.runtime import note_once

__all__ = [
    "Budget",
    "check_budget_text",
    "number_text",
    "parse_budget",
    "service_named",
    "split_budgets",
    "unreachable",
    "within",
]


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that a plan may leave of one cost: ``metric`` of the student <= ``limit``.

    The limit of a counted metric is a whole number, of ``latency_ms`` in milliseconds, of ``memory`` in bytes.
    """

    metric: Metric
    limit: int | float
    text: str  # as it was asked for

    def allows(self, cost: PlanCost) -> bool:
        """Whether a student of that cost is within the budget. Raises BudgetError when the metric is not known."""
        return cost.amount(self.metric) <= self.limit


def _read(text: str, architecture: Architecture) -> tuple[BudgetWords, PruningPlan | None]:
    """What ``text`` says, and the plan whose cost is the limit, where it is one."""
    words = read_budget(text)
    if words.metric == "latency_ms" and words.amount is not None and not words.unit:
        note_once(
            f"the budget {text} means {words.value} ms; a share of the model's own latency is 70% or 0.7x"
        )
    if words.share is not None or words.amount is not None:
        return words, None
    try:
        return words, parse_plan(words.value, architecture)
    except PruneLabError as error:
        raise BudgetError(f"{words.cannot_be_read}: {error}") from None


def check_budget_text(text: str, architecture: Architecture) -> None:
    """Raise BudgetError for a budget that ``parse_budget`` cannot read, whatever was measured."""
    _read(text, architecture)


def parse_budget(text: str, architecture: Architecture, costs: CostTable) -> Budget:
    """The budget that ``text`` describes: ``macs<=66%``, ``params<=482346884`` or ``params<=bk-small``.

    On the left params, macs (attention products included), paper_macs (without them), latency or memory; on the right
    a share of the teacher's (``66%``, ``0.66x``), a number, or a plan whose cost is the limit (``bk-small``,
    ``as:bk-small``). k, M, G, T are powers of 1000; times are in ms (or us, s), memory in bytes (or kB, MiB and
    their like). What stands after ``@`` in a budget on latency is the service that ``costs`` were measured at
    (``service_named``). Raises BudgetError for anything else, and for latency or memory that was not measured.
    """
    words, plan = _read(text, architecture)
    metric, total = words.metric, costs.total.amount(words.metric)
    limit: Decimal | int | float
    if words.share is not None:
        limit = words.share * Decimal(total)
    elif words.amount is not None:
        limit = words.amount
    else:
        assert plan is not None
        limit = costs.of(plan).amount(metric)
    return Budget(metric, math.floor(limit) if metric in COUNTED else float(limit), words.text)


def within(plan: PruningPlan, budgets: Sequence[Budget], costs: CostTable) -> bool:
    """Whether what ``plan`` leaves is within all ``budgets``."""
    cost = costs.of(plan)
    return all(budget.allows(cost) for budget in budgets)


def number_text(value: int | float) -> str:
    """An amount of a metric as errors say it: with commas, a time to a thousandth."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def unreachable(
    budget: Budget, kind: str, among: str, reached: int | float, total: int | float, binds: str = ""
) -> BudgetError:
    """What is said where no plan meets ``budget``: what was asked, the least that a plan of a ``kind`` has, ``among``
    those within other budgets, and of what ``total``; which rule ``binds``; and what would work.
    """
    share = math.ceil(Decimal(reached) * 1000 / Decimal(total)) / 10
    limit = reached if isinstance(reached, int) else math.ceil(reached * 1e3) / 1e3
    return BudgetError(
        f"asked for {budget.text} (at most {number_text(budget.limit)}){among}; the smallest {kind}{among} has "
        f"{budget.metric} {number_text(reached)} of {number_text(total)}{binds}; give {budget.metric}<={limit} or "
        f"{budget.metric}<={share}%"
    )
