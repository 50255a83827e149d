"""Loading a model or a whole pipeline: safetensors only, no code but the libraries' own, one copy in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers import ModelMixin
from torch import nn

from prune_lab.errors import ModelFormatError, UnsupportedModelError
from prune_lab.families import CLASS_NAME, as_loaded, family_of, plain_config
from prune_lab.models.answers import complaint_of_parts, model_complaint, refuse_silent
from prune_lab.models.components import reason_of
from prune_lab.models.conversion import refuse_flawed
from prune_lab.models.files import json_object
from prune_lab.models.folders import variant_of_part
from prune_lab.models.parts import kind_of, part_class, pipeline_class, pipeline_parts, stem_of
from prune_lab.models.schedulers import check_scheduler
from prune_lab.models.silence import quiet
from prune_lab.models.sources import ModelSource
from prune_lab.models.views import STEMS, component_view, pipeline_view
from prune_lab.models.written import tell_weights

if TYPE_CHECKING:  # importing it logs advice about torchvision, which is not used here; see `quiet`
    from diffusers import DiffusionPipeline

_SAFE = {"use_safetensors": True, "local_files_only": True}
_SOUND: set[tuple[object, ...]] = set()  # files as they were when what they hold was found in order


def _state(folders: Iterable[Path]) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of change of each file right in ``folders``."""
    paths = sorted(path for folder in folders for path in folder.iterdir() if path.is_file())
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)


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


def load_model(
    source: ModelSource,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    random_weights: bool = False,
    seed: int = 0,
    trusted: bool = False,
) -> ModelMixin:
    """The model of ``source`` in eval mode; tensor by tensor, so that memory holds it once.

    ``random_weights`` initialises it at ``seed`` instead of reading weights, the only way for structure-only sources; a
    source that was asked for with random weights brings its own seed. Raises UnsupportedModelError when there are no
    weights to read, and, unless it is ``trusted``, ModelFormatError when they hold what is no number, give the same
    answer to every input, or are those that prune-lab wrote in other places.
    """
    model_class: Any = family_of(source.config).model_class()
    if source.random_seed is not None:
        random_weights, seed = True, source.random_seed
    if random_weights:
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(seed)
            model = as_loaded(model_class.from_config(plain_config(source.config)), dtype)
        return model.to(device)
    if source.model_folder is None:
        raise UnsupportedModelError(
            f"asked for the weights of {source.text!r}, which is structure only (kind: {source.kind}); "
            "give the folder of a pipeline or of a model, a hub id, or ask for random weights (--random-weights)"
        )
    state = (_state([source.model_folder]), source.variant, dtype)
    unseen = not trusted and state not in _SOUND
    if unseen:
        tell_weights(source.model_folder, source.variant)
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", FutureWarning)  # what diffusers says of its own parts
        view = stack.enter_context(component_view(source.model_folder, STEMS["diffusers"], source.variant))
        model = model_class.from_pretrained(view, dtype=dtype, low_cpu_mem_usage=True, **_SAFE)
    if view != source.model_folder:  # a view is gone by now
        model.register_to_config(_name_or_path=str(source.model_folder))
    model = model.to(device).eval()
    if unseen:
        named = f"the {source.called} of {source.text}"
        refuse_flawed(model.state_dict().items(), named, dtype)
        refuse_silent(model_complaint(model), named)
        _SOUND.add(state)
    return model


def _loaded_part(folder: Path, found: Any, dtype: torch.dtype, named: str) -> Any:
    """The part in ``folder`` of the class ``found``; ModelFormatError, with what is ``named``, where that fails."""
    settings: dict[str, Any] = {"local_files_only": True}
    if issubclass(found, nn.Module):
        word = "dtype" if kind_of(found) == "transformers model" else "torch_dtype"
        settings |= {word: dtype, "use_safetensors": True, "low_cpu_mem_usage": True}
    try:
        return found.from_pretrained(folder, **settings)
    except MemoryError:
        raise
    except Exception as error:  # whatever the libraries raise about files that make no sense
        raise ModelFormatError(
            f"asked for {named}, which cannot be loaded as a {found.__name__}: {reason_of(error)}; "
            "fetch the model again"
        ) from None


def _assembled(found: Any, index: Mapping[str, Any], made: dict[str, Any], named: str) -> Any:
    """The pipeline of the class ``found`` from what was ``made``, with the settings in its ``index``."""
    components, settings = found._get_signature_keys(found)
    chosen = {
        name: index[name] for name in settings if name in index and name not in found._optional_components
    }
    given = dict.fromkeys(components) | {name: part for name, part in made.items() if name in components}
    if (
        "safety_checker" in given
        and given["safety_checker"] is None
        and "requires_safety_checker" in settings
    ):
        chosen["requires_safety_checker"] = False
    try:
        return found(**chosen, **given)
    except Exception as error:
        raise ModelFormatError(
            f"asked for {named}, of whose parts no {found.__name__} can be made: {reason_of(error)}; "
            "fetch its model_index.json again"
        ) from None


def load_pipeline(
    source: ModelSource,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    model: ModelMixin | None = None,
) -> DiffusionPipeline:
    """The pipeline of ``source``, of the class that it was saved from, without its safety checker and progress bar.

    ``model`` takes the place of the model on disk, which is then not read. Raises UnsupportedModelError when ``source``
    is a model alone, ModelFormatError, which names the part, when one cannot be loaded, holds what is no number, or
    gives the same answer to every input.
    """
    if source.folder is None or not source.is_pipeline:
        raise UnsupportedModelError(
            f"asked for a whole pipeline, but {source.text!r} is a {source.called} alone (kind: {source.kind}) "
            "without what draws with it, such as a scheduler; give reference, a pipeline folder or a hub id"
        )
    index = json_object(source.folder / "model_index.json")
    found = pipeline_class(index[CLASS_NAME])
    assert found is not None
    parts = {part: value for part, value in pipeline_parts(index).items() if part != source.component}
    stems = {part: stem_of(*value) for part, value in parts.items()}
    variants = {part: variant_of_part(source.folder / part, source.asked_variant) for part in stems}
    components, _ = found._get_signature_keys(found)
    classes = (index[CLASS_NAME], *(tuple(value) for value in parts.values()))
    state = (_state([source.folder / part for part in parts]), classes, source.asked_variant, dtype)
    model = load_model(source, device=device, dtype=dtype) if model is None else model
    made: dict[str, Any] = {source.component: model}
    with quiet(), pipeline_view(source.folder, stems, variants) as view:
        for part in (part for part in parts if part in components):
            named = f"the {part} of {source.text}"
            found_part = part_class(*parts[part])
            if kind_of(found_part) == "scheduler" and state not in _SOUND:
                check_scheduler(view / part, found_part, named, found)
            loaded = _loaded_part(view / part, found_part, dtype, named)
            if isinstance(loaded, nn.Module) and state not in _SOUND:
                refuse_flawed(loaded.state_dict().items(), named, dtype)
            made[part] = loaded
        pipeline = _assembled(found, index, made, source.text).to(device)
    if state not in _SOUND:
        refuse_silent(complaint_of_parts(pipeline), source.text)
        _SOUND.add(state)
    pipeline.register_to_config(_name_or_path=str(source.folder))
    pipeline.set_progress_bar_config(disable=True)
    return cast("DiffusionPipeline", pipeline)
