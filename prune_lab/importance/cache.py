"""What has been measured already, kept by model, inputs and number format: nothing is computed twice."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from prune_lab.errors import DataError
from prune_lab.runtime import atomic_write

_FORMAT = "prune_lab scores 1"
_SAVE_EVERY = 20.0  # seconds that an interruption may cost


def set_key(gone: Iterable[str]) -> str:
    """12 hexadecimal digits of a set of units that are gone, whatever the group or plan is called."""
    return hashlib.sha256(json.dumps(sorted(gone)).encode()).hexdigest()[:12]


class ScoreCache:
    """Values by (criterion, set of units that are gone), one number per row of the inputs; NaN: not measured yet.

    One cache is for one model, one set of inputs and one number format; ``open`` finds the file that belongs to them.
    """

    def __init__(self, path: Path | None = None) -> None:
        """An empty cache, or what the file at ``path`` holds; without a path it lives in memory alone."""
        self.path = path
        self._values: dict[str, NDArray[np.float64]] = {}
        self._shelves: dict[str, ScoreCache] = {}
        self._saved = time.monotonic()
        self._changed = False
        if path is not None and path.is_file():
            self._read(path)

    @classmethod
    def open(cls, folder: Path | None, *, model: str, inputs: str, precision: str) -> ScoreCache:
        """The cache in ``folder`` for these digests; in memory where there is no folder."""
        return cls(None if folder is None else folder / f"{model}-{inputs}-{precision}.safetensors")

    def _read(self, path: Path) -> None:
        remedy = "delete it: it will be measured again"
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("format") != _FORMAT:
                    raise DataError(
                        f"asked to read the scores in {path}, found another kind of file; {remedy}"
                    )
                self._values = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"asked to read the scores in {path}, found a damaged file ({error}); {remedy}"
            ) from None

    def values(self, criterion: str, key: str, rows: int) -> NDArray[np.float64]:
        """A copy (rows,) of what is known; NaN where nothing is."""
        known = self._values.get(f"{criterion}/{key}")
        return np.full(rows, np.nan) if known is None or len(known) != rows else known.copy()

    def put(
        self,
        criterion: str,
        key: str,
        rows: int,
        where: slice | NDArray[np.int64],
        found: NDArray[np.float64],
    ) -> None:
        """Keep values ``found`` for the rows ``where``, of ``rows`` in all; saved now and then."""
        whole = self.values(criterion, key, rows)
        whole[where] = found
        self._values[f"{criterion}/{key}"] = whole
        self._changed = True

    def for_inputs(self, inputs: str) -> ScoreCache:
        """The cache beside this one for other inputs of the same model, such as prompts; kept for the next time."""
        if inputs not in self._shelves:
            path = (
                None if self.path is None else self.path.with_name(f"{self.path.stem}-{inputs}.safetensors")
            )
            self._shelves[inputs] = ScoreCache(path)
        return self._shelves[inputs]

    def save(self, *, now: bool = True) -> None:
        """Write the file, whole or not at all; without ``now`` only when the last time is a while ago."""
        for for_inputs in self._shelves.values():
            for_inputs.save(now=now)
        if self.path is None or not self._changed:
            return
        if not now and time.monotonic() - self._saved < _SAVE_EVERY:
            return
        tensors = {name: torch.from_numpy(value) for name, value in self._values.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as temporary:
            save_file(tensors, temporary, metadata={"format": _FORMAT})
        self._saved, self._changed = time.monotonic(), False
