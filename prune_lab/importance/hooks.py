"""Looking into a U-Net while it runs: what goes past a block and what comes out of it, and which weights learn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from prune_lab.blocks import Architecture
from prune_lab.surgery import stand_in_for

BlockHook = Callable[
    [str, Tensor, Tensor], Tensor | None
]  # (name, main, block) -> what is handed on instead, if anything


@contextlib.contextmanager
def block_hooks(
    unet: UNet2DConditionModel, architecture: Architecture, names: Iterable[str], hear: BlockHook
) -> Iterator[None]:
    """Inside, ``hear`` gets what is there without each named block, and the block's output; nothing stays behind.

    Both are (N, C, H, W). What it returns takes the output's place; None leaves it.
    """

    def hook(name: str, stand_in: nn.Module) -> Callable[..., Any]:
        def listen(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            # An attention block answers with a tuple; its stand-in, asked for no form, with the tensor itself.
            main = stand_in(args[0] if args else kwargs["hidden_states"])
            instead = hear(name, main, output if isinstance(output, Tensor) else output[0])
            return instead if instead is None or isinstance(output, Tensor) else (instead,)

        return listen

    with contextlib.ExitStack() as stack:
        for name in names:
            block = architecture.block(name)
            listen = hook(name, stand_in_for(block))
            handle = unet.get_submodule(block.path).register_forward_hook(listen, with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextlib.contextmanager
def only_requires_grad(unet: UNet2DConditionModel, wanted: Iterable[nn.Parameter]) -> Iterator[None]:
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
