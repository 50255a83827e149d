"""The verb that makes whole stages narrower: narrow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_lab.api.settings import settings_of
from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.output import left_beside, show


@app.command(short_help="Write a U-Net with fewer channels in whole stages.")
def narrow(
    model: options.ModelArgument,
    channels: Annotated[
        str,
        typer.Option(
            "--channels",
            help="Channels of each stage, as the config lists them: 256,512,1024,1024.",
        ),
    ] = "",
    macs: Annotated[
        str,
        typer.Option("--macs", help="Find the channels within this budget, step by step: 70%, 0.7x, 150G."),
    ] = "",
    params: Annotated[str, typer.Option("--params", help="The same for parameters.")] = "",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write; state of a distillation lies in OUT.run beside it."),
    ] = None,
    by: Annotated[
        str, typer.Option("--by", help="What is kept: taylor (looks at the probe), magnitude, or random.")
    ] = "taylor",
    steps: Annotated[
        int, typer.Option("--steps", help="Steps of distillation from MODEL; 0: it is cut and not trained.")
    ] = 0,
    batch: Annotated[int | None, options.for_setting("distill.batch")] = None,
    learning_rate: Annotated[float | None, options.for_setting("distill.learning_rate")] = None,
    data: options.DataOption = None,
    revision: options.RevisionOption = "",
    subfolder: options.SubfolderOption = "",
    variant: options.VariantOption = "",
    config: options.ConfigOption = None,
    assign: options.SetOption = [],  # noqa: B006 - typer makes a new list for every call
    device: options.DeviceOption = None,
    seed: options.SeedOption = None,
    force: options.ForceOption = False,
    as_json: options.JsonOption = False,
    wide: options.WideOption = False,
) -> None:
    """Write MODEL, a U-Net, with fewer channels in whole stages: a plain config that any program loads.

    Without --channels or a budget the table shows what each stage can become. Widths inside of blocks, which stay
    closer to MODEL, are those of search --axes depth,width.
    """
    from prune_lab.api.model import Model

    found_by = options.found_by(revision, subfolder, variant)
    asked = {
        "data.source": data,
        "distill.batch": batch,
        "distill.learning_rate": learning_rate,
        **({"distill.steps": steps} if steps else {}),
        **found_by,
    }
    folder = out.resolve() if out and out.name in ("", "..") else out
    run = folder.with_name(f"{folder.name}.run") if folder and steps else None
    settings = settings_of(model, run, config, assign, asked, device=device, seed=seed)
    chosen = Model(settings, run)
    table = (
        chosen.narrow(channels, out, macs=macs, params=params, by=by, steps=steps, force=force)
        if channels or macs or params or out
        else chosen.levels()
    )
    show(table, as_json=as_json, wide=wide)
    if run is not None:
        typer.echo(left_beside(run), err=True)
