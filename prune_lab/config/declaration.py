"""How a setting is declared: its default, what it means, which step reads it, and the rules that its values obey."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from prune_lab.errors import ConfigError

MOST = 2**63 - 1  # of a whole number: torch takes no larger seed
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
    read_by: str = "",
    free: bool = False,
    resumes: bool = False,
) -> Value:
    """A field of a table of settings, with its documentation as data (see ``Setting``).

    ``least`` is the smallest whole number allowed; numbers with a fraction are finite and not below zero.
    """
    known = {"meaning": meaning, "read_by": read_by, "free": free, "resumes": resumes or free}
    return dataclasses.field(default=default, metadata=known | {"least": least})


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
            del known["least"]
            found[field.name] = Setting(field.name, hint, field.default, **known)
    return found


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
            least, most = field.metadata["least"], MOST
            require(value >= least, name, value, f"a whole number of at least {least}")
            require(value <= most, name, value, f"a whole number of at most {most:,}, what 64 bits hold")
        elif isinstance(value, float):
            usable = math.isfinite(value) and value >= 0
            require(usable, name, value, "a finite number, zero or more")
