"""Verbs that work on a run folder: distill, evaluate, rank, report, run.

Without ``--run``, evaluate works in a temporary run folder and only its table stays.
"""

from __future__ import annotations

import dataclasses
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
    OptionalModel,
    RunOption,
    SeedOption,
    app,
)
from prune_lab.cli.output import emit, records
from prune_lab.cli.run_context import existing, model_or_run, run_opened, settings_of
from prune_lab.errors import RunError
from prune_lab.processes import is_main, join, main_process_first
from prune_lab.runs import open_run


@app.command()
def distill(
    model: OptionalModel = "",
    run: RunOption = None,
    plan: Annotated[
        list[str],
        typer.Option("--plan", help="What is distilled; of a run: id, name or text; may be repeated."),
    ] = [],  # noqa: B006
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Pictures with captions: a folder, .parquet, .tar, hub id, or a cache; default: shipped.",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the distillation.", min=1)] = None,
    batch: Annotated[int | None, typer.Option(help="Samples per step, over all processes.", min=1)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of AdamW, after the warm-up.")] = None,
    loss_variant: Annotated[
        str | None,
        typer.Option(help="raw (paper), normalised, outlier-masked, self-attention or inverse-sensitivity."),
    ] = None,
    together: Annotated[
        int | None, typer.Option(help="Students per teacher pass; default: what fits into memory.", min=1)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Pipeline folder to write the student to; of several, a folder for each."),
    ] = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    seed: SeedOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Retrain pruned students from MODEL, all on one teacher pass per batch; the same command again resumes.

    For MODEL the folder of a run may stand: its candidates are distilled. Else --plan says what is cut and distilled,
    and state, curves and tables lie in --run, or in OUT.run beside the student. With `accelerate launch` all processes
    share each batch, and one of them writes.
    """
    model, run = model_or_run(model, run)
    folder = run or (out.with_name(f"{out.name}.run") if out else None)
    if folder is None:
        raise RunError(
            f"asked to distil students of {model or 'no model'} without saying where to; give --out DIR or --run DIR"
        )
    fresh = bool(model) and not config and not open_run(folder, must_exist=False).config.is_file()
    if fresh and not plan:
        raise RunError(
            f"asked to distil students of {model}, found no plan; give --plan, such as --plan bk-small"
        )
    settings = settings_of(
        model,
        folder,
        config,
        device=device,
        seed=seed,
        data={"source": data},
        distill={
            "steps": steps,
            "batch": batch,
            "learning_rate": learning_rate,
            "loss_variant": loss_variant,
            "together": together,
        },
    )
    if fresh:
        asked = dataclasses.replace(settings.search, budgets=(), controls=tuple(plan))
        settings = dataclasses.replace(settings, search=asked)
    join()
    with run_opened(settings, folder, force=force) as opened:
        from prune_lab.workflow import (
            Session,
            ensure_distilled,
            ensure_plans,
            forget,
            plan_named,
            recovery_frame,
            save_students,
        )

        session = Session(opened)
        with main_process_first():
            plans = ensure_plans(session)
            ids = tuple(plan_named(plans, text, session).id for text in plan)
            if force and is_main():
                forget(opened, "distilled", plan_ids=ids or None)
        ensure_distilled(session, only=ids)
        if not is_main():
            return
        frame = recovery_frame(session)
        if out:
            written = save_students(session, out, only=ids, force=force)
            for path in written:
                typer.echo(f"student: {path}", err=True)
    emit(records(frame), as_json=as_json, title=f"Recovery after {session.config.distill.steps} steps")


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
            from prune_lab.workflow import Session, quality_frame

            frame = quality_frame(Session(opened))
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
            from prune_lab.workflow import Session, quality

            session = Session(opened)
            # the device first: loading is what can fail
            unet = session.unet if source.is_pipeline else load_unet(source, device=session.device)
            rows.append({"model": text, "pictures": len(session.prompts), **quality(session, unet)})
    emit(rows, as_json=as_json, title="Quality")


@app.command()
def rank(
    model: Annotated[str, typer.Argument(metavar="RUN", help="Run folder.")] = "",
    run: RunOption = None,
    budget_steps: Annotated[
        int | None, typer.Option(help="Steps that the survivors get; the rest is dropped on the way.", min=1)
    ] = None,
    eta: Annotated[
        int | None, typer.Option(help="At each rung the best 1/eta go on; 0: everyone gets all steps.", min=0)
    ] = None,
    first: Annotated[int | None, typer.Option(help="Steps of the first rung.", min=1)] = None,
    engine: Annotated[str | None, typer.Option(help="local, or ray for a cluster.")] = None,
    address: Annotated[str | None, typer.Option(help="Of the Ray cluster; default: start one here.")] = None,
    storage: Annotated[
        str | None, typer.Option(help="Folder or fsspec URL that all machines of the cluster see.")
    ] = None,
    device: DeviceOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Order the candidates of a run by quality at their cost, with who was dropped or left out and why.

    With --budget-steps or --eta they are distilled first, by successive halving over short distillation: paired
    differences in held-out loss decide, who ties goes on, and a survivor goes on from its state.
    """
    _, folder = model_or_run(model, run)
    if folder is None:
        raise RunError(f"asked to rank {model or 'nothing'}, found no run folder there; give RUN")
    settings = settings_of(
        "",
        open_run(folder, must_exist=True).folder,
        None,
        device=device,
        seed=None,
        distill={"steps": budget_steps},
        rank={"eta": eta, "first": first},
        engine={"kind": engine, "address": address, "storage": storage},
    )
    with run_opened(settings, folder, force=force) as opened:
        from prune_lab.workflow import Session, ensure_distilled, ensure_ranking, forget

        session = Session(opened)
        if force:
            forget(opened, "ranking")
        if budget_steps or eta:
            ensure_distilled(session)
        frame = ensure_ranking(session).frame()
    emit(records(frame), as_json=as_json, title=f"Ranking of {folder}")


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
