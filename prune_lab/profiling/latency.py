"""Wall-clock time and memory of a forward pass, of the whole U-Net and of each of its blocks."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from prune_lab.blocks import architecture_of
from prune_lab.errors import ConfigError
from prune_lab.families import example_inputs
from prune_lab.profiling.costs import REST, cost_table
from prune_lab.runtime import seeded, synchronize, track
from prune_lab.schemas import BLOCK_PROFILE_COLUMNS


@dataclass(frozen=True, slots=True)
class Latency:
    """Wall-clock time of one call in milliseconds: the median and the range of the middle four fifths."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int  # recorded calls
    warmup: int  # calls before them that were not recorded


def latency_of(milliseconds: Sequence[float], warmup: int) -> Latency:
    """The latency of calls that took ``milliseconds`` each, two or more."""
    # "inclusive" keeps both deciles within what was seen, however few the runs.
    deciles = statistics.quantiles(milliseconds, n=10, method="inclusive")
    return Latency(statistics.median(milliseconds), deciles[0], deciles[-1], len(milliseconds), warmup)


def check_runs(runs: int, warmup: int) -> None:
    """Raises ConfigError when a median with a spread cannot come of it."""
    if runs < 2 or warmup < 0:
        raise ConfigError(
            f"asked for {runs} timed runs after {warmup} of warm-up; a median with a spread needs at least 2 runs "
            "and a warm-up of at least 0"
        )


def call_ms(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of ``call``, ``device`` idle before and after."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def measure_latency(
    call: Callable[[], object], *, warmup: int = 3, runs: int = 20, device: torch.device | str = "cpu"
) -> Latency:
    """The time of ``call`` over ``runs`` recorded calls, without gradients, ``device`` idle before and after each.

    Raises ConfigError for fewer than two runs.
    """
    check_runs(runs, warmup)
    device = torch.device(device)
    with torch.inference_mode():
        for _ in range(warmup):
            call()
        times = [call_ms(call, device) for _ in range(runs)]
    return latency_of(times, warmup)


# Memory ----------------------------------------------------------------------------------------------------


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


# Per block -------------------------------------------------------------------------------------------------


def random_inputs(
    config: Mapping[str, Any],
    *,
    batch: int = 1,
    latent: int | None = None,
    tokens: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """``example_inputs`` filled with normal noise: a GPU runs faster on zeros than on pictures."""
    inputs = example_inputs(config, batch=batch, latent=latent, tokens=tokens, device=device, dtype=dtype)
    generator = seeded(seed)
    for name in ("sample", "encoder_hidden_states"):
        inputs[name].copy_(torch.randn(inputs[name].shape, generator=generator))
    inputs["timestep"].fill_(500)
    return inputs


@contextmanager
def _timed(modules: Mapping[str, nn.Module], device: torch.device) -> Iterator[dict[str, float]]:
    """A mapping that each call of ``modules`` adds its milliseconds to; the hooks are gone on exit."""
    spent = dict.fromkeys(modules, 0.0)
    started: dict[str, float] = {}
    handles = []

    def start(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            synchronize(device)
            started[name] = time.perf_counter()

        return hook

    def stop(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            synchronize(device)
            spent[name] += 1e3 * (time.perf_counter() - started[name])

        return hook

    try:
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(start(name)))
            handles.append(module.register_forward_hook(stop(name)))
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def profile_blocks(
    unet: UNet2DConditionModel,
    *,
    batch: int = 1,
    latent: int | None = None,
    tokens: int | None = None,
    runs: int = 10,
    warmup: int = 2,
) -> pd.DataFrame:
    """One row per block, sampler and the rest: name, kind, params, macs, attention_macs, paper_macs, median_ms, share.

    Costs are fvcore's for one forward pass over ``batch`` samples. Time is measured where the U-Net is, around each
    block with the device idle, so the parts together take a little longer than an undisturbed pass; ``share`` is the
    part's median in the sum of all medians. Raises ConfigError for fewer than two runs.
    """
    check_runs(runs, warmup)
    architecture = architecture_of(unet)
    costs = cost_table(architecture, batch=batch, latent=latent, tokens=tokens)
    paths = {block.name: block.path for block in architecture.blocks}
    paths |= {sampler.name: sampler.path for sampler in architecture.samplers}
    parts = {name: unet.get_submodule(path) for name, path in paths.items()}
    inputs = random_inputs(
        unet.config, batch=batch, latent=latent, tokens=tokens, device=unet.device, dtype=unet.dtype
    )
    samples: dict[str, list[float]] = {cost.name: [] for cost in costs.costs}
    whole = "whole"
    with torch.inference_mode():
        for run in track(range(warmup + runs), "timing blocks"):
            with _timed({whole: unet, **parts}, unet.device) as spent:
                unet(**inputs)
            if run >= warmup:
                total = spent.pop(whole)
                for name, milliseconds in spent.items():
                    samples[name].append(milliseconds)
                samples[REST].append(max(0.0, total - sum(spent.values())))
    medians = {name: statistics.median(times) for name, times in samples.items()}
    frame = costs.frame()
    frame["median_ms"] = [medians[name] for name in frame["name"]]
    frame["share"] = frame["median_ms"] / frame["median_ms"].sum()
    return frame[list(BLOCK_PROFILE_COLUMNS)]
