"""What prune-lab wrote of a model, as ``provenance.json`` beside it says, and whether that is what is there now.

Not every mistake shows in a shape: another number of heads or norm groups, and two tensors that changed places, load
and draw something else. So the record holds the settings, which are what says by name what was changed, and digests of
the weights. A setting is never changed alone, so another one is refused. Weights are: people train a student on with
other tools, which save it into the same folder. That is told and taken; the same tensors under other names are refused.
A folder without a record, of an earlier version, is taken as it is.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prune_lab.errors import DataError, ModelFormatError
from prune_lab.families import CLASS_NAME, family_of, plain_config, usual_settings, without_guard
from prune_lab.families.same_settings import shortened
from prune_lab.models.files import (
    PICKLED,
    bits_of,
    chosen_variant,
    json_object,
    read_header,
    rivals_among,
    weight_files,
)
from prune_lab.processes import is_main
from prune_lab.runs import is_plan_id, told_plan_id
from prune_lab.runtime import open_regular, path_text, printable, read_json, warn_once

PLAN, PROVENANCE = "plan.json", "provenance.json"
RECORD = "written"  # in provenance.json
_PICKLED_WEIGHTS = ("diffusion_pytorch_model", "pytorch_model")  # not what a training keeps of its optimizer
_CHUNK = 2**20  # bytes

# Settings that may be others: a hub rewrites where code lies, and the checks of code look there; the size of pictures
# is a default that people set, and shapes no U-Net.
_FREE = {"auto_map"}
_FREE_IN_UNETS = {"sample_size"}
_DAMAGED = "fetch the model again, or restore the file"


# Weights ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _tensors_in(path: Path, size: int, modified: int) -> Mapping[str, str]:
    """By name of each tensor in a safetensors file: its number format, shape, and digest, read once from end to end."""
    # size and time are there for the cache alone: a file that was written anew is read anew
    header = read_header(path)  # in the order in which the tensors lie
    sizes = {name: math.prod(shape) * bits_of(dtype) // 8 for name, (dtype, shape) in header.items()}
    found = {}
    with open_regular(path) as file:
        file.seek(size - sum(sizes.values()))
        for name, (dtype, shape) in header.items():
            digest, left = hashlib.sha256(), sizes[name]
            while left and (content := file.read(min(left, _CHUNK))):
                digest.update(content)
                left -= len(content)
            found[name] = f"{dtype} {shape} {digest.hexdigest()}"
    return found


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _digests(files: Sequence[Path]) -> dict[str, str]:
    """``weights`` of all tensors by name, however they are divided among ``files``; ``tensors``: whatever their names.

    Each of 16 hexadecimal digits.
    """
    tensors: dict[str, str] = {}
    for path in files:
        status = path.stat()
        tensors |= _tensors_in(path.resolve(), status.st_size, status.st_mtime_ns)
    return {
        "weights": _digest([f"{name} {tensors[name]}" for name in sorted(tensors)]),
        "tensors": _digest(sorted(tensors.values())),
    }


# The record ------------------------------------------------------------------------------------------------------


def record_of(folder: Path) -> dict[str, Any]:
    """The record of the model that was just written into ``folder``, ready for JSON."""
    config = plain_config(without_guard(json_object(folder / "config.json")))
    return {"config": config, **_digests(weight_files(folder))}


def _read(path: Path) -> Mapping[str, Any]:
    """What the JSON file says; nothing where it is not there, or is of another program. ModelFormatError: no JSON."""
    if not path.is_file():
        return {}
    try:
        value = read_json(path)
    except DataError as error:
        raise ModelFormatError(str(error)) from None
    return value if isinstance(value, dict) else {}


def _recorded(folder: Path) -> Mapping[str, Any]:
    """The record in ``folder``; empty where there is none. Raises ModelFormatError where it is damaged."""
    told = _read(folder / PROVENANCE)
    if RECORD not in told:
        return {}
    record = told[RECORD]
    digests = ("weights", "tensors")
    if (
        not isinstance(record, dict)
        or not isinstance(record.get("config"), dict)
        or not isinstance(record["config"].get(CLASS_NAME), str)
        or not all(isinstance(record.get(name), str) for name in digests)
    ):
        raise ModelFormatError(
            f"asked for the model in {path_text(folder)}, found in its {PROVENANCE} no settings and digests under "
            f"{RECORD!r}: it is damaged; {_DAMAGED}, or delete that entry of it"
        )
    return record


# Settings --------------------------------------------------------------------------------------------------------


def _as_json(value: object) -> Any:
    """``value`` with lists and objects of JSON in place of tuples and mappings, at any depth."""
    if isinstance(value, Mapping):
        return {name: _as_json(one) for name, one in value.items()}
    return [_as_json(one) for one in value] if isinstance(value, (list, tuple)) else value


def _settings(config: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """All settings that the class of ``like`` has, those that ``config`` leaves out as they are usual."""
    family = family_of(like)
    model_class = family.model_class()
    free = _FREE | (_FREE_IN_UNETS if family.component == "unet" else set())
    known = {CLASS_NAME, *inspect.signature(model_class.__init__).parameters} - free
    everything = _as_json({**usual_settings(model_class), **config})
    everything = shortened(model_class.__name__, everything)
    return {name: value for name, value in everything.items() if name in known}


def _changes(was: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(name, as it was, as it is) of each setting that is another, also inside of others; None: it is not there."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in [*was, *(key for key in now if key not in was)]:
            yield from _changes(was.get(key), now.get(key), f"{name}.{key}" if name else str(key))
    elif was != now:
        yield name, was, now


def _shown(value: object) -> str:
    return printable(json.dumps(value), 60)


def _check_settings(folder: Path, record: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    was, now = (_settings(plain_config(one), config) for one in (record["config"], config))
    changes = list(_changes(was, now))
    if not changes:
        return
    name, before, after = changes[0]
    more = f" ({len(changes) - 1} more were changed)" if len(changes) > 1 else ""
    raise ModelFormatError(
        f"asked for the model in {path_text(folder)}, found {printable(name, 120)} {_shown(after)} in its config.json, "
        f"which was written as {_shown(before)}{more}: the weights would load and mean something else; set it back, "
        f"or delete {RECORD!r} in its {PROVENANCE} where another model is what you want"
    )


# Plans -----------------------------------------------------------------------------------------------------------


def _check_plan(folder: Path, provenance: Mapping[str, Any]) -> None:
    plan = _read(folder / PLAN)
    ours = isinstance(provenance.get("plan_id"), str) and (folder / PLAN).is_file()
    if not ours and not {"architecture", "removed"} <= plan.keys():
        return  # of another program
    found = told_plan_id(plan)
    told = {name: provenance.get(name) for name in ("plan_id", "form")}
    ids = [one for one in (plan.get("id"), told["plan_id"]) if isinstance(one, str) and is_plan_id(one)]
    wrong = "" if found else "no plan"
    wrong = wrong or next((f"plan {found} and the id of {one}" for one in ids if one != found), "")
    if not wrong and isinstance(told["form"], str) and plan.get("form", told["form"]) != told["form"]:
        wrong = f"the form {_shown(plan['form'])}, where {PROVENANCE} says {_shown(told['form'])}"
    if wrong:
        raise ModelFormatError(
            f"asked for the model in {path_text(folder)}, found {wrong} in its {PLAN}, which was changed after it was "
            f"written; restore it, or delete it where the weights are all you need"
        )


# Looking ---------------------------------------------------------------------------------------------------------


def beside(model_folder: Path | None, name: str) -> dict[str, Any]:
    """What the file ``name``, PLAN or PROVENANCE, beside the weights says; empty where there is none.

    Raises ModelFormatError for what is no JSON object.
    """
    path = None if model_folder is None else model_folder / name
    return json_object(path) if path is not None and path.is_file() else {}


def form_of_zeros(model_folder: Path | None) -> str:
    """The form of a student whose zeros stand for what was removed, ``neutral`` or ``padded``; empty for any other.

    Whatever trains all of its weights trains the zeros away.
    """
    form = beside(model_folder, PLAN).get("form")
    return str(form) if form in ("neutral", "padded") else ""


def check_record(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelFormatError where ``config`` or ``plan.json`` in ``folder`` is not what prune-lab wrote; see the
    module. Reads a few kilobytes.
    """
    if record := _recorded(folder):
        _check_settings(folder, record, config)
    _check_plan(folder, _read(folder / PROVENANCE))


def _tell_others(folder: Path, variant: str) -> None:
    """Write a line on stderr where weights lie in ``folder`` beside those that prune-lab wrote and that are read."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    read = chosen_variant(names, variant)
    others = {
        name: f"--variant {other} reads it" if other else "without --variant it is read"
        for other, files in rivals_among(names).items()
        for name in files
        if other != read
    }
    others |= {
        name: "pickled files are never opened here: if it is the newer one, save it as safetensors"
        for name in names
        if name.startswith(_PICKLED_WEIGHTS) and Path(name).suffix in PICKLED
    }
    if others and is_main():
        name, cure = min(others.items())
        more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
        warn_once(
            f"warning: {path_text(folder)} holds {printable(name, 120)}{more}, which prune-lab did not write and does "
            f"not read here; {cure}"
        )


def tell_weights(folder: Path, variant: str = "") -> None:
    """Write a line on stderr where the weights in ``folder`` are not those that prune-lab wrote; see the module.

    Reads them whole, once in a process. Raises ModelFormatError where they are the same tensors under other names.
    """
    record = _recorded(folder)
    if not record:
        return
    found = _digests(weight_files(folder, variant))
    if found["weights"] == record["weights"]:
        _tell_others(folder, variant)
        return
    if found["tensors"] == record["tensors"]:
        raise ModelFormatError(
            f"asked for the weights in {path_text(folder)}, found the tensors that prune-lab wrote under other names: "
            "some changed places; fetch or prune the model again"
        )
    if is_main():
        warn_once(
            f"warning: the weights in {path_text(folder)} are not the ones that prune-lab wrote: trained or converted "
            "by another tool? If not, fetch or prune the model again"
        )
