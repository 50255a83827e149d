"""Names that diffusers gave a class before it had one of its own, as published models still have them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers

from prune_lab.families.family import CLASS_NAME

# By the old class and its ``norm_type``; diffusers itself loads these as the new class.
_NEW_NAMES: Mapping[tuple[str, str], str] = {
    ("Transformer2DModel", "ada_norm_zero"): "DiTTransformer2DModel",
    ("Transformer2DModel", "ada_norm_single"): "PixArtTransformer2DModel",
}


def modern_class(name: object, config: Mapping[str, Any]) -> Any:
    """The class that diffusers makes of a model of ``config`` that says it is a ``name``: itself unless it is an old
    one.
    """
    return _NEW_NAMES.get((str(name), str(config.get("norm_type"))), name)


def _settings(class_name: str) -> set[str]:
    return set(inspect.signature(getattr(diffusers, class_name).__init__).parameters)


def modern_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same ``config`` with the name of today's class, and without the settings that only the old one had."""
    name = config.get(CLASS_NAME)
    new = modern_class(name, config)
    if new == name:
        return dict(config)
    dropped = _settings(str(name)) - _settings(new)
    return {key: value for key, value in config.items() if key not in dropped} | {CLASS_NAME: new}
