"""The verb that counts and times what plans leave: profile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from prune_lab.cli.application import app
from prune_lab.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    PlanOption,
    WideOption,
)
from prune_lab.cli.output import emit, records
from prune_lab.config import PLAN_FILES
from prune_lab.errors import PlanError

if TYPE_CHECKING:
    import pandas as pd

    from prune_lab.models import ModelSource


@app.command()
def profile(
    model: ModelArgument,
    plan: PlanOption = [],  # noqa: B006 - typer makes a new list for every call
    steps: Annotated[int, typer.Option(help="Denoising steps of --pipeline.", min=1)] = 25,
    batch: Annotated[int, typer.Option(help="Pictures per call.", min=1)] = 1,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    latency: Annotated[
        bool | None,
        typer.Option("--latency/--no-latency", help="Time a forward pass; default: with weights only."),
    ] = None,
    runs: Annotated[int, typer.Option(help="Recorded calls behind each median.", min=2)] = 20,
    by_block: Annotated[
        bool, typer.Option("--blocks", help="One row per block instead of one per plan.")
    ] = False,
    pipeline: Annotated[
        bool, typer.Option("--pipeline", help="Shares of text encoder, U-Net, decoder.")
    ] = False,
    as_json: JsonOption = False,
    wide: WideOption = False,
) -> None:
    """Count parameters and MACs of MODEL and of what each plan leaves, the teacher first, with the changes.

    MACs come in two conventions: "macs" is everything, "paper macs" leaves attention products out, as BK-SDM does.
    """
    from prune_lab.models import resolve_model
    from prune_lab.runtime import pick_device, pick_dtype, progress_shown

    if (by_block or pipeline) and (plan or by_block == pipeline):
        raise PlanError("--blocks, --pipeline and --plan each give a table of their own; ask for one of them")
    source = resolve_model(model)
    place = {"device": pick_device(device or "auto"), "dtype": pick_dtype(dtype or "float32")}
    timed = source.has_weights if latency is None else latency
    with progress_shown():
        if by_block:
            kind, frame = "block costs", _by_block(source, batch, runs, timed, place)
        elif pipeline:
            kind, frame = "pipeline", _by_part(source, steps, batch, runs, place)
        else:
            kind, frame = "reductions", _by_plan(source, plan, batch, runs, timed, place)
    emit(kind, records(frame), as_json=as_json, wide=wide, title=f"Profile of {model}")


def _by_plan(
    source: ModelSource, texts: list[str], batch: int, runs: int, timed: bool, place: dict[str, Any]
) -> pd.DataFrame:
    from prune_lab.plans import read_plans
    from prune_lab.profiling import reduction_table

    architecture = source.architecture
    plans = [
        plan if plan.name else plan.named(plan.text if text.endswith(PLAN_FILES) else text)
        for text in texts
        for plan in read_plans(text, architecture)
    ]
    return reduction_table(
        architecture, plans, model=source.text, batch=batch, latency=timed, runs=runs, **place
    )


def _by_block(source: ModelSource, batch: int, runs: int, timed: bool, place: dict[str, Any]) -> pd.DataFrame:
    from prune_lab.models import load_unet
    from prune_lab.profiling import cost_table, profile_blocks

    if not timed:
        return cost_table(source.architecture, batch=batch).frame()
    unet = load_unet(source, random_weights=not source.has_weights, **place)
    return profile_blocks(unet, batch=batch, tokens=source.tokens, runs=runs)


def _by_part(source: ModelSource, steps: int, batch: int, runs: int, place: dict[str, Any]) -> pd.DataFrame:
    from prune_lab.models import load_pipeline
    from prune_lab.profiling import profile_pipeline

    return profile_pipeline(load_pipeline(source, **place), steps=steps, batch=batch, runs=runs)
