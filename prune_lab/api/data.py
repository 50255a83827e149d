"""Training data as a table: drawn by the model, or encoded from pictures."""

from __future__ import annotations

import contextlib
from pathlib import Path

import diffusers
import pandas as pd

from prune_lab.config import RunConfig
from prune_lab.distill import (
    CACHE_INDEX,
    PREVIEW,
    CacheBuild,
    build_cache,
    check_cache_folder,
    check_draws_from_text,
    draw_cache,
    is_cache,
    left_out_text,
    preview,
    source_of,
)
from prune_lab.errors import DataError, RunError
from prune_lab.families import embedding_width, known_conditions
from prune_lab.models import configured_model, load_pipeline
from prune_lab.models.protection import check_apart, check_folder, sources_of
from prune_lab.models.silence import quiet
from prune_lab.probes import draw_at
from prune_lab.processes import init_processes, is_main
from prune_lab.prompts import read_prompts
from prune_lab.runtime import pick_device, pick_dtype, progress_shown, read_json
from prune_lab.tables import Table


def _check_pictures(source: str) -> None:
    if is_cache(Path(source).expanduser()):
        raise DataError(
            f"asked to encode {source}, a finished cache; give it as data.source of a run as it is"
        )


def _build(settings: RunConfig, out: Path, *, force: bool, pictures: int) -> CacheBuild | None:
    """The finished cache; None in all processes but the main one."""
    init_processes()  # first: it gives each process its GPU
    model = configured_model(settings)
    if not model.is_pipeline:
        raise RunError(
            f"asked for training data of {settings.model!r}, a {model.kind} without text encoder and VAE; "
            "give 'reference', a pipeline folder or a hub id"
        )
    out = check_apart(out, {**sources_of(settings), "the model": model.places})
    check_cache_folder(out, force=force)
    if pictures:
        check_folder(out / PREVIEW, {}, force=True)
    source = prompts = None
    if settings.data.source:
        told = known_conditions(model.config)
        captioned = embedding_width(model.config) > 0 or any(one.classes for one in told)
        source = source_of(settings.data, captioned=captioned)
    else:
        parts = model.folder / "model_index.json" if model.folder is not None else None
        if parts is not None and parts.is_file():  # else it is seen once the model is loaded
            index = read_json(parts)
            assert isinstance(index, dict)
            with quiet():
                pipeline_class = getattr(diffusers, index["_class_name"])
            check_draws_from_text(pipeline_class)
        prompts = read_prompts(settings.data.prompts)
    pipeline = load_pipeline(model, device=pick_device(settings.device), dtype=pick_dtype(settings.dtype))
    draw_at(pipeline, settings.data.resolution)
    with progress_shown() if is_main() else contextlib.nullcontext():
        if source is not None:
            built = build_cache(pipeline, source, settings.data, out, force=force)
        else:
            assert prompts is not None
            built = draw_cache(pipeline, prompts, settings.data, out, force=force)
        if is_main() and pictures:
            preview(pipeline, built.cache, pictures)
    return built if is_main() else None


def data_table(settings: RunConfig, out: Path, *, force: bool = False, pictures: int = 0) -> Table | None:
    """What is in the folder ``out`` of training data, in one row; None in all processes but the main one.

    The pictures of ``data.source`` are encoded; where it is empty the model draws to ``data.prompts``. The first
    ``pictures`` of them are decoded to PNG. Raises DataError for pictures or prompts that cannot be read, RunError for
    a model that cannot encode or draw, StorageError for a folder that holds the model or the pictures, or lies in one.
    """
    if settings.data.source:
        _check_pictures(settings.data.source)
    found = _build(settings, out, force=force, pictures=pictures)
    if found is None:
        return None
    cache = found.cache
    row = {
        "data": settings.data.source or f"drawn to {settings.data.prompts}",
        "folder": str(out),
        "rows": len(cache),
        "left_out": len(cache.left_out),
        "variants": cache.variants,
        "shards": len(cache.shards),
        "bytes": cache.bytes,
        "encoded": found.encoded,
        "seconds": round(found.seconds, 3),
        "pictures_per_second": round(found.encoded / found.seconds, 3),
    }
    notes = tuple(filter(None, [left_out_text(cache.left_out, cache.folder / CACHE_INDEX)]))
    return Table("data", pd.DataFrame([row]), f"Training data for {settings.model}", notes=notes)
