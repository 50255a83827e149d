"""Verbs that work on a run folder: score, search, distill, evaluate, rank, report, run.

Without ``--run``, score, search and evaluate work in a temporary run folder and only their table stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from prune_lab.config import RunConfig, load_config
from prune_lab.errors import ConfigError, RunError
from prune_lab.runs import open_run

if TYPE_CHECKING:
    from prune_lab.runs import Run

ExistingRun = Annotated[Path, typer.Option("--run", help="Run folder.")]


def _settings(
    model: str,
    run: Path | None,
    config: Path | None,
    *,
    device: str | None,
    seed: int | None,
    dtype: str | None = None,
    **tables: dict[str, Any],
) -> RunConfig:
    """The settings of ``config``, or else of the run folder, or else the defaults, with the flags that were given."""
    if config:
        settings = load_config(config)
    elif run and open_run(run, must_exist=False).config.is_file():
        settings = load_config(open_run(run, must_exist=True).config)
    elif model:
        settings = RunConfig(model=model)
    else:
        raise RunError(
            "asked for a step without saying of which model; give MODEL, --config FILE.toml or --run DIR"
        )
    given: dict[str, Any] = {"model": model or None, "device": device, "seed": seed, "dtype": dtype}
    if seed is not None:
        for name in ("probe", "distill"):
            tables[name] = {**tables.get(name, {}), "seed": seed}
    for name, values in tables.items():
        chosen = {key: value for key, value in values.items() if value not in (None, ())}
        given[name] = dataclasses.replace(getattr(settings, name), **chosen) if chosen else None
    return dataclasses.replace(settings, **{key: value for key, value in given.items() if value is not None})


@contextlib.contextmanager
def _opened(settings: RunConfig, folder: Path | None, *, redo: str = "") -> Iterator[Run]:
    """The run in ``folder`` with these settings, started when it is new; a temporary one without ``folder``.

    ``redo`` names the step whose files, and those of the later ones, are removed first.
    """
    from prune_lab.runtime import progress_shown
    from prune_lab.workflow import forget, start_run

    with contextlib.ExitStack() as stack:
        stack.enter_context(progress_shown())
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prune-lab-")))
        run = start_run(settings, folder, force=bool(redo))
        if redo:
            forget(run, redo)
        yield run


@contextlib.contextmanager
def _existing(folder: Path) -> Iterator[Run]:
    """The run in ``folder``, which must be there, with progress shown."""
    from prune_lab.runtime import progress_shown

    run = open_run(folder, must_exist=True)
    with progress_shown():
        yield run


@app.command()
def score(
    model: OptionalModel = "",
    run: RunOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="CSV to write; with --compare a folder of tables and figures."),
    ] = None,
    config: ConfigOption = None,
    criterion: Annotated[
        list[str],
        typer.Option(help="What is measured, such as output-mse; may be repeated: the first leads."),
    ] = [],  # noqa: B006
    groups: Annotated[
        list[str],
        typer.Option(help="blocks, pairs, triplets, stages, inner, or a file of plans; may be repeated."),
    ] = [],  # noqa: B006
    samples: Annotated[int | None, typer.Option(help="Samples in the probe.", min=2)] = None,
    timesteps: Annotated[int | None, typer.Option(help="Points of the schedule they lie at.", min=1)] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts (.txt, .csv, .parquet) instead of held-out pictures and captions."),
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Samples at a time, or auto: what fits into memory.")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Guidance scale of the predictions that output criteria compare; 1: none."),
    ] = None,
    precision: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    race: Annotated[
        float | None,
        typer.Option(
            help="Share of the naive cost, such as 0.15: blocks whose place is settled get no more samples."
        ),
    ] = None,
    compile_blocks: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Put the blocks through torch.compile.")
    ] = None,
    channels_last: Annotated[
        bool | None, typer.Option("--channels-last/--contiguous", help="Memory format of the U-Net.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="All criteria, how they agree, and with what was measured.")
    ] = False,
    device: DeviceOption = None,
    seed: SeedOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure what the model loses when each block, pair and stage is removed, with bootstrap intervals."""
    settings = _settings(
        model,
        run,
        config,
        device=device,
        seed=seed,
        dtype=precision,
        score={
            "criterion": criterion[0] if criterion else None,
            "also": tuple(criterion[1:]),
            "groups": tuple(_group_name(name) for name in groups),
            "batch": None if batch is None else _rows(batch),
            "guidance": guidance,
            "race": race,
            "compile": compile_blocks,
            "channels_last": channels_last,
        },
        probe={
            "samples": samples,
            "timesteps": timesteps,
            "prompts": None if prompts is None else str(prompts),
        },
    )
    with _opened(settings, run, redo="scores" if force else "") as opened:
        from prune_lab.runtime import write_frame
        from prune_lab.workflow import compared_criteria, ensure_scores, scores_frame

        if compare:
            lines, frame = compared_criteria(opened, out or opened.comparison_dir)
            for line in lines:
                typer.echo(line, err=True)
        else:
            ensure_scores(opened)
            frame = scores_frame(opened)
            if out:
                write_frame(out, frame)
    emit(
        records(frame),
        as_json=as_json,
        title=f"{'Agreement of criteria' if compare else 'Importance'}, {settings.model}",
    )


def _group_name(name: str) -> str:
    """One of the kinds, also in the plural, or the path of a file as it is."""
    return name if "." in name else name.removesuffix("s")


def _rows(text: str) -> int:
    """Samples at a time; auto is 0."""
    if text == "auto":
        return 0
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--batch is {text!r}; give a whole number of at least 1, or auto")
    return int(text)


@app.command()
def search(
    model: OptionalModel = "",
    run: RunOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="JSON file to write the plans to.")] = None,
    config: ConfigOption = None,
    budget: Annotated[
        list[str],
        typer.Option(help='"macs<=66%", "params<=482346884" or "params<=bk-small"; may be repeated.'),
    ] = [],  # noqa: B006
    count: Annotated[int | None, typer.Option(help="Plans per budget.", min=1)] = None,
    importance: Annotated[
        Path | None, typer.Option(help="importance.csv to search with, instead of scoring.")
    ] = None,
    device: DeviceOption = None,
    seed: SeedOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the plans that lose least under each budget, exactly; the BK-SDM plans come along as controls."""
    settings = _settings(
        model, run, config, device=device, seed=seed, search={"budgets": tuple(budget), "count": count}
    )
    from prune_lab.workflow import check_budgets

    check_budgets(settings)  # before anything is removed
    with _opened(settings, run, redo="plans" if force else "") as opened:
        from prune_lab.runtime import write_json
        from prune_lab.workflow import ensure_plans, plans_frame

        if importance and not opened.done(opened.importance):
            if not importance.is_file():
                raise RunError(
                    f"asked to search with {importance}, found no such file; write one with: prune-lab score"
                )
            shutil.copyfile(importance, opened.importance)
        plans = ensure_plans(opened)
        frame = plans_frame(opened)
        if out:
            write_json(out, [plan.to_json() for plan in plans])
    emit(records(frame), as_json=as_json, title=f"Plans for {settings.model}")


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
    with _existing(run) as opened:
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
        with _existing(run) as opened:
            from prune_lab.workflow import quality_frame

            frame = quality_frame(opened)
        emit(records(frame), as_json=as_json, title=f"Pictures of {run}")
        return
    rows = []
    for text in models:
        from prune_lab.models import load_unet, resolve_model

        source = resolve_model(text)
        pictures = {"prompts": tuple(prompt), "steps": steps, "seeds": () if seed is None else (seed,)}
        settings = _settings(
            text if source.is_pipeline else base, None, config, device=device, seed=seed, evaluate=pictures
        )
        with _opened(settings, None) as opened:
            from prune_lab.workflow import Teacher, quality

            teacher = Teacher(opened)
            # the device first: loading is what can fail
            unet = teacher.unet if source.is_pipeline else load_unet(source, device=teacher.device)
            rows.append({"model": text, "pictures": len(teacher.prompts), **quality(teacher, unet)})
    emit(rows, as_json=as_json, title="Quality")


@app.command()
def rank(run: ExistingRun, force: ForceOption = False, as_json: JsonOption = False) -> None:
    """Order the candidates of a run by quality at their cost, with who was left out and why."""
    with _existing(run) as opened:
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
    settings = _settings("", None, config, device=device, seed=seed)
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
