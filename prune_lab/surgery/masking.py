"""Units of a width set to 0 for a trial, where the layer behind reads them: what a plan with widths means.

A compact model that has only the units that stay computes the same, up to the rounding of shorter sums.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.families import Kept, Site


def unit_mask(site: Site, kept: Iterable[int]) -> Tensor:
    """(channels,) 1 for the channels of the units ``kept`` of ``site``, 0 for the others."""
    mask = torch.zeros(site.count)
    mask[list(kept)] = 1
    return mask.repeat_interleave(site.size)


def _masking(mask: Tensor, channels: int) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        state: Tensor = args[0]
        form = (-1, *[1] * (state.ndim - 2)) if channels == 1 else (-1,)
        return (state * mask.to(state.device, state.dtype).reshape(form), *args[1:])

    return hook


@contextlib.contextmanager
def masked(model: nn.Module, kept: Kept) -> Iterator[nn.Module]:
    """The same ``model`` that reads 0 in place of all units but those ``kept``; as it was on exit."""
    with contextlib.ExitStack() as hooks:
        for site, units in kept.items():
            mask = unit_mask(site, units)
            for path in site.narrow:
                layer = model.get_submodule(path)
                channels = 1 if isinstance(layer, nn.Conv2d) else -1
                hooks.enter_context(layer.register_forward_pre_hook(_masking(mask, channels)))
        yield model
