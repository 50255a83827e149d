"""Budgets: how much of the teacher a plan may leave, in parameters, multiply-adds, milliseconds or bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from types import MappingProxyType

from prune_lab.blocks import Architecture
from prune_lab.errors import BudgetError, PruneLabError
from prune_lab.plans import PruningPlan, parse_plan
from prune_lab.profiling import COUNTED, METRICS, CostTable, Metric, PlanCost, split_service
from prune_lab.runtime import note_once, printable

_NAMES: Mapping[str, Metric] = {metric: metric for metric in METRICS} | {"latency": "latency_ms"}
_THOUSANDS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_TIMES = {"": 1, "ms": 1, "s": 10**3, "us": Decimal("1e-3")}  # in ms
_BYTES = (
    _THOUSANDS
    | {f"{prefix}B": size for prefix, size in _THOUSANDS.items()}
    | {f"{prefix}iB": 1024**power for power, prefix in enumerate("kMGT", start=1)}
)
_UNITS = MappingProxyType({"latency_ms": _TIMES, "memory": _BYTES} | dict.fromkeys(COUNTED, _THOUSANDS))


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


def split_budgets(text: str) -> tuple[str, ...]:
    """The single budgets in ``text``: ``macs<=65%, params<=6,000,000`` is two of them.

    A comma inside a number is followed by digits, one inside a service by its next part (``0.7x@float16,512,batch=1``),
    one between budgets by the name of a metric.
    """
    found: list[str] = []
    for piece in re.split(r",(?!\s*\d)", text):
        if found and "@" in found[-1] and "<=" not in piece:
            found[-1] += f",{piece}"
        else:
            found.append(piece)
    return tuple(found)


def service_named(texts: Sequence[str]) -> str:
    """What the budgets on latency in ``texts`` say after ``@``: the service of a run; empty where none says anything.

    Raises BudgetError when they name different ones: a run has one service.
    """
    asked = [one for text in texts for one in split_budgets(text) if re.match(r"\s*latency", one)]
    services = {
        ",".join(sorted(part.strip() for part in split_service(one)[1].split(","))): one for one in asked
    }
    if len(services) > 1:
        raise BudgetError(
            f"asked for latencies at different services, {' and '.join(map(repr, services.values()))}; a run measures "
            "at one: give the others a run of their own"
        )
    return next((split_service(one)[1] for one in services.values()), "")


# Digits in groups of three; a comma elsewhere may be meant as a decimal point, and is not guessed at.
_NUMBER = re.compile(
    r"((?:\d{1,3}(?:,\d{3})+|\d{1,3}(?:_\d{3})+|\d+)(?:\.\d+)?|\.\d+)\s*([a-zA-Z]*|%)", re.ASCII
)


_MOST_DIGITS = 40  # a thousand quettabytes take 34


@dataclass(frozen=True, slots=True)
class _Words:
    """A budget as it is written, before any cost is known: one of share, amount and plan is its limit."""

    metric: Metric
    text: str
    share: Decimal | None = None  # of the teacher's cost
    amount: Decimal | None = None
    plan: PruningPlan | None = None


def _read(text: str, architecture: Architecture) -> _Words:
    plain, service = split_service(text)
    match = re.fullmatch(r"\s*([\w-]+)\s*<=\s*(?:as:)?\s*(.+?)\s*", plain)
    metric = _NAMES.get(match[1].replace("-", "_")) if match else None
    if "@" in text and metric and metric != "latency_ms":
        raise BudgetError(
            f"cannot use the budget {text!r}: only a latency depends on a service; leave @{service} out"
        )
    if "@" in text and not service:
        raise BudgetError(
            f"cannot read the budget {text!r}: nothing stands after @; leave it out, or write device, number format, "
            "pixels, batch=N or tokens=N, as in 0.7x@float16,512,batch=1"
        )
    if not match or metric is None:
        raise BudgetError(
            f"cannot read the budget {text!r}; write params, macs, paper_macs, latency or memory, then <= and a share, "
            "a number or a plan, for example 'macs<=66%', 'params<=482346884', 'latency<=0.7x' or 'params<=bk-small'"
        )
    value = match[2]
    if re.match(r"-\s*[\d.]", value):
        raise BudgetError(
            f"cannot use the budget {printable(text)!r}: {printable(value, 40)} is below 0; give an amount above 0, "
            "such as 65% or 0.7x"
        )
    words = f"{metric}<={value}{f'@{service}' if service else ''}"
    number = re.fullmatch(_NUMBER, value)
    amount = Decimal(re.sub("[_,]", "", number[1])) if number else Decimal(0)
    units = _UNITS[metric]
    if number and not amount and number[2] in ("%", "x", *units) and metric not in COUNTED:
        # of what is counted the least that a plan reaches is said instead; these have to be measured for that
        raise BudgetError(
            f"cannot use the budget {printable(text)!r}: no model takes so little; give an amount above 0, such as "
            "70% or 0.7x"
        )
    if number and not number[2] and 0 < amount < 1 and metric != "latency_ms":  # 0.5 ms is a time
        raise BudgetError(
            f"cannot use the budget {text!r}: {value} is a share without its unit; "
            f"write {(100 * amount).normalize():f}% or {value}x"
        )
    if number and number[2] in ("%", "x"):
        share = amount / (100 if number[2] == "%" else 1)
        if share > 1 or "," in number[1]:
            raise BudgetError(
                f"cannot use the budget {printable(text)!r}: a share is a number without commas and at most the whole, "
                "100% or 1x"
            )
        return _Words(metric, words, share=share)
    if number and len(number[1]) > _MOST_DIGITS:
        raise BudgetError(
            f"cannot use the budget {printable(text, 60)!r}: write at most {_MOST_DIGITS} digits, and k, M, G or T"
        )
    if number and number[2] in units:
        if metric == "latency_ms" and not number[2]:
            note_once(
                f"the budget {text} means {value} ms; a share of the model's own latency is 70% or 0.7x"
            )
        return _Words(metric, words, amount=amount * units[number[2]])
    try:
        return _Words(metric, words, plan=parse_plan(value, architecture))
    except PruneLabError as error:
        known = ", ".join(filter(None, units))
        raise BudgetError(
            f"cannot read {printable(value)!r} in the budget {printable(text)!r} as a share or a number (with {known} "
            f"or nothing after it), and as a plan: {error}"
        ) from None


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
    words = _read(text, architecture)
    metric, total = words.metric, costs.total.amount(words.metric)
    limit: Decimal | int | float
    if words.share is not None:
        limit = words.share * Decimal(total)
    elif words.amount is not None:
        limit = words.amount
    else:
        assert words.plan is not None
        limit = costs.of(words.plan).amount(metric)
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
