"""What a U-Net answers without each of many sets of blocks, at the cost of what those answers do not share.

Removing a block changes nothing before it. So the U-Net is walked once, unit by unit (residual and attention blocks,
samplers), with a batch that grows: where a set of removed blocks first differs from the others, its state (the hidden
tensor and the skips that wait for an up stage) leaves the common path and only the rest is computed for it. Sets that
share their first removals share the walk until they differ, as the words in a prefix tree share their beginnings.

For the 38 blocks of SD-v1.4 this needs 1.71 times fewer multiply-adds than running everything for every block; more is
not to be had, since the blocks before a removal are computed once and those after it must be computed anew.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import diffusers
import psutil
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from prune_lab.blocks import Architecture, architecture_of
from prune_lab.errors import UnsupportedModelError
from prune_lab.plans import plan_of, removed_samplers
from prune_lab.probes import Probe, evaluating
from prune_lab.runtime import track
from prune_lab.surgery import stand_in_for

UnitKind = Literal["resnet", "attention", "down", "up"]

_TESTED_DIFFUSERS = "0.42"
_MEMORY_SHARE = 0.4  # of what is free when the walk starts
_MOST_BYTES = 6 << 30
_LEAST_WIDTH = 8
_CPU_ROWS = 128  # in one call: beyond that a processor's caches lose more than larger calls gain
_WORKSPACE = 8  # largest hidden tensors that one call holds at a time, beside its input
_ROUNDINGS = 16  # that the walk may differ by from the U-Net's own forward pass; on one machine it is 0
_COMPILED_ROUNDINGS = 1024  # the same for compiled blocks, which add up in another order
_GRAPHS = 128  # that torch may compile of one class of block: each width is one


@dataclass(frozen=True, slots=True)
class Unit:
    """One step of the walk: a block or a sampler."""

    name: str
    path: str
    kind: UnitKind
    takes_skip: bool  # a residual block of an up stage reads concat(hidden, skip)
    gives_skip: bool  # what it hands on also waits for an up stage
    macs: int  # of one sample


def units_of(architecture: Architecture) -> tuple[Unit, ...]:
    """Blocks and samplers in order of execution, with what each does to the skips."""
    samplers = {sampler.stage: sampler for sampler in architecture.samplers}
    units: list[Unit] = []
    for stage in architecture.stages:
        down, blocks = stage.startswith("Dn"), architecture.stage_blocks(stage)
        for block, following in itertools.zip_longest(blocks, blocks[1:]):  # a student's stage may be empty
            last_of_pair = following is None or following.kind == "resnet"
            units.append(
                Unit(
                    block.name,
                    block.path,
                    block.kind,
                    takes_skip=block.kind == "resnet" and stage.startswith("Up"),
                    gives_skip=down and last_of_pair,
                    macs=block.macs,
                )
            )
        if stage in samplers:
            sampler = samplers[stage]
            kind: UnitKind = "down" if down else "up"
            units.append(Unit(sampler.name, sampler.path, kind, False, gives_skip=down, macs=sampler.macs))
    return tuple(units)


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


@dataclass(frozen=True, slots=True)
class _State:
    """What some sets have in common up to here: hidden (B, C, H, W), waiting skips, and which sets they are."""

    hidden: Tensor
    skips: tuple[Tensor, ...]
    sets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Conditioning:
    """What every block reads beside the hidden tensor, for one copy of the rows."""

    embedding: Tensor  # (B, E) of the timestep, and of SDXL's added conditioning
    text: Tensor  # (B, L, D)
    odd_size: bool  # the latent is no multiple of the sampling factor: upsamplers are told their size

    def times(self, copies: int) -> _Conditioning:
        return replace(self, embedding=self.embedding.repeat(copies, 1), text=self.text.repeat(copies, 1, 1))


def _stem(unet: Any, inputs: dict[str, Any]) -> tuple[Tensor, _Conditioning]:
    """The start of ``UNet2DConditionModel.forward``: embeddings and the first convolution."""
    sample, text = inputs["sample"], inputs["encoder_hidden_states"]
    added = inputs.get("added_cond_kwargs")
    odd = any(side % 2**unet.num_upsamplers for side in sample.shape[-2:])
    if unet.config.center_input_sample:
        sample = 2 * sample - 1.0
    embedding = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=inputs["timestep"]))
    more = unet.get_aug_embed(emb=embedding, encoder_hidden_states=text, added_cond_kwargs=added)
    if more is not None:
        embedding = embedding + more
    if unet.time_embed_act is not None:
        embedding = unet.time_embed_act(embedding)
    text = unet.process_encoder_hidden_states(encoder_hidden_states=text, added_cond_kwargs=added)
    return unet.conv_in(sample), _Conditioning(embedding, text, odd)


def _head(unet: Any, hidden: Tensor) -> Tensor:
    if unet.conv_norm_out:
        hidden = unet.conv_act(unet.conv_norm_out(hidden))
    predicted: Tensor = unet.conv_out(hidden)
    return predicted


def _call(
    unit: Unit, module: nn.Module, hidden: Tensor, given: _Conditioning, skips: Sequence[Tensor]
) -> Tensor:
    found: Any
    if unit.kind == "resnet":
        found = module(hidden, given.embedding)
    elif unit.kind == "attention":
        found = module(hidden, encoder_hidden_states=given.text, return_dict=False)[0]
    elif unit.kind == "down":
        found = module(hidden)
    else:
        found = module(hidden, skips[-1].shape[2:] if given.odd_size else None)
    assert isinstance(found, Tensor)
    return found


@dataclass(frozen=True, slots=True)
class _Walk:
    """A U-Net taken apart, and the rows it is asked about."""

    unet: Any
    units: tuple[Unit, ...]
    modules: dict[str, nn.Module]  # by name: the unit itself
    stand_ins: dict[str, nn.Module]  # by name: what is there when it is gone
    given: _Conditioning
    compute: ComputeCost

    def _input(self, unit: Unit, state: _State) -> Tensor:
        return torch.cat([state.hidden, state.skips[-1]], dim=1) if unit.takes_skip else state.hidden

    def _after(self, unit: Unit, state: _State, hidden: Tensor, sets: tuple[int, ...]) -> _State:
        skips = state.skips[:-1] if unit.takes_skip else state.skips
        return _State(hidden, (*skips, hidden) if unit.gives_skip else skips, sets)

    def kept(self, unit: Unit, states: Sequence[tuple[_State, tuple[int, ...]]]) -> list[_State]:
        """The states after the unit, computed for all of them in one call."""
        if not states:
            return []
        together = torch.cat([self._input(unit, state) for state, _ in states])
        skips = states[0][0].skips
        found = _call(unit, self.modules[unit.name], together, self.given.times(len(states)), skips)
        self.compute.macs += unit.macs * len(together)
        return [
            self._after(unit, state, hidden, sets)
            for (state, sets), hidden in zip(states, found.chunk(len(states)), strict=True)
        ]

    def removed(self, unit: Unit, state: _State, sets: tuple[int, ...]) -> _State:
        """The state after the unit where it is gone: the main path goes on, a skip that it would read is dropped."""
        hidden = self.stand_ins[unit.name](state.hidden) if unit.name in self.stand_ins else state.hidden
        return self._after(unit, state, hidden, sets)

    def step(self, unit: Unit, states: Sequence[_State], gone: Sequence[frozenset[str]]) -> list[_State]:
        """All states after the unit, those that most sets share first."""
        stay: list[tuple[_State, tuple[int, ...]]] = []
        leave: list[tuple[_State, tuple[int, ...]]] = []
        for state in states:
            for into, wanted in ((stay, False), (leave, True)):
                sets = tuple(number for number in state.sets if (unit.name in gone[number]) is wanted)
                if sets:
                    into.append((state, sets))
        after = [*self.kept(unit, stay), *(self.removed(unit, state, sets) for state, sets in leave)]
        return sorted(after, key=lambda state: -len(state.sets))


def _fan_out(
    walk: _Walk, start: _State, gone: Sequence[frozenset[str]], width: int
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """(set numbers, prediction (B, C, H, W)) of every distinct set, at most ``width`` states to a call.

    A stack of (how many units are behind, state): what lies on top goes on together as long as it stands at the same
    unit. Where there are more states than ``width``, single sets go to their end first and make room.
    """
    stack = [(0, start)]
    while stack:
        place, shape = stack[-1][0], stack[-1][1].hidden.shape
        states: list[_State] = []
        while stack and len(states) < width and (stack[-1][0], stack[-1][1].hidden.shape) == (place, shape):
            states.append(stack.pop()[1])
        if place < len(walk.units):
            after = walk.step(walk.units[place], states, gone)
            stack += [(place + 1, state) for state in after]
        else:
            found = _head(walk.unet, torch.cat([state.hidden for state in states]))
            for state, prediction in zip(states, found.chunk(len(states)), strict=True):
                yield state.sets, prediction


def state_bytes(architecture: Architecture, itemsize: int = 4) -> int:
    """Bytes that one row of one state takes at most while it is computed: its skips, and a call's workspace."""
    side = int(architecture.config["sample_size"])
    channels = int(architecture.config["block_out_channels"][0])
    held, largest = channels * side**2, 0
    for unit in units_of(architecture):
        if unit.kind == "down":
            side = -(-side // 2)
        elif unit.kind == "up":
            side *= 2
        else:
            block = architecture.block(unit.name)
            largest = max(largest, block.in_channels * side**2)
            channels = block.out_channels
        if unit.gives_skip:
            held += channels * side**2
    return (held + _WORKSPACE * largest) * itemsize


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def fitting_batch(
    architecture: Architecture, rows: int, device: torch.device, itemsize: int = 4
) -> tuple[int, int]:
    """At most ``rows`` rows, and how many states of them fit beside each other into the device's free memory.

    Rows are given up before there are fewer than `_LEAST_WIDTH` states: states are what is shared.
    """
    budget = min(_MOST_BYTES, int(_MEMORY_SHARE * _free_bytes(device)))
    fitting = budget // state_bytes(architecture, itemsize)
    rows = max(1, min(rows, fitting // _LEAST_WIDTH))
    if device.type == "cpu":
        fitting = min(fitting, _CPU_ROWS)
    return rows, max(1, fitting // rows)


def gone_with(
    architecture: Architecture, removed: Iterable[str], *, stand_in: bool = False
) -> frozenset[str]:
    """The names of all units that are bypassed when the blocks ``removed`` are gone: these, and samplers left over.

    Raises UnknownBlockError, and UnremovableBlockError for a block that changes the width, unless ``stand_in``.
    """
    blocks = [architecture.block(name) for name in removed]
    plan = plan_of(architecture, (block.name for block in blocks if block.removable or not stand_in))
    return frozenset(block.name for block in blocks) | frozenset(removed_samplers(architecture, plan))


def macs_without(architecture: Architecture, gone: frozenset[str]) -> int:
    """Multiply-adds of one row that a set of units ``gone`` needs beside the U-Net's own pass: what comes after the
    first of them. Sets that share their first removals need less.
    """
    units = units_of(architecture)
    first = next((place for place, unit in enumerate(units) if unit.name in gone), -1)
    around = architecture.total_macs - sum(unit.macs for unit in units)  # the stem and the head
    return around + sum(unit.macs for unit in units[first + 1 :] if unit.name not in gone)


def _compiling(wanted: bool) -> contextlib.AbstractContextManager[object]:
    """Inside, torch compiles as many graphs of one class of block as there are widths, and not the usual eight."""
    if not wanted:
        return contextlib.nullcontext()
    patched: contextlib.AbstractContextManager[object] = torch._dynamo.config.patch(recompile_limit=_GRAPHS)
    return patched


def check_walk(unet: UNet2DConditionModel, inputs: dict[str, Any], *, compiled: bool = False) -> None:
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


def _answers(
    unet: UNet2DConditionModel,
    inputs: dict[str, Any],
    gone: Sequence[frozenset[str]],
    width: int,
    compute: ComputeCost,
    compiled: bool,
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    architecture = architecture_of(unet)
    units, everyone = units_of(architecture), tuple(range(len(gone)))
    hidden, given = _stem(unet, inputs)
    modules: dict[str, Any] = {unit.name: unet.get_submodule(unit.path) for unit in units}
    if compiled:  # for any number of rows; blocks of equal shapes share a graph
        modules = {name: torch.compile(module, dynamic=True) for name, module in modules.items()}
    walk = _Walk(
        unet=unet,
        units=units,
        modules=modules,
        stand_ins={block.name: stand_in_for(block) for block in architecture.blocks if block.starred},
        given=given,
        compute=compute,
    )
    rows, stem_and_head = len(hidden), architecture.total_macs - sum(unit.macs for unit in units)
    compute.forward_macs = architecture.total_macs
    for sets, prediction in _fan_out(walk, _State(hidden, (hidden,), everyone), gone, width):
        compute.macs += stem_and_head * rows  # the stem, a thousandth of all, is counted for each
        compute.naive_macs += architecture.total_macs * rows
        yield sets, prediction


def predict_without(
    unet: UNet2DConditionModel,
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
    for part, inputs in probe.batches(batch, device, dtype):
        predictions: dict[int, Tensor] = {}
        # Closed before anything is handed out: neither the mode may leak into what the caller does with it.
        with evaluating(unet), torch.inference_mode(), _compiling(compiled):
            if part.start == 0:
                check_walk(unet, inputs, compiled=compiled)
            answers = _answers(unet, inputs, removed, width, compute, compiled)
            about = f"scoring rows {part.start + 1} to {part.stop} of {len(probe)}"
            for sets, prediction in track(answers, about, len(set(removed))):
                predictions |= dict.fromkeys(sets, prediction.float().cpu())
        yield part, [predictions[number] for number in range(len(removed))]
