"""Memory of a call: how far it rises on a device."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from prune_lab.runtime import synchronize


def _status_bytes(field: str) -> int:
    """One line of /proc/self/status, which is in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(field)


def _give_back_freed_memory() -> None:
    """Hand pages that the C library keeps for reuse back to the system, so that using them again shows."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, others do not
    if trim is not None:
        trim(0)


def measure_memory_growth(call: Callable[[], object], *, device: torch.device | str = "cpu") -> int | None:
    """Bytes by which memory rises above its level before ``call``, at the highest point during it.

    On CUDA, what torch holds. On a Linux CPU, the resident set of this process, whose high-water mark the kernel
    keeps; other threads that allocate at the same time count too. None where neither can be read.
    """
    device = torch.device(device)
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.inference_mode():
            call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    reset = Path("/proc/self/clear_refs")  # Linux only
    if device.type != "cpu" or not reset.exists():
        return None
    try:
        _give_back_freed_memory()
        reset.write_text("5")  # the high-water mark
        before = _status_bytes("VmRSS")
        with torch.inference_mode():
            call()
        return max(0, _status_bytes("VmHWM") - before)
    except (OSError, KeyError):  # a container that forbids it
        return None
