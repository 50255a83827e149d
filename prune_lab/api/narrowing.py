"""What a person asks of narrower stages, in writing or in numbers."""

from __future__ import annotations

from collections.abc import Sequence

from prune_lab.config import check_numbers
from prune_lab.errors import BudgetError, ConfigError, PlanError
from prune_lab.runtime import printable
from prune_lab.workflow import Narrowing


def _numbers(text: str) -> tuple[int, ...]:
    """The numbers of ``256,512,1024,1024``. Raises PlanError for other text."""
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise PlanError(
            f"cannot read the channels {printable(text, 80)!r}; write a number for each stage, as its config lists "
            "them: 256,512,1024,1024"
        )
    return tuple(int(part) for part in parts)


def asked_narrowing(
    channels: str | Sequence[int], budgets: tuple[str, ...], by: str, steps: int
) -> Narrowing:
    """What is asked for: channels, or budgets within which to find them.

    Raises PlanError for channels that cannot be read, BudgetError where neither or both are given, ConfigError for
    ``steps`` below 0.
    """
    if bool(channels) == bool(budgets):
        given = "both channels and a budget" if channels else "neither channels nor a budget"
        raise BudgetError(
            f"asked for narrower stages with {given}; give --channels, such as 256,512,1024,1024, or --macs or "
            "--params, such as 0.7x"
        )
    if steps < 0:
        raise ConfigError(f"asked for steps = {steps}; give 0, not to train, or more")
    check_numbers(steps=steps or None)
    asked = _numbers(channels) if isinstance(channels, str) else tuple(channels)
    return Narrowing(asked, budgets, by, bool(steps))
