"""Models built from a config, before or without their weights."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from prune_lab.errors import UnsupportedModelError
from prune_lab.families.family import CLASS_NAME, plain_config, usual_settings
from prune_lab.families.known import FAMILIES, family_of
from prune_lab.families.number_formats import building_in, in_loaded_format
from prune_lab.runtime import printable

# What diffusers raises, all of it unplanned, where a config makes no sense.
BUILD_ERRORS = (
    *(TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError),
    *(NotImplementedError, RecursionError, MemoryError),
)


def said(error: BaseException) -> str:
    """What a library says of ``error``, in one short line."""
    return printable(" ".join(f"{type(error).__name__}: {error}".split()), 200)


def _check_of_one_class(config: Mapping[str, Any], known: set[str]) -> None:
    """Raise UnsupportedModelError where ``config`` has the settings of another class than the one it names: what that
    one does not know would be left out, and another model be built.
    """
    given = plain_config(config).keys()
    if given <= known:
        return
    for name, family in FAMILIES.items():
        theirs = {CLASS_NAME, *inspect.signature(family.model_class().__init__).parameters}
        if name != config[CLASS_NAME] and given <= theirs:
            raise UnsupportedModelError(
                f"asked to build a {config[CLASS_NAME]}, found the settings of a {name} in its config "
                f"({', '.join(sorted(given - known)[:3])}); correct {CLASS_NAME}"
            )


def _with_formats(model: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """``model`` with ``tensors`` in the formats of one that is loaded in ``dtype``."""
    found = {name: in_loaded_format(type(model), name, one, dtype) for name, one in tensors.items()}
    nn.Module.load_state_dict(model, found, strict=True, assign=True)
    return model


def check_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of ``config`` that its class knows. Raises UnsupportedModelError where one is out of bounds."""
    family = family_of(config)
    model_class = family.model_class()
    # What diffusers does not know, such as the state of a moving average, it would leave out with a warning.
    known = {CLASS_NAME, *inspect.signature(model_class.__init__).parameters}
    _check_of_one_class(config, known)
    settings = {name: value for name, value in plain_config(config).items() if name in known}
    family.check(settings, usual_settings(model_class))
    return settings


def _built(config: Mapping[str, Any], place: AbstractContextManager[Any], dtype: torch.dtype) -> Any:
    """The model of ``config``, built inside ``place``, in evaluation mode; its formats are those of one that is loaded
    in ``dtype``.

    Raises UnsupportedModelError when a setting is out of bounds, or diffusers cannot build it.
    """
    model_class: Any = family_of(config).model_class()
    settings = check_settings(config)
    try:
        with place, building_in(dtype), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # what diffusers says of its own parts
            model = model_class.from_config(settings).eval()
    except BUILD_ERRORS as error:
        # diffusers checks a config by building it; what it says is about the config's own keys
        raise UnsupportedModelError(
            f"asked to build a {model_class.__name__} from its config, diffusers refuses it "
            f"({said(error)}); compare the config with that of a model that loads"
        ) from None
    return model if dtype == torch.float32 else _with_formats(model, model.state_dict(), dtype)


def meta_model(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """The model of ``config`` on the ``meta`` device: every shape, no memory, in evaluation mode.

    ``dtype`` is what diffusers would be asked for. Raises UnsupportedModelError when a setting is out of bounds, or
    diffusers cannot build it.
    """
    return _built(config, torch.device("meta"), dtype)


def empty_model(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """The model of ``config`` before its weights are there: they are on ``meta``, and what is computed of the config
    alone (kernels of samplers, places of patches, which no file holds) is not. In evaluation mode. Arguments and errors
    are those of ``meta_model``.
    """
    return _built(config, init_empty_weights(include_buffers=False), dtype)


def as_loaded(model: Any, dtype: torch.dtype) -> Any:
    """``model``, which is in float32 on the CPU, as plain diffusers would load it in ``dtype`` had it been saved: its
    tensors are taken over, and ``model`` must not be used any more. In evaluation mode.
    """
    if dtype == torch.float32:
        return model.eval()
    return _with_formats(empty_model(plain_config(model), dtype), model.state_dict(), dtype)
