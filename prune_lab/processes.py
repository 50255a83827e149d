"""The processes of one ``accelerate launch``: how this one joins them, what all agree on, and how they part."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from prune_lab.errors import DeviceError

if TYPE_CHECKING:
    from accelerate import Accelerator

Item = TypeVar("Item")

# What accelerate can be asked for that takes the weights of a model apart.
_SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
_PATIENCE = timedelta(hours=6)  # of those who wait while the main process prepares, draws or writes


def num_processes() -> int:
    """How many processes were launched together; 1 where this one was started alone. Imports nothing."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def is_main() -> bool:
    """Whether this process is the one that speaks and writes. Imports nothing."""
    return num_processes() == 1 or os.environ.get("RANK", "0") == "0"


def join() -> Accelerator:
    """This process among those launched together, on its own GPU where there are any; alone where none were.

    The first call opens the process group and chooses the GPU, so it comes before anything is loaded; ``leave`` closes
    it. Raises DeviceError for a launch that shards weights: averages, clipping and checkpoints take them to be whole.
    """
    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    for variable, name in _SHARDED.items():
        if os.environ.get(variable, "false").lower() in ("true", "1", "yes"):
            raise DeviceError(
                f"asked to distil under {name}, which shards weights or moments; students are kept whole in every "
                "process: launch with distributed_type MULTI_GPU, as in prune_lab/launch/ddp-1x8.yaml"
            )
    # Without a GPU accelerate lets every process think it were alone, unless it is told.
    alone = num_processes() == 1 or torch.cuda.is_available()
    return Accelerator(cpu=not alone, kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)])


def gather_object(value: Item) -> list[Item]:
    """``value`` of every process, in order of rank; all must call it. One that was not ``join``ed is alone."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Inside, the main process goes first and the others follow: what it makes, they find. All must enter.

    What waits for all processes must not be called inside, and who enters must not depend on what the main one made.
    """
    if not is_main():
        gather_object(None)
    yield
    if is_main():
        gather_object(None)


def leave() -> None:
    """Close the process group, when one was opened; without it torch warns at exit."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
