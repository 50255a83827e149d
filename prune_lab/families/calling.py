"""A pipeline's model, what it is given and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from prune_lab.errors import UnsupportedModelError
from prune_lab.families.family import check_given, plain_config
from prune_lab.families.known import FAMILIES, family_of
from prune_lab.families.own_code import base_name

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
