"""Formats of numbers in the report; an unknown value is a dash, never a zero."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import pandas as pd

UNKNOWN = "\u2013"  # a dash: not measured, not run or not applicable
MINUS = "\u2212"
NARROW = "\u202f"  # a thin space that keeps a number and its unit on one line


def is_missing(value: object) -> bool:
    """Whether a cell of a table has no value."""
    return value is None or bool(pd.isna(value))  # type: ignore[call-overload]


def text(value: object) -> str:
    """The words in a cell as they are."""
    return UNKNOWN if is_missing(value) else str(value)


def yes_or_no(value: object) -> str:
    """A truth value, whichever way a CSV writes it."""
    return UNKNOWN if is_missing(value) else "yes" if str(value) in ("True", "1.0", "1") else "no"


def _number_format(written: Callable[[float], str]) -> Callable[[object], str]:
    """``written`` for any cell of a table: a dash where it has no value."""

    @functools.wraps(written)
    def cell_text(value: object) -> str:
        return UNKNOWN if is_missing(value) else written(float(str(value)))

    return cell_text


@_number_format
def count(number: float) -> str:
    """A whole number with separated thousands: 859,520,964."""
    return f"{int(number):,}"


@_number_format
def amount(number: float) -> str:
    """A large number in three digits: 339 G, 8.77 M, 12.3 k."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= 0.9995 * size:
            digits = 0 if abs(number) >= 99.95 * size else 1 if abs(number) >= 9.995 * size else 2
            return f"{number / size:.{digits}f}{NARROW}{unit}"
    return f"{number:.0f}"


@_number_format
def percent_change(fraction: float) -> str:
    """A fraction as a signed percentage: −32.6 %."""
    change = round(100 * fraction, 1)
    sign = MINUS if change < 0 else "+" if change > 0 else "±"
    return f"{sign}{abs(change):.1f}{NARROW}%"


def change_with_interval(change: object, low: object, high: object) -> str:
    """A change with its interval: −24.5 % (−26.0 to −23.1); "undecided" where the interval contains no change."""
    if is_missing(change):
        return UNKNOWN
    words = percent_change(change)
    if is_missing(low) or is_missing(high):
        return f"{words}, undecided"
    ends = " to ".join(percent_change(end).split(NARROW)[0] for end in (low, high))
    undecided = float(str(low)) <= 0 <= float(str(high))
    return f"{words} ({ends}){', undecided' if undecided else ''}"


@_number_format
def percent(fraction: float) -> str:
    """A share of a whole: 32.6 %."""
    return f"{100 * fraction:.1f}{NARROW}%"


@_number_format
def loss_or_score(number: float) -> str:
    """A loss or score with four decimals, or with an exponent when it is too small for four."""
    return f"{number:.4f}" if abs(number) >= 0.001 or number == 0 else f"{number:.2e}"


@_number_format
def short_number(number: float) -> str:
    """Two significant digits, in few characters: 1.2e-4, 0.012, 0.31, 2.1."""
    if number == 0:
        return "0"
    if abs(number) >= 0.01:
        return f"{number:.2g}" if abs(number) < 100 else f"{number:.0f}"
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


@_number_format
def correlation(number: float) -> str:
    """A correlation with two decimals: 0.83."""
    return f"{number:.2f}".replace("-", MINUS)


@_number_format
def milliseconds(number: float) -> str:
    """A time in milliseconds with three digits."""
    return f"{number:.3g}{NARROW}ms" if number < 1000 else f"{number:,.0f}{NARROW}ms"


def enumeration(items: Iterable[str], *, most: int | None = None) -> str:
    """The items in one phrase: a, b and c; beyond ``most`` of them their number: a, b and 3 more."""
    listed = list(items)
    if most is not None and len(listed) > most + 1:
        listed = [*listed[:most], f"{len(listed) - most} more"]
    if len(listed) < 2:
        return listed[0] if listed else "none"
    return f"{', '.join(listed[:-1])} and {listed[-1]}"


def plural(number: int, noun: str) -> str:
    """The number with its noun: 1 block, 2 blocks."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
