"""Hooks on the blocks of a model while it runs, and a switch for which of its parameters keep gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from diffusers import ModelMixin
from torch import Tensor, nn

from prune_lab.blocks import Architecture
from prune_lab.surgery import stand_in_for

BlockHook = Callable[[str, Tensor, Tensor], Tensor | None]
"""(block's name, main path (N, C, H, W), block's output (N, C, H, W)) -> a new output, or None to keep the old one."""


@contextlib.contextmanager
def block_hooks(
    model: ModelMixin,
    architecture: Architecture,
    names: Iterable[str],
    hook: BlockHook,
    *,
    every: bool = False,
) -> Iterator[None]:
    """Context in which ``hook`` is called after each named block; the hooks are removed on exit.

    The main path it gets is the tensor that is left when the block is removed. With ``every`` it is called for each
    output of a block that has several, such as text and picture, else for the one on the main path.
    """

    def forward_hook(name: str, stand_in: nn.Module, place: int) -> Callable[..., Any]:
        def call(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            left = stand_in(*args, **kwargs)
            if isinstance(output, Tensor):
                return hook(name, left if isinstance(left, Tensor) else left[place], output)
            changed = list(output)
            for i, own in enumerate(output):
                if isinstance(own, Tensor) and (every or i == place):
                    new = hook(name, left if isinstance(left, Tensor) else left[i], own)
                    changed[i] = own if new is None else new
            return tuple(changed)

        return call

    with contextlib.ExitStack() as stack:
        for name in names:
            block = architecture.block(name)
            module = model.get_submodule(block.path)
            forward = forward_hook(name, stand_in_for(module, block), block.main)
            stack.enter_context(module.register_forward_hook(forward, with_kwargs=True))
        yield


@contextlib.contextmanager
def only_requires_grad(model: ModelMixin, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context in which only ``parameters`` of ``model`` require gradients; all flags are restored on exit."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
