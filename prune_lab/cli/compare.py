"""The verb that puts plans, models and runs side by side: compare."""

from __future__ import annotations

from typing import Annotated

import typer

from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.output import show


# A plan may begin with a dash: what is no option is a target.
@app.command(
    context_settings={"ignore_unknown_options": True},
    short_help="Put plans, candidates, models or runs side by side.",
)
def compare(
    targets: Annotated[
        list[str],
        typer.Argument(metavar="TARGET", help="Plans, candidate folders, model folders or run folders."),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="What plans apply to and changes refer to; default: the first target where that is a model, or the "
            "teacher of the student or run that stands first; else reference.",
        ),
    ] = "",
    as_json: options.JsonOption = False,
    wide: options.WideOption = False,
) -> None:
    """Put plans, candidates, models and runs side by side: costs, changes, and quality where it was measured.

    A run folder and then plans: the plans for the run's model, with their impact on its probe and a map of each.
    MODEL and then plans: the plans for that model, such as prune-lab compare MODEL bk-base "-Dn1.R2 -Dn1.A2".
    """
    if wrong := next((target for target in targets if target.startswith("--")), ""):
        raise typer.BadParameter(f"No such option: {wrong}")
    import prune_lab as pl
    from prune_lab.workflow import block_maps

    table = pl.compare(*targets, model=model or None)
    show(table, as_json=as_json, wide=wide)
    if isinstance(table, pl.Plans) and not as_json:
        maps = block_maps(table[0].architecture, [one.plan for one in table])
        typer.echo("\n".join(("", *maps)))
