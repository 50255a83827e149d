"""A student for other programs: written into the formats that they read."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from prune_lab.export.single_file import Exported, export_single_file
from prune_lab.models import ModelSource

__all__ = ["EXPORT_TARGETS", "ExportTarget", "Exported", "export_single_file"]


class ExportTarget(Protocol):
    """Writes ``source`` to ``out`` for another program: whole, or not at all."""

    def __call__(
        self, source: ModelSource, out: Path, *, dtype: torch.dtype | None = None, force: bool = False
    ) -> Exported: ...


EXPORT_TARGETS: dict[str, ExportTarget] = {"single-file": export_single_file}
