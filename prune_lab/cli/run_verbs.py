"""Verbs that work on a run folder: distill, evaluate, rank, report, run.

Without ``--run``, evaluate works in a temporary run folder and only its table stays.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_lab.cli.application import (
    MODEL_HELP,
    ConfigOption,
    DeviceOption,
    DryRunOption,
    ForceOption,
    JsonOption,
    RunOption,
    SeedOption,
    app,
)
from prune_lab.cli.opening import ExistingRun, existing, run_opened, settings_of
from prune_lab.cli.output import emit, records
from prune_lab.errors import RunError
from prune_lab.runs import open_run


@app.command()
def distill(
    run: ExistingRun,
    plan: Annotated[
        list[str],
        typer.Option("--plan", help="Only this plan of the run: id, name or text; may be repeated."),
    ] = [],  # noqa: B006
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Retrain the candidates of a run from its teacher, all on the same data and noise; resumes."""
    with existing(run) as opened:
        from prune_lab.workflow import (
            Teacher,
            ensure_distilled,
            ensure_plans,
            forget,
            plan_named,
            recovery_frame,
        )

        teacher = Teacher(opened)
        plans = ensure_plans(opened, teacher)
        ids = [plan_named(plans, text, teacher).id for text in plan]
        if force:
            forget(opened, "distilled", plan_ids=ids or None)
        ensure_distilled(opened, teacher, only=tuple(ids))
        frame = recovery_frame(opened, teacher)
    emit(records(frame), as_json=as_json, title=f"Recovery after {teacher.config.distill.steps} steps")


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help=MODEL_HELP)] = [],  # noqa: B006
    run: RunOption = None,
    config: ConfigOption = None,
    base: Annotated[str, typer.Option("--base", help="Pipeline in which U-Net folders draw.")] = "reference",
    prompt: Annotated[
        list[str], typer.Option("--prompt", help="What to draw; may be repeated; default: held-out captions.")
    ] = [],  # noqa: B006
    steps: Annotated[int, typer.Option("--steps", help="Denoising steps.", min=1)] = 25,
    device: DeviceOption = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw and judge: CLIP score and held-out loss of models, or the pictures of a run's teacher and candidates."""
    if bool(models) == bool(run):
        raise RunError(
            "asked to evaluate; give models, or --run DIR for the candidates of a run, and not both"
        )
    if run:
        with existing(run) as opened:
            from prune_lab.workflow import quality_frame

            frame = quality_frame(opened)
        emit(records(frame), as_json=as_json, title=f"Pictures of {run}")
        return
    rows = []
    for text in models:
        from prune_lab.models import load_unet, resolve_model

        source = resolve_model(text)
        pictures = {"prompts": tuple(prompt), "steps": steps, "seeds": () if seed is None else (seed,)}
        settings = settings_of(
            text if source.is_pipeline else base, None, config, device=device, seed=seed, evaluate=pictures
        )
        with run_opened(settings, None) as opened:
            from prune_lab.workflow import Teacher, quality

            teacher = Teacher(opened)
            # the device first: loading is what can fail
            unet = teacher.unet if source.is_pipeline else load_unet(source, device=teacher.device)
            rows.append({"model": text, "pictures": len(teacher.prompts), **quality(teacher, unet)})
    emit(rows, as_json=as_json, title="Quality")


@app.command()
def rank(run: ExistingRun, force: ForceOption = False, as_json: JsonOption = False) -> None:
    """Order the candidates of a run by quality at their cost, with who was left out and why."""
    with existing(run) as opened:
        from prune_lab.workflow import ensure_ranking, forget

        if force:
            forget(opened, "ranking")
        frame = ensure_ranking(opened).frame()
    emit(records(frame), as_json=as_json, title=f"Ranking of {run}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Run folder.")]) -> None:
    """Write report/index.html of a run from the tables and pictures that are there."""
    from prune_lab.report import write_report

    typer.echo(write_report(open_run(folder, must_exist=True)))


@app.command()
def run(
    config: Annotated[Path, typer.Option("--config", help="TOML with the settings of the job.")],
    folder: Annotated[Path, typer.Option("--run", help="Run folder; the same command again resumes.")],
    device: DeviceOption = None,
    seed: SeedOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Redo the steps that changed settings touch; all when none did.")
    ] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Do the whole job: score, search, prune, profile, distill, rank, report."""
    settings = settings_of("", None, config, device=device, seed=seed)
    if dry_run:
        from prune_lab.workflow import steps_frame

        frame = steps_frame(settings, folder)
    else:
        from prune_lab.runtime import progress_shown
        from prune_lab.workflow import run_all

        with progress_shown():
            frame = run_all(settings, folder, force=force).frame()
    emit(records(frame), as_json=as_json, title=f"{'Steps' if dry_run else 'Ranking'} of {folder}")
    if not dry_run:
        typer.echo(f"report: {open_run(folder, must_exist=True).report}", err=True)
