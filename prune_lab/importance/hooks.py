"""Looking into a U-Net while it runs: what goes past a block and what comes out of it, and which weights learn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from diffusers import ModelMixin
from torch import Tensor, nn

from prune_lab.blocks import Architecture
from prune_lab.surgery import stand_in_for

BlockHook = Callable[
    [str, Tensor, Tensor], Tensor | None
]  # (name, main, block) -> what is handed on instead, if anything


@contextlib.contextmanager
def block_hooks(
    unet: ModelMixin, architecture: Architecture, names: Iterable[str], hear: BlockHook
) -> Iterator[None]:
    """Inside, ``hear`` gets what is there without each named block, and the block's output; nothing stays behind.

    Both are (N, C, H, W). What it returns takes the output's place; None leaves it.
    """

    def hook(name: str, stand_in: nn.Module) -> Callable[..., Any]:
        def listen(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            main, found = (
                one if isinstance(one, Tensor) else one[0] for one in (stand_in(*args, **kwargs), output)
            )
            instead = hear(name, main, found)
            return instead if instead is None or isinstance(output, Tensor) else (instead,)

        return listen

    with contextlib.ExitStack() as stack:
        for name in names:
            block = architecture.block(name)
            module = unet.get_submodule(block.path)
            handle = module.register_forward_hook(hook(name, stand_in_for(module, block)), with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextlib.contextmanager
def only_requires_grad(unet: ModelMixin, wanted: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, gradients are kept for the ``wanted`` parameters alone; every parameter's own flag returns on exit."""
    flags = [(parameter, parameter.requires_grad) for parameter in unet.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for parameter in wanted:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
