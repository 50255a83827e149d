"""Which units stay where a plan says only how many: those with the largest weights, read from the files of a model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from prune_lab.blocks import Architecture, architecture_of
from prune_lab.families import Site, cut_tensors, meta_model
from prune_lab.plans import PruningPlan
from prune_lab.width import keeping_largest, site_named


def unit_magnitudes(architecture: Architecture, site: Site, take: Callable[[str], Tensor]) -> list[float]:
    """(units,) the sum of the squares of all weights that leave with each unit; biases and norms do not count.

    This is torch-pruning's magnitude of the group, without a forward pass. ``take`` gives a tensor by its name.
    """
    model = meta_model(architecture.config)
    sums = torch.zeros(site.count, dtype=torch.float64)
    for name, (side, parts) in cut_tensors(model, site).items():
        tensor = take(name)
        if tensor.ndim > 1:
            squares = tensor.double().square().transpose(0, side).flatten(1).sum(1)
            sums += squares.reshape(parts, site.count, site.size).sum((0, 2)).cpu()
    found: list[float] = sums.tolist()
    return found


def with_units_chosen(
    plan: PruningPlan, architecture: Architecture, take: Callable[[str], Tensor]
) -> PruningPlan:
    """``plan`` whose widths all say which units stay: by weights where that was open."""

    def impacts(site: str) -> list[float]:
        return unit_magnitudes(architecture, site_named(site, architecture.sites), take)

    widths = tuple(
        width if width.chosen else keeping_largest(width, impacts(width.site)) for width in plan.widths
    )
    return dataclasses.replace(plan, widths=widths)


def with_first_units(plan: PruningPlan) -> PruningPlan:
    """``plan`` whose widths keep the first units where that was open: enough where only costs are asked for."""
    widths = tuple(keeping_largest(width, [0] * width.of) for width in plan.widths)
    return dataclasses.replace(plan, widths=widths)


def chosen_from_files(plan: PruningPlan, config: Mapping[str, Any], files: Sequence[Path]) -> PruningPlan:
    """The same, by the weights in safetensors ``files`` of the model of ``config``; no other tensors are read."""
    if all(width.chosen for width in plan.widths):
        return plan
    with contextlib.ExitStack() as stack:
        homes: dict[str, Any] = {}
        for path in files:
            file = stack.enter_context(safe_open(path, framework="pt"))
            homes |= dict.fromkeys(file.keys(), file)
        return with_units_chosen(plan, architecture_of(config), lambda name: homes[name].get_tensor(name))
