"""Modules that answer in another way for a while, and stay what and where they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn


@contextlib.contextmanager
def patched(model: nn.Module, forwards: Mapping[str, Callable[..., Any]]) -> Iterator[nn.Module]:
    """The same ``model`` whose modules at the paths in ``forwards`` answer through these; as it was on exit.

    Only ``forward`` is exchanged: a parent that reads a block's attributes finds them, which it would not in another
    module that is put in its place.
    """
    modules = {path: model.get_submodule(path) for path in forwards}
    before = {path: module.__dict__.get("forward") for path, module in modules.items()}
    try:
        for path, forward in forwards.items():
            modules[path].forward = forward
        yield model
    finally:
        for path, module in modules.items():
            own = before[path]  # accelerate's hooks put theirs where this one stood
            if own is not None:
                module.forward = own
            else:
                module.__dict__.pop("forward", None)
