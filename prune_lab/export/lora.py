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
from prune_lab.export.additions import (
    Converted,
    blocks_of,
    check_out,
    read_addition,
    write_addition,
)
from prune_lab.export.students import TRAIN_ANOTHER, Student
from prune_lab.families.adapter_names import (
    TEXT_PREFIXES,
    AdapterNames,
    ModuleKey,
    adapter_names,
    check_has_additions,
    fits,
    kept_path,
)
from prune_lab.families.ldm_structure import has_even_depths
from prune_lab.runs.records import typed
from prune_lab.runtime import parse_json, path_text, printable

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
# What a LoRA or one of its kin is for a module, at the end of a key: all else is no addition, but a weight itself.
_ADDED = re.compile(
    r"(?:.*[._])?(?:(?:lora|oft|boft)(?:[._].+|)|\w+_lora\..+|(?:hada|lokr)_\w+|(?:down|up)\.weight|alpha|scalar"
    r"|diff(?:_b)?|dora_scale|[wb]_norm)",
)
_VOCABULARY = "bundle_emb."
_LONGEST = 500  # characters of a key: the time that a pattern takes may grow with the square of it
_PATTERNS = ("rank_pattern", "alpha_pattern")
# What PEFT's settings are, of those that it computes with or finds modules by.
_SETTINGS: Mapping[str, Any] = {
    **dict.fromkeys(_PATTERNS, dict[str, float] | None),
    "r": int,
    "lora_alpha": float,
    "lora_dropout": float,
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"), bool),
    **dict.fromkeys(("target_modules", "exclude_modules", "modules_to_save"), list[str] | str | None),
}
# The names of modules that are read as patterns: any more of a regular expression may take for ever.
_PLAIN = re.compile(r"\^?(?:[\w-]|\\?\.)+\$?")


def _parts(given: Path, tensors: Mapping[str, Tensor], names: AdapterNames) -> dict[str, ModuleKey]:
    """What each key of the U-Net is about. Raises ModelFormatError for one that belongs to no module of the teacher."""
    found: dict[str, ModuleKey] = {}
    for key, tensor in tensors.items():
        if len(key) > _LONGEST:
            raise ModelFormatError(
                f"asked to convert {path_text(given)}, found a key of {len(key):,} characters in it "
                f"({printable(key, 50)}); fetch the file again"
            )
        is_text = key.startswith(TEXT_PREFIXES)
        part = None if is_text else names.of(key)
        if part is None and not is_text:
            raise ModelFormatError(
                f"asked to convert {path_text(given)}, whose key {path_text(key)!r} names no module of the teacher; "
                "give a LoRA that was trained for this student's teacher"
            )
        if not key.startswith(_VOCABULARY) and not _ADDED.fullmatch(part.rest if part else key):
            raise ModelFormatError(
                f"asked to convert {path_text(given)}, whose {path_text(key)} is no part of a LoRA, but may be a "
                "weight of a model; give a LoRA alone"
            )
        if part is None:
            continue
        if not fits(part, tensor, names):
            raise ModelFormatError(
                f"asked to convert {path_text(given)}, whose {path_text(key)} is {list(tensor.shape)} and does not fit "
                f"the teacher's module of {list(names.shapes[part.module])}; give a LoRA that was trained for this "
                "student's teacher"
            )
        found[key] = part
    if not found:
        raise ModelFormatError(
            f"asked to convert {path_text(given)}, found nothing in it that is about a U-Net"
        )
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
                f"asked to convert {path_text(given)}, whose module {path_text(module)} has "
                f"{path_text(key.removeprefix(module)[1:])}, found no "
                f"{path_text(other.removeprefix(module)[1:])}: the file is not whole; fetch it again"
            )
        if found["side"] in ("A", "down") and tensor.dim() > 1 and tensors[other].dim() > 1:
            ranks = tensor.shape[0], tensors[other].shape[1]
            if ranks[0] != ranks[1]:
                raise ModelFormatError(
                    f"asked to convert {path_text(given)}, whose module {path_text(module)} has two matrices of the "
                    f"ranks {ranks[0]} and {ranks[1]}: they do not belong together; fetch the file again"
                )


def _ending(key: str) -> str:
    """The end of a dotted path that the pattern ``key`` stands for, as PEFT reads a plain name.

    Raises ModelFormatError for more of a regular expression than ``^``, ``$`` and an escaped dot.
    """
    if not _PLAIN.fullmatch(key):
        raise ModelFormatError(
            f"asked to convert a LoRA whose {_CONFIG} has the pattern {printable(key, 80)!r}; only names of modules "
            "are read as patterns: write out the modules, each with its value"
        )
    name = key.removesuffix("$").replace("\\.", ".")
    return f"..{name[1:]}" if name[0] == "^" else f".{name}"


def _pattern(patterns: Mapping[str, Any], modules: Mapping[str, str]) -> dict[str, Any]:
    """The value of each module under its new name: PEFT takes the first pattern that a module's path ends with."""
    endings = [(_ending(key), value) for key, value in patterns.items()]
    found = (
        (new, next((value for ending, value in endings if f"..{module}".endswith(ending)), None))
        for module, new in modules.items()
    )
    return {new: value for new, value in found if value is not None}


def _settings(text: str, modules: Mapping[str, str]) -> str:
    """The settings of the LoRA as diffusers keeps them, with the modules of the U-Net by their new names."""
    try:
        settings = typed(dict[str, Any], parse_json(text))
        json.dumps(settings, allow_nan=False)
        for name in settings:
            if (hint := _SETTINGS.get(name.rpartition(".")[2])) is not None:
                typed(hint, settings[name], name)
    except ValueError as error:
        raise ModelFormatError(
            f"asked to convert a LoRA whose {_CONFIG} cannot be read: {printable(str(error))}; fetch the file again, "
            "or save it without its metadata"
        ) from None
    for name in [name for name in settings if name.startswith("unet.")]:
        short = name.removeprefix("unet.")
        if short in _PATTERNS:
            settings[name] = _pattern(settings[name] or {}, modules)
        elif short == "target_modules":
            settings[name] = sorted(set(modules.values()))
        elif short in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            settings[name] = None  # the list of modules is complete
    return json.dumps(settings, indent=2, sort_keys=True)


def _metadata(metadata: dict[str, str], modules: Iterable[str], student: Student) -> dict[str, str]:
    if _CONFIG not in metadata:
        return metadata
    places = student.layout, student.removed_paths
    renamed = {module: new for module in modules if (new := kept_path(*places, module)) is not None}
    return metadata | {_CONFIG: _settings(metadata[_CONFIG], renamed)}


def convert_lora(student: Student, given: Path, out: Path, *, force: bool = False) -> Converted:
    """The LoRA ``given`` of the teacher as ``out``, for the student; text encoders' parts go along as they are.

    Read are diffusers' formats and kohya's (LoRA, LoHa, LoKr and what is named like them), with diffusers' or LDM
    names; the format stays. Raises ModelFormatError for a key that the teacher has no module for or that does not fit
    it, and when nothing is left; StorageError when ``out`` is taken.
    """
    check_has_additions(student.architecture.config, "to convert a LoRA", instead=TRAIN_ANOTHER)
    given = Path(given)
    out = check_out(student, out, given, force=force)
    tensors, metadata = read_addition(given, "LoRA")
    names = adapter_names(student.architecture.config, student.layout, student.removed_paths)
    parts = _parts(given, tensors, names)
    modules = {part.module: part for part in parts.values()}
    left = [module for module, part in modules.items() if part.new_key is not None]
    if not left:
        raise ModelFormatError(
            f"asked to convert {path_text(given)}, whose {len(modules)} modules all lie in blocks that the "
            "student does not have"
        )
    _check_pairs(given, tensors)
    converted = {
        new: tensor
        for key, tensor in tensors.items()
        if (new := parts[key].new_key if key in parts else key) is not None
    }
    uneven = not has_even_depths(student.layout.config) and any(part.in_ldm_layout for part in parts.values())
    write_addition(out, converted, _metadata(metadata, modules, student), student, given)
    return Converted(
        out,
        "lora",
        parts=len(modules),
        kept=len(left),
        renamed=sum(modules[module].renamed for module in left),
        notes=(_UNEVEN,) if uneven else (),
        dropped_from=blocks_of(student.architecture, modules.keys() - set(left)),
    )
