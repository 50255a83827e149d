"""A U-Net with random weights, for timing alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from prune_lab.families import empty_model, family_of
from prune_lab.runtime import seeded


def random_unet(
    config: Mapping[str, Any],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> ModelMixin:
    """A U-Net of ``config`` with random weights in evaluation mode, for timing: made in seconds, good for nothing else.

    The same 4,096 normal numbers are repeated through all weights; no kernel's time depends on which they are.
    """
    unet: ModelMixin = nn.Module.to(empty_model(config), dtype)
    unet._apply(
        lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
    )
    noise = 0.02 * torch.randn(4096, generator=seeded(seed)).to(device=device, dtype=dtype)
    with torch.no_grad():
        for tensor in unet.parameters():
            count = tensor.numel()
            tensor.copy_(noise.repeat(-(-count // len(noise)))[:count].view_as(tensor))
    return unet


def compile_blocks(unet: ModelMixin) -> None:
    """Put the repeated blocks of ``unet`` through torch.compile when they are first called, in place."""
    names = family_of(unet).compiled
    for module in unet.modules():
        if type(module).__name__ in names:
            module.compile()


def shell_of(unet: ModelMixin) -> ModelMixin:
    """A model of the same class and config that holds the tensors of ``unet``: it can be compiled, ``unet`` stays."""
    found: ModelMixin = empty_model(unet.config)
    nn.Module.load_state_dict(found, unet.state_dict(), strict=True, assign=True)
    return nn.Module.to(found, unet.device).eval()
