"""Verbs about the reference model that ships inside the package: reference train, reference evaluate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from prune_lab.cli.application import DeviceOption, app

reference = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Rebuild or measure the reference model that ships inside the package.",
)
app.add_typer(reference, name="reference")


@reference.command()
def train(
    work: Annotated[
        Path, typer.Option("--work", help="Folder for downloads, checkpoints and curves; resumable.")
    ],
    config: Annotated[
        Path | None, typer.Option("--config", help="TOML with the settings; default: the shipped ones.")
    ] = None,
    sources: Annotated[
        Path | None, typer.Option("--sources", help="Folder with the unpacked public packages.")
    ] = None,
    device: DeviceOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where to write the finished model.")] = None,
) -> None:
    """Rebuild data, VAE, CLIP pair, text encoder and U-Net from the public packages; the same command again resumes."""
    from prune_lab.reference import train_reference
    from prune_lab.runtime import pick_device, progress_shown

    chosen = str(pick_device(device or "auto"))

    def say(line: str) -> None:
        if not sys.stderr.isatty():  # a terminal has the progress bar
            typer.echo(line, err=True)

    with progress_shown():
        train_reference(work, config=config, sources=sources, device=chosen, out=out, say=say)


@reference.command()
def evaluate(
    out: Annotated[Path, typer.Option("--out", help="Folder of the report.")],
    assets: Annotated[
        Path | None, typer.Option("--assets", help="What `reference train` wrote; default: what ships.")
    ] = None,
) -> None:
    """Measure the reference model on its held-out pictures and write the report: tables, figures, README.md."""
    from prune_lab.reference import evaluate_reference
    from prune_lab.runtime import progress_shown

    with progress_shown():
        evaluate_reference(out, assets=assets, curves=None if assets is None else assets / "curves")
    typer.echo(out / "README.md")
