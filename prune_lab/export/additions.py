"""Files of additions to a model (LoRA, IP-Adapter): read whole, checked, and written with what became of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from prune_lab.blocks import Architecture
from prune_lab.errors import ModelFormatError
from prune_lab.export.students import Student
from prune_lab.models.conversion import converted
from prune_lab.models.files import PICKLED, read_header
from prune_lab.models.protection import check_file
from prune_lab.runtime import atomic_write, path_text, without_folders
from prune_lab.version import __version__

# Digests that kohya's tools write over the tensors of a file; those of the new file would be others.
_DIGESTS = ("sshs_model_hash", "sshs_legacy_hash")


@dataclasses.dataclass(frozen=True, slots=True)
class Converted:
    """A file that was made for a student: how many parts of the teacher's were kept, and in which blocks others were.

    A part is a module for a LoRA, an attention for an IP-Adapter, and a skip connection for a ControlNet.
    """

    path: Path
    kind: str
    parts: int  # in the teacher's file
    kept: int
    renamed: int  # of those kept
    dropped_from: tuple[str, ...] = ()  # blocks
    notes: tuple[str, ...] = ()

    @property
    def dropped(self) -> int:
        """How many parts had no place."""
        return self.parts - self.kept


def blocks_of(architecture: Architecture, modules: Iterable[str]) -> tuple[str, ...]:
    """Names of the blocks and samplers that ``modules`` lie in, in order of execution."""
    paths = tuple(modules)
    return tuple(
        unit.name
        for unit in architecture.units
        if any(path == unit.path or path.startswith(f"{unit.path}.") for path in paths)
    )


def read_addition(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of the safetensors file ``path``.

    Raises ModelFormatError when it is missing, damaged or pickled, or holds numbers that are not finite.
    """
    path = Path(path)
    if path.suffix in PICKLED:
        raise ModelFormatError(
            f"asked to convert {path_text(path)}, a pickled file, which is never opened here; give it as safetensors"
        )
    if not path.exists():  # what is there and no file is named by the reader
        raise ModelFormatError(
            f"asked to convert the {kind} {path_text(path)}, found no such file; give a .safetensors"
        )
    read_header(path)
    with safe_open(path, framework="pt") as file:
        tensors = {key: converted(path_text(key), file.get_tensor(key), None) for key in file.keys()}  # noqa: SIM118
        return tensors, dict(file.metadata() or {})


def check_out(student: Student, out: Path, given: Path, *, force: bool) -> Path:
    """The file ``out`` to write what is made of ``given`` for ``student``.

    Raises StorageError as ``models.protection.check_file`` does.
    """
    sources = {"the file": (given,), "the student": (student.folder,) if student.folder else ()}
    return check_file(out, sources, "tensors", force=force)


def origin_of(student: Student, given: Path) -> dict[str, str]:
    """Metadata that says which file was converted for which plan, without paths of this machine."""
    notes = {"converted_from": given.name, "plan": student.plan.text, "plan_id": student.plan.id}
    return {
        "prune_lab.version": __version__,
        "prune_lab.plan": json.dumps(student.plan.to_json()),
        "prune_lab.provenance": json.dumps(notes),
    }


def write_addition(
    out: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], student: Student, given: Path
) -> None:
    """Write the converted ``tensors`` to ``out``, with the ``metadata`` that the file had and what became of it."""
    kept = {name: without_folders(text) for name, text in metadata.items() if name not in _DIGESTS}
    with atomic_write(out) as temporary:
        save_file(
            {key: tensor.contiguous() for key, tensor in tensors.items()},
            temporary,
            {"format": "pt"} | kept | origin_of(student, given),
        )
