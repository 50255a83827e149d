"""The verb that puts plans, models and runs side by side: compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.output import emit, records
from prune_lab.runs import Run, open_run


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
    from prune_lab.workflow import Session, compared_plans, comparison

    first, *plans = targets
    run = Run(Path(first))
    if plans and run.config.is_file() and not any(Path(text).is_dir() for text in plans):
        frame, maps = compared_plans(Session(open_run(run.folder, must_exist=True)), plans)
        emit("plans compared", records(frame), as_json=as_json, wide=wide, title=f"Plans compared, {first}")
        if not as_json:
            typer.echo("\n".join(("", *maps)))
        return
    rows = records(comparison(model, targets))
    emit("comparison", rows, as_json=as_json, wide=wide, title=f"Compared with {model}")
