"""Gates: a line that says how good a model must be, such as ``clip>=0.97x teacher``, and what became of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from prune_lab.errors import ConfigError
from prune_lab.zero_shot.estimates import Estimate

PASSED, FAILED, UNDECIDED = 0, 1, 3  # exit codes; 2 is a user's mistake
Decision = Literal["passed", "failed", "undecided"]
_GATE = re.compile(r"\s*([a-z-]+)\s*(>=|<=)\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(%|x)?\s*(teacher)?\s*")


@dataclass(frozen=True, slots=True)
class Gate:
    """A bound on a metric: a number, or a multiple of the teacher's."""

    text: str
    metric: str
    at_least: bool
    bound: float
    of_teacher: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a gate says of a model: its value with the interval that is held against the bound."""

    gate: Gate
    model: str
    value: float
    low: float
    high: float
    bound: float
    decision: Decision
    reason: str = ""


def parse_gate(text: str, metrics: Iterable[str]) -> Gate:
    """The gate that ``text`` writes, on one of ``metrics``. Raises ConfigError for another text."""
    known = tuple(metrics)
    found = _GATE.fullmatch(text)
    usual = (
        "write a metric, >= or <=, and a number or a multiple of the teacher's: clip>=0.97x teacher, fid<=20"
    )
    if found is None:
        raise ConfigError(f"asked for the gate {text!r:.80}, which cannot be read; {usual}")
    metric, sign, number, unit, teacher = found.groups()
    if metric not in known:
        raise ConfigError(
            f"asked for the gate {text!r:.80}, found no metric {metric!r}; there are {', '.join(known)}"
        )
    if bool(unit) != bool(teacher):
        raise ConfigError(f"asked for the gate {text!r:.80}, which leaves open of what; {usual}")
    bound = float(number) / (100 if unit == "%" else 1)
    return Gate(" ".join(text.split()), metric, sign == ">=", bound, bool(teacher))


def check_gates(gates: Iterable[Gate], models: int) -> None:
    """Raise ConfigError for a gate that needs a teacher where there is one model alone."""
    for gate in gates:
        if gate.of_teacher and models < 2:
            raise ConfigError(
                f"asked for the gate {gate.text!r} with one model, found no teacher beside it; give the teacher first, "
                "and then the models that are judged"
            )


def decide(
    gate: Gate, model: str, found: Mapping[str, Estimate], teacher: Mapping[str, Estimate], reason: str = ""
) -> Verdict:
    """What ``gate`` says of ``model``: undecided where the 95 % interval holds the bound, or there is none.

    Of a multiple of the teacher's the interval is that of the paired difference, laid around the bound.
    """
    nan = math.nan
    one, other = found.get(gate.metric), teacher.get(gate.metric)
    if one is None or (gate.of_teacher and other is None):
        return Verdict(gate, model, nan, nan, nan, nan, "undecided", reason or "not measured")
    bound, away = gate.bound, one
    if gate.of_teacher:
        assert other is not None
        if other.value <= 0:
            why = f"the teacher's {gate.metric} is {other.value:.4g}: no multiple of it is a bound"
            return Verdict(gate, model, one.value, nan, nan, nan, "undecided", why)
        bound = gate.bound * other.value
        away = one.minus(other, gate.bound)
    low, high = away.interval
    if gate.of_teacher:
        low, high = low + bound, high + bound
    if not (math.isfinite(low) and math.isfinite(high)):
        return Verdict(gate, model, one.value, nan, nan, bound, "undecided", "no interval: give more prompts")
    above, below = (low >= bound, high < bound) if gate.at_least else (high <= bound, low > bound)
    decision: Decision = "passed" if above else "failed" if below else "undecided"
    return Verdict(
        gate,
        model,
        one.value,
        low,
        high,
        bound,
        decision,
        "" if above or below else "the interval holds the bound",
    )


def exit_code(verdicts: Iterable[Verdict]) -> int:
    """0 where all passed, 1 where one failed, else 3."""
    found = {one.decision for one in verdicts}
    return FAILED if "failed" in found else UNDECIDED if "undecided" in found else PASSED
