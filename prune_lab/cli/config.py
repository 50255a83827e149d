"""The verb that shows settings: config."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from prune_lab.api.settings import assigned, settings_of
from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.output import emit
from prune_lab.config import SETTINGS, RunConfig, setting_values, to_toml, toml_literal, with_settings

_WIDTH = 120  # of what is not printed on a terminal, which has a width of its own


@app.command(short_help="Print all settings as TOML.")
def config(
    show: Annotated[
        bool, typer.Option("--show", help="Every setting with its default, its meaning, and who reads it.")
    ] = False,
    file: options.ConfigOption = None,
    run: options.RunOption = None,
    assign: options.SetOption = [],  # noqa: B006
    as_json: options.JsonOption = False,
    wide: options.WideOption = False,
) -> None:
    """Print all settings as TOML, ready to be changed and given as --config; with --show, what each of them means.

    With --config, --run or --set they have the values that a job would have.
    """
    asked = bool(file or run or assign)
    if file or run:
        settings = settings_of("", run, file, assign, {})
    else:
        settings = with_settings(RunConfig(), assigned(assign, {}))
    if show and not as_json and not wide and not sys.stdout.isatty():
        typer.echo("\n".join(_lines(_rows(settings, asked, as_json))))
    elif show or as_json:
        emit("settings", _rows(settings, asked, as_json), as_json=as_json, wide=wide, title="Settings")
    else:
        typer.echo(to_toml(settings), nl=False)


def _lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The settings for a file or a pager: a line for each and its meaning below, at most 120 characters wide."""
    for row in rows:
        value = f"{row['value']}, default " if "value" in row else ""
        yield f"{row['setting']} = {value}{row['default']}  (read by {row['read_by']})"
        yield from textwrap.wrap(
            row["meaning"], _WIDTH, initial_indent="    ", subsequent_indent="    ", break_long_words=False
        )


def _rows(settings: RunConfig, asked: bool, as_json: bool) -> list[dict[str, Any]]:
    """One row per setting, the value beside the default where values were ``asked`` for; as in TOML for a person."""

    def written(value: object) -> object:
        return value if as_json else toml_literal(value)

    values = setting_values(settings)
    return [
        {
            "setting": name,
            **({"value": written(values[name])} if asked else {}),
            "default": written(setting.default),
            "read_by": setting.read_by,
            "meaning": setting.meaning,
            "choices": list(setting.choices),
            "may_change": setting.free,
        }
        for name, setting in SETTINGS.items()
    ]
