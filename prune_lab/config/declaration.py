"""How a setting is declared: its default, what it means, which step reads it, and the rules that its values obey."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from prune_lab.errors import ConfigError

MOST = 2**63 - 1  # of a whole number: torch takes no larger seed
MOST_NUMBER = 1e9  # of a number with a fraction: larger ones leave float32, or mean nothing
_MOST_SHOWN = 200  # characters of a value in a message
Value = TypeVar("Value")

# The values that a setting may have, where they are names. The tables of functions behind them have the same keys; a
# solver, repair or loss variant that is added to its table is named here too.
CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": ("float32", "bfloat16", "float16"),
    "search.form": ("native", "neutral", "own"),
    "search.widths": ("gate-fisher", "gate-gradient", "taylor", "magnitude", "random"),
    "search.solver": ("exact", "interactions", "greedy", "descent", "evolution", "learned-gates"),
    "search.objective": ("impact", "repaired"),
    "search.repair": ("auto", "shift", "scale-shift", "linear", "refit", "best"),
    "repair.kind": ("none", "shift", "scale-shift", "linear", "refit", "best"),
    "data.crop": ("center", "random"),
    "data.format": ("float32", "float16"),
    "distill.loss_variant": ("raw", "normalised", "outlier-masked", "self-attention", "inverse-sensitivity"),
    "distill.schedule": ("constant", "linear", "cosine"),
    "engine.kind": ("local", "ray"),
}


def in_words(names: tuple[str, ...]) -> str:
    """The ``names`` as an enumeration: a, b or c."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


# Declaring -------------------------------------------------------------------------------------------------------


def setting(
    default: Value,
    meaning: str,
    *,
    least: int = 0,
    most: int = MOST,
    read_by: str = "",
    free: bool = False,
    resumes: bool = False,
) -> Value:
    """A field of a table of settings, with its documentation as data (see ``Setting``).

    ``least`` and ``most`` are the smallest and the largest whole number allowed; numbers with a fraction are finite,
    not below zero and not above ``MOST_NUMBER``.
    """
    known = {"meaning": meaning, "read_by": read_by, "free": free, "resumes": resumes or free}
    return dataclasses.field(default=default, metadata=known | {"least": least, "most": most})


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """What is known about one setting."""

    name: str  # dotted, such as distill.steps
    hint: Any  # its type
    default: Any
    meaning: str
    read_by: str  # the first step of a run that reads it
    free: bool  # changes how a result is computed, not the result: finished steps stay valid
    resumes: bool  # a student that is half trained goes on under another value; so with all that are free

    @property
    def choices(self) -> tuple[str, ...]:
        """The names that it may have; empty where it is no choice among names."""
        return CHOICES.get(self.name, ())


def declared(config: type[Any]) -> Mapping[str, Setting]:
    """The settings of ``config`` and its tables by their dotted names, in the order in which they are written."""
    found: dict[str, Setting] = {}
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        hint, known = hints[field.name], dict(field.metadata)
        if dataclasses.is_dataclass(hint):
            for name, own in declared(typing.cast("type[Any]", hint)).items():
                dotted, read_by = f"{field.name}.{name}", own.read_by or known["read_by"]
                found[dotted] = dataclasses.replace(own, name=dotted, read_by=read_by)
        else:
            del known["least"], known["most"]
            found[field.name] = Setting(field.name, hint, field.default, **known)
    return found


# Checking --------------------------------------------------------------------------------------------------------


def require(met: bool, name: str, value: object, rule: str) -> None:
    """Raise ConfigError, which says what the setting ``name`` was and by which ``rule`` it fails, unless ``met``."""
    if not met:
        shown = repr(value)
        shown = shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}..."
        raise ConfigError(f"setting {name} = {shown} cannot be used; it must be {rule}")


def require_ranges(settings: Any, prefix: str = "") -> None:
    """Raise ConfigError for a value out of the range that its declaration gives, or that is none of the choices."""
    for field in dataclasses.fields(settings):
        name, value = f"{prefix}{field.name}", getattr(settings, field.name)
        if name in CHOICES:
            require(value in CHOICES[name], name, value, f"one of {', '.join(CHOICES[name])}")
        elif type(value) is int:
            least, most = field.metadata["least"], field.metadata["most"]
            require(value >= least, name, value, f"a whole number of at least {least}")
            held = ", what 64 bits hold" if most == MOST else ""
            require(value <= most, name, value, f"a whole number of at most {most:,}{held}")
        elif isinstance(value, float):
            require(math.isfinite(value) and value >= 0, name, value, "a finite number, zero or more")
            require(value <= MOST_NUMBER, name, value, f"a number of at most {MOST_NUMBER:g}")
