"""The verb that makes training data: data. The model draws them, or pictures of one's own are encoded."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.output import emit
from prune_lab.cli.run_context import settings_of
from prune_lab.config import RunConfig
from prune_lab.errors import ConfigError, DataError, RunError

if TYPE_CHECKING:
    from prune_lab.distill import CacheBuild


@app.command("data")
def make_data(
    out: Annotated[
        Path, typer.Option("--out", help="Folder of the data; the same command again goes on in it.")
    ],
    model: Annotated[str, typer.Argument(help=options.MODEL_HELP, metavar="MODEL")] = "",
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            help="MODEL draws to these prompts: default, a list that ships, or a .txt, .csv, .tsv, .jsonl or .parquet.",
        ),
    ] = None,
    count: Annotated[int | None, options.for_setting("data.count")] = None,
    steps: Annotated[int | None, options.for_setting("data.steps")] = None,
    guidance: Annotated[float | None, options.for_setting("data.guidance")] = None,
    resolution: Annotated[int | None, options.for_setting("data.resolution")] = None,
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
    image_column: Annotated[str | None, options.for_setting("data.image_column")] = None,
    caption_column: Annotated[str | None, options.for_setting("data.caption_column")] = None,
    batch: Annotated[int | None, options.for_setting("data.batch")] = None,
    pictures: Annotated[
        int, typer.Option("--pictures", help="Decode the first of them to PNG, in OUT/pictures.", min=0)
    ] = 0,
    revision: options.RevisionOption = "",
    subfolder: options.SubfolderOption = "",
    variant: options.VariantOption = "",
    config: options.ConfigOption = None,
    assign: options.SetOption = [],  # noqa: B006 - typer makes a new list for every call
    device: options.DeviceOption = None,
    dtype: options.DtypeOption = None,
    seed: options.SeedOption = None,
    force: options.ForceOption = False,
    as_json: options.JsonOption = False,
    wide: options.WideOption = False,
) -> None:
    """Make training data once, into a folder to train from: drawn by MODEL, or encoded from your own pictures.

    `--prompts default --count 1000` lets MODEL draw with its own sampler; `--data DIR` encodes pictures. Name the
    folder as data.source of a run. With `accelerate launch` all processes build their share.
    """
    drawing: dict[str, object] = {"data.prompts": prompts, "data.count": count, "data.steps": steps}
    drawing |= {"data.guidance": guidance, "data.resolution": resolution}
    encoding: dict[str, object] = {
        "data.source": data,
        "data.limit": limit,
        "data.crop": crop,
        "data.flip": flip,
    }
    encoding |= {"data.image_column": image_column, "data.caption_column": caption_column}
    asked = drawing | encoding | {"data.batch": batch, "dtype": dtype}
    asked |= options.found_by(revision, subfolder, variant)
    settings = settings_of(model, None, config, assign, asked, device=device, seed=seed)
    _check_one_way(settings, drawing, encoding, given=config is not None)
    if settings.data.source:
        _check_pictures(settings.data.source)
    found = _build(settings, out, force=force, pictures=pictures)
    if found is None:
        return
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
    emit("data", [row], as_json=as_json, wide=wide, title=f"Training data for {settings.model}")
    if cache.left_out:
        typer.echo(f"left out {len(cache.left_out):,}; the first: {cache.left_out[0]}", err=True)


def _check_one_way(
    settings: RunConfig, drawing: Mapping[str, object], encoding: Mapping[str, object], *, given: bool
) -> None:
    """Raise ConfigError unless it is clear whether the model draws or pictures are encoded."""
    named = [[name for name, value in group.items() if value is not None] for group in (drawing, encoding)]
    if settings.data.source and named[0]:
        raise ConfigError(
            f"asked for {named[0][0]} and for the pictures {settings.data.source}, which are encoded and not drawn; "
            "give --prompts or --data"
        )
    if settings.data.source or drawing["data.prompts"] is not None:
        if named[1] and not settings.data.source:
            raise ConfigError(f"asked for {named[1][0]} of pictures that the model draws; it is for --data")
        return
    if not given:
        raise ConfigError(
            "asked to make data without saying of what; give --prompts default, and the model draws, or "
            "give --data for pictures of your own"
        )


def _check_pictures(source: str) -> None:
    from prune_lab.distill import is_cache

    if is_cache(Path(source).expanduser()):
        raise DataError(
            f"asked to encode {source}, a finished cache; give it as data.source of a run as it is"
        )


def _build(settings: RunConfig, out: Path, *, force: bool, pictures: int) -> CacheBuild | None:
    """The finished cache; None in all processes but the main one."""
    import diffusers

    from prune_lab.distill import build_cache, check_draws_from_text, draw_cache, preview, source_of
    from prune_lab.models import configured_model, load_pipeline
    from prune_lab.models.silence import quiet
    from prune_lab.processes import init_processes, is_main
    from prune_lab.prompts import read_prompts
    from prune_lab.runtime import pick_device, pick_dtype, progress_shown, read_json

    init_processes()  # first: it gives each process its GPU
    model = configured_model(settings)
    if not model.is_pipeline or model.folder is None:
        raise RunError(
            f"asked for training data of {settings.model!r}, a {model.kind} without text encoder and VAE; "
            "give 'reference', a pipeline folder or a hub id"
        )
    source = prompts = None
    if settings.data.source:
        source = source_of(settings.data)
    else:
        index = read_json(model.folder / "model_index.json")
        assert isinstance(index, dict)
        with quiet():
            pipeline_class = getattr(diffusers, index["_class_name"])
        check_draws_from_text(pipeline_class)
        prompts = read_prompts(settings.data.prompts)
    pipeline = load_pipeline(model, device=pick_device(settings.device), dtype=pick_dtype(settings.dtype))
    with progress_shown() if is_main() else contextlib.nullcontext():
        if source is not None:
            built = build_cache(pipeline, source, settings.data, out, force=force)
        else:
            assert prompts is not None
            built = draw_cache(pipeline, prompts, settings.data, out, force=force)
        if is_main() and pictures:
            preview(pipeline, built.cache, pictures)
    return built if is_main() else None


@app.command(
    "cache", hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def _renamed() -> None:
    """The name of `data` until version 0.1."""
    raise RunError(
        "asked for the verb cache; it is called data now: prune-lab data MODEL --data DIR --out DIR"
    )
