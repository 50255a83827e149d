"""The verb that finds plans: search. Without a run folder only its table stays."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from prune_lab.cli.application import app
from prune_lab.cli.options import (
    ConfigOption,
    DeviceOption,
    ForceOption,
    JsonOption,
    OptionalModel,
    RunOption,
    SeedOption,
    SetOption,
    WideOption,
    for_setting,
)
from prune_lab.cli.output import emit, records
from prune_lab.cli.run_context import model_or_run, run_opened, settings_of
from prune_lab.config import SETTINGS, RunConfig, changed_settings, load_config
from prune_lab.errors import RunError
from prune_lab.runs import Run, open_run


def _scored_alike(lender: Run, settings: RunConfig) -> bool:
    """Whether the scores of ``lender`` are those that ``settings`` ask for; another seed is another probe."""
    changed = changed_settings(load_config(lender.config), settings)
    return not any(
        SETTINGS[name].read_by in ("blocks", "probe", "scores") for name in changed if name != "device"
    )


@app.command()
def search(
    model: OptionalModel = "",
    macs: Annotated[str, typer.Option(help="Most multiply-adds: 65%, 0.65x, 150G or as:bk-small.")] = "",
    params: Annotated[str, typer.Option(help="Most parameters, as with --macs.")] = "",
    latency: Annotated[str, typer.Option(help="Most latency: 0.7x, 35ms or as:bk-small; is measured.")] = "",
    memory: Annotated[str, typer.Option(help="Most memory of weights and activations: 70%, 2GiB.")] = "",
    plans: Annotated[int | None, for_setting("search.count", "--plans")] = None,
    solver: Annotated[str | None, for_setting("search.solver")] = None,
    importance: Annotated[
        Path | None, typer.Option(help="importance.csv to search with, instead of scoring.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="JSON file to write the plans to.")] = None,
    run: RunOption = None,
    config: ConfigOption = None,
    assign: SetOption = [],  # noqa: B006
    device: DeviceOption = None,
    seed: SeedOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    wide: WideOption = False,
) -> None:
    """Find the plans that lose least under each budget; the BK-SDM plans come along as controls.

    --macs, --params, --latency and --memory hold at once. For MODEL the folder of a run may stand: its scores are
    searched with, and it stays as it is. Rules are settings: --set search.keep=Md --set "search.quotas=Dn1<=2".
    """
    limits = {"macs": macs, "params": params, "latency": latency, "memory": memory}
    together = ", ".join(f"{metric}<={limit}" for metric, limit in limits.items() if limit)
    model, lender = model_or_run(model, None)
    options = {
        "search.budgets": (together,) if together else (),
        "search.count": plans,
        "search.solver": solver,
        "device": device,
        "seed": seed,
    }
    settings = settings_of(model, lender or run, config, assign, options)
    from prune_lab.workflow import check_budgets

    check_budgets(settings)  # before anything is removed
    with run_opened(settings, run, redo="plans" if force else "") as opened:
        from prune_lab.runtime import write_json
        from prune_lab.workflow import Session, borrow, ensure_plans, plans_frame

        if lender and _scored_alike(open_run(lender, must_exist=True), settings):
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
    emit("plans", records(frame), as_json=as_json, wide=wide, title=f"Plans for {settings.model}")
