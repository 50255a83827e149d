"""The verb that counts and times what plans leave: profile."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.output import emit, records
from prune_lab.cli.run_context import model_found
from prune_lab.config import PLAN_FILES
from prune_lab.errors import PlanError


@app.command()
def profile(
    model: options.ModelArgument,
    plan: options.PlanOption = [],  # noqa: B006 - typer makes a new list for every call
    steps: Annotated[int, typer.Option(help="Denoising steps of --pipeline.", min=1)] = 25,
    batch: Annotated[int, typer.Option(help="Pictures per call.", min=1)] = 1,
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
        typer.Option(
            "--rounds", "--runs", help="Rounds, each of which times everything once, in turns.", min=2
        ),
    ] = 20,
    resolution: Annotated[
        int | None, typer.Option(help="Pixels of the picture's sides; default: the model's own.", min=1)
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Words of text; default: what the text encoder takes, or 77.", min=1)
    ] = None,
    by_block: Annotated[
        bool, typer.Option("--blocks", help="One row per block instead of one per plan.")
    ] = False,
    pipeline: Annotated[
        bool, typer.Option("--pipeline", help="Shares of text encoder, U-Net, decoder.")
    ] = False,
    as_json: options.JsonOption = False,
    wide: options.WideOption = False,
) -> None:
    """Count parameters and MACs of MODEL and of what each plan leaves, the teacher first, with the changes.

    MACs come in two conventions: "macs" is everything, "paper macs" leaves attention products out, as BK-SDM does. The
    latency of plans is measured in turns with the teacher's: the change is the median of the ratios within a round.
    """
    from prune_lab.models import load_pipeline, load_unet
    from prune_lab.plans import read_plans
    from prune_lab.profiling import (
        Service,
        cost_table,
        picture_size,
        pixels_per_latent,
        profile_blocks,
        profile_pipeline,
        reduction_table,
    )
    from prune_lab.runtime import pick_device, pick_dtype, progress_shown

    if (by_block or pipeline) and (plan or by_block == pipeline):
        raise PlanError("--blocks, --pipeline and --plan each give a table of their own; ask for one of them")
    source = model_found(
        model, revision=revision, subfolder=subfolder, variant=variant, random_weights=random_weights
    )
    place: dict[str, Any] = {"device": pick_device(device or "auto"), "dtype": pick_dtype(dtype or "float32")}
    timed = source.has_weights or random_weights if latency is None else latency
    latent, pixels = picture_size(source, resolution)
    sizes: dict[str, Any] = {"batch": batch, "latent": latent, "tokens": tokens or source.tokens}
    with progress_shown():
        if pipeline:
            loaded = load_pipeline(source, **place)
            kind = "pipeline"
            frame = profile_pipeline(loaded, steps=steps, runs=rounds, **{**sizes, "tokens": tokens})
        elif by_block and timed:
            unet = load_unet(source, random_weights=not source.has_weights, **place)
            kind, frame = "block costs", profile_blocks(unet, runs=rounds, **sizes)
        elif by_block:
            kind, frame = "block costs", cost_table(source.architecture, **sizes).frame()
        else:
            plans = [
                found if found.name else found.named(found.text if text.endswith(PLAN_FILES) else text)
                for text in plan
                for found in read_plans(text, source.architecture)
            ]
            kind = "reductions"
            service = Service(str(place["device"]), str(place["dtype"]).removeprefix("torch."), **sizes)
            where = service.text(source.config, pixels_per_latent(source)) if timed else ""
            table = {"latency": timed, "runs": rounds, "where": where, **sizes, **place}
            frame = reduction_table(source.architecture, plans, model=source.text, **table)
    frame = frame.assign(batch=batch, resolution=pixels)
    emit(kind, records(frame), as_json=as_json, wide=wide, title=f"Profile of {model}")
