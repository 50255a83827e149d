"""Formats of numbers in the report; an unknown value is a dash, never a zero."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

UNKNOWN = "\u2013"  # a dash: not measured, not run or not applicable
MINUS = "\u2212"
NARROW = "\u202f"  # a thin space that keeps a number and its unit on one line


def count(value: object) -> str:
    """A whole number with separated thousands: 859,520,964."""
    return UNKNOWN if is_missing(value) else f"{int(float(str(value))):,}"


def amount(value: object) -> str:
    """A large number in three digits: 339 G, 8.77 M, 12.3 k."""
    if is_missing(value):
        return UNKNOWN
    number = float(str(value))
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= 0.9995 * size:
            digits = 0 if abs(number) >= 99.95 * size else 1 if abs(number) >= 9.995 * size else 2
            return f"{number / size:.{digits}f}{NARROW}{unit}"
    return f"{number:.0f}"


def percent_change(value: object) -> str:
    """A fraction as a signed percentage: −32.6 %."""
    if is_missing(value):
        return UNKNOWN
    percent = round(100 * float(str(value)), 1)
    sign = MINUS if percent < 0 else "+" if percent > 0 else "±"
    return f"{sign}{abs(percent):.1f}{NARROW}%"


def loss_or_score(value: object) -> str:
    """A loss or score with four decimals, or with an exponent when it is too small for four."""
    if is_missing(value):
        return UNKNOWN
    number = float(str(value))
    return f"{number:.4f}" if abs(number) >= 0.001 or number == 0 else f"{number:.2e}"


def short_number(value: object) -> str:
    """``value`` with two significant digits, in few characters: 1.2e-4, 0.012, 0.31, 2.1."""
    if is_missing(value):
        return UNKNOWN
    number = float(str(value))
    if number == 0:
        return "0"
    if abs(number) >= 0.01:
        return f"{number:.2g}" if abs(number) < 100 else f"{number:.0f}"
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def milliseconds(value: object) -> str:
    """A time in milliseconds with three digits."""
    if is_missing(value):
        return UNKNOWN
    number = float(str(value))
    return f"{number:.3g}{NARROW}ms" if number < 1000 else f"{number:,.0f}{NARROW}ms"


def is_missing(value: object) -> bool:
    """Whether a cell of a table has no value."""
    return value is None or bool(pd.isna(value))  # type: ignore[call-overload]


def enumeration(items: Iterable[str]) -> str:
    """The items in one phrase: a, b and c."""
    listed = list(items)
    if len(listed) < 2:
        return listed[0] if listed else "none"
    return f"{', '.join(listed[:-1])} and {listed[-1]}"


def plural(number: int, noun: str) -> str:
    """The number with its noun: 1 block, 2 blocks."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
