"""How pipelines draw: what their call takes beside steps and noise, and what it gives.

It is read off the signature of the call, so a new class of pipelines needs no row. Three kinds are known: those that
read texts, those that are asked for classes by number, and those that are asked for nothing.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prune_lab.errors import DataError

_TOKENIZERS = ("tokenizer_3", "tokenizer_2", "tokenizer")  # the first that there is reads the long texts
_BINS = (32, 64, 128)  # sizes of latents for which a pipeline that draws in bins has some
_NUMBER = re.compile(r"(?:class\s+)?(\d+)")


def call_inputs(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    """What calling ``pipeline``, or one of a class, takes, by name."""
    found = pipeline if isinstance(pipeline, type) else type(pipeline)
    return inspect.signature(found.__call__).parameters


def reads_text(pipeline: Any) -> bool:
    """Whether ``pipeline``, or one of a class, draws what a text says."""
    return "prompt" in call_inputs(pipeline)


def draws_videos(pipeline: Any) -> bool:
    """Whether ``pipeline``, or one of a class, draws frames; of one frame it is a picture."""
    return "num_frames" in call_inputs(pipeline)


def has_own_size(pipeline: Any) -> bool:
    """Whether the model of ``pipeline`` draws pictures of one size alone: nobody can ask for another."""
    return "height" not in call_inputs(pipeline)


def latents_per_patch(pipeline: Any, config: Mapping[str, Any] | None = None) -> int:
    """Latents that a side must be a multiple of: transformers see patches of them. ``config`` is that of the model,
    where ``pipeline`` is the class of one.
    """
    if hasattr(pipeline, "_pack_latents"):
        return 2
    if config is None:
        config = getattr(getattr(pipeline, "transformer", None), "config", {})
    patch = config.get("patch_size") or 1
    return int(patch if isinstance(patch, int) else patch[-1])


def latents_per_halving(model: Any) -> int:
    """Latents that a side must be a multiple of, so that each stage of a U-Net halves it: of others the code of the
    U-Net takes another way, which its graph does not have.
    """
    return int(2 ** getattr(model, "num_upsamplers", 0))


def takes_guidance_scale(pipeline: Any) -> bool:
    """Whether ``pipeline`` can be asked for more or less guidance."""
    return "guidance_scale" in call_inputs(pipeline)


def takes_classes(pipeline: Any) -> bool:
    """Whether ``pipeline`` can be asked for classes by number."""
    return "class_labels" in call_inputs(pipeline)


def usual_length(pipeline: Any) -> int | None:
    """Tokens of a text that ``pipeline`` reads by default, where its call can be told; None where it is not."""
    told = call_inputs(pipeline).get("max_sequence_length")
    return told.default if told is not None and isinstance(told.default, int) else None


def text_length(pipeline: Any) -> int | None:
    """Tokens of a text that ``pipeline`` is to read, where its call can be told: its default, or less where its
    tokenizer makes no text so long. None for a pipeline that is not told.
    """
    usual = usual_length(pipeline)
    if usual is None:
        return None
    # the first that its class has: where that is left out, as SD3's for T5, nothing shortens the texts
    tokenizer = next((getattr(pipeline, name) for name in _TOKENIZERS if hasattr(pipeline, name)), None)
    return min(usual, int(getattr(tokenizer, "model_max_length", usual)))


def needed_by(kind: Any, size: object, tokens: int) -> dict[str, Any]:
    """What the call of pipelines of the class ``kind`` (or None) must be told where their model is meant for latents of
    ``size`` and texts of ``tokens`` (0: unknown), and the class expects others.
    """
    inputs: Mapping[str, Any] = call_inputs(kind) if kind else {}
    length = getattr(inputs.get("max_sequence_length"), "default", None)
    found: dict[str, Any] = {}
    if isinstance(length, int) and 0 < tokens < length:
        found["max_sequence_length"] = tokens
    if "use_resolution_binning" in inputs and size not in _BINS:
        found["use_resolution_binning"] = False
    return found


def told(pipeline: Any, needed: Mapping[str, Any]) -> Any:
    """``pipeline``, which from now on draws with the arguments ``needed`` wherever a call does not say otherwise.

    It stays of its class, under a class of the same name: Python looks calls up in classes alone.
    """
    kind = type(pipeline)
    taken = inspect.signature(kind.__call__)

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **given: Any) -> Any:
        said = taken.bind_partial(self, *args, **given).arguments
        return kind.__call__(self, *args, **given, **{k: v for k, v in needed.items() if k not in said})

    if needed:
        pipeline.__class__ = type(
            kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__, "__doc__": kind.__doc__}
        )
    return pipeline


# In ------------------------------------------------------------------------------------------------------------------


def class_numbers(texts: Sequence[str], classes: int, names: Mapping[str, int] | None = None) -> list[int]:
    """The class that each of ``texts`` asks for, "7" or "class 7", of ``classes`` counted from 0; or one of ``names``.

    Raises DataError for a text that names none.
    """
    found = []
    for text in texts:
        number = (names or {}).get(text.strip())
        if number is None and (match := _NUMBER.fullmatch(text.strip().lower())):
            number = int(match[1])
        if number is None or number >= classes:
            raise DataError(
                f"asked for the class of {text!r:.60}, the model knows classes by number; give 0 to {classes - 1}, "
                'such as "class 7"'
            )
        found.append(number)
    return found


def class_texts(classes: int, count: int, first: int = 0) -> tuple[str, ...]:
    """``count`` texts that ask for a class each, from the one numbered ``first`` on and over again, such as "class 0";
    without ``classes`` names of pictures, "picture 1", ...
    """
    numbers = range(first, first + count)
    if not classes:
        return tuple(f"picture {number + 1}" for number in numbers)
    return tuple(f"class {number % classes}" for number in numbers)


def asked(
    pipeline: Any, texts: Sequence[str], *, side: int | None = None, classes: int = 0
) -> dict[str, Any]:
    """Arguments with which ``pipeline`` draws one picture for each of ``texts``, ``side`` pixels high and wide; None:
    the size of its model, which it knows. ``classes``: how many it knows.

    Without resizing behind the model's back, cleaning of texts, or more frames than one. Raises DataError for a text
    that names no class.
    """
    inputs = call_inputs(pipeline)
    found: dict[str, Any] = {}
    if "prompt" in inputs:
        found["prompt"] = list(texts)
    if "class_labels" in inputs and classes:
        names = getattr(pipeline, "labels", None) or {}
        found["class_labels"] = class_numbers(texts, classes, names)
    if "batch_size" in inputs:
        found["batch_size"] = len(texts)
    if side is not None and "height" in inputs:
        found |= {"height": side, "width": side}
    length = text_length(pipeline)
    more = {
        "num_frames": 1,
        "use_resolution_binning": False,
        "clean_caption": False,
        "max_sequence_length": length,
    }
    return found | {name: value for name, value in more.items() if name in inputs and value is not None}


# Out -----------------------------------------------------------------------------------------------------------------


def pictures_in(answer: Any) -> Tensor:
    """Pictures (N, 3, H, W) from 0 to 1 that a pipeline answered with; of videos the first frame."""
    found = answer.frames if hasattr(answer, "frames") else answer.images
    pictures = torch.as_tensor(found).float()
    if hasattr(answer, "frames"):
        pictures = pictures[:, 0]
    return pictures if pictures.shape[1] != 1 else pictures.expand(-1, 3, -1, -1)


def gives_latents(pipeline: Any) -> bool:
    """Whether ``pipeline`` can be asked for the latents in place of the pictures."""
    return "prompt" in call_inputs(pipeline)


def latents_in(pipeline: Any, answer: Any, side: int, *, frames: bool) -> Tensor:
    """Latents (N, C, h, w) that ``pipeline`` answered with, of pictures ``side`` pixels high and wide; with ``frames``
    (N, C, 1, h, w).

    Unpacked, where the pipeline packs patches into rows.
    """
    found = answer.frames if hasattr(answer, "frames") else answer.images
    latents: Tensor = found.float()
    unpack: Callable[..., Tensor] | None = getattr(pipeline, "_unpack_latents", None)
    if latents.ndim == 3 and unpack is not None:
        latents = unpack(latents, side, side, pipeline.vae_scale_factor)
    return latents[:, :, 0] if latents.ndim == 5 and not frames else latents
