"""The verb that makes training data: data. The model draws them, or pictures of one's own are encoded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from prune_lab.api.settings import settings_of
from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.output import show
from prune_lab.config import RunConfig
from prune_lab.errors import ConfigError, RunError


@app.command("data", short_help="Make training data once, into a folder to train from.")
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
            help="Pictures with captions: reference, a folder, .parquet, .tar or .zip (also as a glob), or a hub id.",
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
    from prune_lab.api.data import data_table

    table = data_table(settings, out, force=force, pictures=pictures)
    if table is not None:
        show(table, as_json=as_json, wide=wide)


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


@app.command(
    "cache", hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def _renamed() -> None:
    """The name of `data` until version 0.1."""
    raise RunError(
        "asked for the verb cache; it is called data now: prune-lab data MODEL --data DIR --out DIR"
    )
