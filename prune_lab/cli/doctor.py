"""The verb that looks a run over: doctor. It neither locks nor writes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.output import show
from prune_lab.exit_codes import NO


@app.command(short_help="List what is missing or damaged in a run, and what is next.")
def doctor(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    as_json: options.JsonOption = False,
    wide: options.WideOption = False,
) -> None:
    """List what is missing, damaged, stale or left over in a run, and what the next `prune-lab run` would do.

    Exit code 0 when all holds and nothing is left to do, 1 otherwise.
    """
    from prune_lab.api.results import looked_over

    table, well = looked_over(folder)
    show(table, as_json=as_json, wide=wide)
    if not well:
        raise typer.Exit(NO)
