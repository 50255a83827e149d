"""Checking the folder of a pipeline or a U-Net from a few kilobytes of configs and headers."""

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
    check_code,
    check_forward,
    is_own,
    meta_unet,
    outline_of,
    own_class,
    plain_config,
)
from prune_lab.models.components import check_part, check_vocabulary, misfit
from prune_lab.models.diagnosis import check_files, folder_without_a_model, refuse_config, unusable
from prune_lab.models.files import chosen_variant, headers_of, json_object, weights_in
from prune_lab.models.parts import (
    LEFT_OUT,
    kind_of,
    kinds_wanted,
    part_class,
    pipeline_class,
    pipeline_parts,
    stem_of,
)
from prune_lab.runtime import path_text

_OF_PROMPTS = ("text_encoder", "tokenizer")
_EXAMPLES = "StableDiffusionPipeline, StableDiffusionXLPipeline or StableDiffusionInpaintPipeline"


# U-Net -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def _tensor_shapes(config: str) -> Mapping[str, tuple[int, ...]]:
    unet = meta_unet(json.loads(config))
    outline_of(unet)
    check_forward(unet)
    return {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}


def unet_shapes(config: Mapping[str, Any], path: Path) -> Mapping[str, tuple[int, ...]]:
    """Shapes of the tensors of the U-Net that ``config``, read from ``path``, describes; it was built and run, without
    memory. Raises UnsupportedModelError when it cannot be.
    """
    try:
        return _tensor_shapes(json.dumps(plain_config(config), sort_keys=True))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"no U-Net can be built from {path_text(path)}: {error}") from None


def unet_config(path: Path) -> dict[str, Any]:
    """The config of a U-Net in ``path``; UnsupportedModelError when it is of something else, or of nothing."""
    config = json_object(path)
    refuse_config(path, config)
    return config


def checked_config(path: Path) -> dict[str, Any]:
    """The same, after building the U-Net without memory: a config that makes no sense is refused here."""
    config = unet_config(path)
    unet_shapes(config, path)
    return config


def _check_weights(folder: Path, config: Mapping[str, Any], variant: str) -> str:
    """The variant of the weights in ``folder``; ModelFormatError unless they are just those ``config`` describes."""
    check_code(folder, config)
    weights = weights_in(folder, variant)
    header = headers_of(weights)
    if reason := unusable(header, config):
        raise UnsupportedModelError(f"asked for the weights in {folder}: {reason}")
    found = {name: shape for name, (_, shape) in header.items()}
    if complaint := misfit(found, unet_shapes(config, folder / "config.json")):
        raise ModelFormatError(
            f"the weights in {folder} do not fit its config.json: tensor {complaint}; "
            "fetch both from the same place again"
        )
    return weights.variant


# Pipelines -------------------------------------------------------------------------------------------------------


def variant_of_part(folder: Path, variant: str) -> str:
    """The variant to ask of a part beside the U-Net: ``variant`` where it has that, else what there is."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return variant if variant and chosen_variant(names, variant) is not None else ""


def _shown(value: object) -> str:
    return textwrap.shorten(
        repr(value), 80, placeholder=" ..."
    )  # a message is one line, whatever the index holds


def _check_class(index: Path, parts: Mapping[str, Any]) -> Any:
    """The class of the pipeline that ``index`` describes with these ``parts``."""
    name = parts.get(CLASS_NAME)
    found = pipeline_class(name)
    if found is None:
        raise UnsupportedModelError(
            f"{index} describes a pipeline of class {name!r}, which the installed diffusers has not, and code of "
            f"others is never run here; supported are its pipelines with a U-Net, such as {_EXAMPLES}"
        )
    required, _ = found._get_signature_keys(found)
    if "unet" not in required:
        raise UnsupportedModelError(
            f"{index} describes a {name}, which has no U-Net; supported are pipelines with a "
            f"{', '.join(FAMILIES)}, such as {_EXAMPLES}"
        )
    if found._load_connected_pipes:
        raise UnsupportedModelError(
            f"{index} describes a {name}, which is made of several pipelines; give the one with the U-Net, such as "
            f"{_EXAMPLES}"
        )
    # of several encoders each is optional to diffusers, and the last is the one that no prompt goes without
    last = {max((part for part in required if part.startswith(kind)), default="unet") for kind in _OF_PROMPTS}
    needed = sorted((set(required) - set(found._optional_components) - {"safety_checker"}) | last)
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
    return found


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
    """(config, variant of the weights) of the U-Net of the pipeline that ``index`` describes, all parts checked."""
    check_files(index.parent)
    parts = json_object(index)
    pipeline = _check_class(index, parts)
    components = pipeline_parts(parts)
    for part, value in components.items():
        _check_entry(index, part, value, pipeline)
    folder = index.parent / "unet"
    config = unet_config(folder / "config.json")
    if components["unet"][1] != config[CLASS_NAME]:
        raise ModelFormatError(
            f"{index} lists as unet a {components['unet'][1]}, {folder / 'config.json'} is of a "
            f"{config[CLASS_NAME]}; fetch both from the same place again"
        )
    found = _check_weights(folder, config, variant)
    for part, (library, name) in components.items():
        inner, kind = index.parent / part, kind_of(part_class(library, name))
        if kind == "tokenizer":
            check_vocabulary(inner, part_class(library, name))
        if part != "unet" and stem_of(library, name) is not None:
            check_part(inner, part_class(library, name), variant_of_part(inner, variant))
    return config, found


def checked_unet(folder: Path, variant: str = "") -> tuple[dict[str, Any], str]:
    """(config, variant of the weights) of the U-Net in ``folder``, which has no model_index.json, checked."""
    if not folder.is_dir():
        raise ModelFormatError(f"asked for the model in {folder}, which is no folder; check the name")
    check_files(folder)
    if not (folder / "config.json").is_file():
        raise ModelFormatError(f"asked for the model in {folder}, {folder_without_a_model(folder)}")
    config = unet_config(folder / "config.json")
    return config, _check_weights(folder, config, variant)
