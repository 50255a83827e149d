"""Taking blocks out of a model: bypassed for a trial, or gone for good in a smaller model.

Deleting entries of diffusers' module lists is a trap: an up stage zips its residual with its attention blocks and pops
one skip connection for each, so a missing entry silently drops its neighbour. Bypass modules keep that bookkeeping:
they hand on those inputs that the family names. A residual block that reads a skip connection gets both in one tensor,
``[main, skip]``, and hands on the main path.
"""

from __future__ import annotations

import contextlib
import inspect
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prune_lab.blocks import Architecture, architecture_of
from prune_lab.errors import ModelFormatError, UnsupportedModelError
from prune_lab.families import Layout, Unit, meta_unet
from prune_lab.models import ModelSource, model_digest, weight_files
from prune_lab.plans import PruningPlan, gone_with, native_layout
from prune_lab.runtime import Environment, atomic_folder, read_json, write_json

# Bypassing ---------------------------------------------------------------------------------------------------------


class Bypass(nn.Module):
    """In place of a unit: its inputs that go on without it, in the form in which ``original`` returns its outputs."""

    def __init__(self, original: nn.Module, unit: Unit) -> None:
        super().__init__()
        self._names = tuple(inspect.signature(type(original).forward).parameters)[1:]  # without self
        self._unit = unit

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The named inputs; of one that carries a skip connection too the main path alone."""
        given = dict(zip(self._names, args, strict=False)) | kwargs
        outputs: tuple[Any, ...] = tuple(
            None if name is None else given[name] for name in self._unit.hands_on
        )
        if self._unit.takes_skip:
            # Contiguous, as the smaller model's own tensors are: kernels may round differently on a strided view.
            outputs = tuple(output[:, : self._unit.main_channels].contiguous() for output in outputs)
        return outputs if self._unit.in_tuple or len(outputs) > 1 else outputs[0]


def stand_in_for(original: nn.Module, unit: Unit) -> nn.Module:
    """What takes the place of the module ``original`` of ``unit`` while it is bypassed."""
    return unit.stand_in() if unit.stand_in else Bypass(original, unit)


@contextlib.contextmanager
def bypassed(
    model: ModelMixin, removed: PruningPlan | Iterable[str], *, stand_in: bool = False
) -> Iterator[ModelMixin]:
    """The same ``model`` without the blocks of ``removed``; the originals return on exit, whatever happens inside.

    Samplers that leave with these blocks are bypassed too, as ``native_layout`` drops them. With ``stand_in`` blocks
    that cannot be removed are replaced by their stand-in; without it they raise UnremovableBlockError. Unknown names
    raise UnknownBlockError, a plan for another model PlanError.
    """
    architecture = architecture_of(model)
    names = removed.removed if isinstance(removed, PruningPlan) else tuple(removed)
    gone = gone_with(architecture, names, stand_in=stand_in)
    units = [unit for unit in architecture.units if unit.name in gone]
    originals: dict[str, nn.Module] = {unit.path: model.get_submodule(unit.path) for unit in units}
    try:
        for unit in units:
            model.set_submodule(unit.path, stand_in_for(originals[unit.path], unit))
        yield model
    finally:
        for path, module in originals.items():
            model.set_submodule(path, module)


# Materialising -----------------------------------------------------------------------------------------------------


def materialise(unet: ModelMixin, plan: PruningPlan, *, hand_over: bool = False) -> ModelMixin:
    """The smaller plain diffusers model that ``plan`` leaves, with the surviving weights of ``unet``.

    It is built without memory (on ``meta``) and given the surviving tensors: copies of them, or with ``hand_over`` the
    tensors themselves, after which ``unet`` must not be used any more. Raises NonNativePlanError when no plain config
    describes it.
    """
    layout = native_layout(architecture_of(unet), plan)
    tensors: dict[str, Tensor] = unet.state_dict()

    def take(key: str) -> Tensor:
        return tensors[key] if hand_over else tensors[key].clone()

    return _assembled(layout, take)


def materialise_from_folder(
    folder: Path, plan: PruningPlan, *, dtype: torch.dtype | None = None
) -> ModelMixin:
    """The smaller U-Net that ``plan`` leaves of the U-Net in ``folder``; only surviving tensors are read.

    ``dtype`` converts each tensor as it is read; ``None`` keeps the files' own. Raises NonNativePlanError, or
    ModelFormatError when the weights do not fit the config.
    """
    folder = Path(folder)
    layout = native_layout(_architecture_in(folder), plan)
    with contextlib.ExitStack() as stack:
        homes: dict[str, Any] = {}  # key -> open file; tensors are read one by one through its memory map
        for path in weight_files(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ModelFormatError(f"asked to read {path}: {error}; fetch the file again") from None
            homes |= dict.fromkeys(file.keys(), file)

        def take(key: str) -> Tensor:
            if key not in homes:
                raise ModelFormatError(
                    f"{folder} has no tensor {key!r} although its config.json describes one; fetch the model again"
                )
            tensor: Tensor = homes[key].get_tensor(key)
            return tensor if dtype is None else tensor.to(dtype)

        return _assembled(layout, take)


def save_unet(unet: ModelMixin, folder: Path, plan: PruningPlan, provenance: Mapping[str, object]) -> None:
    """Write ``unet`` as a folder that plain diffusers (``from_pretrained``) loads.

    ``plan.json`` and ``provenance.json`` lie beside the weights. An earlier folder of the same name is replaced
    only when the new one is complete. Raises StorageError when it cannot be written.
    """
    with atomic_folder(folder, force=True) as temporary:
        unet.save_pretrained(temporary, safe_serialization=True)
        write_json(temporary / "plan.json", plan.to_json())
        write_json(temporary / "provenance.json", dict(provenance))


def prune_pipeline(
    source: ModelSource,
    plan: PruningPlan,
    out: Path,
    *,
    force: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:
    """The folder ``out``: ``source`` with its U-Net pruned by ``plan``, loadable by plain diffusers.

    A pipeline folder gives a whole pipeline folder, a U-Net folder a U-Net folder. Neither the original U-Net nor any
    other component is loaded whole. Raises UnsupportedModelError when ``source`` has no weights, StorageError when
    ``out`` holds something and ``force`` is not given.
    """
    if source.folder is None or not source.has_weights:
        raise UnsupportedModelError(
            f"asked to prune {source.text!r}, which has no weights (kind: {source.kind}); "
            "give a pipeline or U-Net folder"
        )
    unet_folder = source.folder / "unet" if source.is_pipeline else source.folder
    provenance = {
        "source": source.text,
        "source_digest": model_digest(source),
        "plan": plan.text,
        "plan_id": plan.id,
        "environment": Environment.capture().as_dict(),
    }
    with atomic_folder(out, force=force) as temporary:
        if source.is_pipeline:
            _copy_components(source.folder, temporary)
        student = materialise_from_folder(unet_folder, plan, dtype=dtype)
        save_unet(student, temporary / "unet" if source.is_pipeline else temporary, plan, provenance)
    return Path(out)


def pipeline_with(source: ModelSource, unet_folder: Path, out: Path, *, force: bool = False) -> Path:
    """The folder ``out``: the pipeline ``source`` with the U-Net of ``unet_folder``, loadable by plain diffusers.

    From a U-Net without a pipeline the U-Net folder alone. Nothing is loaded, files are copied. Raises StorageError
    when ``out`` holds something and ``force`` is not given.
    """
    with atomic_folder(out, force=force) as temporary:
        if source.is_pipeline and source.folder is not None:
            _copy_components(source.folder, temporary)
            shutil.copytree(unet_folder, temporary / "unet")
        else:
            shutil.copytree(unet_folder, temporary, dirs_exist_ok=True)
    return Path(out)


def _architecture_in(folder: Path) -> Architecture:
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ModelFormatError(f"{folder / 'config.json'} is not a diffusers config; fetch the model again")
    return architecture_of(config)


def _assembled(layout: Layout, take: Callable[[str], Tensor]) -> ModelMixin:
    """The student of ``layout`` with every tensor from ``take(key in the original)``."""
    student = meta_unet(layout.config)
    wanted = student.state_dict()
    sources = layout.sources(wanted)
    tensors = {}
    for key, empty in wanted.items():
        tensor = take(sources[key])
        if tensor.shape != empty.shape:
            raise ModelFormatError(
                f"tensor {key!r} has shape {tuple(tensor.shape)}, the config describes {tuple(empty.shape)}; "
                "the weights and config.json do not belong together"
            )
        tensors[key] = tensor
    student.load_state_dict(tensors, strict=True, assign=True)
    return student.eval()


def _copy_components(pipeline: Path, target: Path) -> None:
    """Copy a pipeline folder without its U-Net: the components of its index, and small text files at the top."""
    index = read_json(pipeline / "model_index.json")
    if not isinstance(index, dict):
        raise ModelFormatError(
            f"{pipeline / 'model_index.json'} is not a pipeline index; fetch the model again"
        )
    for entry in sorted(pipeline.iterdir()):
        if entry.is_dir() and entry.name in index and entry.name != "unet":
            shutil.copytree(entry, target / entry.name)
        elif entry.is_file() and entry.suffix in (".json", ".md", ".txt", ""):
            shutil.copy(entry, target / entry.name)
