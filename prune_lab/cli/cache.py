"""The verb that encodes training pictures once: cache."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.output import emit
from prune_lab.cli.run_context import settings_of
from prune_lab.errors import ConfigError, DataError, RunError


@app.command()
def cache(
    out: Annotated[
        Path, typer.Option("--out", help="Folder of the cache; the same command again goes on in it.")
    ],
    model: Annotated[str, typer.Argument(help=options.MODEL_HELP, metavar="MODEL")] = "",
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Pictures with captions: reference, a folder, .parquet or .tar files (also as a glob), or a hub id.",
        ),
    ] = None,
    limit: Annotated[int | None, options.for_setting("data.limit")] = None,
    crop: Annotated[str | None, options.for_setting("data.crop")] = None,
    flip: Annotated[bool | None, options.for_setting("data.flip", "--flip/--no-flip")] = None,
    config: options.ConfigOption = None,
    assign: options.SetOption = [],  # noqa: B006 - typer makes a new list for every call
    device: options.DeviceOption = None,
    seed: options.SeedOption = None,
    force: options.ForceOption = False,
    as_json: options.JsonOption = False,
    wide: options.WideOption = False,
) -> None:
    """Encode pictures and captions with the VAE and text encoder of MODEL, once, into a folder to train from.

    Name the folder as data.source of a run. With `accelerate launch` all processes build their share.
    """
    asked = {"data.source": data, "data.limit": limit, "data.crop": crop, "data.flip": flip}
    settings = settings_of(model, None, config, assign, asked, device=device, seed=seed)
    if not settings.data.source:
        raise ConfigError(
            "asked to build a cache without saying of which pictures; give --data, or data.source in --config"
        )
    from prune_lab.distill import build_cache, is_cache, source_of
    from prune_lab.models import load_pipeline, resolve_model
    from prune_lab.processes import init_processes, is_main
    from prune_lab.runtime import pick_device, pick_dtype, progress_shown

    if is_cache(Path(settings.data.source).expanduser()):
        raise DataError(
            f"asked to cache {settings.data.source}, a finished cache; give it as data.source of a run as it is"
        )
    init_processes()  # first: it gives each process its GPU
    model_source = resolve_model(settings.model)
    if not model_source.is_pipeline:
        raise RunError(
            f"asked to encode pictures with {settings.model!r}, a {model_source.kind} without text encoder and VAE; "
            "give 'reference', a pipeline folder or a hub id"
        )
    source = source_of(settings.data)
    pipeline = load_pipeline(
        model_source, device=pick_device(settings.device), dtype=pick_dtype(settings.dtype)
    )
    with progress_shown() if is_main() else contextlib.nullcontext():
        built = build_cache(pipeline, source, settings.data, out, force=force)
    if not is_main():
        return
    found = built.cache
    row = {
        "data": settings.data.source,
        "folder": str(out),
        "rows": len(found),
        "left_out": len(found.left_out),
        "variants": found.variants,
        "shards": len(found.shards),
        "bytes": found.bytes,
        "encoded": built.encoded,
        "seconds": round(built.seconds, 3),
        "pictures_per_second": round(built.encoded / built.seconds, 1),
    }
    emit("cache", [row], as_json=as_json, wide=wide, title=f"Cache for {settings.model}")
