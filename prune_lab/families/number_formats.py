"""The number formats in which diffusers and transformers hold a model that is asked for in one: not one for all of it.

They leave some modules in float32, and build what no file holds, such as the places of patches, under the format that
is asked for. ``Module.to`` does neither: a model that is cast answers otherwise than one that is loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_HALVES = (torch.float16, torch.bfloat16)


def loaded_format(model_class: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """The format of the tensor ``name``, which is not of whole numbers, of a model loaded in ``dtype``."""
    kept = tuple(getattr(model_class, "_keep_in_fp32_modules", None) or ())
    if not hasattr(model_class, "_keep_in_fp32_modules_strict"):  # a class of diffusers
        return dtype if set(kept).isdisjoint(name.split(".")) else torch.float32
    # transformers searches the whole name, of the first for float16 alone
    strict = tuple(model_class._keep_in_fp32_modules_strict or ())
    words = (*strict, *(kept if dtype == torch.float16 else ()))
    return torch.float32 if dtype in _HALVES and any(word in name for word in words) else dtype


def in_loaded_format(model_class: Any, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The ``tensor`` called ``name`` as a model that is loaded in ``dtype`` has it; whole numbers stay."""
    return tensor.to(loaded_format(model_class, name, dtype)) if tensor.is_floating_point() else tensor


def format_of(module: nn.Module) -> torch.dtype:
    """The format in which ``module`` takes its inputs; some of its own tensors may be in float32 whatever that is."""
    said = getattr(module, "dtype", None)
    return said if isinstance(said, torch.dtype) else next(module.parameters()).dtype


@contextlib.contextmanager
def building_in(dtype: torch.dtype) -> Iterator[None]:
    """Inside, what is built has numbers in ``dtype`` where nothing else is said, as while diffusers loads a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
