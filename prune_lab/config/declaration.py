"""How a setting is declared: its default, what it means, which step reads it, and the rules that its values obey."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from prune_lab.errors import ConfigError

Value = TypeVar("Value")

# The values that a setting may have, where they are names. The tables of functions behind them have the same keys; a
# solver, repair or loss variant that is added to its table is named here too.
CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": ("float32", "bfloat16", "float16"),
    "search.solver": ("exact", "interactions", "greedy", "evolution"),
    "repair.kind": ("none", "shift", "scale-shift", "linear", "refit", "best"),
    "data.crop": ("center", "random"),
    "data.format": ("float32", "float16"),
    "distill.loss_variant": ("raw", "normalised", "outlier-masked", "self-attention", "inverse-sensitivity"),
    "distill.schedule": ("constant", "linear", "cosine"),
    "rank.engine": ("local", "ray"),
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
    read_by: str = "",
    free: bool = False,
    resumes: bool = False,
) -> Value:
    """A field of a table of settings, with its documentation as data (see ``Setting``).

    ``least`` is the smallest whole number allowed; numbers with a fraction are finite and not below zero.
    """
    metadata = {
        "meaning": meaning,
        "least": least,
        "read_by": read_by,
        "free": free,
        "resumes": resumes or free,
    }
    return dataclasses.field(default=default, metadata=metadata)


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
        if not dataclasses.is_dataclass(hints[field.name]):
            found[field.name] = _described(field.name, hints[field.name], field, field.metadata["read_by"])
            continue
        own_hints = typing.get_type_hints(hints[field.name])
        for own in dataclasses.fields(typing.cast("type[Any]", hints[field.name])):
            read_by = own.metadata["read_by"] or field.metadata["read_by"]
            name = f"{field.name}.{own.name}"
            found[name] = _described(name, own_hints[own.name], own, read_by)
    return found


def _described(name: str, hint: Any, field: dataclasses.Field[Any], read_by: str) -> Setting:
    data = field.metadata
    return Setting(name, hint, field.default, data["meaning"], read_by, data["free"], data["resumes"])


# Checking --------------------------------------------------------------------------------------------------------


def require(met: bool, name: str, value: object, rule: str) -> None:
    """Raise ConfigError, which says what the setting ``name`` was and by which ``rule`` it fails, unless ``met``."""
    if not met:
        raise ConfigError(f"setting {name} = {value!r} cannot be used; it must be {rule}")


def require_ranges(settings: Any, prefix: str = "") -> None:
    """Raise ConfigError for a value out of the range that its declaration gives, or that is none of the choices."""
    for field in dataclasses.fields(settings):
        name, value = f"{prefix}{field.name}", getattr(settings, field.name)
        if name in CHOICES:
            require(value in CHOICES[name], name, value, f"one of {', '.join(CHOICES[name])}")
        elif type(value) is int:
            least = field.metadata["least"]
            require(value >= least, name, value, f"a whole number of at least {least}")
        elif isinstance(value, float):
            usable = math.isfinite(value) and value >= 0
            require(usable, name, value, "a finite number, zero or more")


def require_fractions(settings: Any, prefix: str, *fields: str) -> None:
    """Raise ConfigError for one of ``fields`` that is not at least 0 and below 1."""
    for field in fields:
        value = getattr(settings, field)
        require(0 <= value < 1, f"{prefix}{field}", value, "at least 0 and below 1")
