"""Numbers of weights: checked, and converted to another format that holds them."""

from __future__ import annotations

import torch
from torch import Tensor

from prune_lab.errors import ModelFormatError


def _finite(tensor: Tensor) -> bool:
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # formats of eight bits have no such test
    return bool(wide.isfinite().all())


def converted(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``tensor`` in ``dtype``, or as it is for None and for whole numbers.

    Raises ModelFormatError, with its ``name``, when it holds what is no finite number, or a number that is too large
    for ``dtype``.
    """
    if not tensor.is_floating_point():
        return tensor
    found = tensor if dtype is None else tensor.to(dtype)
    if _finite(found):
        return found
    if not _finite(tensor):
        what = "NaN (not a number)" if tensor.float().isnan().any() else "infinite numbers"
        raise ModelFormatError(
            f"asked to write the model, whose own tensor {name} holds {what}: "
            "its weights are broken; fetch the model again, or take another checkpoint of it"
        )
    largest = float(tensor.abs().max())
    asked = str(dtype).removeprefix("torch.")
    raise ModelFormatError(
        f"asked to convert tensor {name} to {asked}, found {largest:.3g} in it, which is too large for that; "
        "give float32 or bfloat16"
    )
