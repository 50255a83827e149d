"""The verb that does the whole job: run. Without a TOML its settings follow from model and device, or from a recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prune_lab.api.settings import budgets_asked, job_settings
from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.output import emit, records
from prune_lab.config import (
    RunConfig,
    changed_settings,
    recipe_about,
    recipe_names,
    setting_values,
    toml_literal,
)
from prune_lab.errors import DeviceError, RunError
from prune_lab.runs import check_free, open_run

if TYPE_CHECKING:
    from prune_lab.workflow import RunEstimate


@app.command(short_help="Do the whole job, from scores to the report.")
def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=options.MODEL_HELP)] = "",
    config: Annotated[
        Path | None, typer.Option("--config", help="TOML with the settings of the job.")
    ] = None,
    recipe: Annotated[
        str, typer.Option("--recipe", help="Ready settings, such as sd15-24gb; list: all.")
    ] = "",
    folder: Annotated[
        Path | None, typer.Option("--run", help="Run folder; the same command again resumes.")
    ] = None,
    macs: options.MacsLimit = [],  # noqa: B006
    params: options.ParamsLimit = [],  # noqa: B006
    latency: options.LatencyLimit = [],  # noqa: B006
    memory: options.MemoryLimit = [],  # noqa: B006
    plans: Annotated[int | None, options.for_setting("search.count", "--plans")] = None,
    data: options.DataOption = None,
    revision: options.RevisionOption = "",
    subfolder: options.SubfolderOption = "",
    variant: options.VariantOption = "",
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
    """Do the whole job: score, search, prune, profile, distill, rank, report.

    `prune-lab run MODEL --latency 0.7x --run runs/mine` needs no TOML: settings that suit model and device are shown
    with an estimate and written to config.toml. With --dry-run they are shown only.
    """
    if recipe == "list":
        found = [{"recipe": name, "about": recipe_about(name)} for name in recipe_names()]
        emit("recipes", found, as_json=as_json, wide=wide, title="Recipes")
        return
    if folder is None and not dry_run:
        raise RunError("asked for a run without saying where to; give --run DIR, or --dry-run to see it only")
    asked = {
        "search.budgets": budgets_asked(
            **options.limits(macs=macs, params=params, latency=latency, memory=memory)
        ),
        "search.count": plans,
        "data.source": data,
        **options.found_by(revision, subfolder, variant),
    }
    place = {"device": device, "seed": seed}
    settings = job_settings(model, folder, config, recipe, assign, asked, place)
    shown = folder or Path("runs/new")
    from prune_lab.models.protection import check_run_folder

    check_run_folder(shown, settings, **{"the settings": [config] if config else []})
    from prune_lab.workflow import check_effect

    check_effect(settings, open_run(shown, must_exist=False))
    if not dry_run:
        check_free(open_run(shown, must_exist=False))
    lines, expected = _estimated(settings, only_shown=dry_run)
    for line in lines if config is None or dry_run else lines[-1:]:  # a TOML has its settings in it
        typer.echo(line, err=True)
    if dry_run:
        from prune_lab.models import configured_model
        from prune_lab.workflow import steps_frame, why_left_out

        kind, rows = "steps", records(steps_frame(settings, shown))
        rows = [{**row, "estimate_seconds": _seconds(row, expected)} for row in rows]
        if why := why_left_out(configured_model(settings)):
            typer.echo(why, err=True)
    else:
        from prune_lab.runtime import progress_shown
        from prune_lab.workflow import run_all, steps_frame

        with progress_shown():
            ranking = run_all(settings, shown, force=force)
        if ranking is not None:
            kind, rows = "ranking", records(ranking.frame())
        else:  # of a model alone
            kind, rows = "steps", records(steps_frame(settings, shown))
    emit(kind, rows, as_json=as_json, wide=wide, title=f"{kind.capitalize()} of {shown}")
    if not dry_run:
        typer.echo(f"report: {open_run(shown, must_exist=True).report}", err=True)


def _estimated(settings: RunConfig, *, only_shown: bool) -> tuple[list[str], RunEstimate]:
    """What differs from the defaults, a line each, and what the run is expected to take."""
    from prune_lab.models import configured_model
    from prune_lab.profiling import drawn_latent
    from prune_lab.runtime import free_bytes, pick_device, pick_dtype
    from prune_lab.session import origin_of
    from prune_lab.workflow import check_budgets, check_drawing, estimate, macs_per_second

    check_budgets(settings)
    source, dtype = configured_model(settings), pick_dtype(settings.dtype)
    latent = drawn_latent(source, settings.data.resolution)
    try:
        device = pick_device(settings.device)
        speed, free = macs_per_second(source.architecture, device, dtype, latent), free_bytes(device)
    except DeviceError:
        if not only_shown:
            raise
        speed, free = None, sys.maxsize  # a recipe may be looked at where its card is not
    origin = origin_of(settings, source)
    check_drawing(settings, source, origin)
    how = {"dtype": dtype, "speed": speed, "free": free, "latent": latent}
    found = estimate(settings, source.architecture, origin, **how)  # type: ignore[arg-type]
    values = setting_values(settings)
    lines = [f"{name} = {toml_literal(values[name])}" for name in changed_settings(RunConfig(), settings)]
    return [*lines, found.line], found


def _seconds(row: dict[str, Any], found: RunEstimate) -> float | None:
    """The seconds that the step of ``row`` is expected to take; None where it is done, not asked for or very short."""
    seconds = found.seconds.get(row["step"])
    return (
        round(seconds, 1) if seconds and row["state"] not in ("done", "not asked for", "left out") else None
    )
