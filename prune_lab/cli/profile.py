"""The verb that counts and times what plans leave: profile."""

from __future__ import annotations

from typing import Annotated

import typer

from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.models import model_of
from prune_lab.cli.output import show


@app.command(short_help="Parameters, MACs and latency of MODEL and of plans.")
def profile(
    model: options.ModelArgument,
    plan: options.PlanOption = [],  # noqa: B006 - typer makes a new list for every call
    steps: Annotated[int, typer.Option(help="Denoising steps of --pipeline.")] = 25,
    batch: Annotated[int, typer.Option(help="Pictures per call.")] = 1,
    revision: options.RevisionOption = "",
    subfolder: options.SubfolderOption = "",
    variant: options.VariantOption = "",
    random_weights: options.RandomWeightsOption = False,
    device: options.DeviceOption = None,
    dtype: options.DtypeOption = None,
    latency: Annotated[
        bool | None,
        typer.Option("--latency/--no-latency", help="Time a forward pass; default: with weights only."),
    ] = None,
    rounds: Annotated[
        int,
        typer.Option("--rounds", "--runs", help="Rounds, each of which times everything once, in turns."),
    ] = 20,
    resolution: options.ResolutionOption = None,
    tokens: options.TokensOption = None,
    frames: options.FramesOption = None,
    by_block: Annotated[
        bool, typer.Option("--blocks", help="One row per block instead of one per plan.")
    ] = False,
    pipeline: Annotated[
        bool, typer.Option("--pipeline", help="Shares of text encoder, model, decoder.")
    ] = False,
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            help="Times in runtimes, each in its own process: eager,compile,onnx,openvino,executorch.",
        ),
    ] = "",
    as_json: options.JsonOption = False,
    wide: options.WideOption = False,
) -> None:
    """Count parameters and MACs of MODEL and of what each plan leaves, the teacher first, with the changes.

    Each plan is taken in the form that `prune` gives it: native where there is one, else with code of its own.

    MACs come in two conventions: "macs" is everything, "paper macs" leaves attention products out, as BK-SDM does. The
    latency of plans is measured in turns with the teacher's: the change is the median of the ratios within a round.
    """
    found_by = options.found_by(revision, subfolder, variant, random_weights)
    table = model_of(model, found_by, device=device, dtype=dtype).profile(
        *plan,
        blocks=by_block,
        pipeline=pipeline,
        latency=latency,
        steps=steps,
        batch=batch,
        resolution=resolution,
        tokens=tokens,
        frames=frames,
        rounds=rounds,
        backend=backend,
    )
    show(table, as_json=as_json, wide=wide)
