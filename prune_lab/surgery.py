"""Taking blocks out of a U-Net: bypassed for a trial, or gone for good in a smaller model.

Deleting entries of diffusers' module lists is a trap: an up stage zips its residual with its attention blocks and pops
one skip connection for each, so a missing entry silently drops its neighbour. Bypass modules keep that bookkeeping. A
bypassed residual block hands on the main path (the first channels of its input: an up stage concatenates
``[main, skip]``), a bypassed attention block or sampler hands on its input.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prune_lab.blocks import Architecture, Block, architecture_of
from prune_lab.errors import ModelFormatError, UnsupportedModelError
from prune_lab.families import meta_unet
from prune_lab.models import ModelSource, model_digest, weight_files
from prune_lab.plans import NativeLayout, PruningPlan, native_layout, plan_of, removed_samplers
from prune_lab.runtime import Environment, atomic_folder, read_json, write_json

# Bypassing ---------------------------------------------------------------------------------------------------------


class MainPath(nn.Module):
    """In place of a residual block: the main path, which is the first ``channels`` channels of its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, hidden: Tensor, *_: object, **__: object) -> Tensor:
        """(B, channels, H, W) of (B, channels + skip, H, W)."""
        # Contiguous, as the smaller model's own tensors are: kernels may round differently on a strided view.
        main: Tensor = hidden[:, : self.channels]
        return main.contiguous()


class PassThrough(nn.Module):
    """In place of an attention block or a sampler: its input, in the form that the caller expects."""

    def forward(self, hidden: Tensor, *_: object, return_dict: bool | None = None, **__: object) -> Any:
        """``hidden`` itself; in a tuple or an output object where an attention block would return one."""
        if return_dict is None:
            return hidden
        return Transformer2DModelOutput(sample=hidden) if return_dict else (hidden,)


class ChannelInterpolation(nn.Module):
    """In place of a block that changes the width: its main path, resized linearly along the channels.

    Only for scoring: BK-SDM marks blocks scored this way with a star. Of an up stage's input the skip is discarded.
    """

    def __init__(self, main_channels: int, out_channels: int) -> None:
        super().__init__()
        self.main_channels = main_channels
        self.out_channels = out_channels

    def forward(self, hidden: Tensor, *_: object, **__: object) -> Tensor:
        """(B, out_channels, H, W) of (B, main_channels + skip, H, W)."""
        main = hidden[:, : self.main_channels]
        pixels = main.flatten(2).transpose(1, 2)  # (B, H W, main_channels)
        resized: Tensor = F.interpolate(pixels, size=self.out_channels, mode="linear", align_corners=False)
        return resized.transpose(1, 2).reshape(hidden.shape[0], self.out_channels, *hidden.shape[2:])


@contextlib.contextmanager
def bypassed(
    unet: UNet2DConditionModel, removed: PruningPlan | Iterable[str], *, stand_in: bool = False
) -> Iterator[UNet2DConditionModel]:
    """The same ``unet`` without the blocks of ``removed``; the originals return on exit, whatever happens inside.

    Samplers around an innermost stage that is removed whole are bypassed too, as ``native_layout`` drops them.
    With ``stand_in`` blocks that change the width are replaced by a channel interpolation; without it they raise
    UnremovableBlockError. Unknown names raise UnknownBlockError, a plan for another U-Net PlanError.
    """
    architecture = architecture_of(unet)
    names = removed.removed if isinstance(removed, PruningPlan) else tuple(removed)
    blocks = [architecture.block(name) for name in names]
    plan = plan_of(architecture, (block.name for block in blocks if block.removable or not stand_in))
    samplers = removed_samplers(architecture, plan)
    stand_ins: dict[str, nn.Module] = {block.path: stand_in_for(block) for block in blocks}
    stand_ins |= {
        sampler.path: PassThrough() for sampler in architecture.samplers if sampler.name in samplers
    }
    originals = {path: unet.get_submodule(path) for path in stand_ins}
    try:
        for path, module in stand_ins.items():
            unet.set_submodule(path, module)
        yield unet
    finally:
        for path, module in originals.items():
            unet.set_submodule(path, module)


def stand_in_for(block: Block) -> nn.Module:
    """What takes the place of ``block`` while it is bypassed; for a starred one its channel interpolation."""
    if block.kind == "attention":
        return PassThrough()
    if block.removable:
        return MainPath(block.out_channels)
    return ChannelInterpolation(block.in_channels - block.skip_channels, block.out_channels)


# Materialising -----------------------------------------------------------------------------------------------------


def materialise(
    unet: UNet2DConditionModel, plan: PruningPlan, *, hand_over: bool = False
) -> UNet2DConditionModel:
    """The smaller plain diffusers U-Net that ``plan`` leaves, with the surviving weights of ``unet``.

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
) -> UNet2DConditionModel:
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


def save_unet(
    unet: UNet2DConditionModel, folder: Path, plan: PruningPlan, provenance: Mapping[str, object]
) -> None:
    """Write ``unet`` as a folder that plain ``UNet2DConditionModel.from_pretrained`` loads.

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


def _assembled(layout: NativeLayout, take: Callable[[str], Tensor]) -> UNet2DConditionModel:
    """The student of ``layout`` with every tensor from ``take(key in the original)``."""
    student = meta_unet(dict(layout.config))
    tensors = {}
    for key, wanted in student.state_dict().items():
        tensor = take(_source_key(key, layout.sources))
        if tensor.shape != wanted.shape:
            raise ModelFormatError(
                f"tensor {key!r} has shape {tuple(tensor.shape)}, the config describes {tuple(wanted.shape)}; "
                "the weights and config.json do not belong together"
            )
        tensors[key] = tensor
    student.load_state_dict(tensors, strict=True, assign=True)
    return student.eval()


def _source_key(key: str, sources: Mapping[str, str]) -> str:
    """Where the student's tensor ``key`` lies in the original."""
    parts = key.split(".")
    for length in (4, 3):  # down_blocks.0.resnets.0 and mid_block.resnets.0
        path = ".".join(parts[:length])
        if path in sources:
            return ".".join((sources[path], *parts[length:]))
    return key


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
