"""A U-Net's predictions without each of many sets of units, at the cost of what they do not share.

Removing a block changes nothing before it. So the U-Net is walked once, unit by unit, with a batch that grows: where a
set of removed units first differs from the others, its state (the hidden tensor and the skips that wait for an up
stage) leaves the common path and only the rest is computed for it. Sets that share their first removals share the walk
until they differ, as the words in a prefix tree share their beginnings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.families.family import Outline, Removed, Unit

_WORKSPACE = 8  # largest hidden tensors that one call holds at a time, beside its input


@dataclass(frozen=True, slots=True)
class _State:
    """What some sets have in common up to here: hidden (B, C, H, W), waiting skips, and which sets they are."""

    hidden: Tensor
    skips: tuple[Tensor, ...]
    sets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Conditioning:
    """What every block reads beside the hidden tensor, for one copy of the rows."""

    embedding: Tensor  # (B, E) of the timestep, and of what is added to it
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
    embedding = unet.time_embedding(
        unet.get_time_embed(sample=sample, timestep=inputs["timestep"]), inputs.get("timestep_cond")
    )
    labels = unet.get_class_embed(sample=sample, class_labels=inputs.get("class_labels"))
    if labels is not None:
        concatenated = unet.config.class_embeddings_concat
        embedding = torch.cat([embedding, labels], dim=-1) if concatenated else embedding + labels
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
    elif unit.gives_skip:  # of the samplers, a down-sampler
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
    computed: Callable[[Unit, int], None]

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
        self.computed(unit, len(together))
        return [
            self._after(unit, state, hidden, sets)
            for (state, sets), hidden in zip(states, found.chunk(len(states)), strict=True)
        ]

    def removed(self, unit: Unit, state: _State, sets: tuple[int, ...]) -> _State:
        """The state after the unit where it is gone: the main path goes on, a skip that it would read is dropped."""
        hidden = self.stand_ins[unit.name](state.hidden) if unit.name in self.stand_ins else state.hidden
        return self._after(unit, state, hidden, sets)

    def step(self, unit: Unit, states: Sequence[_State], removed: Sequence[Removed]) -> list[_State]:
        """All states after the unit, those that most sets share first."""
        stay: list[tuple[_State, tuple[int, ...]]] = []
        leave: list[tuple[_State, tuple[int, ...]]] = []
        for state in states:
            for into, wanted in ((stay, False), (leave, True)):
                sets = tuple(number for number in state.sets if (unit.name in removed[number]) is wanted)
                if sets:
                    into.append((state, sets))
        after = [*self.kept(unit, stay), *(self.removed(unit, state, sets) for state, sets in leave)]
        return sorted(after, key=lambda state: -len(state.sets))


def _fan_out(
    walk: _Walk, start: _State, removed: Sequence[Removed], width: int
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
            after = walk.step(walk.units[place], states, removed)
            stack += [(place + 1, state) for state in after]
        else:
            found = _head(walk.unet, torch.cat([state.hidden for state in states]))
            for state, prediction in zip(states, found.chunk(len(states)), strict=True):
                yield state.sets, prediction


def predictions(
    unet: Any,
    outline: Outline,
    inputs: dict[str, Any],
    removed: Sequence[Removed],
    width: int,
    computed: Callable[[Unit, int], None],
    compiled: bool,
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """(set numbers, prediction (B, C, H, W)) of every distinct set in ``removed``; see ``family.PrefixWalk``."""
    hidden, given = _stem(unet, inputs)
    units = tuple(unit for unit in outline.units if not unit.inside)
    modules: dict[str, Any] = {unit.name: unet.get_submodule(unit.path) for unit in units}
    if compiled:  # for any number of rows; blocks of equal shapes share a graph
        modules = {name: torch.compile(module, dynamic=True) for name, module in modules.items()}
    walk = _Walk(
        unet=unet,
        units=units,
        modules=modules,
        stand_ins={unit.name: unit.stand_in() for unit in units if unit.stand_in},
        given=given,
        computed=computed,
    )
    return _fan_out(walk, _State(hidden, (hidden,), tuple(range(len(removed)))), removed, width)


def state_bytes(outline: Outline, itemsize: int) -> int:
    """Bytes that one row of one state takes at most while it is computed: its skips, and a call's workspace."""
    side = int(outline.config["sample_size"])
    channels = int(outline.config["block_out_channels"][0])
    held, largest = channels * side**2, 0
    for unit in outline.units:
        if unit.inside:
            continue
        if unit.kind == "sampler":
            side = -(-side // 2) if unit.gives_skip else side * 2
        else:
            largest = max(largest, unit.in_channels * side**2)
            channels = unit.out_channels
        if unit.gives_skip:
            held += channels * side**2
    return (held + _WORKSPACE * largest) * itemsize
