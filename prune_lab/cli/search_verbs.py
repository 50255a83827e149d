"""Verbs that measure blocks and find plans: score and search.

Without a run folder they work in a temporary one, and only their table stays.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from prune_lab.cli.application import (
    ConfigOption,
    DeviceOption,
    ForceOption,
    JsonOption,
    OptionalModel,
    RunOption,
    SeedOption,
    app,
)
from prune_lab.cli.output import emit, records
from prune_lab.cli.run_context import model_or_run, run_opened, settings_of
from prune_lab.errors import ConfigError, RunError
from prune_lab.runs import open_run


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
    model, run = model_or_run(model, run)
    settings = settings_of(
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
    with run_opened(settings, run, redo="scores" if force else "") as opened:
        from prune_lab.runtime import write_frame
        from prune_lab.workflow import Session, compared_criteria, ensure_scores, scores_frame

        session = Session(opened)
        if compare:
            lines, frame = compared_criteria(session, out or opened.comparison_dir)
            for line in lines:
                typer.echo(line, err=True)
        else:
            ensure_scores(session)
            frame = scores_frame(session)
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
        typer.Option(
            help='"macs<=66%", "params<=bk-small", or several with commas between; may be repeated.'
        ),
    ] = [],  # noqa: B006
    macs: Annotated[str, typer.Option(help="Most multiply-adds: 65%, 0.65x, 150G or as:bk-small.")] = "",
    params: Annotated[str, typer.Option(help="Most parameters, as with --macs.")] = "",
    latency: Annotated[str, typer.Option(help="Most latency: 0.7x, 35ms or as:bk-small; is measured.")] = "",
    memory: Annotated[str, typer.Option(help="Most memory of weights and activations: 70%, 2GiB.")] = "",
    solver: Annotated[str | None, typer.Option(help="exact, interactions, greedy or evolution.")] = None,
    plans: Annotated[int | None, typer.Option("--plans", "--count", help="Plans per budget.", min=1)] = None,
    diverse: Annotated[
        int | None, typer.Option(help="Blocks in which any two plans of a budget differ at least.", min=1)
    ] = None,
    native_only: Annotated[
        bool | None,
        typer.Option("--native-only/--any", help="Plans that plain diffusers can build, or any."),
    ] = None,
    keep: Annotated[list[str], typer.Option(help="Block or stage that stays; may be repeated.")] = [],  # noqa: B006
    remove: Annotated[list[str], typer.Option(help="Block or stage that goes; may be repeated.")] = [],  # noqa: B006
    quota: Annotated[
        list[str], typer.Option(help='"Dn1<=2": at most two blocks of Dn1 go; "Dn1=2": two; may be repeated.')
    ] = [],  # noqa: B006
    longest_run: Annotated[
        int | None, typer.Option(help="Most blocks in a row that go together.", min=1)
    ] = None,
    control: Annotated[
        list[str],
        typer.Option(help="Plan, or uniform, random-median, lowest-one-shot, similarity; may be repeated."),
    ] = [],  # noqa: B006
    importance: Annotated[
        Path | None, typer.Option(help="importance.csv to search with, instead of scoring.")
    ] = None,
    device: DeviceOption = None,
    seed: SeedOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the plans that lose least under each budget; the BK-SDM plans come along as controls.

    --macs, --params, --latency and --memory hold at once. For MODEL the folder of a run may stand: its scores are
    searched with, and it stays as it is.
    """
    asked = {"macs": macs, "params": params, "latency": latency, "memory": memory}
    together = ", ".join(f"{metric}<={limit}" for metric, limit in asked.items() if limit)
    model, lender = model_or_run(model, None)
    settings = settings_of(
        model,
        lender or run,
        config,
        device=device,
        seed=seed,
        search={
            "budgets": (*budget, *([together] if together else [])),
            "solver": solver,
            "count": plans,
            "diverse": diverse,
            "native_only": native_only,
            "keep": tuple(keep),
            "remove": tuple(remove),
            "quotas": tuple(quota),
            "longest_run": longest_run,
            "controls": tuple(control),
        },
    )
    from prune_lab.workflow import check_budgets

    check_budgets(settings)  # before anything is removed
    with run_opened(settings, run, redo="plans" if force else "") as opened:
        from prune_lab.runtime import write_json
        from prune_lab.workflow import Session, borrow, ensure_plans, plans_frame

        if lender and seed is None:  # another seed is another probe
            borrow(open_run(lender, must_exist=True), opened)
        if importance and not opened.done(opened.importance):
            if not importance.is_file():
                raise RunError(
                    f"asked to search with {importance}, found no such file; write one with: prune-lab score"
                )
            shutil.copyfile(importance, opened.importance)
        session = Session(opened)
        found = ensure_plans(session)
        frame = plans_frame(session)
        if out:
            write_json(out, [plan.to_json() for plan in found])
    emit(records(frame), as_json=as_json, title=f"Plans for {settings.model}")
