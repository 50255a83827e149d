"""Settings that only students with code of their own have, looked at before that code reads them."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

from torch import nn

from prune_lab.families.setting_rules import TEXT, TRUTH, WIDTH, Rule, refuse

Modules: TypeAlias = Mapping[str, nn.Module]  # by path

# Numbers of a module that widths change: the sizes of layers, and what ``families.widths`` says of sites beside.
_NUMBERS = (
    *("in_features", "out_features", "in_channels", "out_channels", "num_channels", "num_groups"),
    *("heads", "sliceable_head_dim", "inner_dim", "inner_kv_dim"),
)


def _names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _handed_on(value: object) -> bool:
    return isinstance(value, list) and all(one is None or isinstance(one, str) for one in value)


_OF_GONE: Mapping[str, Rule] = {
    "hands_on": Rule(_handed_on, "a list of names of inputs"),
    "channels": WIDTH.or_null(),
    "in_tuple": TRUTH,
    "keeps": Rule(_names, "a list of paths of modules"),
    "mark": Rule(lambda value: value == "" or TEXT.fits(value), "a name"),
}


def _module(modules: Modules, path: object, key: str) -> Any:
    """The one of ``modules`` at ``path``. Raises UnsupportedModelError where there is none."""
    if not isinstance(path, str) or not path or path not in modules:
        refuse(key, path, f"the path of a module of the model, such as {next(filter(None, modules))}")
    return modules[path]


def _object(value: object, key: str, meaning: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        refuse(key, value, meaning)
    return value


def _check_removed(modules: Modules, removed: object) -> None:
    gone = _object(removed, "removed", "an object: for each path what is there instead")
    for path, how in gone.items():
        block = _module(modules, path, "removed")
        key = f"removed.{path}"
        inputs = list(inspect.signature(type(block).forward).parameters)[1:]
        for name, value in _object(how, key, f"an object with {', '.join(_OF_GONE)}").items():
            if name not in _OF_GONE:
                refuse(f"{key}.{name}", value, f"left out: known are {', '.join(_OF_GONE)}")
            if not _OF_GONE[name].fits(value):
                refuse(f"{key}.{name}", value, _OF_GONE[name].meaning)
        for name in how.get("hands_on", [object()]):
            if name is not None and name not in inputs:
                shown = name if isinstance(name, str) else None
                refuse(f"{key}.hands_on", shown, f"a list of inputs of the block, of {', '.join(inputs)}")
        for inner in how.get("keeps", []):
            _module(dict(block.named_modules()), inner, f"{key}.keeps")
    if gone and not any(how.get("mark") for how in gone.values()):
        refuse("removed", [], "with a mark in one of its modules, by which weights tell what is gone")


def _check_widths(modules: Modules, widths: object, gone: Collection[str]) -> None:
    for path, numbers in _object(widths, "widths", "an object: for each path its numbers").items():
        module = _module(modules, path, "widths")
        key = f"widths.{path}"
        if any(path == one or path.startswith(f"{one}.") for one in gone):
            refuse("widths", path, "a path of what is there: by removed that module is gone")
        has = [name for name in _NUMBERS if type(getattr(module, name, None)) is int]
        for name, value in _object(numbers, key, f"an object with numbers of {', '.join(has)}").items():
            if name not in has:
                refuse(
                    f"{key}.{name}", value, f"left out: the module has {', '.join(has) or 'no such number'}"
                )
            most = getattr(module, name)
            if type(value) is not int or not 1 <= value <= most:
                refuse(f"{key}.{name}", value, f"a whole number from 1 to {most}, what the whole model has")


def check_own(model: nn.Module, removed: object, main_path: object, widths: object) -> None:
    """Raise UnsupportedModelError where one of these settings makes no sense for ``model``, the whole one; None: it is
    not there.
    """
    modules = dict(model.named_modules())  # once: a student without half its blocks names a hundred paths
    if removed is not None:
        _check_removed(modules, removed)
    if main_path is not None:
        paths = (
            main_path if isinstance(main_path, list) else refuse("main_path", main_path, "a list of paths")
        )
        for path in paths:
            _module(modules, path, "main_path")
    if widths is not None:
        _check_widths(modules, widths, removed if isinstance(removed, dict) else ())
