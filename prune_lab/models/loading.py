"""Loading a U-Net or a whole pipeline: safetensors only, no code but the libraries' own, one copy in memory."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers import ModelMixin

from prune_lab.errors import UnsupportedModelError
from prune_lab.families import CLASS_NAME, family_of, plain_config
from prune_lab.models.files import json_object
from prune_lab.models.folders import variant_of_part
from prune_lab.models.parts import left_out, pipeline_class, pipeline_parts, stem_of
from prune_lab.models.silence import quiet
from prune_lab.models.sources import ModelSource
from prune_lab.models.views import STEMS, component_view, pipeline_view

if TYPE_CHECKING:  # importing it logs advice about torchvision, which is not used here; see `quiet`
    from diffusers import DiffusionPipeline

_SAFE = {"use_safetensors": True, "local_files_only": True}


@contextlib.contextmanager
def plain_source(source: ModelSource) -> Iterator[ModelSource]:
    """``source`` with the variant that was asked for under the plain names; itself where none was asked for."""
    if source.folder is None or not source.asked_variant:
        yield source
        return
    with contextlib.ExitStack() as stack:
        if source.is_pipeline:
            index = json_object(source.folder / "model_index.json")
            stems = {part: stem_of(*value) for part, value in pipeline_parts(index).items()}
            variants = {part: variant_of_part(source.folder / part, source.asked_variant) for part in stems}
            view = stack.enter_context(pipeline_view(source.folder, stems, variants))
        else:
            view = stack.enter_context(component_view(source.folder, STEMS["diffusers"], source.variant))
        yield dataclasses.replace(source, folder=view, variant="", asked_variant="")


def load_unet(
    source: ModelSource,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    random_weights: bool = False,
    seed: int = 0,
) -> ModelMixin:
    """The U-Net of ``source`` in eval mode; tensor by tensor, so that memory holds it once.

    ``random_weights`` initialises it at ``seed`` instead of reading weights, the only way for structure-only sources; a
    source that was asked for with random weights brings its own seed. Raises UnsupportedModelError when there are no
    weights to read.
    """
    model_class: Any = family_of(source.config).model_class()
    if source.random_seed is not None:
        random_weights, seed = True, source.random_seed
    if random_weights:
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(seed)
            unet = model_class.from_config(plain_config(source.config)).to(device, dtype)
        return unet.eval()
    if source.unet_folder is None:
        raise UnsupportedModelError(
            f"asked for the weights of {source.text!r}, which is structure only (kind: {source.kind}); "
            "give a pipeline or U-Net folder, a hub id, or ask for random weights (--random-weights)"
        )
    with quiet(), component_view(source.unet_folder, STEMS["diffusers"], source.variant) as view:
        unet = model_class.from_pretrained(view, dtype=dtype, low_cpu_mem_usage=True, **_SAFE)
    if view != source.unet_folder:  # a view is gone by now
        unet.register_to_config(_name_or_path=str(source.unet_folder))
    return unet.to(device).eval()


def load_pipeline(
    source: ModelSource,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    unet: ModelMixin | None = None,
) -> DiffusionPipeline:
    """The pipeline of ``source``, of the class that it was saved from, without its safety checker and progress bar.

    ``unet`` takes the place of the U-Net on disk, which is then not read. Raises UnsupportedModelError when ``source``
    is a U-Net alone.
    """
    if source.folder is None or not source.is_pipeline:
        raise UnsupportedModelError(
            f"asked for a whole pipeline, but {source.text!r} is a U-Net alone (kind: {source.kind}) without text "
            "encoder and VAE; give reference, a pipeline folder or a hub id"
        )
    index = json_object(source.folder / "model_index.json")
    given: dict[str, Any] = dict.fromkeys(left_out(index))
    found = pipeline_class(index[CLASS_NAME])
    assert found is not None
    if "safety_checker" in given and "requires_safety_checker" in found._get_signature_keys(found)[1]:
        given["requires_safety_checker"] = False
    stems = {part: stem_of(*value) for part, value in pipeline_parts(index).items() if part != "unet"}
    variants = {part: variant_of_part(source.folder / part, source.asked_variant) for part in stems}
    given["unet"] = load_unet(source, dtype=dtype) if unet is None else unet
    with quiet(), pipeline_view(source.folder, stems, variants) as view:
        pipeline = found.from_pretrained(view, dtype=dtype, **_SAFE, **given)
        pipeline = pipeline.to(device)
    if view != source.folder:
        pipeline.register_to_config(_name_or_path=str(source.folder))
    pipeline.set_progress_bar_config(disable=True)
    return cast("DiffusionPipeline", pipeline)
