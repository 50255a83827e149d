"""The command line that all recipes of models have: ``python -m recipes.NAME train|evaluate``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from prune_lab.cli.application import Verbs
from prune_lab.errors import RunError
from prune_lab.processes import num_processes

WorkOption = Annotated[
    Path, typer.Option("--work", help="Folder for downloads, checkpoints and curves; resumable.")
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="TOML with the settings; default: the committed ones.")
]
ModelOption = Annotated[
    Path | None, typer.Option("--out", help="Where to write the finished model; default: WORK/assets.")
]
ReportOption = Annotated[Path, typer.Option("--out", help="Folder of the report.")]
RunOption = Annotated[Path, typer.Option("--work", help="Folder of the run; resumable.")]
AssetsOption = Annotated[
    Path | None, typer.Option("--assets", help="What `train` wrote; default: what ships.")
]


def command_line(model: str) -> typer.Typer:
    """A command line without verbs yet, to rebuild or measure ``model``, which ships."""
    app = typer.Typer(
        cls=Verbs,  # a user's mistake ends in one line on stderr and exit code 2, as in prune-lab itself
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        help=f"Rebuild or measure {model} that ships inside prune_lab.",
    )

    @app.callback()
    def before_any_verb() -> None:
        if num_processes() > 1:  # each of them would do all of it, into the same files
            raise RunError(
                f"asked to work on {model} in {num_processes()} processes, which cannot share it; "
                "run this without accelerate launch"
            )

    return app


@contextmanager
def importing() -> Iterator[None]:
    """For the imports of a verb: they log advice about torchvision, which is not used here."""
    from prune_lab.models.silence import quiet

    with quiet():
        yield


@contextmanager
def training(device: str | None) -> Iterator[tuple[str, Callable[[str], None]]]:
    """With progress shown: the device that ``device`` stands for, and what says a line where there is no bar."""
    from prune_lab.runtime import pick_device, progress_shown

    def say(line: str) -> None:
        if not sys.stderr.isatty():  # a terminal has the progress bar
            typer.echo(line, err=True)

    chosen = str(pick_device(device or "auto"))
    with progress_shown():
        yield chosen, say
