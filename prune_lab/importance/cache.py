"""A cache of measured values by model, inputs and number format, so that nothing is computed twice."""

from __future__ import annotations

import hashlib
import json
import time
import weakref
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from prune_lab.errors import DataError
from prune_lab.importance.intervals import Floats, Integers
from prune_lab.runs.tensor_files import read_tensors
from prune_lab.runtime import atomic_write, tensors_digest

_FORMAT = "prune_lab scores 1"
_SAVE_EVERY = 20.0  # seconds of work that an interruption may cost


def set_key(removed: Iterable[str]) -> str:
    """12 hexadecimal digits that identify a set of removed units, whatever the group or plan is called."""
    return hashlib.sha256(json.dumps(sorted(removed)).encode()).hexdigest()[:12]


class ScoreCache:
    """Values by (criterion, set of removed units), one number per row of the inputs; NaN means not measured yet.

    A cache belongs to one model, one set of inputs and one number format; ``open`` finds the file for them.
    """

    def __init__(self, path: Path | None = None) -> None:
        """An empty cache, or the contents of the file at ``path``. Without a path it is kept in memory only."""
        self.path = path
        self._values: dict[str, Floats] = {}
        self._other_inputs: dict[str, ScoreCache] = {}
        self._owner: weakref.ref[object] | None = None
        self._saved = time.monotonic()
        self._changed = False
        if path is not None and path.exists():
            self._read(path)

    @classmethod
    def open(cls, folder: Path | None, *, model: str, inputs: str, precision: str) -> ScoreCache:
        """The cache in ``folder`` for these digests; in memory only when ``folder`` is None."""
        return cls(None if folder is None else folder / f"{model}-{inputs}-{precision}.safetensors")

    def keep_for(self, model: object) -> None:
        """Note that the values are those of ``model``. Raises DataError while it keeps those of another one."""
        owner = self._owner() if self._owner else None
        if owner is not None and owner is not model:
            raise DataError(
                "asked to score a model with the cache of another one, whose values would be taken for its own; give "
                "each model a cache of its own (cache=ScoreCache())"
            )
        self._owner = weakref.ref(model)

    def _read(self, path: Path) -> None:
        remedy = "delete it, and the scores will be measured again"
        metadata, tensors = read_tensors(path, _FORMAT, "read the scores in", remedy)
        if metadata.get("digest", "") not in ("", tensors_digest(tensors)):
            raise DataError(f"asked to read the scores in {path}, found other numbers in it; {remedy}")
        self._values = {name: tensor.numpy() for name, tensor in tensors.items()}

    def values(self, criterion: str, key: str, rows: int) -> Floats:
        """A copy (rows,) of the cached values; NaN where there is none."""
        cached = self._values.get(f"{criterion}/{key}")
        return np.full(rows, np.nan) if cached is None or len(cached) != rows else cached.copy()

    def put(self, criterion: str, key: str, rows: int, index: slice | Integers, values: Floats) -> None:
        """Store ``values`` for the rows ``index`` out of ``rows``; ``save`` writes them to the file."""
        row_values = self.values(criterion, key, rows)
        row_values[index] = values
        self._values[f"{criterion}/{key}"] = row_values
        self._changed = True

    def for_inputs(self, inputs: str) -> ScoreCache:
        """The cache of the same model for other inputs, such as prompts; ``save`` of this cache saves it too."""
        if inputs not in self._other_inputs:
            path = self.path and self.path.with_name(f"{self.path.stem}-{inputs}.safetensors")
            self._other_inputs[inputs] = ScoreCache(path)
        return self._other_inputs[inputs]

    def save(self, *, now: bool = True) -> None:
        """Write the file completely or not at all; with ``now=False`` only if the last save is long enough ago."""
        for cache in self._other_inputs.values():
            cache.save(now=now)
        if self.path is None or not self._changed:
            return
        if not now and time.monotonic() - self._saved < _SAVE_EVERY:
            return
        tensors = {name: torch.from_numpy(value) for name, value in self._values.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as temporary:
            save_file(tensors, temporary, metadata={"format": _FORMAT, "digest": tensors_digest(tensors)})
        self._saved, self._changed = time.monotonic(), False
