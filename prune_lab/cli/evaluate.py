"""The verb that draws pictures and judges them: evaluate. Models are judged in a temporary run folder."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from prune_lab.api.settings import model_or_run, settings_of
from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.models import model_of
from prune_lab.cli.output import emit, records
from prune_lab.errors import RunError
from prune_lab.runs import open_run, writing


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help=options.MODEL_HELP)] = [],  # noqa: B006
    base: Annotated[
        str,
        typer.Option(
            "--base",
            help="Pipeline in which folders of a model alone draw; default: the shipped one of its class.",
        ),
    ] = "",
    prompt: Annotated[
        list[str], typer.Option("--prompt", help="What to draw; may be repeated; default: held-out captions.")
    ] = [],  # noqa: B006
    data: options.DataOption = None,
    revision: options.RevisionOption = "",
    subfolder: options.SubfolderOption = "",
    variant: options.VariantOption = "",
    run: options.RunOption = None,
    config: options.ConfigOption = None,
    assign: options.SetOption = [],  # noqa: B006
    device: options.DeviceOption = None,
    seed: options.SeedOption = None,
    as_json: options.JsonOption = False,
    wide: options.WideOption = False,
) -> None:
    """Draw and judge: CLIP score and held-out loss of models, or the pictures of a run's teacher and candidates."""
    if bool(models) == bool(run):
        raise RunError(
            "asked to evaluate; give models, or --run DIR for the candidates of a run, and not both"
        )
    if run:
        if config or prompt or data or assign or seed is not None:
            raise RunError(
                f"asked to evaluate {run} with other settings; its pictures are drawn with its own: "
                "give models instead, or change the run's settings with prune-lab run"
            )
        from prune_lab.runtime import progress_shown
        from prune_lab.workflow import Session, quality_frame

        opened = open_run(run, must_exist=True)
        with progress_shown(), writing(opened):  # pictures that are missing are drawn
            frame = quality_frame(Session(opened))
        emit("pictures", records(frame), as_json=as_json, wide=wide, title=f"Pictures of {run}")
        return
    for text in models:
        if model_or_run(text, None)[1] is not None:
            raise RunError(
                f"asked to evaluate the model {text}, found a run folder there; give --run {text} for its candidates, "
                "or the folder of one of its models"
            )
    from prune_lab.models import shipped_like

    rows: list[dict[str, Any]] = []
    told: set[str] = set()  # the lines on data that were shown of the models before
    asked = {
        "evaluate.prompts": tuple(prompt),
        "data.source": data,
        "evaluate.seeds": () if seed is None else (seed,),
    }
    found_by = options.found_by(revision, subfolder, variant)
    for text in models:
        model = model_of(text, found_by)
        whole = model.source.is_pipeline
        settings = settings_of(
            text if whole else base or shipped_like(model.source),
            None,
            config,
            assign,
            {**asked, **(found_by if whole else {})},
            device=device,
            seed=seed,
        )
        rows += model.judged_in(settings, told).records()
    emit("quality", rows, as_json=as_json, wide=wide, title="Quality")
