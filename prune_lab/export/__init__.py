"""A student among others: written into the formats that they read, and what was made for its teacher fitted to it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from prune_lab.export.additions import Converted
from prune_lab.export.card import write_card
from prune_lab.export.compatibility import compatibility
from prune_lab.export.controlnet import convert_controlnet
from prune_lab.export.edge import export_for
from prune_lab.export.hub import check_repository, push_folder, uploads_of
from prune_lab.export.ip_adapter import convert_ip_adapter
from prune_lab.export.lora import convert_lora
from prune_lab.export.narrowed_card import write_narrowed_card
from prune_lab.export.single_file import FORMS, NATIVE, Exported, export_single_file
from prune_lab.export.snippets import loaded_in_python
from prune_lab.export.students import Student, padded_widths, student_in, student_of
from prune_lab.models import ModelSource
from prune_lab.runtimes import RUNTIMES

__all__ = [
    "CONVERSIONS",
    "EXPORT_TARGETS",
    "FORMS",
    "Conversion",
    "Converted",
    "ExportTarget",
    "Exported",
    "Student",
    "check_repository",
    "compatibility",
    "convert_controlnet",
    "convert_ip_adapter",
    "convert_lora",
    "export_single_file",
    "loaded_in_python",
    "padded_widths",
    "push_folder",
    "student_in",
    "student_of",
    "uploads_of",
    "write_card",
    "write_narrowed_card",
]


class ExportTarget(Protocol):
    """Writes ``source`` to ``out`` for another program: whole, or not at all."""

    def __call__(
        self,
        source: ModelSource,
        out: Path,
        *,
        dtype: torch.dtype | None = None,
        form: str = NATIVE,
        force: bool = False,
        weights: str = "",
    ) -> Exported: ...


EXPORT_TARGETS: dict[str, ExportTarget] = {
    "single-file": export_single_file,
    **{name: export_for(name) for name in RUNTIMES},
}


class Conversion(Protocol):
    """Writes what was made for the teacher, ``given``, as ``out`` for its student: whole, or not at all."""

    def __call__(self, student: Student, given: Path, out: Path, *, force: bool = False) -> Converted: ...


CONVERSIONS: dict[str, Conversion] = {
    "lora": convert_lora,
    "controlnet": convert_controlnet,
    "ip-adapter": convert_ip_adapter,
}
