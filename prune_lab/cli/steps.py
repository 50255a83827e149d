"""The verb that compares few steps: steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.models import model_of
from prune_lab.cli.output import emit, show
from prune_lab.errors import ConfigError


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"asked for {option} {text}; give whole numbers, such as {option} 4,8") from None


@app.command(short_help="Time and quality of pictures in few steps.")
def steps(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="The teacher first, then students. " + options.MODEL_HELP),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the table, a figure, a page and pictures.")],
    counts: Annotated[str, typer.Option("--steps", help="Numbers of steps.")] = "4,8,12,25",
    schedulers: Annotated[
        str, typer.Option("--schedulers", help="Of own, dpmsolver++, ddim, unipc, euler, pndm, lcm.")
    ] = "own,dpmsolver++,unipc",
    reuse: Annotated[
        str, typer.Option("--reuse", help="One whole pass in so many, beside none: 2,3 (as DeepCache).")
    ] = "",
    latency: Annotated[
        str, typer.Option("--latency", help="Which lever meets it best: 200ms, or 0.5x of the first model's.")
    ] = "",
    many: Annotated[int, typer.Option("--many", help="Steps that few steps are compared with.")] = 50,
    prompts: Annotated[
        str,
        typer.Option(
            "--prompts", help="File of prompts; default: held-out captions, or the list that ships."
        ),
    ] = "",
    images: Annotated[int, typer.Option("--images", help="Pictures of each configuration.")] = 24,
    guidance: Annotated[float, typer.Option("--guidance", help="Classifier-free guidance scale.")] = 7.5,
    rounds: Annotated[
        int, typer.Option("--rounds", help="Rounds of timing, one picture of each in turns.")
    ] = 6,
    scorer: Annotated[str, typer.Option("--scorer", help="CLIP folder or hub id; none: no CLIP score.")] = "",
    device: options.DeviceOption = None,
    dtype: options.DtypeOption = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the noise.")] = 0,
    dry_run: options.DryRunOption = False,
    as_json: options.JsonOption = False,
    wide: options.WideOption = False,
) -> None:
    """Time and quality of pictures in few steps: MODELs, schedulers and reuse; shows what is not beaten in both.

    The same command again goes on. --json has all configurations. How much there is to draw is said first; --dry-run
    says it and about how long each takes, with the models loaded.
    """
    given: dict[str, Any] = {
        "steps": _numbers(counts, "--steps"),
        "schedulers": tuple(filter(None, map(str.strip, schedulers.split(",")))),
        "reuse": _numbers(reuse, "--reuse"),
        "many": many,
        "prompts": prompts,
        "images": images,
        "guidance": guidance,
        "rounds": rounds,
        "scorer": scorer,
        "seed": seed,
    }
    first, *others = (model_of(text, {}, device=device, dtype=dtype) for text in models)
    table = first.few_steps(*others, out=out, latency=latency, dry_run=dry_run, **given)
    if dry_run:
        show(table, as_json=as_json, wide=wide)
        return
    rows = table.records()
    best = rows if as_json else sorted((row for row in rows if row["best"]), key=lambda row: row["median_ms"])
    title = f"Few steps: {len(best)} of {len(rows)} configurations are not beaten in both time and quality"
    emit("few steps", best, as_json=as_json, wide=wide, title=title)
    for line in table.notes:
        typer.echo(f"note: {line}", err=True)
