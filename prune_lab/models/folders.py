"""Checking the folder of a pipeline or of a model alone from a few kilobytes of configs and headers."""

from __future__ import annotations

import functools
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prune_lab.errors import ModelFormatError, UnsupportedModelError
from prune_lab.families import (
    CLASS_NAME,
    FAMILIES,
    REFUSED,
    WIDTHS_MARK,
    base_name,
    check_code,
    check_forward,
    check_settings,
    family_of,
    is_own,
    mark_shapes,
    meta_model,
    modern_class,
    modern_config,
    outline_of,
    own_class,
    plain_config,
    supported_classes,
    without_guard,
)
from prune_lab.models.components import Shapes, check_part, check_vocabulary, misfit, unread_tensors
from prune_lab.models.diagnosis import check_files, folder_without_a_model, refuse_config, unusable
from prune_lab.models.files import chosen_variant, headers_of, json_object, weights_in
from prune_lab.models.parts import (
    LEFT_OUT,
    classes_wanted,
    kind_of,
    kinds_wanted,
    models_wanted,
    part_class,
    pipeline_class,
    pipeline_parts,
    stem_of,
)
from prune_lab.models.written import check_record
from prune_lab.runtime import path_text

_OF_PROMPTS = ("text_encoder", "tokenizer")
# Of several encoders each is optional to diffusers, and the last is the one that no prompt goes without; but in the
# place of these it puts zeros.
_DISPENSABLE = {"text_encoder_3", "tokenizer_3"}
_EXAMPLES = "StableDiffusionPipeline, StableDiffusion3Pipeline, FluxPipeline or WanPipeline"


# Model -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def _tensor_shapes(config: str) -> Mapping[str, tuple[int, ...]]:
    model = meta_model(json.loads(config))
    outline_of(model)
    check_forward(model)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def tensor_shapes(config: Mapping[str, Any], path: Path) -> Mapping[str, tuple[int, ...]]:
    """Shapes of the tensors of the model that ``config``, read from ``path``, describes; it was built and run, without
    memory. Raises UnsupportedModelError when it cannot be.
    """
    try:
        return _tensor_shapes(json.dumps(plain_config(config), sort_keys=True))
    except UnsupportedModelError as error:
        called = family_of(config).called
        raise UnsupportedModelError(f"no {called} can be built from {path_text(path)}: {error}") from None


def model_config(path: Path) -> dict[str, Any]:
    """The config of a model in ``path``, its class called as it is today; UnsupportedModelError when it is of something
    else, or of nothing.
    """
    config = without_guard(modern_config(json_object(path)))
    refuse_config(path, config)
    return config


def checked_config(path: Path) -> dict[str, Any]:
    """The same, after building the model without memory: a config that makes no sense is refused here."""
    config = model_config(path)
    tensor_shapes(config, path)
    return config


def _changed_since(found: Shapes, config: Mapping[str, Any]) -> str:
    """What of a student with code of its own was changed after it was written, as its tensors without numbers tell:
    their shapes are digests of it. Empty where that is not what is wrong.
    """
    if not is_own(config):
        return ""
    try:
        check_settings(config)
    except UnsupportedModelError:  # told where the model is built
        return ""
    shapes = mark_shapes(config)
    if shapes.get(WIDTHS_MARK) != found.get(WIDTHS_MARK):
        return f"the widths in its config.json were changed after it was written (tensor {WIDTHS_MARK} tells)"
    other = next((name for name, shape in shapes.items() if found.get(name) != shape), "")
    if other:
        return f"what is removed by its config.json was changed after it was written (tensor {other} tells)"
    return ""


def _check_weights(folder: Path, config: Mapping[str, Any], variant: str) -> str:
    """The variant of the weights in ``folder``; ModelFormatError unless they are just those ``config`` describes,
    or where ``config`` is not the one that prune-lab wrote.
    """
    check_code(folder, config)
    check_record(folder, config)
    weights = weights_in(folder, variant)
    header = headers_of(weights)
    if reason := unusable(header, config):
        raise UnsupportedModelError(f"asked for the weights in {folder}: {reason}")
    found = {name: shape for name, (_, shape) in header.items()}
    family = family_of(config)
    if changed := _changed_since(found, config):
        raise ModelFormatError(
            f"asked for the weights in {folder}, found that {changed}; restore its config.json, or fetch both from the "
            "same place again"
        )
    wanted, unread = tensor_shapes(config, folder / "config.json"), unread_tensors(family.model_class())
    if complaint := misfit(found, wanted, f"that {family.called}", unread):
        raise ModelFormatError(
            f"the weights in {folder} do not fit its config.json: tensor {complaint}; "
            "fetch both from the same place again"
        )
    return weights.variant


# Pipelines -------------------------------------------------------------------------------------------------------


def variant_of_part(folder: Path, variant: str) -> str:
    """The variant to ask of a part beside the model: ``variant`` where it has that, else what there is."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return variant if variant and chosen_variant(names, variant) is not None else ""


def _shown(value: object) -> str:
    return textwrap.shorten(
        repr(value), 80, placeholder=" ..."
    )  # a message is one line, whatever the index holds


def _names_a_model(value: object) -> bool:
    """Whether an entry of an index is of a model whose blocks are known."""
    return isinstance(value, list) and len(value) == 2 and base_name(str(value[1])) in FAMILIES


def _why_no_model(pipeline: Any) -> str:
    """Why the class ``pipeline`` has no model that is pruned here, as the end of *which*."""
    for part, classes in classes_wanted(pipeline).items():
        for name in (name for name in classes if name in REFUSED):
            return f"has as {part} a {name}, which {REFUSED[name]}"
    return "has no model whose blocks are known"


def _check_class(index: Path, parts: Mapping[str, Any]) -> tuple[Any, str]:
    """The class of the pipeline that ``index`` describes with these ``parts``, and which of them is its model."""
    name = parts.get(CLASS_NAME)
    found = pipeline_class(name)
    if found is None:
        raise UnsupportedModelError(
            f"{index} describes a pipeline of class {name!r}, which the installed diffusers has not, and code of "
            f"others is never run here; supported are its own, such as {_EXAMPLES}"
        )
    required, _ = found._get_signature_keys(found)
    if not models_wanted(found):
        raise UnsupportedModelError(
            f"{index} describes a {name}, which {_why_no_model(found)}; supported are pipelines with a "
            f"{supported_classes()}, such as {_EXAMPLES}"
        )
    component = next(iter(models_wanted(found)))
    models = [part for part in sorted(required) if _names_a_model(parts.get(part))]
    if models not in ([], [component]):
        raise UnsupportedModelError(
            f"{index} lists {' and '.join(models)}, where one {component} is known: of a pipeline of several models "
            "none can be pruned here; supported are pipelines of one"
        )
    if found._load_connected_pipes:
        raise UnsupportedModelError(
            f"{index} describes a {name}, which is made of several pipelines; give the one with the {component}, "
            f"such as {_EXAMPLES}"
        )
    others = {part: value[1] for part, value in parts.items() if _names_a_model(value)}
    if component not in parts and others:
        had = " and ".join(f"a {other} as {part}" for part, other in others.items())
        raise UnsupportedModelError(
            f"{index} describes a {name}, which takes a {component}, and lists {had}; correct its {CLASS_NAME}, "
            f"such as {_EXAMPLES}"
        )
    wanted = set(required) - _DISPENSABLE
    last = {
        max((part for part in wanted if part.startswith(kind)), default=component) for kind in _OF_PROMPTS
    }
    needed = sorted((wanted - set(found._optional_components) - {"safety_checker"}) | last | {component})
    missing = [part for part in needed if part not in parts]
    if missing:
        raise ModelFormatError(f"{index} lists no {missing[0]}, which a {name} needs; fetch it again")
    for part in sorted({*required, *LEFT_OUT} & parts.keys()):
        value = parts[part]
        if value in (None, [None, None]) and part not in needed:
            continue
        if not isinstance(value, list) or len(value) != 2 or not all(isinstance(one, str) for one in value):
            raise ModelFormatError(
                f"{index} lists {part} as {_shown(value)}, which a {name} cannot use; its entry is a library and a "
                'class, such as ["diffusers", "PNDMScheduler"]; fetch it again'
            )
    return found, component


def _check_entry(index: Path, part: str, value: list[Any], pipeline: Any) -> None:
    """Raise unless the ``part`` of ``pipeline`` is of a class that it can use, and has a folder."""
    named = part if part.isidentifier() else repr(part)
    if len(value) == 2 and is_own(value[1]):
        own_class(*value)  # says which code is known
    found = part_class(*value) if len(value) == 2 else None
    if found is None:
        raise UnsupportedModelError(
            f"{index} wants code of its own for {named} ({_shown(value)}), which is never run here; supported are "
            "pipelines made of models, schedulers, tokenizers and image processors of diffusers and transformers"
        )
    wanted, kind = kinds_wanted(pipeline).get(part, frozenset()), kind_of(found)
    if wanted and kind not in wanted:
        raise UnsupportedModelError(
            f"{index} lists as {named} a {found.__name__}, a {kind}, where a {pipeline.__name__} takes a "
            f"{' or '.join(sorted(wanted))}; fetch it again"
        )
    if Path(part).name != part or not (index.parent / part).is_dir():
        raise ModelFormatError(
            f"{index} lists {named}, but {index.parent / named} is not there; fetch it again"
        )
    check_files(index.parent / part)


def checked_pipeline(index: Path, variant: str = "") -> tuple[dict[str, Any], str]:
    """(config, variant of the weights) of the model of the pipeline that ``index`` describes, all parts checked."""
    check_files(index.parent)
    parts = json_object(index)
    pipeline, component = _check_class(index, parts)
    components = pipeline_parts(parts)
    for part, value in components.items():
        _check_entry(index, part, value, pipeline)
    folder = index.parent / component
    config = model_config(folder / "config.json")
    listed, name = modern_class(components[component][1], config), config[CLASS_NAME]
    if listed != name:
        raise ModelFormatError(
            f"{index} lists as {component} a {listed}, {folder / 'config.json'} is of a {name}; "
            "fetch both from the same place again"
        )
    if base_name(name) not in models_wanted(pipeline)[component]:
        raise UnsupportedModelError(
            f"{index} lists as {component} a {name}, where a {pipeline.__name__} takes a "
            f"{' or '.join(models_wanted(pipeline)[component])}; fetch it again"
        )
    found = _check_weights(folder, config, variant)
    for part, (library, name) in components.items():
        inner, kind = index.parent / part, kind_of(part_class(library, name))
        if kind == "tokenizer":
            check_vocabulary(inner, part_class(library, name))
        if part != component and stem_of(library, name) is not None:
            check_part(inner, part_class(library, name), variant_of_part(inner, variant))
    return config, found


def checked_model(folder: Path, variant: str = "") -> tuple[dict[str, Any], str]:
    """(config, variant of the weights) of the model in ``folder``, which has no model_index.json, checked."""
    if not folder.is_dir():
        raise ModelFormatError(f"asked for the model in {folder}, which is no folder; check the name")
    check_files(folder)
    if not (folder / "config.json").is_file():
        raise ModelFormatError(f"asked for the model in {folder}, {folder_without_a_model(folder)}")
    config = model_config(folder / "config.json")
    return config, _check_weights(folder, config, variant)
