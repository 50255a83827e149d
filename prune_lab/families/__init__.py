"""What is known about each class of model: how it is built, what it takes, which parts it has, what can leave it.

A family is a row of functions about one diffusers class. Everything else asks it and knows no class of model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.errors import UnsupportedModelError
from prune_lab.families.building import BUILD_ERRORS, as_loaded, check_settings, empty_model, meta_model, said
from prune_lab.families.calling import forward_inputs, model_of, predict_with, prediction_of
from prune_lab.families.chain import STEPS
from prune_lab.families.configs import looks_like_a_unet, picture_scale
from prune_lab.families.family import (
    CLASS_NAME,
    CLIP_TOKENS,
    Condition,
    Family,
    Form,
    Layout,
    Outline,
    Stage,
    Unit,
    UnitKind,
    plain_config,
    usual_settings,
)
from prune_lab.families.known import FAMILIES, family_of, supported_classes
from prune_lab.families.legacy import modern_class, modern_config
from prune_lab.families.meta_device import runs_on_meta
from prune_lab.families.number_formats import format_of, in_loaded_format, loaded_format
from prune_lab.families.own_code import (
    WIDTHS_MARK,
    base_name,
    check_code,
    code_path,
    entry_of,
    file_of,
    is_own,
    known_files,
    mark_shapes,
    only_watches,
    own_class,
    own_layout,
    without_guard,
)
from prune_lab.families.refused import REFUSED
from prune_lab.families.unet_conditions import REFINER_TIME_IDS, SDXL_TIME_IDS
from prune_lab.families.widths import Conversion, Kept, Member, Site, cut_tensors, emptied, narrowed_sizes
from prune_lab.families.widths import sites_of as _sites_of

__all__ = [
    "CLASS_NAME",
    "CLIP_TOKENS",
    "FAMILIES",
    "REFINER_TIME_IDS",
    "REFUSED",
    "SDXL_TIME_IDS",
    "STEPS",
    "WIDTHS_MARK",
    "Condition",
    "Conversion",
    "Family",
    "Form",
    "Kept",
    "Layout",
    "Member",
    "Outline",
    "Site",
    "Stage",
    "Unit",
    "UnitKind",
    "as_loaded",
    "base_name",
    "check_code",
    "check_forward",
    "check_settings",
    "code_path",
    "conditions_of",
    "cut_tensors",
    "embedding_width",
    "emptied",
    "empty_model",
    "entry_of",
    "example_inputs",
    "family_of",
    "file_of",
    "filled_with_noise",
    "film_frames",
    "format_of",
    "forward_inputs",
    "in_loaded_format",
    "is_own",
    "known_conditions",
    "known_files",
    "knows_its_size",
    "latent_channels",
    "latent_form",
    "latent_shape",
    "loaded_format",
    "looks_like_a_unet",
    "mark_shapes",
    "meta_model",
    "model_of",
    "modern_class",
    "modern_config",
    "narrowed_sizes",
    "only_watches",
    "outline_of",
    "own_class",
    "own_layout",
    "picture_scale",
    "plain_config",
    "predict_with",
    "prediction_of",
    "runs_on_meta",
    "sites_of",
    "supported_classes",
    "takes_guidance",
    "text_form",
    "usual_settings",
    "without_guard",
]

_ANY_LATENT = 64  # pixels of a side, where a config does not say


@torch.no_grad()
def check_forward(model: Any) -> None:
    """Raise UnsupportedModelError unless ``model``, which is on ``meta``, takes its example inputs and answers with
    latents of their size: what can be built cannot always be run.
    """
    config, name = model.config, type(model).__name__
    latent = None if config.get("sample_size") is not None else _ANY_LATENT
    inputs = example_inputs(config, latent=latent, device="meta")
    try:
        with runs_on_meta():
            predicted = model(**inputs)[0]
    except BUILD_ERRORS as error:
        raise UnsupportedModelError(
            f"asked to run the {name} of a config, diffusers cannot ({said(error)}); compare the config with that of "
            "a model that runs"
        ) from None
    if config.get("out_channels") is None or family_of(model).component != "unet":
        return  # a class that answers with something else, such as patches in rows, or does not say
    wanted = (1, int(config["out_channels"]), *inputs["sample"].shape[2:])
    if tuple(predicted.shape) != wanted:
        raise UnsupportedModelError(
            f"asked to run the {name} of a config, found that it answers {list(inputs['sample'].shape)} with "
            f"{list(predicted.shape)} instead of {list(wanted)}; compare the config with that of a model that runs"
        )


def outline_of(model: nn.Module) -> Outline:
    """The parts of ``model`` in order of execution; it may be on ``meta``."""
    return family_of(model).outline(model)


def sites_of(model: nn.Module) -> tuple[Site, ...]:
    """Where the blocks of ``model``, which may be on ``meta``, can be made narrower, in order of execution."""
    return _sites_of(model, outline_of(model))


def example_inputs(
    config: Mapping[str, Any],
    *,
    batch: int = 1,
    latent: int | None = None,
    tokens: int | None = None,
    frames: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Keyword arguments for the ``forward`` of the model of ``config``: zeros of the right shapes.

    Of a U-Net: sample (B, C, H, W), timestep (B,), encoder_hidden_states (B, L, D) and its ``conditions_of``, each in
    its place. None for ``latent``, ``tokens`` and ``frames`` means the sizes that the model is meant for; a model of
    pictures has no frames.
    """
    family = family_of(config)
    film = {} if frames is None or not family.frames else {"frames": frames}
    return family.example_inputs(
        config, batch=batch, latent=latent, tokens=tokens, **film, device=device, dtype=dtype
    )


_AS_THEY_ARE = (
    "ids",
    "mask",
    "rotary_emb",
)  # endings of names: places and masks, whose numbers have a meaning


def filled_with_noise(inputs: Any, generator: torch.Generator, name: str = "") -> Any:
    """The same ``inputs`` with normal noise in place of zeros, timesteps of 500, and what has a meaning as it was."""
    if isinstance(inputs, Mapping):
        return {key: filled_with_noise(value, generator, key) for key, value in inputs.items()}
    if isinstance(inputs, list):  # of one tensor a row
        return [filled_with_noise(value, generator, name) for value in inputs]
    if not isinstance(inputs, Tensor) or name.endswith(_AS_THEY_ARE):
        return inputs
    if name.startswith("timestep") and not name.endswith("cond"):
        return torch.full_like(inputs, 500)
    if not inputs.is_floating_point():
        return inputs
    return torch.randn(inputs.shape, generator=generator).to(inputs.device, inputs.dtype)


def latent_shape(config: Mapping[str, Any], latent: int | None = None) -> tuple[int, int]:
    """Height and width of the latent: ``latent`` squared, or the size that the model of ``config`` is meant for.

    Raises UnsupportedModelError where its config does not say.
    """
    return family_of(config).size(config) if latent is None else (latent, latent)


def film_frames(source: nn.Module | Mapping[str, Any], frames: int | None = None) -> int | None:
    """Frames of the latents of a model of films: ``frames``, or those of the film that it is meant for; else None."""
    family = family_of(source)
    return (frames or family.film(plain_config(source))) if family.frames else None


def knows_its_size(config: Mapping[str, Any]) -> bool:
    """Whether the size of the latent is known that the model of ``config`` is meant for."""
    try:
        latent_shape(config)
    except UnsupportedModelError:
        return False
    return True


def latent_form(source: nn.Module | Mapping[str, Any], latent: int | None = None) -> tuple[int, ...]:
    """Shape of one row of noisy latents, (C, h, w), of a model of films (C, 1, h, w): ``latent`` squared, or of the
    size that the model is meant for. Raises UnsupportedModelError where its config does not say.
    """
    family, config = family_of(source), plain_config(source)
    frames = (1,) if family.frames else ()
    return (family.channels(config), *frames, *latent_shape(config, latent))


def text_form(source: nn.Module | Mapping[str, Any], tokens: int | None = None) -> tuple[int, int]:
    """Words and width (L, D) of the text that a model reads, ``tokens`` words or as many as it is run with where
    nothing is said; (0, 0) where it reads none.
    """
    family, config = family_of(source), plain_config(source)
    width = family.text(config)
    return (family.tokens(config) if tokens is None else tokens, width) if width else (0, 0)


def conditions_of(source: nn.Module | Mapping[str, Any]) -> tuple[Condition, ...]:
    """What a model, or that of a config, takes beside noisy latents, timestep and text."""
    return family_of(source).conditions(plain_config(source))


def latent_channels(source: nn.Module | Mapping[str, Any]) -> int:
    """Channels of the noisy latents of a model, or that of a config; of a model of pixels those of the picture."""
    return family_of(source).channels(plain_config(source))


def embedding_width(source: nn.Module | Mapping[str, Any]) -> int:
    """Width of the text that a model, or that of a config, reads; 0 where it reads none."""
    return family_of(source).text(plain_config(source))


def known_conditions(source: nn.Module | Mapping[str, Any]) -> tuple[Condition, ...]:
    """``conditions_of`` of a model that is to be run on pictures or noise.

    Raises UnsupportedModelError for one that takes something of which no rows are made here, or whose predictions are
    more than noise or velocity, and a variance that can be left out.
    """
    found = conditions_of(source)
    for condition in found:
        if condition.reason:
            raise UnsupportedModelError(
                f"asked to run a model on inputs made here, found that it takes {condition.reason}"
            )
    family, config = family_of(source), plain_config(source)
    answered, taken = family.predicted(config), family.channels(config)
    if answered not in (None, taken):
        raise UnsupportedModelError(
            f"asked to run a {family.called} on inputs made here, found that it predicts {answered} channels for "
            f"{taken} channels of latents, as models do that go on from a picture (FLUX Canny, Depth and Fill), which "
            "this program does not make; its blocks can be counted, profiled and pruned without"
        )
    predicted, latents = config.get("out_channels"), family.channels(config)
    if family.component == "unet" and predicted not in (None, latents, 2 * latents):
        raise UnsupportedModelError(
            f"asked to run a U-Net on inputs made here, found that it predicts {predicted} channels for {latents} "
            "channels of latents; known are those that predict noise or velocity, and a variance of it as well"
        )
    return found


def takes_guidance(source: nn.Module | Mapping[str, Any]) -> bool:
    """Whether a model takes the guidance as an input: it is then not run a second time with the empty caption."""
    return any(condition.name == "guidance" for condition in conditions_of(source))
