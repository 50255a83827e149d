"""The verb that writes the pages of a run: report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_lab.cli.application import app


@app.command(short_help="Write report/index.html of a run from its tables.")
def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Run folder.")]) -> None:
    """Write report/index.html of a run from the tables and pictures that are there."""
    import prune_lab as pl

    typer.echo(pl.open_run(folder).report())
