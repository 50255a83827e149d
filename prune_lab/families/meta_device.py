"""What lets a model run on the ``meta`` device, where tensors have shapes and no numbers."""

from __future__ import annotations

import contextlib
import functools
import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from prune_lab.families.family import CLASS_NAME

_AUTOCAST = torch.autocast


def _autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
    """``torch.autocast``, which does nothing on ``meta`` instead of refusing it (Mochi asks for it)."""
    return contextlib.nullcontext() if device_type == "meta" else _AUTOCAST(device_type, *args, **kwargs)


def _on_meta(value: Any) -> Any:
    # a size is a tensor of no dimension while a model is traced
    return value.to("meta") if isinstance(value, Tensor) and value.ndim and not value.is_meta else value


class _MasksFollow(TorchFunctionMode):
    """A mask whose words are counted while a model runs (Lumina 2, Mochi) is no ``meta`` tensor: it becomes one
    where it meets others.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if any(isinstance(value, Tensor) and value.is_meta for value in (*args, *given.values())):
            args = tuple(_on_meta(value) for value in args)
            given = {name: _on_meta(value) for name, value in given.items()}
        return func(*args, **given)


@contextlib.contextmanager
def runs_on_meta() -> Iterator[None]:
    """Inside, models that ask for more than shapes run on ``meta`` as well."""
    torch.autocast = _autocast  # type: ignore[misc,assignment]
    try:
        with torch.no_grad(), _MasksFollow():
            yield
    finally:
        torch.autocast = _AUTOCAST  # type: ignore[misc]


@functools.lru_cache(maxsize=32)
def _built(canonical: str) -> Any:
    config = json.loads(canonical)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what diffusers says of its own parts
        return getattr(diffusers, config[CLASS_NAME]).from_config(config).eval()


@functools.lru_cache(maxsize=32)
def _names(canonical: str) -> tuple[str, ...]:
    return tuple(_built(canonical).state_dict())


def _canonical(config: Mapping[str, Any]) -> str:
    return json.dumps(dict(config), sort_keys=True)


def shapes_of(config: Mapping[str, Any]) -> Any:
    """The diffusers model of a ``config`` that was checked, on ``meta``: to be read, since equal configs share it."""
    return _built(_canonical(config))


def tensors_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of all tensors of that model."""
    return _names(_canonical(config))
