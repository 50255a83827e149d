"""Rebuild or measure the shipped transformer: ``python -m recipes.transformer_model train|evaluate|study``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from prune_lab.cli.application import Verbs
from prune_lab.cli.options import DeviceOption
from prune_lab.errors import RunError
from prune_lab.processes import num_processes

app = typer.Typer(
    cls=Verbs,  # a user's mistake ends in one line on stderr and exit code 2, as in prune-lab itself
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Rebuild or measure the transformer that ships inside prune_lab.",
)


@app.callback()
def _before_any_verb() -> None:
    if num_processes() > 1:  # each of them would do all of it, into the same files
        raise RunError(
            f"asked to work on the transformer in {num_processes()} processes, which cannot share it; "
            "run this without accelerate launch"
        )


@app.command()
def train(
    work: Annotated[Path, typer.Option("--work", help="Folder for checkpoints and curves; resumable.")],
    config: Annotated[
        Path | None, typer.Option("--config", help="TOML with the settings; default: the committed ones.")
    ] = None,
    device: DeviceOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to write the finished model; default: WORK/assets.")
    ] = None,
) -> None:
    """Rebuild the transformer from the pictures, VAE and text encoder that ship; the same command again resumes."""
    from prune_lab.models.silence import quiet
    from prune_lab.runtime import pick_device, progress_shown

    with quiet():  # importing them logs advice about torchvision, which is not used here
        from recipes.transformer_model.build import train_shipped_transformer

    chosen = str(pick_device(device or "auto"))

    def say(line: str) -> None:
        if not sys.stderr.isatty():  # a terminal has the progress bar
            typer.echo(line, err=True)

    with progress_shown():
        train_shipped_transformer(work, config=config, device=chosen, out=out, say=say)


@app.command()
def evaluate(
    out: Annotated[Path, typer.Option("--out", help="Folder of the report.")],
    assets: Annotated[
        Path | None, typer.Option("--assets", help="What `train` wrote; default: what ships.")
    ] = None,
) -> None:
    """Measure the transformer on the held-out pictures and write the report: tables, figures, README.md."""
    from prune_lab.models.silence import quiet
    from prune_lab.runtime import progress_shown

    with quiet():
        from recipes.transformer_model.evaluate import evaluate_transformer

    with progress_shown():
        evaluate_transformer(out, assets=assets)
    typer.echo(out / "README.md")


@app.command()
def study(
    work: Annotated[Path, typer.Option("--work", help="Folder of the run; resumable.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the report.")],
    config: Annotated[
        Path | None, typer.Option("--config", help="TOML with the settings; default: the committed ones.")
    ] = None,
) -> None:
    """Score, prune, distil and rank what ships, with controls, and write the report: tables, figures, README.md."""
    from prune_lab.models.silence import quiet
    from prune_lab.runtime import progress_shown

    with quiet():
        from recipes.transformer_model.study import study_transformer

    with progress_shown():
        study_transformer(out, work, config=config)
    typer.echo(out / "README.md")


if __name__ == "__main__":
    app(prog_name="python -m recipes.transformer_model")
