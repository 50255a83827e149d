"""The processes of one ``accelerate launch``: how many there are, whether this is the main one, and how they begin.

Waiting for each other and sharing values are accelerate's own: ``PartialState`` and ``accelerate.utils``.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

from prune_lab.errors import DeviceError

if TYPE_CHECKING:
    from accelerate import Accelerator

# Launches that take the weights of a model apart, by the variable that accelerate sets.
_SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
_TIMEOUT = timedelta(hours=6)  # others wait while the main process prepares, draws or writes


def num_processes() -> int:
    """How many processes were launched together; 1 where this one was started alone. Imports nothing."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def is_main() -> bool:
    """Whether this process is the one that speaks and writes. Imports nothing."""
    return num_processes() == 1 or os.environ.get("RANK", "0") == "0"


def init_processes() -> Accelerator:
    """The accelerator of this process: one of those launched together, on its own GPU where there are any, or alone.

    The first call opens the process group and chooses the GPU, so it comes before anything is loaded. Raises
    DeviceError for a launch that shards weights: averages, clipping and checkpoints take them to be whole.
    """
    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    for variable, name in _SHARDED.items():
        if os.environ.get(variable, "false").lower() in ("true", "1", "yes"):
            raise DeviceError(
                f"asked to distil under {name}, which shards weights or moments; students are kept whole in every "
                "process: launch with distributed_type MULTI_GPU, as in prune_lab/launch/ddp-1x8.yaml"
            )
    # Without a GPU accelerate takes every process to be alone, unless it is asked for the CPU.
    alone = num_processes() == 1 or torch.cuda.is_available()
    return Accelerator(cpu=not alone, kwargs_handlers=[InitProcessGroupKwargs(timeout=_TIMEOUT)])


def end_processes() -> None:
    """Close the process group, when there is one; without that torch warns at exit."""
    from accelerate import PartialState

    if num_processes() > 1:
        PartialState().destroy_process_group()
