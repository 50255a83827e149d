"""Settings as TOML: read with every name checked, and written whole."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import re
import tomllib
import typing
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from prune_lab.config.declaration import require
from prune_lab.config.settings import SETTINGS, RunConfig
from prune_lab.errors import ConfigError, PruneLabError
from prune_lab.runtime import path_text, printable, read_text

# Names -----------------------------------------------------------------------------------------------------------


# Settings that an earlier version called otherwise: the old name, and what it is called now.
RENAMED: dict[str, str] = {
    "search.native_only": "search.form",
    "rank.engine": "engine.kind",
    "rank.address": "engine.address",
    "rank.storage": "engine.storage",
    "rank.cpus": "engine.cpus",
}


def setting_values(config: RunConfig) -> dict[str, object]:
    """The value of every setting in ``config`` by its dotted name, such as ``distill.steps``."""
    return {name: attrgetter(name)(config) for name in SETTINGS}


def unknown_setting(name: str) -> ConfigError:
    """What to raise for a setting that does not exist: names the nearest one, or what it is called now."""
    if name in RENAMED:
        return ConfigError(f"setting {name} is now called {RENAMED[name]}; write that instead")
    table, _, leaf = name.rpartition(".")
    # In the named table a near spelling will do; a right name in the wrong table is a nearer miss than any other.
    here = [other for other in SETTINGS if other.rpartition(".")[0] == table]
    leaves = difflib.get_close_matches(leaf, {one.rpartition(".")[2] for one in SETTINGS}, n=1, cutoff=0.8)
    near = (
        difflib.get_close_matches(name, here, n=1, cutoff=0.9)
        or [other for other in SETTINGS if other.rpartition(".")[2] in leaves]
        or difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.5)
    )
    tables = sorted({other.split(".")[0] for other in SETTINGS})
    known = f"did you mean {' or '.join(near)}?" if near else f"settings and tables are: {', '.join(tables)}"
    return ConfigError(f"there is no setting {name}; {known}")


def changed_settings(old: RunConfig, new: RunConfig) -> tuple[str, ...]:
    """The dotted names of the settings in which ``old`` and ``new`` differ."""
    before, after = setting_values(old), setting_values(new)
    return tuple(name for name in before if before[name] != after[name])


# Reading ---------------------------------------------------------------------------------------------------------

MOST_TOML = 2**20  # bytes of settings, most of them prompts
_MOST_DOTS = 100  # of a line outside of its texts: tomllib takes minutes for a name of some thousand parts
_QUOTED = re.compile(r""""[^"\n]*"|'[^'\n]*'|#[^\n]*""")


def _parsed(text: str) -> dict[str, Any]:
    """The TOML ``text`` as Python values. Raises ValueError, which says why not."""
    if text.count(".") > _MOST_DOTS and any(
        line.count(".") > _MOST_DOTS for line in _QUOTED.sub("", text).split("\n")
    ):
        raise ValueError(f"a line has more than {_MOST_DOTS} dots outside of its texts")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deep") from None


_KIND_NAMES = {str: "text in quotes", int: "whole number", float: "number", bool: "true or false"}


def _read(hint: Any, value: Any, name: str) -> Any:
    """The setting or table ``name`` of type ``hint`` from the ``value`` in the TOML; RunConfig itself has no name."""
    if dataclasses.is_dataclass(hint):
        require(isinstance(value, dict), name, value, f"a table: write [{name}] and its settings below")
        hints, values = typing.get_type_hints(hint), {}
        for key, inner in value.items():
            dotted = f"{name}.{key}" if name else key
            if key not in hints:
                raise unknown_setting(dotted)
            values[key] = _read(hints[key], inner, dotted)
        return typing.cast("type[Any]", hint)(**values)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        require(isinstance(value, list), name, value, f"a list in [ ], each a {_KIND_NAMES[item]}")
        return tuple(_read(item, one, name) for one in value)
    if hint is float and type(value) is int:
        return float(value)
    # `type`, not `isinstance`: true is an int to Python, and no count to a reader
    require(type(value) is hint, name, value, f"a {_KIND_NAMES[hint]}")
    return value


def config_from_toml(text: str) -> RunConfig:
    """The settings that the TOML ``text`` describes.

    Raises ConfigError, as ``load_config`` does.
    """
    try:
        table = _parsed(text)
    except ValueError as error:  # also of a number with thousands of digits
        raise ConfigError(
            f"this is not TOML: {printable(str(error))}; write lines such as steps = 500 under [distill]"
        ) from None
    config: RunConfig = _read(RunConfig, table, "")
    return config


def load_config(path: Path | str) -> RunConfig:
    """The settings in the TOML file ``path``; whatever it leaves out has its default.

    Raises ConfigError when the file is missing or not TOML, or when a setting is unknown or out of range.
    """
    try:
        text = read_text(path, most=MOST_TOML)
    except PruneLabError as error:
        raise ConfigError(f"asked for the settings in {path_text(path)}: {error}") from None
    try:
        return config_from_toml(text)
    except ConfigError as error:
        raise ConfigError(f"{path_text(path)}: {error}") from None


# One setting at a time --------------------------------------------------------------------------------------------


def parse_assignment(text: str) -> tuple[str, object]:
    """The setting and the value in ``text``, which is ``table.key=value``.

    The value is written as in TOML, but text needs no quotes, and a list of one item no brackets. Raises ConfigError
    for an unknown setting and for a value of another kind.
    """
    name, equals, written = (part.strip() for part in text.partition("="))
    if not equals:
        raise ConfigError(
            f"cannot read the setting {text!r}; write table.key=value, such as distill.steps=200"
        )
    if name not in SETTINGS:
        raise unknown_setting(name)
    hint = SETTINGS[name].hint
    try:
        found = _parsed(f"value = {written}") if len(written) <= MOST_TOML else {}
        (value,) = found.values()  # there are several where it goes on behind the value
    except ValueError:
        usable = typing.get_origin(hint) is not tuple or not written.startswith("[")
        require(usable, name, written, 'a list in TOML, such as ["one", "two"]')
        value = written
    if typing.get_origin(hint) is tuple and not isinstance(value, list):
        (item, *_) = typing.get_args(hint)
        value = [written if item is str and not isinstance(value, str) else value]
    elif hint is str and not isinstance(value, str):
        value = written
    return name, _read(hint, value, name)


def setting_named(name: str, value: object) -> Any:
    """``value`` as the setting ``name`` holds it: lists are tuples there, and whole numbers may stand for others.

    Raises ConfigError for an unknown setting and for a value of another kind.
    """
    if name not in SETTINGS:
        raise unknown_setting(name)
    return _read(SETTINGS[name].hint, list(value) if isinstance(value, tuple) else value, name)


def with_settings(config: RunConfig, values: Mapping[str, object]) -> RunConfig:
    """``config`` with other ``values`` of some settings, by their dotted names; checked when all are in place."""
    tables: dict[str, dict[str, Any]] = {"": {}}
    for name, value in values.items():
        table, _, key = name.rpartition(".")
        tables.setdefault(table, {})[key] = value
    own = tables.pop("")
    own |= {name: dataclasses.replace(getattr(config, name), **keys) for name, keys in tables.items()}
    return dataclasses.replace(config, **own)


# Writing ---------------------------------------------------------------------------------------------------------


def toml_literal(value: object) -> str:
    """The ``value`` of a setting as TOML writes it."""
    if isinstance(value, str):
        # TOML's escapes are JSON's, but TOML wants U+007F escaped as well
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(toml_literal(one) for one in value)}]"
    return repr(value)


def to_toml(config: RunConfig) -> str:
    """The TOML of every setting of ``config``, defaults included; reading it gives ``config`` again."""
    lines: list[str] = []
    for table, settings in itertools.groupby(SETTINGS, key=lambda name: name.rpartition(".")[0]):
        lines += ["", f"[{table}]"] if table else []
        lines += [f"{name.split('.')[-1]} = {toml_literal(attrgetter(name)(config))}" for name in settings]
    return "\n".join(lines) + "\n"
