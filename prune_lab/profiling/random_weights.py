"""A model with random weights, for timing alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from prune_lab.families import empty_model, family_of
from prune_lab.runtime import seeded


def random_model(
    config: Mapping[str, Any],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> ModelMixin:
    """A model of ``config`` with random weights in evaluation mode, for timing: made in seconds, good for nothing else.

    The same 4,096 normal numbers are repeated through all weights; no kernel's time depends on which they are.
    """
    model: ModelMixin = empty_model(config, dtype)
    model._apply(
        lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
    )
    noise = 0.02 * torch.randn(4096, generator=seeded(seed)).to(device=device, dtype=dtype)
    with torch.no_grad():
        for tensor in model.parameters():
            count = tensor.numel()
            tensor.copy_(noise.repeat(-(-count // len(noise)))[:count].view_as(tensor))
    return model


def compile_blocks(model: ModelMixin) -> None:
    """Put the repeated blocks of ``model`` through torch.compile when they are first called, in place."""
    names = family_of(model).compiled
    for module in model.modules():
        if type(module).__name__ in names:
            module.compile()


def shell_of(model: ModelMixin) -> ModelMixin:
    """A model of the same class and config that holds the tensors of ``model``: it can be compiled, ``model`` stays."""
    found: ModelMixin = empty_model(model.config, model.dtype)
    nn.Module.load_state_dict(found, model.state_dict(), strict=True, assign=True)
    return nn.Module.to(found, model.device).eval()
