"""A subject that is learnt in a few steps, as settings and as words of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FEW: Mapping[str, Any] = {
    "token": "red",
    "subject_class": "cat",
    "template": "a {}",
    "steps": 3,
    "class_count": 3,
    "class_steps": 2,
}


def words_of(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The options of ``personalise`` that ask for ``settings``."""
    return tuple(
        str(word)
        for name, value in settings.items()
        for word in (f"--{name.replace('subject_', '').replace('_', '-')}", value)
    )
