"""Devices, seeds, safe writing, progress, and a record of the machine a number was measured on."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from safetensors import SafetensorError

from prune_lab.errors import DataError, DeviceError, StorageError

if TYPE_CHECKING:  # torch, pandas and rich take seconds to import; most callers need one of them at most
    import pandas as pd
    import torch
    from rich.progress import Progress

Item = TypeVar("Item")

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
        name = torch.cuda.get_device_name(kind) if kind.type == "cuda" else _cpu_name()
        return cls(
            python=platform.python_version(),
            platform=f"{platform.system()} {platform.machine()}",
            cpu=_cpu_name(),
            num_cpus=len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1,
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


# Safe writing ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; it takes the place of ``path`` only when the body succeeds.

    Raises StorageError when the disk is full, read-only or the folder cannot be made.
    """
    path = Path(path)
    with _storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())  # mkstemp makes private files; these are ordinary results
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``path`` that becomes ``path`` only when the body succeeds.

    Raises StorageError when ``path`` holds something already and ``force`` is not given, or when writing fails.
    With ``force`` the old folder is removed after the new one is complete.
    """
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not force):
        what = "a file" if path.is_file() else "a folder that is not empty"
        raise StorageError(
            f"asked to write the folder {path}, found {what} there; give another path or --force"
        )
    with _storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            if path.exists():
                old = temporary.with_suffix(".old")
                path.replace(old)
                temporary.replace(path)
                shutil.rmtree(old)
            else:
                temporary.replace(path)
        except StorageError as error:
            # Of something written inside: name the folder that was asked for, not our temporary one.
            raise StorageError(str(error).replace(str(temporary), str(path))) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> object:
    """The value that the JSON file ``path`` holds.

    Raises StorageError when it is missing, DataError when it is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"asked to read {path}: {error.strerror}; check the path") from None
    except ValueError as error:
        raise DataError(f"asked to read {path} as JSON, found {error}; write the file again") from None


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Write ``frame`` as CSV without its index, whole or not at all; floats keep every digit."""
    with atomic_write(path) as temporary:
        frame.to_csv(temporary, index=False)


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError) and "I/O error" not in str(error):
            raise  # about the tensors, not about the disk
        reason = getattr(error, "strerror", None) or str(error)
        raise StorageError(
            f"asked to write {path}: {reason}; free some space or give a path that can be written; "
            "nothing was left half-written"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# Progress --------------------------------------------------------------------------------------------------------

_progress: ContextVar[Progress | None] = ContextVar("prune_lab_progress", default=None)


@contextlib.contextmanager
def progress_shown() -> Iterator[None]:
    """Inside this context every ``track`` draws a bar with the time left on the terminal's error stream."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Throughput(ProgressColumn):
        """Units per second, of bars that count in units."""

        def render(self, task: Task) -> Text:
            unit, per = task.fields.get("unit", ""), task.fields.get("per", 1)
            return Text(f"{task.speed * per:,.1f} {unit}/s" if unit and task.speed else "")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        Throughput(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        token = _progress.set(progress)
        try:
            yield
        finally:
            _progress.reset(token)


def note(text: str) -> None:
    """Show one line of ``text`` above the progress bars, when they are shown (see ``progress_shown``)."""
    progress = _progress.get()
    if progress is not None:
        progress.console.print(text, markup=False, highlight=False)


def track(
    items: Iterable[Item], description: str, total: int | None = None, *, unit: str = "", per: float = 1
) -> Iterator[Item]:
    """The same ``items``, counted on a progress bar when one is shown (see ``progress_shown``).

    With ``unit`` the bar tells how many of them a second, ``per`` for each item.
    """
    progress = _progress.get()
    if progress is None:
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    task = progress.add_task(description, total=total, unit=unit, per=per)
    try:
        for item in items:
            yield item
            progress.advance(task)
    finally:
        progress.remove_task(task)
