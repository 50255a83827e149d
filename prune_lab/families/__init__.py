"""What is known about each class of model: how it is built, what it takes, which parts it has, what can leave it.

A family is a row of functions about one diffusers class. Everything else asks it and knows no class of model.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from prune_lab.errors import UnsupportedModelError
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
    check_given,
    plain_config,
)
from prune_lab.families.image_transformers import IMAGE_TRANSFORMERS
from prune_lab.families.joint_transformers import JOINT_TRANSFORMERS
from prune_lab.families.legacy import modern_class, modern_config
from prune_lab.families.meta_device import runs_on_meta
from prune_lab.families.number_formats import building_in, format_of, in_loaded_format, loaded_format
from prune_lab.families.own_code import (
    base_name,
    check_code,
    code_path,
    entry_of,
    file_of,
    is_own,
    known_files,
    only_watches,
    own_class,
    own_family,
    own_layout,
)
from prune_lab.families.refused import REFUSED
from prune_lab.families.skipping_transformers import SKIPPING_TRANSFORMERS
from prune_lab.families.unet2d import UNET2D
from prune_lab.families.unet2d_condition import UNET2D_CONDITION
from prune_lab.families.unet_conditions import REFINER_TIME_IDS, SDXL_TIME_IDS
from prune_lab.families.video_transformers import VIDEO_TRANSFORMERS
from prune_lab.families.widths import Conversion, Kept, Member, Site, cut_tensors, emptied, narrowed_sizes
from prune_lab.families.widths import sites_of as _sites_of
from prune_lab.runtime import printable

__all__ = [
    "CLASS_NAME",
    "CLIP_TOKENS",
    "FAMILIES",
    "REFINER_TIME_IDS",
    "REFUSED",
    "SDXL_TIME_IDS",
    "STEPS",
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
]

FAMILIES: Mapping[str, Family] = {
    "UNet2DConditionModel": UNET2D_CONDITION,
    "UNet2DModel": UNET2D,
    **IMAGE_TRANSFORMERS,
    **JOINT_TRANSFORMERS,
    **VIDEO_TRANSFORMERS,
    **SKIPPING_TRANSFORMERS,
}
"""By name of the diffusers class."""


def supported_classes() -> str:
    """The names of the classes that have a family, in one short text."""
    nets = [name for name in FAMILIES if name.startswith("UNet")]
    rest = [re.sub("(Transformer)?[23]DModel$", "", name) for name in FAMILIES if name not in nets]
    return f"{', '.join(nets)} and the transformers {', '.join(rest)}"


@functools.cache
def _own_family(class_name: str, file: str) -> Family:
    return own_family(FAMILIES[base_name(class_name)], file)


def family_of(source: nn.Module | Mapping[str, Any]) -> Family:
    """The family of a model, or of the model that a diffusers config describes.

    Raises UnsupportedModelError when its class has none, or a config does not name its class.
    """
    name = source.get(CLASS_NAME) if isinstance(source, Mapping) else type(source).__name__
    if is_own(name) and base_name(str(name)) in FAMILIES:
        file = file_of(source) if isinstance(source, Mapping) else type(source).__module__
        return _own_family(str(name), file.rpartition(".")[2])
    if not isinstance(name, str) or name not in FAMILIES:
        found = f"a model of class {name}" if name else f"a config without {CLASS_NAME}"
        why = f", which {REFUSED[name]}" if isinstance(name, str) and name in REFUSED else ""
        raise UnsupportedModelError(
            f"asked for the blocks of a model, found {found}{why}; supported is {supported_classes()}"
        )
    return FAMILIES[name]


_ANY_LATENT = 64  # pixels of a side, where a config does not say
# What diffusers raises, all of it unplanned, where a config makes no sense.
_BUILD_ERRORS = (
    *(TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError),
    *(NotImplementedError, RecursionError, MemoryError),
)


def _said(error: BaseException) -> str:
    """What a library says of ``error``, in one short line."""
    return printable(" ".join(f"{type(error).__name__}: {error}".split()), 200)


def _check_of_one_class(config: Mapping[str, Any], known: set[str]) -> None:
    """Raise UnsupportedModelError where ``config`` has the settings of another class than the one it names: what that
    one does not know would be left out, and another model be built.
    """
    given = plain_config(config).keys()
    if given <= known:
        return
    for name, family in FAMILIES.items():
        theirs = {CLASS_NAME, *inspect.signature(family.model_class().__init__).parameters}
        if name != config[CLASS_NAME] and given <= theirs:
            raise UnsupportedModelError(
                f"asked to build a {config[CLASS_NAME]}, found the settings of a {name} in its config "
                f"({', '.join(sorted(given - known)[:3])}); correct {CLASS_NAME}"
            )


def _with_formats(model: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """``model`` with ``tensors`` in the formats of one that is loaded in ``dtype``."""
    found = {name: in_loaded_format(type(model), name, one, dtype) for name, one in tensors.items()}
    nn.Module.load_state_dict(model, found, strict=True, assign=True)
    return model


def _built(config: Mapping[str, Any], place: AbstractContextManager[Any], dtype: torch.dtype) -> Any:
    """The model of ``config``, built inside ``place``, in evaluation mode; its formats are those of one that is loaded
    in ``dtype``.

    Raises UnsupportedModelError when a setting is out of bounds, or diffusers cannot build it.
    """
    family = family_of(config)
    model_class: Any = family.model_class()
    parameters = inspect.signature(model_class.__init__).parameters
    # What diffusers does not know, such as the state of a moving average, it would leave out with a warning.
    known = {CLASS_NAME, *parameters}
    _check_of_one_class(config, known)
    settings = {name: value for name, value in plain_config(config).items() if name in known}
    defaults = {name: one.default for name, one in parameters.items() if one.default is not one.empty}
    family.check(settings, defaults)
    try:
        with place, building_in(dtype), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # what diffusers says of its own parts
            model = model_class.from_config(settings).eval()
    except _BUILD_ERRORS as error:
        # diffusers checks a config by building it; what it says is about the config's own keys
        raise UnsupportedModelError(
            f"asked to build a {model_class.__name__} from its config, diffusers refuses it "
            f"({_said(error)}); compare the config with that of a model that loads"
        ) from None
    return model if dtype == torch.float32 else _with_formats(model, model.state_dict(), dtype)


def meta_model(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """The model of ``config`` on the ``meta`` device: every shape, no memory, in evaluation mode.

    ``dtype`` is what diffusers would be asked for. Raises UnsupportedModelError when a setting is out of bounds, or
    diffusers cannot build it.
    """
    return _built(config, torch.device("meta"), dtype)


def empty_model(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """The model of ``config`` before its weights are there: they are on ``meta``, and what is computed of the config
    alone (kernels of samplers, places of patches, which no file holds) is not. In evaluation mode. Arguments and errors
    are those of ``meta_model``.
    """
    return _built(config, init_empty_weights(include_buffers=False), dtype)


def as_loaded(model: Any, dtype: torch.dtype) -> Any:
    """``model``, which is in float32 on the CPU, as plain diffusers would load it in ``dtype`` had it been saved: its
    tensors are taken over, and ``model`` must not be used any more. In evaluation mode.
    """
    if dtype == torch.float32:
        return model.eval()
    return _with_formats(empty_model(plain_config(model), dtype), model.state_dict(), dtype)


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
    except _BUILD_ERRORS as error:
        raise UnsupportedModelError(
            f"asked to run the {name} of a config, diffusers cannot ({_said(error)}); compare the config with that of "
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


# A pipeline's model, and what it is given and answers ----------------------------------------------------------------

_MODELS = ("unet", "transformer", "transformer_2")  # names of such parts in diffusers' pipelines


def model_of(pipeline: Any) -> Any:
    """The one part of ``pipeline`` that predicts, whose class has a family.

    Raises UnsupportedModelError where there is none, or there are two.
    """
    parts = {name: getattr(pipeline, name, None) for name in _MODELS}
    found = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    known = [name for name, part in found.items() if base_name(type(part).__name__) in FAMILIES]
    if len(known) > 1:
        raise UnsupportedModelError(
            f"asked for the model of a {type(pipeline).__name__}, found {len(known)} ({', '.join(known)}) that share "
            "the steps; give a pipeline with one, or the folder of one of them"
        )
    if known:
        return found[known[0]]
    for part in found.values():
        family_of(part)  # says why it has none
    raise UnsupportedModelError(
        f"asked for the model of a {type(pipeline).__name__}, found none among its parts; "
        f"give a pipeline with a {' or '.join(dict.fromkeys(family.component for family in FAMILIES.values()))}"
    )


def forward_inputs(
    model: nn.Module, sample: Tensor, timestep: Tensor, text: Tensor, given: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Keyword arguments for the ``forward`` of ``model``: the one place where its inputs are put together.

    sample (B, C, h, w) are noisy latents, (B, C, 1, h, w) of a model of films, timestep (B,), text (B, L, D), ``given``
    the rows (B, ...) of its ``conditions_of`` by name. Raises DataError when ``given`` holds others than the model
    takes.
    """
    family, config = family_of(model), plain_config(model)
    conditions = family.conditions(config)
    check_given(conditions, given)
    return family.arrange(config, conditions, sample, timestep, text, given)


def prediction_of(model: nn.Module, output: Any, sample: Tensor) -> Tensor:
    """What ``model`` predicts for noisy latents ``sample``, in their form; ``output`` is the first that it gave."""
    return family_of(model).prediction(plain_config(model), output, sample)


def predict_with(
    model: Any,
    sample: Tensor,
    timestep: Tensor,
    text: Tensor,
    given: Mapping[str, Tensor],
    *,
    forward: Callable[..., Any] | None = None,
) -> Tensor:
    """What ``model`` predicts for noisy latents ``sample``, in their form; the arguments are those of
    ``forward_inputs``. ``forward`` is called in place of the model where it is wrapped.
    """
    inputs = forward_inputs(model, sample, timestep, text, given)
    return prediction_of(model, (forward or model)(**inputs, return_dict=False)[0], sample)
