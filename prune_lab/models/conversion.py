"""Numbers of weights: checked, and converted to another format that holds them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prune_lab.errors import ModelFormatError

_REMEDY = "its weights are broken; fetch the model again, or take another checkpoint of it"


# Checking --------------------------------------------------------------------------------------------------------


def _range(tensor: Tensor) -> tuple[float, float]:
    """The least and the largest number of ``tensor``; NaN for both where it holds one."""
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # formats of eight bits have no such test
    low, high = wide.detach().aminmax()  # one pass without a copy, unlike isfinite
    return float(low), float(high)


def flaw(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """What is broken about the named ``tensors`` of a model, the first of it; empty where nothing is.

    Numbers that are not finite, or matrices that all hold one number over and over: no trained model has those.
    """
    constant: list[float] = []
    varied = False
    for name, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = _range(tensor)
        if math.isnan(low):
            return f"its tensor {name} holds NaN (not a number)"
        if math.isinf(low) or math.isinf(high):
            return f"its tensor {name} holds infinite numbers"
        if tensor.squeeze().ndim > 1:
            varied = varied or low < high
            constant += [low] if low == high else []
    if varied or not constant:
        return ""
    return f"each of its {len(constant)} matrices holds {constant[0]:g} throughout"


def stored(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor in the safetensors ``files`` with its name, read one by one through a memory map."""
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelFormatError(f"asked to read {path}: {error}; fetch the file again") from None


def refuse_flawed(
    tensors: Iterable[tuple[str, Tensor]], named: str, dtype: torch.dtype | None = None
) -> None:
    """Raise ModelFormatError, with the first tensor that is broken, for the ``tensors`` of what is ``named``.

    ``dtype`` is the format in which they were loaded, None that of their files.
    """
    if found := flaw(tensors):
        remedy = _REMEDY
        if dtype is not None and dtype.itemsize < 4 and "infinite" in found:
            remedy += f"; if it is not, {dtype} cannot hold it: give float32 or bfloat16"
        raise ModelFormatError(f"asked for {named}: {found}: {remedy}")


# Converting ------------------------------------------------------------------------------------------------------


def converted(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``tensor`` in ``dtype``, or as it is for None and for whole numbers.

    Raises ModelFormatError, with its ``name``, when it holds what is no finite number, or a number that is too large
    for ``dtype``.
    """
    if not tensor.is_floating_point():
        return tensor
    found = tensor if dtype is None else tensor.to(dtype)
    if not found.numel() or all(map(math.isfinite, _range(found))):
        return found
    low, high = _range(tensor)
    if not math.isfinite(low) or not math.isfinite(high):
        what = "NaN (not a number)" if math.isnan(low) else "infinite numbers"
        raise ModelFormatError(f"asked to write the model, whose own tensor {name} holds {what}: {_REMEDY}")
    asked = str(dtype).removeprefix("torch.")
    raise ModelFormatError(
        f"asked to convert tensor {name} to {asked}, found {max(-low, high):.3g} in it, which is too large for that; "
        "give float32 or bfloat16"
    )
