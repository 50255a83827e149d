"""Whether the files of a part hold what its class needs: every tensor by name and shape, and its vocabulary.

The libraries fill what a file lacks with random numbers and go on, and make a tokenizer without a vocabulary. So names
and shapes of all tensors are compared with the class that a part's config describes before anything is loaded, from
headers and on ``meta``.
"""

from __future__ import annotations

import functools
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from prune_lab.errors import ModelFormatError, PruneLabError, UnsupportedModelError
from prune_lab.families import plain_config
from prune_lab.models.diagnosis import unusable
from prune_lab.models.files import headers_of, json_object, weights_in
from prune_lab.models.silence import quiet
from prune_lab.models.views import STEMS, component_view

# What the libraries raise, all of it unplanned, when they build a model from a config that makes no sense.
BUILD_ERRORS = (
    *(TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError),
    *(OSError, RecursionError, MemoryError, ImportError),
)
# What older files hold beside the weights and is computed today: counters, angles, and masks of attention.
_COUNTER = "position_ids"
_EMPTY_CAPTION = "caption_projection.y_embedding"  # what stood for no caption while a PixArt was trained
_COMPUTED = (_COUNTER, "token_type_ids", ".attn.bias", ".attn.masked_bias", ".inv_freq")
# A text or picture encoder may come in the file of the whole model that it is one half of.
_OTHER_HALVES = (
    *("text_model", "text_projection", "vision_model", "visual_projection", "logit_scale", "logit_bias"),
    *("decoder", "lm_head"),
)
# How older files of a VAE call the parts of its attention; diffusers renames them when it loads.
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

_ADAPTER = (
    "adapter_config.json"  # beside the weights of a transformers model it is read without being asked for
)
_ELSEWHERE = "transformers_weights"  # an entry of a config by which transformers reads another file

_SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
_MOST_SCALE = 1e4  # of latents; known VAEs have 0.04 to 9

Shapes = Mapping[str, tuple[int, ...]]


def reason_of(error: BaseException) -> str:
    """What ``error`` says, as a part of a line."""
    return textwrap.shorten(str(error), 160, placeholder=" ...") or type(error).__name__


# Names and shapes ------------------------------------------------------------------------------------------------


def modern_name(key: str) -> str:
    """The name that the classes of today give a tensor: older files of a VAE have others."""
    if ".attentions." in key and key.startswith(("encoder.", "decoder.")):
        module, kind = key.rsplit(".", 1)
        parent, _, layer = module.rpartition(".")
        return f"{parent}.{_RENAMED.get(layer, layer)}.{kind}"
    return key


def _first_of(complaints: Sequence[str]) -> str:
    more = f" and {len(complaints) - 1} more" if len(complaints) > 1 else ""
    return f"{complaints[0]}{more}" if complaints else ""


def _complaints(
    missing: Sequence[str], extra: Sequence[str], misshapen: Sequence[str], whole: str
) -> list[str]:
    lacking = [f"{name} is missing" for name in missing]
    if lacking and extra:
        lacking[0] += f" ({extra[0]} is there instead)"
    return [*lacking, *misshapen, *(f"{name} is not part of {whole}" for name in extra)]


def unread_tensors(model_class: Any) -> tuple[str, ...]:
    """Parts of the names of tensors that files of ``model_class`` may hold and that nothing reads; see ``misfit``."""
    return (
        _COUNTER,
        _EMPTY_CAPTION,
        *(getattr(model_class, "_keys_to_ignore_on_load_unexpected", None) or ()),
    )


def misfit(found: Shapes, wanted: Shapes, whole: str, unread: tuple[str, ...] = (_COUNTER,)) -> str:
    """The first tensor in which ``found`` is not what is ``wanted`` of ``whole``, and how many more; empty: it fits.

    ``unread`` are parts of names that may be there beside.
    """
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted and not any(part in name for part in unread)]
    misshapen = [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    return _first_of(_complaints(missing, extra, misshapen, whole))


@functools.lru_cache(maxsize=64)
def _wanted(model_class: Any, config: str) -> Shapes:
    with quiet(), torch.device("meta"):
        model = model_class.from_config(json.loads(config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _is_of_other_half(name: str, own: frozenset[str]) -> bool:
    first = name.split(".", 1)[0]
    return first in _OTHER_HALVES and first not in own


def _transformers_misfit(model_class: Any, folder: Path, variant: str) -> str:
    """What transformers itself misses when it loads the part without its numbers: it knows all its old names."""
    with quiet(), component_view(folder, STEMS["transformers"], variant) as view:
        model, report = model_class.from_pretrained(
            view,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            local_files_only=True,
        )
    own = frozenset(name.split(".", 1)[0] for name in model.state_dict())
    extra = [
        name
        for name in sorted(report["unexpected_keys"])
        if not name.endswith(_COMPUTED) and not _is_of_other_half(name, own)
    ]
    misshapen = [
        f"{name} is {list(found)} instead of {list(want)}"
        for name, found, want in sorted(report["mismatched_keys"])
    ]
    whole = f"a {model_class.__name__} of its config.json"
    return _first_of(_complaints(sorted(report["missing_keys"]), extra, misshapen, whole))


# Scaling of latents ----------------------------------------------------------------------------------------------


def _within(value: object, least: float) -> bool:
    return type(value) in (int, float) and least <= value <= _MOST_SCALE  # type: ignore[operator]


def complaint_of_scaling(config: Mapping[str, Any]) -> str:
    """What is wrong with the numbers by which a VAE of this ``config`` scales its latents; empty where nothing is."""
    scale, shift = config.get("scaling_factor", 1.0), config.get("shift_factor")
    if not _within(scale, 1 / _MOST_SCALE):
        return f"scaling_factor is {scale!r:.60}, where a finite number above zero belongs"
    if shift is not None and not _within(shift, -_MOST_SCALE):
        return f"shift_factor is {shift!r:.60}, where a finite number or null belongs"
    channels = config.get("latent_channels") or config.get("z_dim") or 4
    for name, least in (("latents_mean", -_MOST_SCALE), ("latents_std", 1 / _MOST_SCALE)):
        values = config.get(name)
        usable = isinstance(values, (list, tuple)) and all(_within(value, least) for value in values)
        if values is not None and not (usable and len(values) == channels):
            kind = "finite numbers" if least < 0 else "finite numbers above zero"
            return f"{name} is {values!r:.60}, where {channels} {kind} or null belong"
    return ""


# Parts -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _checked(model_class: Any, folder: Path, variant: str, _state: tuple[tuple[str, int, int], ...]) -> None:
    config = json_object(folder / "config.json")
    header = headers_of(weights_in(folder, variant))
    if f'"{_ELSEWHERE}"' in json.dumps(config):
        raise UnsupportedModelError(
            f"found {folder / 'config.json'}, whose {_ELSEWHERE} names a file to read in place of the usual one; take "
            "that entry away, and call the right file model.safetensors"
        )
    if reason := unusable(header, config):
        raise UnsupportedModelError(f"asked for the weights in {folder}: {reason}")
    if config.keys() & set(_SCALING) and (flawed := complaint_of_scaling(config)):
        raise ModelFormatError(
            f"found {folder / 'config.json'}, whose {flawed}; correct it, or fetch the model again"
        )
    try:
        if issubclass(model_class, diffusers.ModelMixin):
            found = {modern_name(name): shape for name, (_, shape) in header.items()}
            wanted = _wanted(model_class, json.dumps(plain_config(config), sort_keys=True))
            whole = f"a {model_class.__name__} of its config.json"
            complaint = misfit(found, wanted, whole, unread_tensors(model_class))
        else:
            complaint = _transformers_misfit(model_class, folder, variant)
    except PruneLabError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"no {model_class.__name__} can be built from {folder / 'config.json'}: {reason_of(error)}; "
            "fetch the folder again"
        ) from None
    if complaint:
        raise ModelFormatError(
            f"the weights in {folder} do not fit its config.json: tensor {complaint}; fetch both from the same place "
            "again"
        )


def check_part(folder: Path, model_class: Any, variant: str = "") -> None:
    """Raise ModelFormatError unless the files in ``folder`` hold just the tensors of ``model_class`` by its config.

    Files that are as they were are not looked at again.
    """
    if (folder / _ADAPTER).is_file():
        raise UnsupportedModelError(
            f"found {folder / _ADAPTER}, an adapter (LoRA, PEFT) that would be put on the weights there: merge it into "
            "them first (PEFT: merge_and_unload), or take the file away"
        )
    weights = weights_in(folder, variant)
    paths = [folder / "config.json", *weights.files, *([weights.index] if weights.index else [])]
    if not paths[0].is_file():
        raise ModelFormatError(f"{folder} has weights and no config.json; fetch it again")
    states = tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    _checked(model_class, folder, variant, states)


def check_vocabulary(folder: Path, tokenizer_class: Any) -> None:
    """Raise ModelFormatError where ``folder`` lacks the words of a tokenizer: it would be made without any."""
    names = {
        name: file
        for name, file in getattr(tokenizer_class, "vocab_files_names", {}).items()
        if name != "tokenizer_file" and isinstance(file, str)
    }
    missing = [file for file in names.values() if not (folder / file).is_file()]
    if missing and not (folder / "tokenizer.json").is_file():
        raise ModelFormatError(
            f"{folder} lacks {missing[0]}, in which a {tokenizer_class.__name__} has its words; fetch it again"
        )
