"""The parts of a pipeline by the names in its ``model_index.json``: their classes, and which of them are read.

An index may name any class of any module. Only models, schedulers, tokenizers and what prepares pictures count, and
only those of the installed diffusers and transformers: nothing else is imported, and no code beside a model is run.
"""

from __future__ import annotations

import enum
import functools
import inspect
import types
from collections.abc import Mapping
from typing import Any, Literal

import diffusers
import transformers
from torch import nn

from prune_lab.errors import UnsupportedModelError
from prune_lab.families import CLASS_NAME, FAMILIES, is_own, own_class
from prune_lab.families.drawing import call_inputs, draws_videos, reads_text
from prune_lab.models.silence import quiet
from prune_lab.models.views import STEMS

# Left out where the class of the pipeline can do without: they say nothing about the model.
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
# How transformers called what prepares pictures before its version 5; sources that old are still about.
_OLD_ENDING, _NEW_ENDING = "FeatureExtractor", "ImageProcessor"

PartKind = Literal["diffusers model", "transformers model", "scheduler", "tokenizer", "processor"]
_BASES: Mapping[PartKind, tuple[tuple[types.ModuleType, str], ...]] = {
    "diffusers model": ((diffusers, "ModelMixin"),),
    "transformers model": ((transformers, "PreTrainedModel"),),
    "scheduler": ((diffusers, "SchedulerMixin"),),
    "tokenizer": ((transformers, "PreTrainedTokenizerBase"),),
    "processor": (
        (transformers, "FeatureExtractionMixin"),
        (transformers, "ImageProcessingMixin"),
        (transformers, "ProcessorMixin"),
    ),
}


def pipeline_class(name: object) -> Any | None:
    """The pipeline of the installed diffusers that is called ``name``; None where there is none."""
    with quiet():  # importing a pipeline logs advice about torchvision
        found = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
        usable = isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)
    return found if usable and found is not diffusers.DiffusionPipeline else None


@functools.lru_cache(maxsize=256)
def kind_of(found: Any) -> PartKind | None:
    """What sort of part the class ``found`` is; None for one that no pipeline is made of."""
    if not isinstance(found, type):
        return None
    for kind, bases in _BASES.items():
        if issubclass(found, tuple(getattr(library, name) for library, name in bases)):
            return kind
    return "scheduler" if issubclass(found, enum.Enum) and "Scheduler" in found.__name__ else None


def _attribute(home: Any, name: str) -> Any:
    try:
        with quiet():
            return getattr(home, name, None)
    except Exception:  # a class that wants a library which is not installed says so in a way of its own
        return None


def installed_name(library: object, name: str) -> str:
    """The name by which the installed ``library`` knows the class ``name``, which may be of an older version."""
    if library == "transformers" and name.endswith(_OLD_ENDING) and _attribute(transformers, name) is None:
        return name.removesuffix(_OLD_ENDING) + _NEW_ENDING
    return name


def part_class(library: object, name: object) -> Any | None:
    """The class of a part as model_index.json names it, from the installed libraries alone.

    None where they have none of that name, or one of a sort that no pipeline is made of.
    """
    if not isinstance(library, str) or not isinstance(name, str) or not name.isidentifier():
        return None
    if is_own(name):
        try:
            return own_class(library, name)
        except UnsupportedModelError:
            return None
    homes: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
    home = homes.get(library)
    if (
        home is None and library.isidentifier()
    ):  # a few are named by the folder of their pipeline in diffusers
        home = _attribute(diffusers.pipelines, library)
        inside = isinstance(home, types.ModuleType) and home.__name__.startswith("diffusers.pipelines.")
        home = home if inside else None
    found = _attribute(home, installed_name(library, name)) if home is not None else None
    return found if kind_of(found) is not None and not isinstance(found, enum.EnumMeta) else None


def why_no_text_to_image(pipeline: Any, scheduler: Any = None) -> str:
    """Why pipelines of the class ``pipeline`` draw no plain picture from a prompt; empty where they do.

    ``scheduler``: with one of this class.

    Others may need more, draw panoramas, videos or depths, or take minutes: diffusers lists those that do not.
    """
    with quiet():
        from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING as KNOWN

    components, _ = pipeline._get_signature_keys(pipeline)
    inputs = inspect.signature(pipeline.__call__).parameters.values()
    asked = [one.name for one in inputs if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    more = [name for name in asked if name not in ("self", "prompt", "class_labels")]
    if more:
        return f"draws from {' and '.join(more)} besides"
    if not reads_text(pipeline):
        told = {"num_inference_steps", "generator"} - call_inputs(pipeline).keys()
        return f"cannot be told {' and '.join(sorted(told))}" if told else ""
    if draws_videos(pipeline) and {"vae", "transformer"} <= set(components):
        return ""  # a picture is one frame
    if pipeline not in KNOWN.values() or "vae" not in components:
        return "is not among the pipelines that diffusers lists for text to image"
    with quiet():
        steps, *others = pipeline._get_signature_types()["scheduler"]
    any_of_many = others or issubclass(steps, enum.Enum)
    if scheduler is None or any_of_many or issubclass(scheduler, steps):
        return ""
    # A pipeline for a solver asks its scheduler for nothing but steps; diffusers lists what may take a solver's place.
    if issubclass(steps, diffusers.DPMSolverMultistepScheduler) and scheduler.__name__ in steps._compatibles:
        return ""
    return f"steps by a {steps.__name__}, found a {scheduler.__name__}"


@functools.lru_cache(maxsize=64)
def kinds_wanted(pipeline: Any) -> Mapping[str, frozenset[PartKind]]:
    """What sort of part the class ``pipeline`` takes under each name; empty where it does not say."""
    with quiet():
        types_of = pipeline._get_signature_types()
    return {
        name: frozenset(kind for one in found if (kind := kind_of(one)) is not None)
        for name, found in types_of.items()
    }


@functools.lru_cache(maxsize=64)
def classes_wanted(pipeline: Any) -> Mapping[str, tuple[str, ...]]:
    """The names of the classes that the class ``pipeline`` takes under each name, as far as it says them."""
    with quiet():
        types_of = pipeline._get_signature_types()
    return {
        part: tuple(one.__name__ for one in found if isinstance(one, type))
        for part, found in types_of.items()
    }


def models_wanted(pipeline: Any) -> Mapping[str, tuple[str, ...]]:
    """Under which name the class ``pipeline`` takes a model whose blocks are known, and of which classes; empty for one
    that takes none.
    """
    known = {
        part: tuple(name for name in names if name in FAMILIES and FAMILIES[name].component == part)
        for part, names in classes_wanted(pipeline).items()
    }
    return {part: names for part, names in known.items() if names}


def component_of(index: Mapping[str, Any]) -> str:
    """The name of the model among the parts of a pipeline with this ``model_index.json``, whose class takes one."""
    return next(iter(models_wanted(pipeline_class(index[CLASS_NAME]))))


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
    return STEMS["transformers" if kind_of(found) == "transformers model" else "diffusers"]
