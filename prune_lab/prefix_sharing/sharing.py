"""What a model answers without each of many sets of blocks, at the cost of what those answers do not share.

Removing a block changes nothing before it, so sets of removed blocks share the computation up to where they first
differ (``replay``).

For the 38 blocks of SD-v1.4 this needs 1.71 times fewer multiply-adds than running everything for every block, for n
equal blocks in a chain 2n/(n+2); more is not to be had, since the blocks before a removal are computed once and those
after it must be computed anew.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from prune_lab.blocks import UNKNOWN_LATENT, Architecture, architecture_of
from prune_lab.errors import ReplayError
from prune_lab.families import Unit, example_inputs, meta_model, prediction_of, runs_on_meta
from prune_lab.live_bytes import live_peak
from prune_lab.models.streamed import is_streamed
from prune_lab.prefix_sharing.growing import growth
from prune_lab.prefix_sharing.needs import needed_bytes
from prune_lab.prefix_sharing.replay import replayed
from prune_lab.prefix_sharing.sites import in_order
from prune_lab.probes import Probe, evaluating
from prune_lab.runtime import bytes_text, device_of, free_bytes, full_float32, note, track, used_bytes

_MEMORY_SHARE = 0.4  # of what is free at the start
_MOST_BYTES = 6 << 30
_LEAST_WIDTH = 8
_CPU_ROWS = 128  # in one call: beyond that a processor's caches lose more than larger calls gain
_BESIDE = 0.1  # of a row's peak: what is taken apart and put together again (0.02 to 0.06 for SD's shapes)
_APART = 1e-4  # that a wide pass may differ by from a plain one, of the largest value; of half precision _ROUNDINGS
_ROUNDINGS = 16
_GRAPHS = 256  # that torch may compile of one class of block: each width is one


@dataclass(slots=True)
class ComputeCost:
    """Multiply-adds of what was run, of running everything for every set, and of one sample's forward pass."""

    macs: int = 0
    naive_macs: int = 0
    forward_macs: int = 0

    @property
    def forwards(self) -> float:
        """The work in forward passes of one sample through the whole model."""
        return self.macs / self.forward_macs if self.forward_macs else 0.0

    @property
    def saving(self) -> float:
        """How many times fewer multiply-adds than running everything for every set; 1 when nothing was shared."""
        return self.naive_macs / self.macs if self.macs else 1.0


@functools.lru_cache(maxsize=64)
def _peak_bytes(architecture: Architecture, latent: int | None) -> int:
    """The most bytes that one row of a forward pass keeps alive at one moment, in float32; of a film one frame."""
    config = architecture.config
    if latent is None and config.get("sample_size", "its own") is None:
        latent = UNKNOWN_LATENT
    inputs = example_inputs(config, latent=latent, tokens=architecture.tokens, frames=1, device="meta")
    with runs_on_meta():
        return live_peak(meta_model(config), inputs)


def state_bytes(architecture: Architecture, itemsize: int = 4, latent: int | None = None) -> int:
    """Bytes that one row of one set takes at most while it is computed, beside others in one pass.

    ``latent`` is the side of its latents (None: what the model is meant for); of a film a row is one frame.
    """
    return int((1 + _BESIDE) * _peak_bytes(architecture, latent)) * itemsize // 4


def fitting_batch(
    architecture: Architecture,
    rows: int,
    device: torch.device,
    itemsize: int = 4,
    latent: int | None = None,
) -> tuple[int, int]:
    """At most ``rows`` rows of this side of the ``latent``, and for how many sets they fit beside each other into the
    device's free memory.

    Rows are given up before there are fewer than `_LEAST_WIDTH` sets: what they begin with is what is shared.
    """
    one = state_bytes(architecture, itemsize, latent)
    budget = min(_MOST_BYTES, int(_MEMORY_SHARE * free_bytes(device)))
    fitting = budget // one
    rows = max(1, min(rows, fitting // _LEAST_WIDTH))
    if device.type == "cpu":
        fitting = min(fitting, _CPU_ROWS)
    return rows, max(1, fitting // rows)


def own_macs(architecture: Architecture) -> tuple[dict[str, int], int]:
    """Multiply-adds of one row by unit, without those of the units inside it; and of what lies around all units."""
    units = architecture.outline.present
    whole = {unit.name: architecture.count().by_module[unit.path][0] for unit in units}
    own = dict(whole)
    for unit in units:
        if unit.inside:
            own[unit.inside] -= whole[unit.name]
    return own, architecture.total_macs - sum(own.values())


def macs_without(architecture: Architecture, gone: frozenset[str]) -> int:
    """Multiply-adds of one row that a set of units ``gone`` needs beside the model's own pass: what comes after the
    first of them, and what lies around it in the same block. Sets that share their first removals need less.
    """
    own, needed = own_macs(architecture)
    units = in_order(architecture.outline.present)
    around: dict[str, frozenset[str]] = {
        "": frozenset()
    }  # of each unit: itself, and those that it lies inside of
    for unit in units:
        around[unit.name] = around[unit.inside] | {unit.name}
    first = next((place for place, unit in enumerate(units) if unit.name in gone), -1)
    again = around[units[first].name] if first >= 0 else frozenset[str]()
    for place, unit in enumerate(units):
        if (place > first or unit.name in again) and gone.isdisjoint(around[unit.name]):
            needed += own[unit.name]
    return needed


def compiling(wanted: bool) -> contextlib.AbstractContextManager[object]:
    """Inside, torch compiles as many graphs of one class of block as there are widths, and not the usual eight.

    Where that is not enough it raises: it would run the blocks that are left as they are, without a word.
    """
    if not wanted:
        return contextlib.nullcontext()
    patched: contextlib.AbstractContextManager[object] = torch._dynamo.config.patch(
        recompile_limit=_GRAPHS,
        accumulated_recompile_limit=_GRAPHS,
        fail_on_recompile_limit_hit=True,
    )
    return patched


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some rows of a probe, and the model that is asked."""

    model: Any
    probe: Probe
    numbers: tuple[int, ...]

    def inputs(self, copies: int) -> dict[str, Any]:
        """Keyword arguments of ``forward`` for the rows, repeated copy after copy."""
        numbers = self.numbers * copies
        ((_, inputs),) = self.probe.rows(numbers).batches(len(numbers), self.model)
        return inputs

    def answer(self, copies: int) -> Tensor:
        """The prediction (copies x rows, ...)."""
        output = self.model(**self.inputs(copies), return_dict=False)[0]
        return prediction_of(self.model, output, self.probe.noisy[list(self.numbers * copies)])

    def first(self) -> _Rows:
        """The first row alone."""
        return _Rows(self.model, self.probe, self.numbers[:1])


def _answers(
    rows: _Rows,
    removed: Sequence[frozenset[str]],
    width: int,
    at_once: int | None,
    compute: ComputeCost,
    compiled: bool,
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    architecture = architecture_of(rows.model)
    macs, around = own_macs(architecture)
    compute.forward_macs = architecture.total_macs
    ran = dict.fromkeys(macs, 0)  # lanes by unit

    def computed(unit: Unit, lanes: int) -> None:
        ran[unit.name] += lanes

    found = replayed(
        rows.model,
        architecture,
        rows.answer,
        removed,
        width=width,
        growth=lambda: growth(rows.model, architecture, rows.inputs),
        computed=computed,
        at_once=at_once,
        compiled=compiled,
    )
    for sets, prediction in found:
        count = len(prediction)
        # The stem, a thousandth of all, is counted for each.
        compute.macs += count * (around + sum(macs[name] * lanes for name, lanes in ran.items()))
        compute.naive_macs += architecture.total_macs * count
        ran = dict.fromkeys(macs, 0)
        yield sets, prediction


def _check_wide(rows: _Rows, removed: frozenset[str], found: Tensor) -> None:
    """Raise ReplayError unless ``found`` (1, ...), of a wide pass, is what the first row gives alone."""
    architecture = architecture_of(rows.model)
    ((_, wanted),) = replayed(rows.model, architecture, rows.first().answer, [removed])
    tolerance = max(_APART, _ROUNDINGS * torch.finfo(wanted.dtype).eps)
    # A damaged model is not this function's business: what is not finite only has to be so in both.
    atol = tolerance * float(wanted.nan_to_num(0, 0, 0).abs().max())
    if not torch.allclose(found, wanted, rtol=tolerance, atol=atol, equal_nan=True):
        raise ReplayError(
            "asked to score several sets in one pass, found that a row gives another answer beside others than alone "
            f"(largest difference {float((found - wanted).abs().max()):.2g}); score set by set (width 1)"
        )


def _width_from_disk(rows: _Rows, removed: Sequence[frozenset[str]], at_once: int) -> int:
    """How many sets share a pass of a model that is read from disk: all, if they fit, so that it is read once.

    Says what memory that will take, before it starts.
    """
    device = rows.model.device
    width, free = len(set(removed)), free_bytes(device)
    needed = needed_bytes(rows.model, rows.inputs, removed, width=width, at_once=at_once)
    while needed > _MEMORY_SHARE * free and width > 1:
        width = -(-width // 2)
        needed = needed_bytes(rows.model, rows.inputs, removed, width=width, at_once=at_once)
    where = "memory" if device.type == "cpu" else f"the memory of {device}"
    note(
        f"blocks are read from disk, {-(-len(set(removed)) // width)} times each for {len(rows.numbers)} rows; this "
        f"takes up to {bytes_text(needed)} of {where} beside the {bytes_text(used_bytes(device))} in use"
    )
    return width


def predict_without(
    model: ModelMixin,
    probe: Probe,
    removed: Sequence[frozenset[str]],
    *,
    batch: int = 8,
    width: int | None = None,
    compute: ComputeCost | None = None,
    compiled: bool = False,
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Rows of the probe, and the prediction (rows, C, H, W) float32 on the CPU for each of ``removed``, in that order.

    ``removed`` holds the units that are bypassed, as from ``gone_with``; the empty set is the model itself. At most
    ``batch`` rows go together, and at most ``width`` sets in one pass; by default both are what fits into memory. With
    a width of 1 the numbers are those of plain passes over the same rows, bit for bit. ``compute`` is added up.
    ``compiled`` blocks take a minute or two to compile and are faster then. Of a model that is read from disk
    (``load_streamed``) all sets share a pass if they fit, so that each block is read once. Raises ReplayError for a
    model whose units cannot be replayed, or whose rows hang on each other.
    """
    compute = ComputeCost() if compute is None else compute
    at_once = None
    if width is None:
        rows = min(batch, len(probe))
        side = max(probe.noisy.shape[-2:])
        batch, width = fitting_batch(
            architecture_of(model), rows, device_of(model), model.dtype.itemsize, side
        )
    if is_streamed(model) and width > 1:
        at_once = width
        width = _width_from_disk(_Rows(model, probe, tuple(range(min(batch, len(probe))))), removed, at_once)
    for start in range(0, len(probe), batch):
        part = slice(start, min(start + batch, len(probe)))
        given = _Rows(model, probe, tuple(range(part.start, part.stop)))
        predictions: dict[int, Tensor] = {}
        # Closed before anything is handed out: neither the mode may leak into what the caller does with it. In
        # inference mode torch does not count what is changed in place.
        with (
            evaluating(model),
            torch.inference_mode(False),
            torch.no_grad(),
            full_float32(),
            compiling(compiled),
        ):
            answers = _answers(given, removed, width, at_once, compute, compiled)
            about = f"scoring rows {part.start + 1} to {part.stop} of {len(probe)}"
            for sets, prediction in track(answers, about, len(set(removed))):
                if part.start == 0 and width > 1 and 0 in sets:
                    _check_wide(given, removed[0], prediction[:1])
                predictions |= dict.fromkeys(sets, prediction.float().cpu())
        yield part, [predictions[number] for number in range(len(removed))]
