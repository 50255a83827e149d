"""Weights in one byte a number, for storing: whole numbers from -127 to 127, and a scale for each row of a matrix.

A file of such weights is half as large as one in float16. It is read back as float16, always as the same numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

_LARGEST = 127
_SCALE = ".scale"


def packed(tensors: Mapping[str, torch.Tensor], names: Collection[str]) -> dict[str, torch.Tensor]:
    """The matrices `names` as int8 with a float32 scale (rows, 1) each, the other tensors as float16."""
    found: dict[str, torch.Tensor] = {}
    for name, given in tensors.items():
        value = given.detach().cpu().float()
        if name in names:
            scale = value.abs().amax(1, keepdim=True) / _LARGEST
            whole = value / scale.clamp_min(torch.finfo(torch.float32).tiny)
            found[name] = whole.round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
            found[name + _SCALE] = scale
        else:
            found[name] = value.half().contiguous()
    return found


def unpacked(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that were packed, float16, under their own names."""
    return {
        name: (value.float() * tensors[name + _SCALE]).half() if value.dtype == torch.int8 else value
        for name, value in tensors.items()
        if not name.endswith(_SCALE)
    }
