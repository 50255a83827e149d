"""The parts of a pipeline beside its model, copied in one layout: only what is needed, and all under the same names.

Weights are called as plain diffusers calls them, with or without a variant, whatever the source calls them. Nothing
written names a folder of this machine, and the index lists what is there.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from prune_lab.errors import DataError, ModelFormatError
from prune_lab.families import modern_class
from prune_lab.models import weight_files
from prune_lab.models.conversion import converted, refuse_flawed, stored
from prune_lab.models.files import json_object
from prune_lab.models.folders import variant_of_part
from prune_lab.models.parts import LEFT_OUT, installed_name, part_class
from prune_lab.runtime import FILE_LIST, copied_without_folders, names_alone, note, read_json, write_json

INDEX = "model_index.json"
_TEXTS = (".json", ".txt", ".model")  # configs, vocabularies; a sentencepiece model
_LICENCES = ("licen", "notice")
_STEMS = ("diffusion_pytorch_model", "model")
# What transformers reads where no number format is asked for.
_FORMATS = ("dtype", "torch_dtype")


def _without(value: Any, names: Sequence[str]) -> Any:
    """The JSON ``value`` without the entries ``names``, at any depth."""
    if isinstance(value, dict):
        return {name: _without(inner, names) for name, inner in value.items() if name not in names}
    return [_without(inner, names) for inner in value] if isinstance(value, list) else value


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write ``config`` without the folders it may name; of a transformers model with a number format.

    Without one such a model is loaded in that of its file, the diffusers models around it in float32, and the two
    cannot draw together. Asked for another format, all of them are loaded in that.
    """
    kept = names_alone(config)
    if path.name == "config.json" and "_class_name" not in kept:
        kept = {**_without(kept, _FORMATS), "dtype": "float32"}
    write_json(path, kept)


def _copy_text(path: Path, target: Path) -> None:
    if path.suffix == ".json" and path.name != "tokenizer.json":
        try:
            value = read_json(path)
        except DataError:
            value = None  # of a part that is used it is refused before; of another the bytes are kept
        if isinstance(value, dict) and (path.name == "config.json" or names_alone(value) != value):
            write_config(target, value)
            return
    shutil.copyfile(path, target)  # the content, also of a link into a cache


def _names(stem: str, variant: str, number: int) -> list[str]:
    """Names of ``number`` files with weights, as diffusers and transformers write them."""
    start = f"{stem}.{variant}" if variant else stem
    if number == 1:
        return [f"{start}.safetensors"]
    return [f"{start}-{i + 1:05d}-of-{number:05d}.safetensors" for i in range(number)]


def copy_weights(
    files: Sequence[Path],
    target: Path,
    *,
    variant: str,
    dtype: torch.dtype | None,
    part: Any = None,
) -> None:
    """Write the safetensors ``files`` of one component into ``target``, with their index where there are several.

    ``dtype`` converts every tensor that is not of whole numbers, but what the class ``part`` leaves in float32 when it
    is loaded in ``dtype``; one file is in memory at a time.
    """
    stem = next(stem for stem in _STEMS if files[0].name.startswith(stem))
    names = _names(stem, variant, len(files))
    homes: dict[str, str] = {}
    size = 0
    for path, name in zip(files, names, strict=True):
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            if dtype is not None:
                tensors = {key: converted(key, file.get_tensor(key), dtype, part) for key in keys}
                save_file(tensors, target / name, {"format": "pt"})
        if dtype is None:
            copied_without_folders(path, target / name)
        homes |= dict.fromkeys(keys, name)
        size += (target / name).stat().st_size
    if len(files) > 1:
        middle = f".{variant}" if variant else ""
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(homes.items()))}
        write_json(target / f"{stem}.safetensors.index{middle}.json", index)


def copy_texts(source: Path, target: Path) -> None:
    """Write configs and vocabularies of the component ``source`` into ``target``, no weights and no index of them."""
    paths = sorted(source.iterdir())
    target.mkdir(exist_ok=True)
    for path in paths:
        if path.name == FILE_LIST:
            continue  # of another folder's files
        if path.is_file() and path.suffix in _TEXTS and ".index" not in path.suffixes:
            _copy_text(path, target / path.name)


def _weights_of(folder: Path, class_name: str, asked: str) -> tuple[Path, ...]:
    """The files with weights of a component; none for tokenizers, schedulers and settings of pictures."""
    modelless = not (folder / "config.json").is_file() or "Tokenizer" in class_name
    return () if modelless else weight_files(folder, variant_of_part(folder, asked))


def _entry_of(value: list[Any], named: str) -> list[str]:
    """The library and class of a part as the installed libraries know it; ModelFormatError where they do not."""
    if len(value) != 2 or part_class(*value) is None:
        raise ModelFormatError(f"{named} is of a class that diffusers and transformers have not")
    library, name = value
    return [library, installed_name(library, name)]


def copy_parts(
    pipeline: Path,
    target: Path,
    *,
    model: str,
    asked: str = "",
    variant: str = "",
    dtype: torch.dtype | None = None,
) -> None:
    """Write the pipeline folder into ``target`` without its model, the component ``model``.

    Parts that are not there, or whose weights are not in safetensors, are taken out of the index where a pipeline draws
    without them. ``asked`` is the variant that is read of the parts that have it; ``variant`` names the files that are
    written, ``dtype`` converts them.
    """
    index = json_object(pipeline / INDEX)
    written: dict[str, Any] = {}
    for part, value in index.items():
        if part == model:
            written[part] = [value[0], modern_class(value[1], json_object(pipeline / part / "config.json"))]
            continue
        if not isinstance(value, list) or value[:1] == [None]:
            written[part] = value
            continue
        named = f"the {part} in {pipeline}"
        try:
            entry = _entry_of(value, named)
            files = _weights_of(pipeline / part, entry[-1], asked)
            copy_texts(pipeline / part, target / part)
        except (ModelFormatError, FileNotFoundError) as error:
            if part not in LEFT_OUT:
                raise
            if (pipeline / part).is_dir():
                note(f"left {part} out: {error}")
            written[part] = [None, None]
            continue
        if files:
            refuse_flawed(stored(files), named)
            found = part_class(*entry)
            copy_weights(files, target / part, variant=variant, dtype=dtype, part=found)
        written[part] = entry
    if written.get("safety_checker", [None])[0] is None and "safety_checker" in written:
        written["requires_safety_checker"] = False
    write_config(target / INDEX, written)
    for path in sorted(pipeline.iterdir()):
        if path.is_file() and any(word in path.name.lower() for word in _LICENCES):
            shutil.copyfile(path, target / path.name)


def rename_part(folder: Path, part: str, entry: Sequence[str]) -> None:
    """Say in the index of the pipeline ``folder`` of which library, or file beside its weights, and class a part is."""
    index = json_object(folder / INDEX)
    if index.get(part) != list(entry):
        write_config(folder / INDEX, {**index, part: list(entry)})
