"""What a model answers without each of many sets of blocks, at the cost of what those answers do not share.

Removing a block changes nothing before it, so sets of removed blocks share the computation up to where they first
differ. How a model is taken apart for that is its family's business (``families.PrefixWalk``); where a family does not
say, every set is a forward pass of its own.

For the 38 blocks of SD-v1.4 this needs 1.71 times fewer multiply-adds than running everything for every block; more is
not to be had, since the blocks before a removal are computed once and those after it must be computed anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from torch import Tensor

from prune_lab.blocks import Architecture, architecture_of
from prune_lab.errors import UnsupportedModelError
from prune_lab.families import Unit
from prune_lab.probes import Probe, evaluating
from prune_lab.runtime import free_bytes, track
from prune_lab.surgery import bypassed

_TESTED_DIFFUSERS = "0.42"
_MEMORY_SHARE = 0.4  # of what is free when the walk starts
_MOST_BYTES = 6 << 30
_LEAST_WIDTH = 8
_CPU_ROWS = 128  # in one call: beyond that a processor's caches lose more than larger calls gain
_ROUNDINGS = 16  # that the walk may differ by from the U-Net's own forward pass; on one machine it is 0
_COMPILED_ROUNDINGS = 1024  # the same for compiled blocks, which add up in another order
_GRAPHS = 128  # that torch may compile of one class of block: each width is one


@dataclass(slots=True)
class ComputeCost:
    """Multiply-adds of a walk, those of running everything for every set, and those of one sample's forward pass."""

    macs: int = 0
    naive_macs: int = 0
    forward_macs: int = 0

    @property
    def forwards(self) -> float:
        """The work in forward passes of one sample through the whole U-Net."""
        return self.macs / self.forward_macs if self.forward_macs else 0.0

    @property
    def saving(self) -> float:
        """How many times fewer multiply-adds than running everything for every set; 1 when nothing was shared."""
        return self.naive_macs / self.macs if self.macs else 1.0


def state_bytes(architecture: Architecture, itemsize: int = 4) -> int:
    """Bytes that one row of one state takes at most while it is computed; 0 where a family has no walk."""
    walk = architecture.family.walk
    return walk.state_bytes(architecture.outline, itemsize) if walk else 0


def fitting_batch(
    architecture: Architecture, rows: int, device: torch.device, itemsize: int = 4
) -> tuple[int, int]:
    """At most ``rows`` rows, and how many states of them fit beside each other into the device's free memory.

    Rows are given up before there are fewer than `_LEAST_WIDTH` states: states are what is shared.
    """
    one = state_bytes(architecture, itemsize)
    if not one:
        return rows, 1
    budget = min(_MOST_BYTES, int(_MEMORY_SHARE * free_bytes(device)))
    fitting = budget // one
    rows = max(1, min(rows, fitting // _LEAST_WIDTH))
    if device.type == "cpu":
        fitting = min(fitting, _CPU_ROWS)
    return rows, max(1, fitting // rows)


def macs_without(architecture: Architecture, gone: frozenset[str]) -> int:
    """Multiply-adds of one row that a set of units ``gone`` needs beside the U-Net's own pass: what comes after the
    first of them. Sets that share their first removals need less.
    """
    units = architecture.units
    first = next((place for place, unit in enumerate(units) if unit.name in gone), -1)
    around = architecture.total_macs - sum(unit.macs for unit in units)  # the stem and the head
    return around + sum(unit.macs for unit in units[first + 1 :] if unit.name not in gone)


def compiling(wanted: bool) -> contextlib.AbstractContextManager[object]:
    """Inside, torch compiles as many graphs of one class of block as there are widths, and not the usual eight."""
    if not wanted:
        return contextlib.nullcontext()
    patched: contextlib.AbstractContextManager[object] = torch._dynamo.config.patch(recompile_limit=_GRAPHS)
    return patched


def check_walk(unet: ModelMixin, inputs: dict[str, Any], *, compiled: bool = False) -> None:
    """Compare the walk with ``unet.forward`` on the first row of ``inputs``.

    Raises UnsupportedModelError when they differ: this diffusers computes the model in another way than the walk.
    """
    one = {
        name: {key: value[:1] for key, value in tensor.items()} if isinstance(tensor, dict) else tensor[:1]
        for name, tensor in inputs.items()
    }
    wanted = unet(**one, return_dict=False)[0]
    ((_, found),) = _answers(unet, one, [frozenset()], 1, ComputeCost(), compiled)
    tolerance = (_COMPILED_ROUNDINGS if compiled else _ROUNDINGS) * torch.finfo(wanted.dtype).eps
    # A damaged model is not this function's business: what is not finite only has to be so in both.
    atol = tolerance * float(wanted.nan_to_num(0, 0, 0).abs().max())
    if not torch.allclose(found, wanted, rtol=tolerance, atol=atol, equal_nan=True):
        raise UnsupportedModelError(
            "asked to score by shared prefixes, found that the blocks one after the other give another answer than "
            f"the U-Net itself (largest difference {float((found - wanted).abs().max()):.2g}); "
            f"prune_lab is tested with diffusers {_TESTED_DIFFUSERS}, this is {diffusers.__version__}"
        )


def _naive(
    model: ModelMixin,
    architecture: Architecture,
    inputs: dict[str, Any],
    removed: Sequence[frozenset[str]],
    computed: Callable[[Unit, int], None],
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """The predictions of ``families.PrefixWalk``, by a forward pass for every distinct set."""
    blocks = {block.name for block in architecture.named}
    for gone in dict.fromkeys(removed):
        with bypassed(model, gone & blocks, stand_in=True):
            prediction = model(**inputs, return_dict=False)[0]
        for unit in architecture.units:
            if unit.name not in gone:
                computed(unit, len(prediction))
        yield tuple(number for number, other in enumerate(removed) if other == gone), prediction


def _walkable(architecture: Architecture, removed: Sequence[frozenset[str]]) -> bool:
    """Whether the walk knows how to call all units, and none of ``removed`` lies inside another."""
    layers = {layer.name for layer in architecture.layers}
    return all(gone.isdisjoint(layers) for gone in removed) and all(
        unit.in_tuple if unit.kind == "attention" else unit.hands_on == ("hidden_states",)
        for unit in architecture.units
        if unit.kind != "resnet"
    )


def _answers(
    model: ModelMixin,
    inputs: dict[str, Any],
    removed: Sequence[frozenset[str]],
    width: int,
    compute: ComputeCost,
    compiled: bool,
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    architecture = architecture_of(model)
    macs = {unit.name: unit.macs for unit in architecture.units}
    compute.forward_macs = architecture.total_macs

    def computed(unit: Unit, rows: int) -> None:
        compute.macs += macs[unit.name] * rows

    walk = architecture.family.walk
    if walk is None or not _walkable(architecture, removed):
        found = _naive(model, architecture, inputs, removed, computed)
    else:
        found = walk.predictions(model, architecture.outline, inputs, removed, width, computed, compiled)
    stem_and_head = architecture.total_macs - sum(macs.values())
    for sets, prediction in found:
        rows = len(prediction)
        compute.macs += stem_and_head * rows  # the stem, a thousandth of all, is counted for each
        compute.naive_macs += architecture.total_macs * rows
        yield sets, prediction


def predict_without(
    unet: ModelMixin,
    probe: Probe,
    removed: Sequence[frozenset[str]],
    *,
    batch: int = 8,
    width: int | None = None,
    compute: ComputeCost | None = None,
    compiled: bool = False,
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Rows of the probe, and the prediction (rows, C, H, W) float32 on the CPU for each of ``removed``, in that order.

    ``removed`` holds the units that are bypassed, as from ``gone_with``; the empty set is the U-Net itself. At most
    ``batch`` rows go together, and at most ``width`` states in one call; by default both are what fits into memory.
    ``compute`` is added up. ``compiled`` blocks take a minute or two to compile and are faster then. The walk is
    compared with the U-Net's own forward pass first; UnsupportedModelError when they differ.
    """
    compute = ComputeCost() if compute is None else compute
    dtype, device = unet.dtype, unet.device
    if width is None:
        rows = min(batch, len(probe))
        batch, width = fitting_batch(architecture_of(unet), rows, device, dtype.itemsize)
    for part, inputs in probe.batches(batch, unet):
        predictions: dict[int, Tensor] = {}
        # Closed before anything is handed out: neither the mode may leak into what the caller does with it.
        with evaluating(unet), torch.inference_mode(), compiling(compiled):
            if part.start == 0:
                check_walk(unet, inputs, compiled=compiled)
            answers = _answers(unet, inputs, removed, width, compute, compiled)
            about = f"scoring rows {part.start + 1} to {part.stop} of {len(probe)}"
            for sets, prediction in track(answers, about, len(set(removed))):
                predictions |= dict.fromkeys(sets, prediction.float().cpu())
        yield part, [predictions[number] for number in range(len(removed))]
