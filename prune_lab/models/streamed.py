"""A model whose blocks are read from disk when they are called: memory holds one of them at a time.

What lies around the blocks, a few hundredths of a large model, is there all along. The files are mapped, so that a
block that is stored as it is computed is not copied. Whoever calls the model as a whole need not know: also a replay,
which calls each block once for all sets of a pass, and so reads its weights once.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prune_lab.errors import ModelFormatError
from prune_lab.families import Unit, empty_model, family_of, in_loaded_format, outline_of
from prune_lab.models.conversion import Look, refuse_broken
from prune_lab.models.files import json_object, read_headers, weight_files
from prune_lab.models.folders import variant_of_part
from prune_lab.models.parts import pipeline_parts, stem_of
from prune_lab.models.silence import quiet
from prune_lab.models.sources import ModelSource
from prune_lab.models.written import tell_weights
from prune_lab.runtime import return_freed


class _Weights:
    """The safetensors files of a model's folder, opened for each tensor anew: a map that is closed takes no memory."""

    def __init__(
        self, folder: Path, variant: str, model: Any, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._named = f"the {family_of(model).called} in {folder}"
        self._class, self._device, self._dtype = type(model), device, dtype
        self._look, self._unread = Look(), set(model.state_dict())  # names that were not looked at yet
        self._files: dict[str, Path] = {}
        self.stored: dict[str, torch.dtype] = {}  # by name of each tensor
        for path in weight_files(folder, variant):
            with self._open(path) as file:
                self._files |= dict.fromkeys(file.keys(), path)
                self.stored |= {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118

    @staticmethod
    def _open(path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelFormatError(
                f"asked for the weights in {path}, found a damaged file ({error}); fetch the model again"
            ) from None

    def read(self, name: str) -> Tensor:
        """The tensor of that name, on the device and in the number format of the model.

        Raises ModelFormatError when it is not there, or holds what is no finite number.
        """
        if name not in self._files:
            raise ModelFormatError(
                f"asked for the weights of a model, found none called {name!r} in its files; fetch the model again"
            )
        with self._open(self._files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        found = in_loaded_format(self._class, name, tensor, self._dtype)
        if name in self._unread:
            self._look_at(name, found)
        return found.to(self._device)

    def _look_at(self, name: str, tensor: Tensor) -> None:
        """Raise ModelFormatError for what is broken, as where a whole model is loaded: at the first block that is, or
        at the last of all.
        """
        broken = self._look.at(name, tensor) or (self._look.over if self._unread == {name} else "")
        refuse_broken(broken, self._named, self._dtype)
        self._unread.discard(name)


_STREAMED: weakref.WeakKeyDictionary[nn.Module, _Weights] = weakref.WeakKeyDictionary()


def is_streamed(model: nn.Module) -> bool:
    """Whether the model is one of ``load_streamed``."""
    return model in _STREAMED


def stored_dtypes(model: nn.Module) -> Mapping[str, torch.dtype]:
    """By name of each tensor of a streamed ``model`` the number format that it has on disk."""
    return _STREAMED[model].stored


class _OneAtATime:
    """The unit whose weights are in memory: the one that was called last."""

    def __init__(self, weights: _Weights) -> None:
        self._weights = weights
        self._module: nn.Module | None = None
        self._empty: Mapping[str, Tensor] = {}  # what it holds without them

    def bring(self, path: str, module: nn.Module, keeps: tuple[str, ...]) -> None:
        """Put the weights of ``module`` into it, and take them out of the one before; those that begin as one of
        ``keeps`` are there all along.
        """
        if module is self._module:
            return
        if self._module is not None:
            nn.Module.load_state_dict(self._module, self._empty, strict=False, assign=True)
            return_freed()  # else what one block leaves in pieces adds up, block after block
        self._module = None
        self._empty = {
            name: tensor for name, tensor in module.state_dict().items() if not name.startswith(keeps)
        }
        try:
            for name in self._empty:
                # One by one: of a tensor that is stored in another form both are there for a moment.
                nn.Module.load_state_dict(
                    module, {name: self._weights.read(f"{path}.{name}")}, strict=False, assign=True
                )
        except BaseException:  # half of it is no block
            nn.Module.load_state_dict(module, self._empty, strict=False, assign=True)
            raise
        self._module = module


def _bringing(place: _OneAtATime, path: str, module: nn.Module, keeps: tuple[str, ...]) -> Callable[..., Any]:
    forward = module.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        place.bring(path, module, keeps)
        return forward(*args, **kwargs)

    return call


def outer_units(model: nn.Module) -> Iterator[Unit]:
    """The units that lie in no other, which are read in turns."""
    return (unit for unit in outline_of(model).units if not unit.inside)


def _in_memory(tensor: Tensor) -> Tensor:
    """``tensor``, of which every page is read: so what it takes is part of what is in use from now on.

    Not a copy: where a tensor begins decides how kernels round, and a model that is loaded whole lies as the file does.
    """
    if tensor.device.type == "cpu":
        tensor.reshape(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()
    return tensor


def _beginnings(paths: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{path}." for path in paths)


def load_streamed(
    folder: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, variant: str = ""
) -> ModelMixin:
    """The model in ``folder``, in eval mode, that reads each of its blocks from there when it is called.

    It stays where it is and as it is laid out: ``to`` changes nothing. ``variant`` is that of the files, such as fp16.
    Raises ModelFormatError for weights that are missing or damaged, UnsupportedModelError for a class that is not
    known.
    """
    folder = Path(folder)
    config = json_object(folder / "config.json")
    tell_weights(folder, variant)
    with quiet():
        model = empty_model(config, dtype)
    weights = _Weights(folder, variant, model, torch.device(device), dtype)
    units = tuple(outer_units(model))
    in_turns = _beginnings(unit.path for unit in units)
    kept = _beginnings(f"{unit.path}.{path}" for unit in units for path in unit.keeps)  # others read them
    resident = {
        name: _in_memory(weights.read(name))
        for name in model.state_dict()
        if name.startswith(kept) or not name.startswith(in_turns)
    }
    nn.Module.load_state_dict(model, resident, strict=False, assign=True)
    for name, buffer in model.named_buffers():
        if buffer.device != torch.device(device) and buffer.device.type != "meta":
            owner, _, own = name.rpartition(".")
            model.get_submodule(owner)._buffers[own] = buffer.to(device)
    place = _OneAtATime(weights)
    for unit in units:
        module = model.get_submodule(unit.path)
        module.forward = _bringing(place, unit.path, module, _beginnings(unit.keeps))
    model.requires_grad_(False)
    model.to = lambda *_where, **_how: model
    _STREAMED[model] = weights
    streamed: ModelMixin = model
    return streamed


def bytes_beside(source: ModelSource, dtype: torch.dtype) -> int:
    """Bytes in ``dtype`` of what a pipeline has beside its model, such as text encoders and VAE, read from headers."""
    if source.folder is None or not source.is_pipeline:
        return 0
    parts = pipeline_parts(json_object(source.folder / "model_index.json"))
    total = 0
    for part, value in parts.items():
        if part == source.component or stem_of(*value) is None:
            continue
        folder = source.folder / part
        headers = read_headers(weight_files(folder, variant_of_part(folder, source.asked_variant)))
        total += sum(math.prod(shape) for _, shape in headers.values())
    return total * dtype.itemsize
