"""A ControlNet of the teacher for its student, cut by the same plan; see ``families.controlnet``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from prune_lab.errors import FormError, ModelFormatError, StorageError
from prune_lab.export.additions import Converted, blocks_of
from prune_lab.export.students import TRAIN_ANOTHER, Student
from prune_lab.families.adapter_names import check_has_additions
from prune_lab.families.controlnet import cut_controlnet, meta_controlnet
from prune_lab.models import weight_files
from prune_lab.models.conversion import converted
from prune_lab.models.files import json_object, read_header
from prune_lab.models.protection import check_folder
from prune_lab.runtime import names_alone, open_regular, output_folder, path_text, write_json


def _folder_of(given: Path) -> Path:
    if given.exists() and not given.is_dir():
        open_regular(given).close()  # raises what it is, where that is no file
    folder = given.parent if given.is_file() else given
    if not (folder / "config.json").is_file():
        raise ModelFormatError(
            f"asked to convert the ControlNet {path_text(given)}, found no config.json beside its weights; give the "
            "folder that save_pretrained wrote (a file in the LDM layout becomes one through diffusers' "
            "from_single_file)"
        )
    return folder


def _check_weights(folder: Path, config: dict[str, Any]) -> None:
    """Raise ModelFormatError unless the weights in ``folder`` are those of its config."""
    wanted = {key: tuple(tensor.shape) for key, tensor in meta_controlnet(config).state_dict().items()}
    found = {key: shape for path in weight_files(folder) for key, (_, shape) in read_header(path).items()}
    wrong = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    if wrong:
        raise ModelFormatError(
            f"the weights in {path_text(folder)} do not fit its config.json: tensor {path_text(wrong[0])} is "
            f"{found.get(wrong[0])} instead of {wanted.get(wrong[0])}; fetch both from the same place again"
        )


def _read(folder: Path, keys: dict[str, str], zero: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensor of each key, from the one of the name that it has in ``folder``; zeros for the modules ``zero``."""
    with contextlib.ExitStack() as stack:
        homes: dict[str, Any] = {}
        for path in weight_files(folder):
            file = stack.enter_context(safe_open(path, framework="pt"))
            homes |= dict.fromkeys(file.keys(), file)
        tensors = {key: converted(old, homes[old].get_tensor(old), None) for key, old in keys.items()}
    return {
        key: torch.zeros_like(tensor) if key.startswith(tuple(f"{module}." for module in zero)) else tensor
        for key, tensor in tensors.items()
    }


def convert_controlnet(student: Student, given: Path, out: Path, *, force: bool = False) -> Converted:
    """The ControlNet in the folder ``given``, of the teacher, as the folder ``out`` that plain diffusers loads.

    Raises ModelFormatError when its files are not a ControlNet's, UnsupportedModelError when it was made for another
    U-Net, FormError when no plain ControlNet fits the student, StorageError when ``out`` is taken.
    """
    check_has_additions(student.architecture.config, "to convert a ControlNet", instead=TRAIN_ANOTHER)
    if student.plan.form != "native":
        raise FormError(
            f"asked to convert a ControlNet for a student in the {student.plan.form} form; it counts skip connections, "
            "and these are known of students in the native form alone: use it with the teacher, or prune natively "
            "(prune --form native says whether the plan can be)"
        )
    given, out = Path(given), Path(out)
    folder = _folder_of(given)
    if out.suffix == ".safetensors":
        raise StorageError(
            f"asked to write {out}; a ControlNet is a folder: give a name without .safetensors"
        )
    sources = {"the ControlNet": (folder,), "the student": (student.folder,) if student.folder else ()}
    out = check_folder(out, sources, force=force)
    config = json_object(folder / "config.json")
    cut = cut_controlnet(config, student.architecture.outline, student.layout)
    _check_weights(folder, config)
    smaller = meta_controlnet(cut.layout.config)
    smaller.load_state_dict(
        _read(folder, cut.layout.sources(smaller.state_dict()), cut.zero), strict=True, assign=True
    )
    origin = {"converted_from": folder.name, "plan": student.plan.text, "plan_id": student.plan.id}
    with output_folder(out, force=force) as temporary:
        smaller.save_pretrained(temporary, safe_serialization=True)
        write_json(temporary / "config.json", names_alone(json_object(temporary / "config.json")))
        write_json(temporary / "plan.json", student.plan.to_json())
        write_json(temporary / "provenance.json", origin)
    own = {path: new for path, new in cut.layout.names.items() if new is None}
    notes = ["its blocks left by the same plan as the student's; its mid stage stays whole"]
    if cut.zero:
        notes = [
            "its blocks left by the same plan as the student's; its mid stage has no place in this student and "
            "gives nothing"
        ]
    return Converted(
        out,
        "controlnet",
        parts=cut.teacher_skips,
        kept=len(cut.skips),
        renamed=sum(new != old for new, old in cut.skips.items()),
        dropped_from=blocks_of(student.architecture, own),
        notes=tuple(notes),
    )
