"""The smaller model that a plan leaves, built from a model in memory or from the files of one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prune_lab.blocks import architecture_of
from prune_lab.errors import ModelFormatError, UnsupportedModelError
from prune_lab.families import Layout, empty_model, family_of, meta_model
from prune_lab.forms import layout_of
from prune_lab.models import weight_files
from prune_lab.models.conversion import converted
from prune_lab.models.streamed import is_streamed
from prune_lab.plans import PruningPlan
from prune_lab.runtime import read_json


def materialise(model: ModelMixin, plan: PruningPlan, *, hand_over: bool = False) -> ModelMixin:
    """The smaller model that ``plan`` leaves, in the form of the plan, with the surviving weights of ``model``.

    It is built without memory (on ``meta``) and given the surviving tensors: copies of them, or with ``hand_over`` the
    tensors themselves, after which ``model`` must not be used any more. Raises FormError when it cannot be built in
    the form of the plan.
    """
    if is_streamed(model):
        raise UnsupportedModelError(
            "asked to build a student of a model that is read from disk block by block; materialise_from_folder reads "
            "what the plan leaves"
        )
    layout = layout_of(architecture_of(model), plan)
    tensors: dict[str, Tensor] = model.state_dict()

    def take(key: str) -> Tensor:
        return tensors[key] if hand_over else tensors[key].clone()

    return _assembled(layout, take, model.dtype)


def materialise_from_files(
    config: Mapping[str, Any], files: Sequence[Path], plan: PruningPlan, *, dtype: torch.dtype | None = None
) -> ModelMixin:
    """The smaller model that ``plan`` leaves of the one with ``config`` and weights in the safetensors ``files``.

    Only surviving tensors are read. ``dtype`` converts each as it is read, to what plain diffusers gives that is asked
    for it: some modules stay in float32. ``None`` keeps the files' own. Raises FormError, or ModelFormatError when the
    weights do not fit the config, are no finite numbers, or too large for ``dtype``.
    """
    layout = layout_of(architecture_of(config), plan)
    model_class = family_of(config).model_class()
    with contextlib.ExitStack() as stack:
        homes: dict[str, Any] = {}  # key -> open file; tensors are read one by one through its memory map
        for path in files:
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ModelFormatError(f"asked to read {path}: {error}; fetch the file again") from None
            homes |= dict.fromkeys(file.keys(), file)

        def take(key: str) -> Tensor:
            if key not in homes:
                raise ModelFormatError(
                    f"{files[0].parent} has no tensor {key!r} although its config.json describes one; "
                    "fetch the model again"
                )
            tensor: Tensor = homes[key].get_tensor(key)
            return converted(key, tensor, dtype, model_class)

        return _assembled(layout, take, dtype or torch.float32)


def materialise_from_folder(
    folder: Path, plan: PruningPlan, *, dtype: torch.dtype | None = None, variant: str = ""
) -> ModelMixin:
    """The smaller model that ``plan`` leaves of the model in ``folder``; see ``materialise_from_files``."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ModelFormatError(f"{folder / 'config.json'} is not a diffusers config; fetch the model again")
    return materialise_from_files(config, weight_files(folder, variant), plan, dtype=dtype)


def predicted_shapes(config: Mapping[str, Any], plan: PruningPlan) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the smaller model by its name there, from the original's inventory: nothing is built."""
    layout = layout_of(architecture_of(config), plan)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in meta_model(config).state_dict().items():
        new = layout.renamed(name)
        if new is not None:
            made = layout.convert[new](tensor) if new in layout.convert else tensor
            shapes[new] = tuple(made.shape)
    return {**shapes, **layout.empty}


def _assembled(layout: Layout, take: Callable[[str], Tensor], dtype: torch.dtype) -> ModelMixin:
    """The student of ``layout`` with every tensor from ``take(key in the original)``, and what no file holds as it is
    of a model in ``dtype``.
    """
    student = empty_model(layout.config, dtype)
    wanted = student.state_dict()
    sources = layout.sources(wanted)
    tensors = {}
    for key, empty in wanted.items():
        if key in layout.empty:
            continue
        tensor = take(sources[key])
        if key in layout.convert:
            tensor = layout.convert[key](tensor)
        if tensor.shape != empty.shape:
            raise ModelFormatError(
                f"tensor {key!r} has shape {tuple(tensor.shape)}, the config describes {tuple(empty.shape)}; "
                "the weights and config.json do not belong together"
            )
        tensors[key] = tensor
    first = next(iter(tensors.values()))
    tensors |= {
        key: torch.empty(shape, dtype=first.dtype, device=first.device) for key, shape in layout.empty.items()
    }
    student.load_state_dict(tensors, strict=True, assign=True)
    # What no file holds was computed on the CPU; the weights are where the original has its own.
    for module in student.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None:
                module._buffers[name] = buffer.to(first.device)
    return student.eval()
