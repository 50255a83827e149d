"""How the weights are stored: one byte for each of the large matrices, two for the rest, read by plain diffusers.

Eight-bit floats (e4m3: 4 bits of exponent, 3 of mantissa) need no table of scales: whoever reads the file turns them
into the numbers of the type that was asked for. Their steps are an eighth of the number's size, and 1/512 next to zero;
so the last part of the training sees its weights rounded, and learns around it.
"""

from __future__ import annotations

import torch
from diffusers import PixArtTransformer2DModel
from torch import nn

_BYTE = torch.float8_e4m3fn
_REST = torch.float16


def rounded_names(transformer: PixArtTransformer2DModel) -> tuple[str, ...]:
    """Names of the weights that are stored in one byte: all linear layers inside the blocks, and the modulation's."""
    inside = [
        f"{name}.weight"
        for name, module in transformer.named_modules()
        if name.startswith("transformer_blocks.") and isinstance(module, nn.Linear)
    ]
    return (*inside, "adaln_single.linear.weight")


def stored(weight: torch.Tensor) -> torch.Tensor:
    """The weight as it is after storing and reading, in its own type."""
    return weight.to(_BYTE).to(weight.dtype)


def as_stored(transformer: PixArtTransformer2DModel) -> dict[str, torch.Tensor]:
    """The state dict in the types of the file."""
    names = set(rounded_names(transformer))
    return {
        name: value.detach().cpu().to(_BYTE if name in names else _REST).contiguous()
        for name, value in transformer.state_dict().items()
    }
