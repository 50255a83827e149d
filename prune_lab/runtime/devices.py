"""Devices, seeds, and a record of the machine that a number was measured on."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import importlib.metadata
import itertools
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune_lab.errors import DeviceError

if TYPE_CHECKING:  # torch takes seconds to import
    import torch

_DTYPE_NAMES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}


# Devices and seeds -----------------------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is the first of CUDA, MPS and CPU that is there.

    Raises DeviceError when the device does not exist on this machine.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"no device is called {name!r}; use auto, cpu, cuda, cuda:N or mps") from None
    found = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if device.type not in found:
        raise DeviceError(f"device {name!r} is not supported; use auto, cpu, cuda, cuda:N or mps")
    if found[device.type] <= (device.index or 0):
        there = ", ".join(f"{count} x {kind}" for kind, count in found.items() if count)
        raise DeviceError(f"device {name!r} was asked for, this machine has {there}; use --device auto")
    return device


def pick_dtype(name: str) -> torch.dtype:
    """The floating-point format called ``name`` (float32, bfloat16, float16, or fp32, bf16, fp16)."""
    import torch

    if name not in _DTYPE_NAMES:
        raise DeviceError(f"no number format is called {name!r}; use one of: {', '.join(_DTYPE_NAMES)}")
    dtype = getattr(torch, _DTYPE_NAMES[name])
    assert isinstance(dtype, torch.dtype)
    return dtype


def device_of(model: Any) -> torch.device:
    """Where ``model`` computes: its device, or where accelerate's hooks bring tensors that have no numbers between two
    calls (``cpu_offload``).
    """
    import torch

    found: torch.device = model.device
    if found.type != "meta":
        return found
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    flat = itertools.chain.from_iterable(getattr(hook, "hooks", (hook,)) for hook in hooks)
    where = (getattr(hook, "execution_device", None) for hook in flat)
    brought = next((one for one in where if one is not None), None)
    return found if brought is None else torch.device(brought)


def free_bytes(device: torch.device) -> int:
    """Bytes free on ``device`` now; on the CPU those of the machine."""
    import psutil
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def used_bytes(device: torch.device) -> int:
    """Bytes that this process has in use on ``device`` now: of a GPU those of its tensors, else all of its memory."""
    import psutil
    import torch

    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def return_freed() -> None:
    """Give back to the system what the C library (glibc) keeps of the memory that was freed; elsewhere nothing."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done all work given to it; a GPU call returns before its work is done."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seeded(seed: int) -> torch.Generator:
    """A CPU generator at ``seed``; drawing on the CPU gives the same numbers for every device."""
    import torch

    return torch.Generator("cpu").manual_seed(seed)


def generator_for(seed: int, purpose: str, number: int) -> torch.Generator:
    """A CPU generator for one purpose and number; those of neighbouring seeds or numbers are unrelated."""
    content = hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()
    return seeded(int.from_bytes(content[:8], "big") >> 1)


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """16 hexadecimal digits that change with any name, shape, format or bit of ``tensors``."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


# The machine -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Environment:
    """What a measurement depends on besides the model: machine, device, number format, library versions."""

    python: str
    platform: str
    cpu: str
    num_cpus: int
    num_threads: int
    device: str
    device_name: str
    dtype: str
    torch: str
    diffusers: str
    transformers: str
    fvcore: str
    prune_lab: str

    @classmethod
    def capture(cls, device: str = "cpu", dtype: str = "float32") -> Environment:
        """The environment of this process for work on ``device`` in ``dtype``."""
        import torch

        kind = pick_device(device)
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        name = torch.cuda.get_device_name(kind) if kind.type == "cuda" else _cpu_name()
        return cls(
            python=platform.python_version(),
            platform=f"{platform.system()} {platform.machine()}",
            cpu=_cpu_name(),
            num_cpus=cpus,
            num_threads=torch.get_num_threads(),
            device=str(kind),
            device_name=name,
            dtype=_DTYPE_NAMES.get(dtype, dtype),
            torch=torch.__version__,
            diffusers=_version("diffusers"),
            transformers=_version("transformers"),
            fvcore=_version("fvcore"),
            prune_lab=_version("prune-lab"),
        )

    def as_dict(self) -> dict[str, str | int]:
        """The fields by name, ready for JSON."""
        return dataclasses.asdict(self)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """A context in which float32 convolutions on a GPU are computed in float32.

    By default cuDNN rounds their inputs to TF32, ten bits of mantissa: differences of 1e-3, more than many blocks are
    worth.
    """
    import torch

    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
