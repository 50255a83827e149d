"""The typer application, the options that several verbs share, and how mistakes end a command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from prune_lab import __version__
from prune_lab.errors import PruneLabError, RunError
from prune_lab.processes import leave, num_processes

MISTAKE = 2  # exit code of a user's mistake, the same as typer's for a wrong option
LAUNCHED = ("cache", "distill")  # verbs that many processes share; any other would be done as often
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Verbs(TyperGroup):
    """The group of verbs; turns a user's mistake into one line on stderr, and leaves bugs their traceback."""

    def invoke(self, ctx: Any) -> Any:  # typer's Context is a vendored click class without a public name
        try:
            found = super().invoke(ctx)
            if num_processes() > 1:
                leave()
            return found
        except PruneLabError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(MISTAKE) from None
        except KeyboardInterrupt:
            typer.echo(
                "interrupted; finished files are kept, the same command again goes on from there", err=True
            )
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help is faster, and a usage error stays readable in a log
    help="Score, prune, profile, retrain and rank the blocks of a diffusion U-Net, after BK-SDM (arXiv:2305.15798).",
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _before_any_verb(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if num_processes() > 1 and ctx.invoked_subcommand not in LAUNCHED:
        raise RunError(
            f"asked to {ctx.invoked_subcommand} in {num_processes()} processes; only {' and '.join(LAUNCHED)} share "
            "their work: run this verb without accelerate launch"
        )


MODEL_HELP = "reference, a preset (sd-v1.4), a pipeline or U-Net folder, a U-Net config.json, or a hub id."

ModelArgument = Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")]
OptionalModel = Annotated[str, typer.Argument(help=MODEL_HELP + " Or the folder of a run.", metavar="MODEL")]
PlanOption = Annotated[
    list[str],
    typer.Option(
        "--plan", help='Plan: bk-base, "bk-small +Md", "-Dn1.R2 -Dn1.A2" or a plan.json; may be repeated.'
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print a JSON list of objects instead of a table.")]
RunOption = Annotated[Path | None, typer.Option("--run", help="Run folder; made when it is not there.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="TOML with the settings of the job.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Seed of everything that is drawn.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Redo: replace what is there already.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, then stop.")]
