"""The verb that writes the pages of a run: report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_lab.cli.application import app
from prune_lab.runs import open_run


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Run folder.")]) -> None:
    """Write report/index.html of a run from the tables and pictures that are there."""
    from prune_lab.report import write_report

    typer.echo(write_report(open_run(folder, must_exist=True)))
