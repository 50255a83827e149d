"""What a model does at its blocks, found by watching it run: independent of what its family says.

A block that is gone hands on those inputs that its outputs would have become: the next block of its class takes them
under the same names. Where there is no such block, an output is the one input of its shape.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Site:
    """A block: its path, the inputs that go on without it, and whether it answers with a tuple."""

    path: str
    hands_on: tuple[str | None, ...]
    in_tuple: bool


def _bound(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _outputs(answer: Any) -> list[Tensor | None]:
    return [answer] if isinstance(answer, Tensor) else list(answer)


@contextlib.contextmanager
def patched(model: nn.Module, functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Inside, the module at each path answers with ``function(its own forward, module, args, kwargs)``."""
    changed = []
    try:
        for path, function in functions.items():
            module = model.get_submodule(path)

            def instead(
                *args: Any, _f: Any = function, _m: Any = module, _o: Any = module.forward, **kwargs: Any
            ) -> Any:
                return _f(_o, _m, args, kwargs)

            module.forward = instead
            changed.append(module)
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]


def discover(model: nn.Module, paths: Sequence[str], call: Callable[[], Any]) -> list[Site]:
    """The blocks at ``paths`` in order of execution. Fails where one is called twice, or its outputs fit no inputs."""
    log: list[tuple[str, dict[str, Any], Any]] = []

    def recorder(path: str) -> Callable[..., Any]:
        def record(own: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
            answer = own(*args, **kwargs)
            log.append((path, _bound(module, args, kwargs), answer))
            return answer

        return record

    with patched(model, {path: recorder(path) for path in paths}):
        call()
    order = [path for path, _, _ in log]
    assert len(set(order)) == len(order), "a block is called more than once"
    by_class: dict[type, tuple[str, ...]] = {}
    for (path, _, answer), (following, inputs, _) in itertools.pairwise(log):
        kind = type(model.get_submodule(path))
        if kind is not type(model.get_submodule(following)):
            continue
        names = [
            next((name for name, value in inputs.items() if value is output), None)
            for output in _outputs(answer)
        ]
        if all(name is not None for name in names):
            by_class[kind] = tuple(name for name in names if name is not None)
    return [
        Site(
            path,
            _named(by_class.get(type(model.get_submodule(path))), inputs, answer),
            not isinstance(answer, Tensor),
        )
        for path, inputs, answer in log
    ]


def _named(known: tuple[str, ...] | None, inputs: Mapping[str, Any], answer: Any) -> tuple[str | None, ...]:
    outputs = _outputs(answer)
    if known is not None and len(known) == len(outputs):
        return tuple(None if output is None else name for name, output in zip(known, outputs, strict=True))
    found: list[str | None] = []
    for output in outputs:
        fit = [
            name
            for name, value in inputs.items()
            if output is not None and isinstance(value, Tensor) and value.shape == output.shape
        ]
        assert output is None or len(fit) == 1, f"an output fits {fit}"
        found.append(fit[0] if fit else None)
    return tuple(found)


@contextlib.contextmanager
def without(model: nn.Module, sites: Sequence[Site]) -> Iterator[None]:
    """Inside, the blocks ``sites`` compute nothing: they hand on their inputs."""

    def bypass(site: Site) -> Callable[..., Any]:
        def answer(own: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
            given = _bound(module, args, kwargs)
            outputs = tuple(None if name is None else given[name] for name in site.hands_on)
            return outputs if site.in_tuple else outputs[0]

        return answer

    with patched(model, {site.path: bypass(site) for site in sites}):
        yield
