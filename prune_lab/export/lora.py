"""A LoRA of the teacher for its student: what changes surviving modules goes to where they are now.

Nothing is computed, keys are renamed. So the student with the converted LoRA is the teacher with the LoRA and without
the blocks of the plan.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from prune_lab.errors import ModelFormatError
from prune_lab.export.additions import Converted, blocks_of, check_out, read_addition, write_addition
from prune_lab.export.students import Student
from prune_lab.families import Layout
from prune_lab.families.adapter_names import TEXT_PREFIXES, AdapterNames, ModuleKey, adapter_names, fits
from prune_lab.families.ldm_structure import has_even_depths

_CONFIG = "lora_adapter_metadata"  # diffusers' entry for the settings of PEFT, by part of the pipeline
_UNEVEN = (
    "its names are of the LDM layout, which diffusers counts right only with equally many layers in all stages; this "
    "student has not: use it where the LDM layout is read, such as ComfyUI"
)
# One of the two matrices of a module: of a LoRA with any spelling, or of LoHa and LoKr.
_HALF = re.compile(
    r"(?P<begin>(?P<module>.+?)[._](?:\w+_lora\.|lora[._](?:linear_layer\.)?|(?:hada|lokr)_w\d_))"
    r"(?P<side>A|B|down|up|a|b)(?P<rest>(?:\.\w+)*\.weight|)"
)
_OTHER = {"A": "B", "B": "A", "down": "up", "up": "down", "a": "b", "b": "a"}
_PATTERNS = ("rank_pattern", "alpha_pattern")


def _parts(given: Path, tensors: Mapping[str, Tensor], names: AdapterNames) -> dict[str, ModuleKey]:
    """What each key of the U-Net is about. Raises ModelFormatError for one that belongs to no module of the teacher."""
    found: dict[str, ModuleKey] = {}
    for key, tensor in tensors.items():
        if key.startswith(TEXT_PREFIXES):
            continue
        part = names.of(key)
        if part is None:
            raise ModelFormatError(
                f"asked to convert {given}, whose key {key!r} names no module of the teacher; "
                "give a LoRA that was trained for this student's teacher"
            )
        if not fits(part, tensor, names):
            raise ModelFormatError(
                f"asked to convert {given}, whose {key} is {list(tensor.shape)} and does not fit the teacher's module "
                f"of {list(names.shapes[part.module])}; give a LoRA that was trained for this student's teacher"
            )
        found[key] = part
    if not found:
        raise ModelFormatError(f"asked to convert {given}, found nothing in it that is about a U-Net")
    return found


def _check_pairs(given: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise ModelFormatError unless each matrix of a module has its other one, and both have the same rank."""
    for key, tensor in tensors.items():
        found = _HALF.fullmatch(key)
        if not found:
            continue
        module, other = found["module"], f"{found['begin']}{_OTHER[found['side']]}{found['rest']}"
        if other not in tensors:
            raise ModelFormatError(
                f"asked to convert {given}, whose module {module} has {key.removeprefix(module)[1:]}, "
                f"found no {other.removeprefix(module)[1:]}: the file is not whole; fetch it again"
            )
        if found["side"] in ("A", "down") and tensor.dim() > 1 and tensors[other].dim() > 1:
            ranks = tensor.shape[0], tensors[other].shape[1]
            if ranks[0] != ranks[1]:
                raise ModelFormatError(
                    f"asked to convert {given}, whose module {module} has two matrices of the ranks "
                    f"{ranks[0]} and {ranks[1]}: they do not belong together; fetch the file again"
                )


def _pattern(patterns: Mapping[str, Any], modules: Mapping[str, str]) -> dict[str, Any]:
    """The value of each module under its new name: PEFT takes the first pattern that a module's path ends with."""
    return {
        new: value
        for module, new in modules.items()
        if (
            value := next(
                (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), None
            )
        )
        is not None
    }


def _settings(text: str, modules: Mapping[str, str]) -> str:
    """The settings of the LoRA as diffusers keeps them, with the modules of the U-Net by their new names."""
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ModelFormatError(f"asked to convert a LoRA whose {_CONFIG} is not JSON: {error}") from None
    for name in [name for name in settings if name.startswith("unet.")]:
        short = name.removeprefix("unet.")
        if short in _PATTERNS and isinstance(settings[name], dict):
            settings[name] = _pattern(settings[name], modules)
        elif short == "target_modules":
            settings[name] = sorted(set(modules.values()))
        elif short in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            settings[name] = None  # the list of modules is complete
    return json.dumps(settings, indent=2, sort_keys=True)


def _metadata(metadata: dict[str, str], modules: Iterable[str], layout: Layout) -> dict[str, str]:
    if _CONFIG not in metadata:
        return metadata
    renamed = {module: new for module in modules if (new := layout.renamed(module)) is not None}
    return metadata | {_CONFIG: _settings(metadata[_CONFIG], renamed)}


def convert_lora(student: Student, given: Path, out: Path, *, force: bool = False) -> Converted:
    """The LoRA ``given`` of the teacher as ``out``, for the student; text encoders' parts go along as they are.

    Read are diffusers' formats and kohya's (LoRA, LoHa, LoKr and what is named like them), with diffusers' or LDM
    names; the format stays. Raises ModelFormatError for a key that the teacher has no module for or that does not fit
    it, and when nothing is left; StorageError when ``out`` is taken.
    """
    given = Path(given)
    out = check_out(student, out, given, force=force)
    tensors, metadata = read_addition(given, "LoRA")
    names = adapter_names(student.architecture.config, student.layout)
    parts = _parts(given, tensors, names)
    modules = {part.module: part for part in parts.values()}
    left = [module for module, part in modules.items() if part.new_key is not None]
    if not left:
        raise ModelFormatError(
            f"asked to convert {given}, whose {len(modules)} modules all lie in blocks that the student does not have"
        )
    _check_pairs(given, tensors)
    converted = {
        new: tensor
        for key, tensor in tensors.items()
        if (new := parts[key].new_key if key in parts else key) is not None
    }
    uneven = not has_even_depths(student.layout.config) and any(part.in_ldm_layout for part in parts.values())
    write_addition(out, converted, _metadata(metadata, modules, student.layout), student, given)
    return Converted(
        out,
        "lora",
        parts=len(modules),
        kept=len(left),
        renamed=sum(modules[module].renamed for module in left),
        notes=(_UNEVEN,) if uneven else (),
        dropped_from=blocks_of(student.architecture, modules.keys() - set(left)),
    )
