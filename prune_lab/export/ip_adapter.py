"""An IP-Adapter of the teacher for its student: its layers are counted by the attentions, so they get new numbers."""

from __future__ import annotations

import re
from pathlib import Path

from prune_lab.errors import ModelFormatError
from prune_lab.export.additions import (
    Converted,
    blocks_of,
    check_out,
    read_addition,
    write_addition,
)
from prune_lab.export.students import TRAIN_ANOTHER, Student
from prune_lab.families import meta_model
from prune_lab.families.adapter_names import (
    attentions,
    check_has_additions,
    is_cross_attention,
    kept_path,
    values_of,
)
from prune_lab.runtime import path_text

_LAYER = re.compile(r"ip_adapter\.(0|[1-9][0-9]{0,5})\.(.+)")
_IMAGE = "image_proj."


def new_numbers(student: Student) -> dict[int, int | None]:
    """The number in the student of each attention of the teacher; None where it is gone. Both count from 0."""
    layout, removed = student.layout, student.removed_paths
    places = {path: number for number, path in enumerate(attentions(layout.config))}
    paths = [kept_path(layout, removed, path) for path in attentions(student.architecture.config)]
    return {number: None if path is None else places[path] for number, path in enumerate(paths)}


def convert_ip_adapter(student: Student, given: Path, out: Path, *, force: bool = False) -> Converted:
    """The IP-Adapter ``given`` of the teacher as ``out``, for the student; the projection of images stays as it is.

    Raises ModelFormatError when it was made for a U-Net with other attentions, StorageError when ``out`` is taken.
    """
    check_has_additions(student.architecture.config, "to convert an IP-Adapter", instead=TRAIN_ANOTHER)
    given = Path(given)
    out = check_out(student, out, given, force=force)
    tensors, metadata = read_addition(given, "IP-Adapter")
    paths = attentions(student.architecture.config)
    shapes = {
        name: tuple(t.shape) for name, t in meta_model(student.architecture.config).state_dict().items()
    }
    numbers = new_numbers(student)
    converted, given_layers = {}, set()
    for key, tensor in tensors.items():
        if key.startswith(_IMAGE):
            converted[key] = tensor
            continue
        found = _LAYER.fullmatch(key)
        number = int(found[1]) if found else -1
        if not found or number not in numbers:
            raise ModelFormatError(
                f"asked to convert {path_text(given)}, whose key {path_text(key)!r} is none of an IP-Adapter "
                f"for the teacher, which has {len(paths)} attentions; give one that was trained for this "
                "student's teacher"
            )
        width = shapes[f"{values_of(paths[number])}.weight"]
        if found[2] in ("to_k_ip.weight", "to_v_ip.weight") and (
            tuple(tensor.shape) != width or not is_cross_attention(paths[number])
        ):
            raise ModelFormatError(
                f"asked to convert {path_text(given)}, whose {key} is {list(tensor.shape)} where the teacher has "
                f"{list(width)}; give an IP-Adapter that was trained for this student's teacher"
            )
        given_layers.add(number)
        if (new := numbers[number]) is not None:
            converted[f"ip_adapter.{new}.{found[2]}"] = tensor
    kept = [number for number in given_layers if numbers[number] is not None]
    if not kept:
        raise ModelFormatError(
            f"asked to convert {path_text(given)}, found no layer in it that the student has an attention for"
        )
    write_addition(out, converted, metadata, student, given)
    return Converted(
        out,
        "ip-adapter",
        parts=len(given_layers),
        kept=len(kept),
        renamed=sum(numbers[number] != number for number in kept),
        dropped_from=blocks_of(student.architecture, (paths[number] for number in given_layers - set(kept))),
    )
