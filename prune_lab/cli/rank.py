"""The verb that orders the candidates of a run: rank."""

from __future__ import annotations

from typing import Annotated

import typer

from prune_lab.api.settings import model_or_run, settings_of
from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.output import show
from prune_lab.errors import RunError
from prune_lab.runs import open_run


@app.command(short_help="Order the candidates of a run by quality at their cost.")
def rank(
    model: Annotated[str, typer.Argument(metavar="RUN", help="Run folder.")] = "",
    budget_steps: Annotated[
        int | None, typer.Option(help="Steps that the survivors get; the rest is dropped on the way.")
    ] = None,
    eta: Annotated[int | None, options.for_setting("rank.eta")] = None,
    engine: Annotated[str | None, options.for_setting("engine.kind", "--engine")] = None,
    run: options.RunOption = None,
    assign: options.SetOption = [],  # noqa: B006
    device: options.DeviceOption = None,
    force: options.ForceOption = False,
    as_json: options.JsonOption = False,
    wide: options.WideOption = False,
) -> None:
    """Order the candidates of a run by quality at their cost, with who was dropped or left out and why.

    With --budget-steps or --eta they are distilled first, by successive halving over short distillation: paired
    differences in held-out loss decide, who ties goes on, and a survivor goes on from its state.
    """
    _, folder = model_or_run(model, run)
    if folder is None:
        raise RunError(f"asked to rank {model or 'nothing'}, found no run folder there; give RUN")
    asked = {"distill.steps": budget_steps, "rank.eta": eta, "engine.kind": engine}
    settings = settings_of("", open_run(folder, must_exist=True).folder, None, assign, asked, device=device)
    tournament = budget_steps or eta or any(text.startswith(("distill.", "rank.")) for text in assign)
    from prune_lab.api.model import Model

    table = Model(settings, folder).rank(distill=bool(tournament), force=force)
    show(table, as_json=as_json, wide=wide)
