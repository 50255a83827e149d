"""The parts of a pipeline: their classes in the installed libraries, and whether the weights of each are its own.

The libraries fill what a file lacks with random numbers and go on. So names and shapes of all tensors are compared with
the class that a part's config describes before anything is loaded, from headers and on ``meta``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from prune_lab.errors import ModelFormatError, PruneLabError, UnsupportedModelError
from prune_lab.families import CLASS_NAME, plain_config
from prune_lab.models.diagnosis import unusable
from prune_lab.models.files import json_object, read_headers, weights_in
from prune_lab.models.silence import quiet
from prune_lab.models.views import STEMS, component_view

# What the libraries raise, all of it unplanned, when they build a model from a config that makes no sense.
BUILD_ERRORS = (
    *(TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError),
    *(OSError, RecursionError, MemoryError),
)
# Left out where the class of the pipeline can do without: they say nothing about the U-Net.
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
# Tensors that count up, which older files hold and no class of today has.
_COUNTERS = ("position_ids",)
# How older files of a VAE call the parts of its attention; diffusers renames them when it loads.
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

Shapes = Mapping[str, tuple[int, ...]]


# Classes ---------------------------------------------------------------------------------------------------------


def pipeline_class(name: object) -> Any | None:
    """The pipeline of the installed diffusers that is called ``name``; None where there is none."""
    with quiet():  # importing a pipeline logs advice about torchvision
        found = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
        usable = isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)
    return found if usable and found is not diffusers.DiffusionPipeline else None


def part_class(library: object, name: object) -> Any | None:
    """The class of a part as model_index.json names it, from the installed libraries alone; None where it has none."""
    if not isinstance(library, str) or not isinstance(name, str) or not name.isidentifier():
        return None
    if library == "diffusers":
        home: Any = diffusers
    elif library == "transformers":
        home = transformers
    else:  # a few classes of diffusers are named by the folder of their pipeline
        home = getattr(diffusers.pipelines, library, None) if library.isidentifier() else None
    with quiet():
        found = getattr(home, name, None)
    return found if isinstance(found, type) else None


def left_out(index: Mapping[str, Any]) -> tuple[str, ...]:
    """The parts of a pipeline with this ``model_index.json`` that are not read."""
    found = pipeline_class(index.get(CLASS_NAME))
    optional = getattr(found, "_optional_components", LEFT_OUT)
    return tuple(part for part in LEFT_OUT if part in index and part in optional)


def pipeline_parts(index: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The parts that are read, each with its library and class, of a pipeline with this ``model_index.json``."""
    skipped = left_out(index)
    return {
        part: value
        for part, value in index.items()
        if isinstance(value, list) and part not in skipped and value[:1] != [None]
    }


def stem_of(library: str, class_name: str) -> str | None:
    """How the weights of a part are called; None where it is a tokenizer or a scheduler, which have none."""
    found = part_class(library, class_name)
    if found is None or not issubclass(found, nn.Module):
        return None
    return STEMS["transformers" if library == "transformers" else "diffusers"]


# Weights against configs -----------------------------------------------------------------------------------------


def modern_name(key: str) -> str:
    """The name that the classes of today give a tensor: older files of a VAE have others."""
    if ".attentions." in key and key.startswith(("encoder.", "decoder.")):
        module, kind = key.rsplit(".", 1)
        parent, _, layer = module.rpartition(".")
        return f"{parent}.{_RENAMED.get(layer, layer)}.{kind}"
    return key


def misfit(found: Shapes, wanted: Shapes, *, strict: bool) -> str:
    """The first tensor in which ``found`` is not what is ``wanted``, and how many more; empty where it fits.

    What is beyond it counts with ``strict`` only: the libraries leave it alone.
    """
    extra = [name for name in found if name not in wanted and not name.endswith(_COUNTERS)]
    complaints = [f"{name} is missing" for name in wanted if name not in found]
    if complaints and extra and not strict:
        complaints[0] += f" ({extra[0]} is there instead)"
    complaints += [f"{name} is not part of that U-Net" for name in extra if strict]
    complaints += [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        # linear layers of a VAE's attention were convolutions once
        if name in found and _squeezed(found[name], strict) != _squeezed(shape, strict)
    ]
    more = f" and {len(complaints) - 1} more" if len(complaints) > 1 else ""
    return f"{complaints[0]}{more}" if complaints else ""


def _squeezed(shape: Sequence[int], strict: bool) -> tuple[int, ...]:
    return tuple(shape) if strict or tuple(shape[2:]) != (1, 1) else tuple(shape[:2])


@functools.lru_cache(maxsize=64)
def _wanted(model_class: Any, config: str) -> Shapes:
    with quiet(), torch.device("meta"):
        model = model_class.from_config(json.loads(config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _transformers_misfit(model_class: Any, folder: Path, variant: str) -> str:
    """What transformers itself misses when it loads the part without its numbers: it knows all its old names."""
    with quiet(), component_view(folder, STEMS["transformers"], variant) as view:
        _, report = model_class.from_pretrained(
            view,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            local_files_only=True,
        )
    missing, wrong = sorted(report["missing_keys"]), sorted(report["mismatched_keys"])
    unexpected = sorted(report["unexpected_keys"])
    instead = f" ({unexpected[0]} is there instead)" if missing and unexpected else ""
    complaints = [f"{name} is missing{instead}" for name in missing]
    complaints += [f"{name} is {list(found)} instead of {list(want)}" for name, found, want in wrong]
    more = f" and {len(complaints) - 1} more" if len(complaints) > 1 else ""
    return f"{complaints[0]}{more}" if complaints else ""


@functools.lru_cache(maxsize=256)
def _checked(model_class: Any, folder: Path, variant: str, _state: tuple[tuple[str, int, int], ...]) -> None:
    config = json_object(folder / "config.json")
    header = read_headers(weights_in(folder, variant).files)
    if reason := unusable(header, config):
        raise UnsupportedModelError(f"asked for the weights in {folder}: {reason}")
    try:
        if issubclass(model_class, diffusers.ModelMixin):
            found = {modern_name(name): shape for name, (_, shape) in header.items()}
            wanted = _wanted(model_class, json.dumps(plain_config(config), sort_keys=True))
            complaint = misfit(found, wanted, strict=False)
        else:
            complaint = _transformers_misfit(model_class, folder, variant)
    except PruneLabError:
        raise
    except BUILD_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedModelError(
            f"no {model_class.__name__} can be built from {folder / 'config.json'}: {reason}; "
            "fetch the folder again"
        ) from None
    if complaint:
        raise ModelFormatError(
            f"the weights in {folder} do not fit its config.json: tensor {complaint}; fetch both from the same place "
            "again"
        )


def check_part(folder: Path, model_class: Any, variant: str = "") -> None:
    """Raise ModelFormatError unless the files in ``folder`` hold every tensor of ``model_class`` by its config.

    Files that are as they were are not looked at again.
    """
    paths = [folder / "config.json", *weights_in(folder, variant).files]
    if not paths[0].is_file():
        raise ModelFormatError(f"{folder} has weights and no config.json; fetch it again")
    states = tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    _checked(model_class, folder, variant, states)
