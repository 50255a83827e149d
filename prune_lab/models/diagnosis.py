"""What is wrong with a model that is not what it should be, in words that show the way out.

Each function looks at names, configs and headers alone, and either says what it found or says nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from prune_lab.errors import ModelFormatError, UnsupportedModelError
from prune_lab.families import (
    CLASS_NAME,
    FAMILIES,
    REFUSED,
    base_name,
    looks_like_a_unet,
    supported_classes,
)
from prune_lab.models.files import PICKLED, is_lfs_pointer, json_object, variants_among
from prune_lab.runtime import path_text, printable

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors")
OTHER_PACKINGS = {
    ".dduf": "a pipeline packed as DDUF: unpack it (it is a zip: unzip FILE -d FOLDER) and give the folder",
    ".gguf": "weights quantised as GGUF: give the folder of the model that they were made from",
    ".onnx": "a model exported to ONNX, which is only run: give the folder of the model that it was made from",
    ".zip": "an archive: unpack it and give the folder",
    ".tar": "an archive: unpack it and give the folder",
}
"""By the ending of its name: what a file is that is not read as it is, and what to give instead."""
_TRAINING_FILES = ("optimizer.bin", "optimizer.pt", "random_states_0.pkl", "training_args.bin", "scaler.pt")
_DEEP = 3  # levels below the folder that was given on which a model is looked for
_WIDE = 64  # folders of each of them that are looked at: somebody may give the root of a disk
_MOST_SHOWN = 4

# Files of a folder -----------------------------------------------------------------------------------------------

_MOST_LAYERS = 512
_LARGEST = 10**7  # whole number, or numbers in a list: the largest known vocabularies have a million words
_BUILT_FROM = ("config.json", "scheduler_config.json")  # what the libraries build without a look at it


def beyond_bounds(config: object, name: str = "") -> str:
    """The first setting of a ``config`` that is too large for anything to be built from it; empty where none is."""
    if isinstance(config, dict):
        inner = ((f"{name}.{key}" if name else str(key), value) for key, value in config.items())
        return next(filter(None, (beyond_bounds(value, key) for key, value in inner)), "")
    if isinstance(config, list):
        if len(config) > _LARGEST:
            return f"{printable(name)} is a list of {len(config):,}"
        return next(filter(None, (beyond_bounds(value, name) for value in config)), "")
    layers = "layers" in name.rpartition(".")[2]
    most = _MOST_LAYERS if layers else _LARGEST
    if isinstance(config, int) and abs(config) > most:
        return f"{printable(name)} is {printable(str(config), 40)}, where at most {most:,} is built"
    return ""


def check_files(folder: Path) -> None:
    """Raise ModelFormatError where a file directly in ``folder`` is what Git keeps in place of a large one, or is no
    file at all, or a config that asks for more than can be built.
    """
    read = (".json", ".safetensors", ".txt", ".model")
    paths = sorted(folder.iterdir())
    for path in paths:
        # a library that opens a pipe waits for its writer
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ModelFormatError(
                f"found {path_text(path)}, a pipe, a device or a socket and no file; take it out of the folder"
            )
    pointers = [
        path.name for path in paths if path.suffix in read and path.is_file() and is_lfs_pointer(path)
    ]
    if pointers:
        more = f" and {len(pointers) - 1} more" if len(pointers) > 1 else ""
        raise ModelFormatError(
            f"{folder / pointers[0]}{more} is a Git LFS pointer and not the file itself; "
            "run git lfs pull in that folder, or fetch the model again"
        )
    for path in paths:
        if path.name in _BUILT_FROM and path.is_file() and (reason := beyond_bounds(json_object(path))):
            raise UnsupportedModelError(
                f"asked for the model of {path_text(path)}, whose {reason}; fetch it again"
            )


# Names of tensors ------------------------------------------------------------------------------------------------

_WRAPPERS = {
    "_orig_mod.": "the model was saved while compiled: save model._orig_mod, or unwrap it first",
    "module.": "the model was saved inside its wrapper for many devices: save model.module, or unwrap it first",
}
_QUANTISED = (".absmax", ".quant_map", ".quant_state", ".SCB", ".scale_weight", ".qweight", ".qzeros")
_FEW_BITS = ("U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E4M3FN", "I4", "U4", "F4")


def wrapped(keys: Collection[str]) -> str:
    """Says so where the names of all tensors begin with the name of what the model was wrapped in."""
    for prefix, remedy in _WRAPPERS.items():
        if keys and all(key.startswith(prefix) for key in keys):
            how = "(accelerate: unwrap_model(model, keep_torch_compile=False).save_pretrained(...))"
            return f"the names of its tensors begin with {prefix!r}: {remedy} {how}"
    return ""


def adapted(keys: Collection[str]) -> str:
    """Says so where the tensors are those of an adapter, or a model with one attached."""
    marks = (
        ".lora_A.",
        ".lora_B.",
        "lora_up.",
        "lora_down.",
        ".lora.up.",
        ".lora.down.",
        ".alpha",
        ".hada_w",
    )
    if any(".to_k_ip." in key for key in keys):
        if all(key.startswith(("ip_adapter.", "image_proj.")) for key in keys):
            return "it is an IP-Adapter, an addition to a model: give the model itself"
        return (
            "an IP-Adapter is attached to it: take it off first (diffusers: unload_ip_adapter), then save it"
        )
    if not any(mark in key for key in keys for mark in marks[:-2]):
        return ""
    if all(any(mark in key for mark in marks) for key in keys):
        return "it is a LoRA, an addition to a model: give the model itself"
    return "a LoRA is attached to it: merge it first (PEFT: merge_and_unload, diffusers: fuse_lora), then save it"


def quantised(header: Mapping[str, tuple[str, tuple[int, ...]]], config: Mapping[str, Any]) -> str:
    """Says so where weights or config are those of a model whose numbers have 8 bits or fewer."""
    remedy = "pruning needs the weights in float32, float16 or bfloat16: give the model that it was made from"
    settings = config.get("quantization_config")
    if settings:
        how = (
            settings.get("quant_method") or settings.get("quant_type")
            if isinstance(settings, Mapping)
            else None
        )
        bits = "4 bits, " if isinstance(settings, Mapping) and settings.get("load_in_4bit") else ""
        return f"it is quantised ({bits}{how or 'quantization_config'}); {remedy}"
    for key, (dtype, _) in header.items():
        if dtype in _FEW_BITS:
            return f"it is quantised ({key} is in {dtype}); {remedy}"
    for key in header:
        if key.endswith(_QUANTISED) or any(f"{mark}." in key for mark in _QUANTISED):
            return f"it is quantised (it has {key}); {remedy}"
    return ""


def unusable(header: Mapping[str, tuple[str, tuple[int, ...]]], config: Mapping[str, Any]) -> str:
    """The first of the reasons above for which these tensors are not read; empty where there is none."""
    return wrapped(header) or adapted(header) or quantised(header, config)


# Configs ---------------------------------------------------------------------------------------------------------


def refuse_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError, which says what ``config`` is of, unless it is that of a known model."""
    name = config.get(CLASS_NAME)
    if isinstance(name, str) and base_name(name) in FAMILIES:
        return
    remedy = f"supported is {supported_classes()}"
    if isinstance(name, str) and name.endswith("Pipeline"):
        found, remedy = f"the index of a pipeline ({name})", f"give its folder, {path.parent}"
    elif name:
        found = f"a model of class {name}" if isinstance(name, str) else f"{CLASS_NAME} {name!r}"
        if isinstance(name, str) and name in REFUSED:
            found += f", which {REFUSED[name]},"
        if path.parent.name and (path.parent.parent / "model_index.json").is_file():
            remedy += f"; did you mean {path.parent.parent}?"
    elif "model_type" in config or "architectures" in config:
        found = f"a config of transformers (model_type {config.get('model_type')!r})"
    elif "peft_type" in config or "base_model_name_or_path" in config:
        found, remedy = "the config of an adapter (PEFT)", "give the model that it was made for"
    else:
        found = f"no {CLASS_NAME}"
        why = (
            "if it is that of a U-Net, add"
            if looks_like_a_unet(config)
            else "give the config.json of a model, which has"
        )
        remedy = f'{why} "{CLASS_NAME}": "{next(iter(FAMILIES))}", or what else its class is; {remedy}'
    raise UnsupportedModelError(f"asked for a model, found {found} in {path}; {remedy}")


# Folders ---------------------------------------------------------------------------------------------------------


def _config_class(folder: Path) -> str:
    try:
        return str(json_object(folder / "config.json").get(CLASS_NAME, ""))
    except ModelFormatError:
        return ""


def _models_below(folder: Path, deep: int = _DEEP, wide: int = _WIDE) -> Iterator[Path]:
    """Pipelines and models in the folders below ``folder``, those that lie higher first."""
    try:
        visible = (path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir())
        inner = sorted(itertools.islice(visible, wide))
    except OSError:
        return
    here = [
        path
        for path in inner
        if (path / "model_index.json").is_file() or base_name(_config_class(path)) in FAMILIES
    ]
    yield from here
    if deep > 1:
        for path in inner:
            if path not in here:
                yield from _models_below(path, deep - 1, wide // 4)


def _shown(names: Collection[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _MOST_SHOWN} more" if len(ordered) > _MOST_SHOWN else ""
    return ", ".join(ordered[:_MOST_SHOWN]) + more


def folder_without_a_model(folder: Path) -> str:
    """What there is in ``folder``, which has neither model_index.json nor config.json, and what to give instead."""
    entries = {path.name: path for path in folder.iterdir() if not path.name.startswith(".")}
    if not entries:
        return "found an empty folder; give the folder that save_pretrained wrote"
    if adapter := next((name for name in ADAPTER_FILES if name in entries), ""):
        base = ""
        if "adapter_config.json" in entries:
            base = str(json_object(entries["adapter_config.json"]).get("base_model_name_or_path") or "")
        return (
            f"found {adapter}, an adapter (LoRA, PEFT), which is an addition to a model: give the model it was "
            f"made for{f', {base}' if base else ''}"
        )
    below = list(_models_below(folder))
    names = [path.relative_to(folder).as_posix() for path in below]
    for component in sorted({family.component for family in FAMILIES.values()}):
        averaged = f"{component}_ema"
        trained = component in names and any(name in entries for name in _TRAINING_FILES)
        if trained or averaged in names:
            which = ", or ".join(f"--subfolder {name}" for name in (averaged, component) if name in names)
            return f"found the checkpoint of a training: say which {component} of it, {which}"
    if names:
        return f"found models further below: did you mean {' or '.join(str(path) for path in below[:_MOST_SHOWN])}?"
    single = [name for name in entries if name.endswith(".safetensors") and not variants_among([name])]
    if single:
        return f"found single files: did you mean {folder / sorted(single)[0]}?"
    if variants_among(entries):
        return f"found weights ({_shown(variants_among(entries).values())}) without their config.json: fetch that too"
    if packed := [name for name in sorted(entries) if Path(name).suffix in OTHER_PACKINGS]:
        return f"found {packed[0]}, {OTHER_PACKINGS[Path(packed[0]).suffix]}"
    if pickled := [name for name in entries if Path(name).suffix in PICKLED]:
        return f"found only pickled files ({_shown(pickled)}), which are never opened here: convert them to safetensors"
    if (folder.parent / "model_index.json").is_file():
        return f"found {_shown(entries)}, a part of the pipeline: did you mean {folder.parent}?"
    return f"found {_shown(entries)}; give the folder that save_pretrained wrote"
