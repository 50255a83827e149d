"""The verb that puts plans, models and runs side by side: compare."""

from __future__ import annotations

from typing import Annotated

import typer

from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.output import show


@app.command()
def compare(
    targets: Annotated[
        list[str],
        typer.Argument(metavar="TARGET", help="Plans, candidate folders, model folders or run folders."),
    ],
    model: Annotated[
        str, typer.Option("--model", help="What plans apply to and changes refer to.")
    ] = "reference",
    as_json: options.JsonOption = False,
    wide: options.WideOption = False,
) -> None:
    """Put plans, candidates, models and runs side by side: costs, changes, and quality where it was measured.

    A run folder and then plans: the plans for the run's model, with their impact on its probe and a map of each.
    A plan that starts with a dash needs "--" before it: prune-lab compare -- "-Dn1.R2 -Dn1.A2".
    """
    import prune_lab as pl
    from prune_lab.workflow import block_maps

    table = pl.compare(*targets, model=model)
    show(table, as_json=as_json, wide=wide)
    if isinstance(table, pl.Plans) and not as_json:
        maps = block_maps(table[0].architecture, [one.plan for one in table])
        typer.echo("\n".join(("", *maps)))
