"""Latency tables that are kept: measured once per structure of a model and service, and found again in any run.

They lie in the user's cache folder, ``$XDG_CACHE_HOME/prune_lab/latency`` (``~/.cache`` without it), each in a file
named by what it holds for. Weights are not among that: they decide nothing about the time of a pass.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prune_lab.blocks import Architecture
from prune_lab.errors import DataError, PlanError, StorageError
from prune_lab.families import film_frames, latent_shape, plain_config
from prune_lab.profiling.latency import LatencyTable, latency_table_from_dict
from prune_lab.profiling.service import Service
from prune_lab.runs import read_typed
from prune_lab.runtime import Environment, cache_folder, note, write_json
from prune_lab.runtimes import RUNTIMES

_FORMAT = 1


def latency_key(architecture: Architecture, service: Service) -> dict[str, Any]:
    """All that a latency table depends on, as JSON values."""
    config = {
        name: value for name, value in plain_config(architecture.config).items() if name != "sample_size"
    }
    there = Environment.capture(service.device, service.dtype)
    film = film_frames(config, service.frames)
    return {
        "format": _FORMAT,
        "structure": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16],
        "device": torch.device(service.device).type,
        "device_name": there.device_name,
        "threads": there.num_threads if torch.device(service.device).type == "cpu" else 0,
        "dtype": service.dtype,
        "batch": service.batch,
        "latent": list(latent_shape(architecture.config, service.latent)),
        "tokens": architecture.tokens if service.tokens is None else service.tokens,
        **({} if film is None else {"frames": film}),
        "backend": service.backend,
        "torch": there.torch,
        "diffusers": there.diffusers,
        **({"runtime": RUNTIMES[service.backend].version} if service.backend in RUNTIMES else {}),
    }


def latency_file(key: Mapping[str, Any]) -> Path:
    """Where the table of ``key`` is kept, whether or not it is there."""
    digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder("latency") / f"{digest}.json"


def keep_latency(path: Path, key: Mapping[str, Any], table: LatencyTable) -> None:
    """Write ``table`` to ``path`` with the ``key`` that it holds for. Raises StorageError."""
    write_json(path, {**table.as_dict(), "key": dict(key)})


def kept_latency(path: Path, key: Mapping[str, Any], architecture: Architecture) -> LatencyTable | None:
    """The table of ``key`` in ``path``; None where there is none, with a word where the file is of no use."""
    if not path.is_file():
        return None
    try:
        found = read_typed(path, dict[str, Any])
        if "key" not in found:
            raise DataError("it does not say what it holds for")
        if found.pop("key") != dict(key):
            raise DataError("it holds for another model or service")
        return latency_table_from_dict(found, architecture)
    except (DataError, PlanError, StorageError) as error:
        note(f"the latency table in {path} cannot be used ({error}); it is measured anew")
        return None


def latency_words(table: LatencyTable) -> str:
    """When ``table`` was measured, in how many passes, and how well it foretells; for a line of output."""
    error = table.median_error_percent
    checked = sum(check.use == "held-out" for check in table.checks)
    words = f"measured {table.measured or 'at an unknown time'} in {table.whole.runs} passes"
    return words if error is None else f"{words}, median error {error:.1f} % on {checked} other plans"
