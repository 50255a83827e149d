"""The verb that teaches a student to draw in a few steps: distill-steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_lab.api.settings import settings_of
from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.models import model_of
from prune_lab.cli.output import show


@app.command("distill-steps", short_help="Teach a student to draw in about four steps.")
def distill_steps(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="What learns: " + options.MODEL_HELP)],
    out: Annotated[
        Path, typer.Option("--out", help="Pipeline folder to write; state lies in OUT.run beside it.")
    ],
    teacher: Annotated[
        str, typer.Option("--teacher", help="Pipeline that it learns from; default: STUDENT as it is.")
    ] = "",
    steps: Annotated[int | None, typer.Option("--steps", help="Steps of training; default: 300.")] = None,
    batch: Annotated[int | None, options.for_setting("distill.batch")] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="After the warm-up; default: 1e-4.")
    ] = None,
    guidance: Annotated[
        float, typer.Option("--guidance", help="Guidance of the teacher, which is baked in; 1: none.")
    ] = 7.5,
    grid: Annotated[int, typer.Option("--grid", help="Steps in which the teacher draws.")] = 50,
    data: options.DataOption = None,
    config: options.ConfigOption = None,
    assign: options.SetOption = [],  # noqa: B006 - typer makes a new list for every call
    device: options.DeviceOption = None,
    seed: options.SeedOption = None,
    force: options.ForceOption = False,
    as_json: options.JsonOption = False,
    wide: options.WideOption = False,
) -> None:
    """Teach STUDENT to draw in about four steps without guidance, by consistency distillation (arXiv:2310.04378).

    OUT draws in plain diffusers with 4 steps and guidance_scale=1.0. The same command again resumes.
    """
    given = {"steps": steps, "batch": batch, "learning_rate": learning_rate}
    asked = {name: value for name, value in given.items() if value is not None}
    settings = settings_of(
        teacher or student, None, config, assign, {"data.source": data}, device=device, seed=seed
    )
    from prune_lab.api.model import Model

    folder = out.resolve() if out.name in ("", "..") else out
    learner = model_of(student, {})
    model = Model(settings, folder.with_name(f"{folder.name}.run"))
    table = model.distill_steps(learner, out, guidance=guidance, grid=grid, force=force, **asked)
    show(table, as_json=as_json, wide=wide)
