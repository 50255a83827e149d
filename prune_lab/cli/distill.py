"""The verb that retrains students: distill."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_lab.api.settings import model_or_run, settings_of
from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.output import left_beside, show
from prune_lab.errors import RunError
from prune_lab.processes import is_main
from prune_lab.runs import open_run


@app.command(short_help="Retrain pruned students from MODEL.")
def distill(
    model: options.OptionalModel = "",
    plan: Annotated[
        list[str],
        typer.Option(
            "--plan",
            callback=options.plans_checked,
            help="What is distilled; of a run: id, name or text; may be repeated.",
        ),
    ] = [],  # noqa: B006
    data: options.DataOption = None,
    steps: Annotated[int | None, options.for_setting("distill.steps")] = None,
    batch: Annotated[int | None, options.for_setting("distill.batch")] = None,
    learning_rate: Annotated[float | None, options.for_setting("distill.learning_rate")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Pipeline folder to write the student to; of several, a folder for each."),
    ] = None,
    revision: options.RevisionOption = "",
    subfolder: options.SubfolderOption = "",
    variant: options.VariantOption = "",
    run: options.RunOption = None,
    config: options.ConfigOption = None,
    assign: options.SetOption = [],  # noqa: B006
    device: options.DeviceOption = None,
    seed: options.SeedOption = None,
    force: options.ForceOption = False,
    as_json: options.JsonOption = False,
    wide: options.WideOption = False,
) -> None:
    """Retrain pruned students from MODEL, all on one teacher pass per batch; the same command again resumes.

    For MODEL the folder of a run may stand: its candidates are distilled. Else --plan says what is cut and distilled,
    and state, curves and tables lie in --run, or in OUT.run beside the student. With `accelerate launch` all processes
    share each batch, and one of them writes.
    """
    model, run = model_or_run(model, run)
    if out:
        from prune_lab.models.protection import check_apart

        out = check_apart(out, {"the model": (model,), "the data": (data or "",), "the run": (run or "",)})
    beside = out.resolve() if out and out.name in ("", "..") else out
    folder = run or (beside.with_name(f"{beside.name}.run") if beside else None)
    if folder is None:
        raise RunError(
            f"asked to distil students of {model or 'no model'} without saying where to; give --out DIR or --run DIR"
        )
    fresh = bool(model) and not config and not open_run(folder, must_exist=False).config.is_file()
    if fresh and not plan:
        raise RunError(
            f"asked to distil students of {model}, found no plan; give --plan, such as --plan bk-small"
        )
    asked = {
        "data.source": data,
        "distill.steps": steps,
        "distill.batch": batch,
        "distill.learning_rate": learning_rate,
    }
    found_by = options.found_by(revision, subfolder, variant)
    settings = settings_of(model, folder, config, assign, {**asked, **found_by}, device=device, seed=seed)
    from prune_lab.api.model import Model

    table = Model(settings, folder).distill(*plan, out=out, force=force)
    if is_main():
        show(table, as_json=as_json, wide=wide)
        if run is None:
            typer.echo(left_beside(folder, shown=True), err=True)
