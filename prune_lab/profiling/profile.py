"""The profile of one model: what it holds, what it computes, how long it takes, and what it needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import ModelMixin

from prune_lab.counting import count_macs
from prune_lab.errors import DataError, ModelNotFoundError
from prune_lab.families import family_of, latent_shape, meta_model
from prune_lab.profiling.latency import Latency, measure_latency, random_inputs
from prune_lab.profiling.live_memory import measure_memory_growth
from prune_lab.profiling.turns import Change
from prune_lab.runs import typed
from prune_lab.runtime import Environment


@dataclass(frozen=True, slots=True)
class Profile:
    """The costs of a model and the conditions they hold under; None is "not measured", never zero."""

    params: int
    macs: int  # whole convention, one forward pass over the batch
    attention_macs: int
    paper_macs: int  # without attention products
    uncounted: Mapping[str, int]  # operator -> calls that no formula covers
    latency: Latency | None  # of one forward pass over the batch
    peak_memory_bytes: int | None  # weights and what a forward pass adds to them at its highest point
    disk_bytes: int  # weights in safetensors
    batch: int
    latent: tuple[int, int]  # height and width
    tokens: int
    dtype: str
    device: str
    environment: Environment
    change: Change | None = None  # of the latency against the teacher's, from times taken in turns
    timed: str = "alone"  # or "in turns, one process"

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values; ``profile_from_dict`` reads them back."""
        values = dataclasses.asdict(dataclasses.replace(self, uncounted=dict(self.uncounted)))
        return {**values, "latent": list(self.latent)}


def profile_from_dict(values: Mapping[str, Any]) -> Profile:
    """The profile that ``as_dict`` wrote. Raises DataError when a field is missing, unknown or of another kind."""
    try:
        return cast("Profile", typed(Profile, values))
    except ValueError as error:
        raise DataError(f"asked to read a profile, found {error}; profile the model again") from None


def tensor_bytes(model: ModelMixin) -> int:
    """Bytes of everything that is saved with ``model``; a safetensors file adds a header of some kilobytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def weights_on_disk(folder: Path) -> int:
    """Bytes of the safetensors files anywhere in ``folder``. Raises ModelNotFoundError when there are none."""
    files = list(Path(folder).rglob("*.safetensors"))
    if not files:
        raise ModelNotFoundError(
            f"asked for the size of the weights in {folder}, found no .safetensors file; give a model folder"
        )
    return sum(file.stat().st_size for file in files)


def profile(
    source: ModelMixin | Mapping[str, Any],
    *,
    batch: int = 1,
    latent: int | None = None,
    tokens: int | None = None,
    frames: int | None = None,
    runs: int = 20,
    warmup: int = 3,
    measured: bool = True,
    timed: bool = True,
    folder: Path | None = None,
) -> Profile:
    """The profile of a model on the device and in the number format it has, or of a config (counted only).

    MACs are fvcore's for one forward pass over ``batch`` samples at ``latent`` squared, ``tokens`` words and ``frames``
    of the latent of a film (None: what the model is meant for). Without ``measured`` latency and memory stay None,
    without ``timed`` latency does. ``folder`` says where the weights lie; without it their size is that of the tensors.
    Raises ConfigError for fewer than two runs.
    """
    config = source if isinstance(source, Mapping) else source.config
    model = meta_model(source) if isinstance(source, Mapping) else source
    disk_bytes = tensor_bytes(model) if folder is None else weights_on_disk(folder)
    macs = count_macs(source, batch=batch, latent=latent, tokens=tokens, frames=frames)
    params = sum(parameter.numel() for parameter in model.parameters())
    measured = measured and model.device.type != "meta"
    latency, memory = None, None
    if measured:
        sizes: dict[str, Any] = {"batch": batch, "latent": latent, "tokens": tokens, "frames": frames}
        inputs = random_inputs(config, **sizes, device=model.device, dtype=model.dtype)
        if timed:
            latency = measure_latency(lambda: model(**inputs), warmup=warmup, runs=runs, device=model.device)
        growth = measure_memory_growth(lambda: model(**inputs), device=model.device)
        memory = None if growth is None else growth + tensor_bytes(model)
    dtype = str(model.dtype).removeprefix("torch.")
    device = model.device if measured else torch.device("cpu")
    return Profile(
        params=params,
        macs=macs.total,
        attention_macs=macs.attention,
        paper_macs=macs.without_attention,
        uncounted=dict(macs.uncounted),
        latency=latency,
        peak_memory_bytes=memory,
        disk_bytes=disk_bytes,
        batch=batch,
        latent=latent_shape(model.config, latent),
        tokens=family_of(config).tokens(config) if tokens is None else tokens,
        dtype=dtype,
        device=str(device),
        environment=Environment.capture(str(device), dtype),
    )
