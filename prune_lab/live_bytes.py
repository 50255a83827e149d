"""Bytes that a forward pass keeps alive, watched storage by storage; ``meta`` tensors will do."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HEAD = "head"  # the name of all that follows the last part


class FusedAttention(TorchFunctionMode):
    """Attention as a fused kernel leaves it: the result and nothing beside it. On ``meta`` it would be written out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            return torch.empty_like(query)  # (B, heads, N, width), laid out as the query is
        return func(*args, **(kwargs or {}))


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside this context: bytes of all storages made in it that are alive now, and the most at one moment.

    Storages of ``module`` do not count: a transposed weight is no activation.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._known = {
            tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage())
        return found

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def restart(self) -> int:
        """What is alive now, from which the next peak is counted."""
        self.peak = self.now
        return self.now


@dataclass(frozen=True, slots=True)
class LiveSpan:
    """Bytes around one call: alive before it, the most during it, and those of its first input and its result."""

    before: int
    peak: int
    given: int
    made: int


def spans(
    model: nn.Module, paths: Mapping[str, str], inputs: Mapping[str, Any]
) -> tuple[dict[str, LiveSpan], int]:
    """The span of every part by name, and of the whole pass the most.

    ``paths`` has a module path for each part, in order of execution; the modules that the whole calls after the last
    part are one more, HEAD.
    """
    found: dict[str, LiveSpan] = {}
    before: dict[str, int] = {}
    overall = 0

    def started(name: str) -> Any:
        def hook(*_: Any) -> None:
            nonlocal overall
            overall = max(overall, live.peak)
            before[name] = live.restart()

        return hook

    def ended(name: str) -> Any:
        def hook(_module: Any, given: tuple[Any, ...], named: dict[str, Any], made: Any) -> None:
            nonlocal overall
            overall = max(overall, live.peak)
            found[name] = LiveSpan(before[name], live.peak, _first((given, named)), _first(made))
            live.restart()

        return hook

    def head_started(*_: Any) -> None:
        if HEAD not in before and last in found:
            started(HEAD)()

    handles, last = [], list(paths)[-1] if paths else ""
    with torch.no_grad(), LiveBytes(model) as live, FusedAttention():
        # Made anew inside: what the caller holds is alive all along, and counts.
        own = {name: _renewed(value) for name, value in inputs.items()}
        try:
            for name, path in paths.items():
                module = model.get_submodule(path)
                handles.append(module.register_forward_pre_hook(started(name)))
                handles.append(module.register_forward_hook(ended(name), with_kwargs=True))
            handles += [child.register_forward_pre_hook(head_started) for child in model.children()]
            model(**own)
        finally:
            for handle in handles:
                handle.remove()
        if HEAD in before:
            found[HEAD] = LiveSpan(before[HEAD], live.peak, 0, 0)
        return found, max(overall, live.peak)


def _renewed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _renewed(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_renewed, value))
    return torch.empty_like(value) if isinstance(value, torch.Tensor) else value


def _first(values: Any) -> int:
    """Bytes of the first tensor in ``values``; 0 where there is none."""
    tensors = (value for value in tree_leaves(values) if isinstance(value, torch.Tensor))
    return next((tensor.numel() * tensor.element_size() for tensor in tensors), 0)


def live_peak(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """The most bytes that ``model(**inputs)`` keeps alive at one moment, counted as in here; ``meta`` will do."""
    return spans(model, {}, inputs)[1]
