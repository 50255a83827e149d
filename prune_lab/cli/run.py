"""The verb that does the whole job: run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.output import emit, records
from prune_lab.cli.run_context import settings_of
from prune_lab.runs import open_run


@app.command()
def run(
    config: Annotated[Path, typer.Option("--config", help="TOML with the settings of the job.")],
    folder: Annotated[Path, typer.Option("--run", help="Run folder; the same command again resumes.")],
    assign: options.SetOption = [],  # noqa: B006
    device: options.DeviceOption = None,
    seed: options.SeedOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Redo the steps that changed settings touch; all when none did.")
    ] = False,
    dry_run: options.DryRunOption = False,
    as_json: options.JsonOption = False,
    wide: options.WideOption = False,
) -> None:
    """Do the whole job: score, search, prune, profile, distill, rank, report."""
    settings = settings_of("", None, config, assign, {}, device=device, seed=seed)
    if dry_run:
        from prune_lab.workflow import steps_frame

        kind, frame = "steps", steps_frame(settings, folder)
    else:
        from prune_lab.runtime import progress_shown
        from prune_lab.workflow import run_all

        with progress_shown():
            kind, frame = "ranking", run_all(settings, folder, force=force).frame()
    emit(kind, records(frame), as_json=as_json, wide=wide, title=f"{kind.capitalize()} of {folder}")
    if not dry_run:
        typer.echo(f"report: {open_run(folder, must_exist=True).report}", err=True)
