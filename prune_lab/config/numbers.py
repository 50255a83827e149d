"""The numbers that verbs take and that are no settings of a run: the range of each, and the one check of it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from prune_lab.config.declaration import MOST, MOST_NUMBER
from prune_lab.errors import ConfigError

NUMBERS: Mapping[str, tuple[int, int]] = {
    "batch": (1, 65_536),
    "count": (1, 10_000),
    "resolution": (1, 65_536),
    "frames": (1, 4096),
    "images": (1, 2_000_000),
    "processes": (1, 1024),
    "rounds": (2, 10**6),
    "seed": (0, MOST),
    "seeds": (1, 10_000),
    "steps": (1, 10**6),
    "tokens": (1, 100_000),
}
"""Least and most of each whole number."""


def check_numbers(*, guidance: float | None = None, **asked: int | None) -> None:
    """Raise ConfigError for a number that is none, or out of the range of its name; None was not given.

    ``asked`` are whole numbers by their names in ``NUMBERS``, ``guidance`` is a scale.
    """
    for name, value in asked.items():
        least, most = NUMBERS[name]
        # `type`: true is an int to Python
        if value is not None and not (type(value) is int and least <= value <= most):
            raise ConfigError(
                f"asked for {name} = {value!r:.60}; it must be a whole number from {least} to {most:,}"
            )
    if guidance is None:
        return
    usable = type(guidance) in (int, float) and math.isfinite(guidance) and 0 <= guidance <= MOST_NUMBER
    if not usable:
        raise ConfigError(
            f"asked for guidance = {guidance!r:.60}; it must be a finite number, zero or more, 1 for none"
        )
