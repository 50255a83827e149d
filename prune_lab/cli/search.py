"""The verb that finds plans: search. Without a run folder only its table stays."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from prune_lab.api.settings import budgets_asked, model_or_run, settings_of
from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.output import show
from prune_lab.config import RunConfig
from prune_lab.config.axes import check_axes_fit
from prune_lab.errors import ConfigError


@app.command(short_help="Find the plans that lose least within a budget.")
def search(
    model: options.OptionalModel = "",
    macs: options.MacsLimit = [],  # noqa: B006
    params: options.ParamsLimit = [],  # noqa: B006
    latency: options.LatencyLimit = [],  # noqa: B006
    memory: options.MemoryLimit = [],  # noqa: B006
    plans: Annotated[int | None, options.for_setting("search.count", "--plans")] = None,
    solver: Annotated[str | None, options.for_setting("search.solver")] = None,
    objective: Annotated[str | None, options.for_setting("search.objective", "--objective")] = None,
    axes: Annotated[str | None, options.for_setting("search.axes", "--axes")] = None,
    widths: Annotated[str | None, options.for_setting("search.widths", "--widths")] = None,
    round_to: Annotated[int | None, options.for_setting("search.round_to", "--round-to")] = None,
    form: Annotated[str | None, options.for_setting("search.form", "--form")] = None,
    data: options.DataOption = None,
    importance: Annotated[
        Path | None, typer.Option(help="importance.csv to search with, instead of scoring.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="JSON file to write the plans to.")] = None,
    revision: options.RevisionOption = "",
    subfolder: options.SubfolderOption = "",
    variant: options.VariantOption = "",
    random_weights: options.RandomWeightsOption = False,
    run: options.RunOption = None,
    config: options.ConfigOption = None,
    assign: options.SetOption = [],  # noqa: B006
    device: options.DeviceOption = None,
    seed: options.SeedOption = None,
    force: options.ForceOption = False,
    as_json: options.JsonOption = False,
    wide: options.WideOption = False,
) -> None:
    """Find the plans that lose least under each budget; the BK-SDM plans come along as controls.

    --macs, --params, --latency and --memory hold at once. --axes depth,width makes blocks narrower, too. For MODEL the
    folder of a run may stand: its scores are searched with, and it stays as it is. Rules are settings: --set
    search.keep=Md --set "search.quotas=Dn1<=2".
    """
    model, lender = model_or_run(model, None)
    asked = {
        "search.budgets": budgets_asked(
            **options.limits(macs=macs, params=params, latency=latency, memory=memory)
        ),
        "search.count": plans,
        "search.form": form,
        "search.axes": tuple(axis.strip() for axis in axes.split(",")) if axes else None,
        "search.widths": widths,
        "search.round_to": round_to,
        "data.source": data,
        "search.solver": solver,
        "search.objective": objective,
    }
    found_by = options.found_by(revision, subfolder, variant, random_weights)
    unused = [flag for flag, value in (("--widths", widths), ("--round-to", round_to)) if value is not None]

    def check_used(settings: RunConfig) -> None:
        if unused and "width" not in settings.search.axes:
            raise ConfigError(
                f"asked for {' and '.join(unused)}, found the axes {', '.join(settings.search.axes)}, where no block "
                "gets narrower; add --axes depth,width, or leave it out"
            )
        check_axes_fit(settings)

    settings = settings_of(
        model,
        lender or run,
        config,
        assign,
        {**asked, **found_by},
        device=device,
        seed=seed,
        check=check_used,
    )
    from prune_lab.api.model import Model
    from prune_lab.models import recorded_model
    from prune_lab.models.protection import check_file, sources_of
    from prune_lab.runtime import write_json

    if lender:
        recorded_model(settings, lender)  # where it is not found, this says from where a run names it
    if out:
        given = {"the scores": [] if importance is None else [importance]}
        out = check_file(out, {**sources_of(settings), **given}, "plans", force=force)

    table = Model(settings, run).search(lender=lender, importance=importance, force=force)
    if out:
        write_json(out, [one.plan.to_json() for one in table])
    show(table, as_json=as_json, wide=wide)
    if out and len(table):
        best = next((place for place, one in enumerate(table, 1) if one.plan.origin == "search"), 1)
        told = shlex.join(["prune-lab", "prune", settings.model, "--plan", f"{out}#{best}", "--out", "DIR"])
        typer.echo(
            f"note: {out} has {len(table)} plans, in this order; to build plan {best}: {told}", err=True
        )
