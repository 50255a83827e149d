"""What lets a model run on the ``meta`` device, where tensors have shapes and no numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

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
