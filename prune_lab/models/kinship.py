"""Whether a model is a shipped one or a student of one: only these know the pictures and the scorer that ship."""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from prune_lab.assets import SHIPPED_MODELS, reference_folder
from prune_lab.errors import ConfigError, ModelNotFoundError, PruneLabError
from prune_lab.families import CLASS_NAME, base_name
from prune_lab.models.files import json_object, weight_files
from prune_lab.models.folders import variant_of_part
from prune_lab.models.sources import ModelSource, resolve_model

_PARTS = ("text_encoder", "vae")
# Entries of a config.json that say how it was written, not what it describes.
_INCIDENTAL = ("dtype", "torch_dtype", "transformers_version", "architectures")


def _described(config: dict[str, Any]) -> str:
    kept = {
        name: value for name, value in config.items() if not name.startswith("_") and name not in _INCIDENTAL
    }
    return json.dumps(kept, sort_keys=True)


def _tensors(folder: Path, variant: str = "") -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in weight_files(folder, variant_of_part(folder, variant)):
        found |= load_file(path)
    return {name: tensor for name, tensor in found.items() if tensor.is_floating_point()}


def _same_weights(ours: Path, theirs: Path, variant: str) -> bool:
    """Whether two folders hold the same numbers, ``theirs``, of that ``variant``, perhaps in half precision."""
    one, other = _tensors(ours), _tensors(theirs, variant)
    return one.keys() == other.keys() and all(
        one[name].shape == other[name].shape
        and torch.allclose(one[name].float(), other[name].float(), rtol=1e-2, atol=1e-3)
        for name in one
    )


@functools.lru_cache(maxsize=16)
def _has_shipped_parts(folder: Path, variant: str) -> bool:
    ours = reference_folder()
    try:
        for part in _PARTS:
            configs = [json_object(place / part / "config.json") for place in (ours, folder)]
            if _described(configs[0]) != _described(configs[1]):
                return False  # as good as always; the weights need not be read
        return all(_same_weights(ours / part, folder / part, variant) for part in _PARTS)
    except (PruneLabError, OSError):
        return False


def of_shipped_family(source: ModelSource) -> bool:
    """Whether ``source`` is a shipped pipeline or one with their text encoder and VAE, such as a student of one."""
    if source.kind == "shipped":
        return True
    if not source.is_pipeline or source.folder is None:
        return False
    return _has_shipped_parts(source.folder.resolve(), source.asked_variant)


# A model alone -------------------------------------------------------------------------------------------------------


def _class_of(source: ModelSource) -> str:
    return base_name(str(source.config[CLASS_NAME]))


def shipped_like(source: ModelSource) -> str:
    """The shipped model of the class of ``source``, in whose pipeline it can draw; ``reference`` where none is."""
    for name in SHIPPED_MODELS:
        with contextlib.suppress(ModelNotFoundError):
            if _class_of(resolve_model(name)) == _class_of(source):
                return name
    return "reference"


def check_same_class(source: ModelSource, base: ModelSource) -> None:
    """Raise ConfigError where the model ``source`` is of another class than the one that the pipeline ``base`` has."""
    own, other = _class_of(source), _class_of(base)
    if own != other:
        raise ConfigError(
            f"asked to judge {source.text}, a {own}, in the pipeline {base.text}, whose model is a {other}; name a "
            "pipeline of its own class as base"
        )
