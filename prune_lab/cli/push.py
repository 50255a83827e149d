"""The verb that puts a student onto the model hub: push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.output import emit
from prune_lab.schemas import PUSHED_COLUMNS


@app.command(short_help="Put a student onto the Hugging Face hub.")
def push(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A student, as prune or distill wrote it.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="OWNER/NAME", help="The repository on the hub.")],
    public: Annotated[
        bool, typer.Option("--public", help="Everyone may see it; without this the repository is private.")
    ] = False,
    revision: Annotated[
        str, typer.Option("--revision", help="Branch to write to; made where it is not there.")
    ] = "",
    message: Annotated[str, typer.Option("--message", help="What the commit says.")] = "",
    dry_run: options.DryRunOption = False,
    as_json: options.JsonOption = False,
    wide: options.WideOption = False,
) -> None:
    """Put the student in FOLDER onto the Hugging Face hub, into a private repository; --dry-run lists the files."""
    from prune_lab.export import check_repository, push_folder, uploads_of

    check_repository(to, revision)
    rows = [
        dict(zip(PUSHED_COLUMNS, (upload.name, upload.num_bytes), strict=True))
        for upload in uploads_of(folder)
    ]
    seen = "public" if public else "private"
    title = f"Would go to {to} ({seen})"
    if not dry_run:
        where = push_folder(folder, to, public=public, revision=revision or None, message=message)
        typer.echo(f"commit: {where}", err=True)
        title = f"Went to {to} ({seen})"
    emit("pushed", rows, as_json=as_json, wide=wide, title=title)
