"""The memory that a replay will take, said before it starts: it is run without weights and numbers first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from prune_lab.blocks import architecture_of
from prune_lab.families import meta_model, runs_on_meta
from prune_lab.live_bytes import FusedAttention, LiveBytes
from prune_lab.models.streamed import is_streamed, outer_units
from prune_lab.prefix_sharing.growing import Kinds, growth
from prune_lab.prefix_sharing.replay import replayed

Inputs = Callable[[int], Mapping[str, Any]]


def _holding(shell: nn.Module) -> Iterator[tuple[str, Callable[..., Any]]]:
    """What the units of ``shell`` answer through so that memory holds the weights of one at a time, as if read."""
    held: dict[str, list[Tensor]] = {}

    def holding(path: str, module: nn.Module, keeps: tuple[str, ...]) -> Callable[..., Any]:
        forward, state = module.forward, module.state_dict()
        shapes = [(one.shape, one.dtype) for name, one in state.items() if not name.startswith(keeps)]

        def call(*args: Any, **kwargs: Any) -> Any:
            if path not in held:
                held.clear()
                held[path] = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes]
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
        for path, forward in _holding(shell):
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
    """Bytes of this process at the highest moment of the replay: those that it has now, and ``needed_bytes``."""
    needed = needed_bytes(model, inputs, removed, width=width, at_once=at_once)
    now: int = psutil.Process().memory_info().rss  # after it: what it loads of torch stays
    return now + needed
