"""What a budget says by itself, before any model is known: its metric, and a share, an amount, or what may be a plan.

Imports no heavy library, so that a slip of the hand is told at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from types import MappingProxyType
from typing import Literal, get_args

from prune_lab.errors import BudgetError
from prune_lab.runtime.reading import printable

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

# Digits in groups of three; a comma elsewhere may be meant as a decimal point, and is not guessed at.
_NUMBER = re.compile(
    r"((?:\d{1,3}(?:,\d{3})+|\d{1,3}(?:_\d{3})+|\d+)(?:\.\d+)?|\.\d+)\s*([a-zA-Z]*|%)", re.ASCII
)
_MOST_DIGITS = 40  # a thousand quettabytes take 34


@dataclass(frozen=True, slots=True)
class BudgetWords:
    """A budget as it is written: a share, an amount, or, where it has neither, what has to be a plan is its limit."""

    metric: Metric
    text: str
    value: str
    """What stands on the right."""
    share: Decimal | None = None
    """Of the teacher's cost."""
    amount: Decimal | None = None
    """In milliseconds or bytes, or as it is counted."""
    unit: str = ""

    @property
    def cannot_be_read(self) -> str:
        """What is said where what stands on the right is no plan either, which is to follow."""
        known = ", ".join(filter(None, _UNITS[self.metric]))
        return (
            f"cannot read {printable(self.value)!r} in the budget {printable(self.text)!r} as a share or a number "
            f"(with {known} or nothing after it), and as a plan"
        )


def split_service(text: str) -> tuple[str, str]:
    """(budget, service) of ``0.7x@float16,512,batch=1``; the service is empty where none is named."""
    budget, _, service = text.partition("@")
    return budget.strip(), service.strip()


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


def _parted(text: str) -> tuple[Metric, str, str]:
    """(metric, what stands on the right, service) of a budget. Raises BudgetError."""
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
    return metric, match[2], service


def _check_number(text: str, metric: Metric, value: str, amount: Decimal, unit: str) -> None:
    """Raise BudgetError for the number ``value`` that means nothing, or another thing than it seems to."""
    if not amount and unit in ("%", "x", *_UNITS[metric]) and metric not in COUNTED:
        # of what is counted the least that a plan reaches is said instead; these have to be measured for that
        raise BudgetError(
            f"cannot use the budget {printable(text)!r}: no model takes so little; give an amount above 0, such as "
            "70% or 0.7x"
        )
    if not unit and 0 < amount < 1 and metric != "latency_ms":  # 0.5 ms is a time
        raise BudgetError(
            f"cannot use the budget {text!r}: {value} is a share without its unit; "
            f"write {(100 * amount).normalize():f}% or {value}x"
        )
    if unit in ("%", "x") and ("," in value or amount / (100 if unit == "%" else 1) > 1):
        raise BudgetError(
            f"cannot use the budget {printable(text)!r}: a share is a number without commas and at most the whole, "
            "100% or 1x"
        )


def read_budget(text: str) -> BudgetWords:
    """What ``text`` says, such as ``macs<=65%``. Raises BudgetError for what can be no budget of any model."""
    metric, value, service = _parted(text)
    if re.match(r"-\s*[\d.]", value):
        raise BudgetError(
            f"cannot use the budget {printable(text)!r}: {printable(value, 40)} is below 0; give an amount above 0, "
            "such as 65% or 0.7x"
        )
    words = f"{metric}<={value}{f'@{service}' if service else ''}"
    if number := re.fullmatch(_NUMBER, value):
        amount, unit = Decimal(re.sub("[_,]", "", number[1])), number[2]
        _check_number(text, metric, value, amount, unit)
        if unit in ("%", "x"):
            return BudgetWords(metric, words, value, share=amount / (100 if unit == "%" else 1), unit=unit)
        if len(number[1]) > _MOST_DIGITS:
            raise BudgetError(
                f"cannot use the budget {printable(text, 60)!r}: write at most {_MOST_DIGITS} digits, and k, M, G or T"
            )
        if unit in _UNITS[metric]:
            return BudgetWords(metric, words, value, amount=amount * _UNITS[metric][unit], unit=unit)
    found = BudgetWords(metric, words, value)
    if value[0].isdigit() or value[0] == ".":
        raise BudgetError(f"{found.cannot_be_read}, of which no part begins with a digit")
    return found


def check_budget_texts(texts: Sequence[str]) -> None:
    """Raise BudgetError for one of the budgets of a run that no model could meet, whatever it is."""
    for text in texts:
        for one in split_budgets(text):
            read_budget(one)
    service_named(texts)
