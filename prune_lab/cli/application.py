"""The typer application, and how mistakes end a command."""

from __future__ import annotations

import contextlib
import errno
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from prune_lab.cli.options import instead_of
from prune_lab.errors import PruneLabError, RunError
from prune_lab.exit_codes import INTERRUPTED, MISTAKE, TERMINATED, exit_codes_text
from prune_lab.processes import end_processes, is_main, num_processes
from prune_lab.runtime import printable
from prune_lab.version import __version__

LAUNCHED = ("data", "distill")  # verbs that many processes share; any other would be done as often
GOES_ON = (
    *("run", "data", "steps", "distill-steps", "personalise", "narrow"),
)  # verbs that keep what is finished in a folder of theirs
WITH_PLAN = ("distill", "profile", "prune")  # verbs whose plan is an option
# What the system says of a path that a person gave; of a disk that is full or broken it says other things.
_OF_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR)
_GIVEN = "prune_lab.given"  # where all words of the command line are kept
_PLAN = re.compile(r"-[A-Z][A-Za-z]*\d*(\.|\s|$)")  # how a plan begins that takes a block out
_PATIENCE = 3.0  # seconds in which a signal that comes again does not disturb the way out


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[list[float]]:
    """SIGTERM ends the block as SIGINT does; when it came is in the list.

    So cluster schedulers and containers, which send it, leave neither half-written files nor a lock.
    """
    came: list[float] = []

    def end(number: int, frame: object) -> None:
        came.append(time.monotonic())
        # a launcher and its process group send it twice, and the second one would stop the cleaning up
        if len(came) == 1 or came[-1] - came[0] > _PATIENCE:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield came  # signals are the main thread's
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def _plan_among(words: Sequence[str], verb: str, option: str) -> str:
    """What to write where a plan among ``words`` was read as the ``option`` that it begins as; empty for no plan."""
    plan = next((word for word in words if word.startswith(option) and _PLAN.match(word)), "")
    if not plan:
        return ""
    shown = printable(plan, 60)
    if verb in WITH_PLAN:
        return f'asked prune-lab {verb} for the plan "{shown}" without its option; write --plan "{shown}"'
    return f'asked prune-lab {verb} for the plan "{shown}", which it takes none of; prune-lab {verb} --help says what'


def _mistake_of(error: Exception, verb: str, words: Sequence[str] = ()) -> str:
    """What is said of an ``error`` that a user's mistake in calling ``verb`` led to; empty for a bug of ours.

    The classes of errors in a command line have no public names.
    """
    option = getattr(error, "option_name", "")
    if option and (plan := _plan_among(words, verb, option)):
        return plan
    if option and (instead := instead_of(verb, option)):
        return f"prune-lab {verb} has no option {option}; write {instead}"
    if isinstance(error, OSError) and error.errno in _OF_NAMES:
        return (
            f"asked for {printable(str(error.filename))}: {error.strerror}; check its name and who may use it"
        )
    said = getattr(error, "format_message", None)
    command = f"prune-lab {verb}" if verb else "prune-lab"
    return f"{str(said()).rstrip('.')}; {command} --help lists what there is" if said else ""


def _what_is_kept(command: Any, verb: str, words: Sequence[str]) -> str:
    """What is said of a ``verb`` that was stopped: whether the same command, in ``words``, goes on where it was."""
    folders = (Path(word) / "config.toml" for word in words)
    in_a_run = any(word.partition("=")[0] == "--run" for word in words)
    with contextlib.suppress(OSError, ValueError):  # a plan may be no path
        # A search in a finished run leaves that as it is, and is done in a folder that is gone afterwards.
        in_a_run = in_a_run or (verb != "search" and any(folder.is_file() for folder in folders))
    keeps = verb == "evaluate" and any(word.partition("=")[0] == "--prompts" for word in words)
    if in_a_run or keeps or verb in GOES_ON:
        return "finished files are kept: the same command again uses what there is"
    options = {option for one in getattr(command, "params", ()) for option in one.opts}
    return "the same command again starts anew" + (
        "; with --run DIR it goes on" if "--run" in options else ""
    )


class Verbs(TyperGroup):
    """The group of verbs; turns a user's mistake into one line on stderr, and leaves bugs their traceback."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The same as of any group, with mistakes before the verb in one line."""
        ctx.meta[_GIVEN] = tuple(args)
        if not args:
            return super().parse_args(ctx, args)  # shows the help
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if not (mistake := _mistake_of(error, "")):
                raise
        typer.echo(f"error: {' '.join(mistake.split())}", err=True)
        raise typer.Exit(MISTAKE)

    def invoke(self, ctx: Any) -> Any:  # typer's Context is a vendored click class without a public name
        try:
            with _ended_by_sigterm() as ended:
                found = super().invoke(ctx)
            if num_processes() > 1:
                end_processes()
            return found
        except PruneLabError as error:
            mistake = str(error)
        except KeyboardInterrupt:
            if is_main():
                verb = ctx.invoked_subcommand or ""
                kept = _what_is_kept(self.get_command(ctx, verb), verb, ctx.meta[_GIVEN])
                typer.echo(f"{'terminated' if ended else 'interrupted'}; {kept}", err=True)
            raise typer.Exit(TERMINATED if ended else INTERRUPTED) from None
        except Exception as error:
            mistake = _mistake_of(error, ctx.invoked_subcommand or "", ctx.meta[_GIVEN])
            if not mistake:
                raise
        typer.echo(f"error: {' '.join(mistake.split())}", err=True)
        raise typer.Exit(MISTAKE)


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help is faster, and a usage error stays readable in a log
    help="Score, prune, profile, retrain and rank the blocks of a diffusion model, after BK-SDM (arXiv:2305.15798).",
    epilog=exit_codes_text(),
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
    try:
        Path.cwd()
    except FileNotFoundError:  # torch cannot even be imported there
        raise RunError(
            "asked to work in the current directory, which was removed; go to one that is there"
        ) from None
    if num_processes() > 1 and ctx.invoked_subcommand not in LAUNCHED:
        raise RunError(
            f"asked to {ctx.invoked_subcommand} in {num_processes()} processes; only {' and '.join(LAUNCHED)} share "
            "their work: run this verb without accelerate launch"
        )
