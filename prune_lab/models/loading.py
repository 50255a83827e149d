"""Loading a U-Net or a whole pipeline: safetensors only, no code but the libraries' own, one copy in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import diffusers
import torch
from diffusers import ModelMixin

from prune_lab.errors import UnsupportedModelError
from prune_lab.families import family_of, plain_config
from prune_lab.models.files import json_object, weight_files
from prune_lab.models.silence import quiet
from prune_lab.models.sources import LEFT_OUT, ModelSource, pipeline_components

if TYPE_CHECKING:  # importing them logs advice about torchvision, which is not used here; see `quiet`
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

_SAFE = {"use_safetensors": True, "local_files_only": True}


def _variant(folder: Path) -> str | None:
    return "fp16" if ".fp16" in weight_files(folder)[0].name else None


def load_unet(
    source: ModelSource,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    random_weights: bool = False,
    seed: int = 0,
) -> ModelMixin:
    """The U-Net of ``source`` in eval mode; tensor by tensor, so that memory holds it once.

    ``random_weights`` initialises it at ``seed`` instead of reading weights, the only way for structure-only sources.
    Raises UnsupportedModelError when there are no weights to read.
    """
    model_class: Any = family_of(source.config).model_class()
    if random_weights:
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(seed)
            unet = model_class.from_config(plain_config(source.config))
        return unet.to(device, dtype).eval()
    if source.unet_folder is None:
        raise UnsupportedModelError(
            f"asked for the weights of {source.text!r}, which is structure only (kind: {source.kind}); "
            "give a pipeline or U-Net folder, a hub id, or ask for random weights"
        )
    with quiet():
        unet = model_class.from_pretrained(
            source.unet_folder,
            dtype=dtype,
            low_cpu_mem_usage=True,
            variant=_variant(source.unet_folder),
            **_SAFE,
        )
    return unet.to(device).eval()


def load_pipeline(
    source: ModelSource,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    unet: ModelMixin | None = None,
) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """The pipeline of ``source`` on ``device``, without its safety checker and with no progress bar of its own.

    ``unet`` takes the place of the U-Net on disk, which is then not read. Raises UnsupportedModelError when ``source``
    is a U-Net alone.
    """
    if source.folder is None or not source.is_pipeline:
        raise UnsupportedModelError(
            f"asked for a whole pipeline, but {source.text!r} is a U-Net alone (kind: {source.kind}) without text "
            "encoder and VAE; give reference, a pipeline folder or a hub id"
        )
    parts = json_object(source.folder / "model_index.json")
    given: dict[str, Any] = {part: None for part in LEFT_OUT if part in parts}
    if "safety_checker" in parts:
        given["requires_safety_checker"] = False
    given["unet"] = load_unet(source, dtype=dtype) if unet is None else unet
    folders = [source.folder / part for part in pipeline_components(parts) if part != "unet"]
    # fp16 when any part that is read exists in that variant only.
    found = [_variant(folder) for folder in folders if (folder / "config.json").is_file()]
    with quiet():
        pipeline = getattr(diffusers, parts["_class_name"]).from_pretrained(
            source.folder, dtype=dtype, variant="fp16" if "fp16" in found else None, **_SAFE, **given
        )
        pipeline = pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    return cast("StableDiffusionPipeline | StableDiffusionXLPipeline", pipeline)
