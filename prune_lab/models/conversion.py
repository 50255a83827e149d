"""Numbers of weights: checked, and converted to another format that holds them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prune_lab.errors import ModelFormatError
from prune_lab.families import loaded_format

_REMEDY = "its weights are broken; fetch the model again, or take another checkpoint of it"


# Checking --------------------------------------------------------------------------------------------------------


def _range(tensor: Tensor) -> tuple[float, float]:
    """The least and the largest number of ``tensor``; NaN for both where it holds one."""
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # formats of eight bits have no such test
    low, high = wide.detach().aminmax()  # one pass without a copy, unlike isfinite
    return float(low), float(high)


@dataclasses.dataclass(slots=True)
class Look:
    """A look at the numbers of a model, tensor by tensor.

    Numbers that are not finite, or matrices that all hold one number over and over: no trained model has those.
    """

    constant: list[float] = dataclasses.field(default_factory=list)  # of each matrix that holds one number
    varied: bool = False  # whether a matrix holds others

    def at(self, name: str, tensor: Tensor) -> str:
        """What is broken about one tensor by itself; empty where nothing is."""
        if not tensor.is_floating_point() or not tensor.numel():
            return ""
        low, high = _range(tensor)
        if math.isnan(low):
            return f"its tensor {name} holds NaN (not a number)"
        if math.isinf(low) or math.isinf(high):
            return f"its tensor {name} holds infinite numbers"
        if tensor.squeeze().ndim > 1:
            self.varied = self.varied or low < high
            self.constant += [low] if low == high else []
        return ""

    @property
    def over(self) -> str:
        """What is broken about all that were looked at; empty where nothing is."""
        if self.varied or not self.constant:
            return ""
        return f"each of its {len(self.constant)} matrices holds {self.constant[0]:g} throughout"


def flaw(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """What is broken about the named ``tensors`` of a model, the first of it; empty where nothing is."""
    look = Look()
    return next(filter(None, (look.at(name, tensor) for name, tensor in tensors)), "") or look.over


def stored(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor in the safetensors ``files`` with its name, read one by one through a memory map."""
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelFormatError(f"asked to read {path}: {error}; fetch the file again") from None


def refuse_broken(found: str, named: str, dtype: torch.dtype | None = None) -> None:
    """Raise ModelFormatError where something was ``found`` of what is ``named``; ``dtype`` as of ``refuse_flawed``."""
    if found:
        remedy = _REMEDY
        if dtype is not None and dtype.itemsize < 4 and "infinite" in found:
            remedy += f"; if it is not, {dtype} cannot hold it: give float32 or bfloat16"
        raise ModelFormatError(f"asked for {named}: {found}: {remedy}")


def refuse_flawed(
    tensors: Iterable[tuple[str, Tensor]], named: str, dtype: torch.dtype | None = None
) -> None:
    """Raise ModelFormatError, with the first tensor that is broken, for the ``tensors`` of what is ``named``.

    ``dtype`` is the format in which they were loaded, None that of their files.
    """
    refuse_broken(flaw(tensors), named, dtype)


# Converting ------------------------------------------------------------------------------------------------------


def converted(name: str, tensor: Tensor, dtype: torch.dtype | None, model_class: Any = None) -> Tensor:
    """``tensor`` in ``dtype``, or as it is for None and for whole numbers; in float32 where ``model_class`` leaves it
    so when it is loaded in ``dtype``.

    Raises ModelFormatError, with its ``name``, when it holds what is no finite number, or a number that is too large
    for ``dtype``.
    """
    if not tensor.is_floating_point():
        return tensor
    if dtype is not None:
        dtype = loaded_format(model_class, name, dtype)
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
