"""The memory that a replay will take, said before it starts: it is run without weights and numbers first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.blocks import architecture_of
from prune_lab.families import meta_model, runs_on_meta
from prune_lab.live_bytes import FusedAttention, LiveBytes
from prune_lab.models.streamed import is_streamed, outer_units, stored_dtypes
from prune_lab.prefix_sharing.growing import Kinds, growth
from prune_lab.prefix_sharing.replay import replayed
from prune_lab.runtime import used_bytes

Inputs = Callable[[int], Mapping[str, Any]]


def _holding(shell: nn.Module, stored: Mapping[str, torch.dtype]) -> Iterator[tuple[str, Callable[..., Any]]]:
    """What the units of ``shell`` answer through so that memory holds the weights of one at a time, as if read.

    ``stored`` are the number formats on disk of those that are read into the same memory: where one is computed in
    another, both are there for a moment.
    """
    held: dict[str, list[Tensor]] = {}

    def holding(path: str, module: nn.Module, keeps: tuple[str, ...]) -> Callable[..., Any]:
        forward = module.forward
        state = {name: one for name, one in module.state_dict().items() if not name.startswith(keeps)}

        def read(name: str, one: Tensor) -> Tensor:
            form = stored.get(f"{path}.{name}", one.dtype)
            return torch.empty(one.shape, dtype=form, device="meta").to(one.dtype)

        def call(*args: Any, **kwargs: Any) -> Any:
            if path not in held:
                held.clear()
                held[path] = [read(name, one) for name, one in state.items()]
            return forward(*args, **kwargs)

        return call

    for unit in outer_units(shell):
        keeps = tuple(f"{path}." for path in unit.keeps)
        yield unit.path, holding(unit.path, shell.get_submodule(unit.path), keeps)


def needed_bytes(
    model: Any, inputs: Inputs, removed: Sequence[frozenset[str]], *, width: int, at_once: int | None = None
) -> int:
    """The most bytes that a replay of ``removed`` will hold beside the model, at one moment.

    ``inputs(copies)`` are the rows repeated so many times. Counted by a run on ``meta``, storage by storage, with a
    block's weights where the model is streamed; what a kernel takes for itself is not seen.
    """
    architecture = architecture_of(model)
    known = growth(model, architecture, inputs)
    shell = meta_model(architecture.config, model.dtype)
    if is_streamed(model):
        for path, forward in _holding(shell, stored_dtypes(model) if model.device.type == "cpu" else {}):
            shell.get_submodule(path).forward = forward

    def call(copies: int) -> Tensor:
        given = Kinds.of(inputs(copies)).inputs(torch.device("meta"), model.dtype)
        answer: Tensor = shell(**given, return_dict=False)[0]
        return answer

    with runs_on_meta(), LiveBytes(shell) as live, FusedAttention():
        for _ in replayed(
            shell, architecture, call, removed, width=width, growth=lambda: known, at_once=at_once
        ):
            pass
    peak: int = live.peak
    return peak


def stated_peak(
    model: Any, inputs: Inputs, removed: Sequence[frozenset[str]], *, width: int, at_once: int | None = None
) -> int:
    """Bytes in use at the highest moment of the replay: those that are now, and ``needed_bytes``."""
    needed = needed_bytes(model, inputs, removed, width=width, at_once=at_once)
    return needed + used_bytes(model.device)  # in this order: what the first loads of torch stays
