"""Rebuild or measure the reference model: ``python -m recipes.reference_model train|evaluate|demo-prompts``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_lab.cli.options import DeviceOption
from recipes.command_line import (
    AssetsOption,
    ConfigOption,
    ModelOption,
    ReportOption,
    WorkOption,
    command_line,
    importing,
    training,
)

app = command_line("the reference model")


@app.command()
def train(
    work: WorkOption,
    config: ConfigOption = None,
    sources: Annotated[
        Path | None,
        typer.Option("--sources", help="Folder of the public packages; default: WORK/sources."),
    ] = None,
    device: DeviceOption = None,
    out: ModelOption = None,
) -> None:
    """Rebuild data, VAE, CLIP pair, text encoder and U-Net from the public packages; the same command again resumes."""
    with importing():
        from recipes.reference_model.build import train_reference

    with training(device) as (chosen, say):
        train_reference(work, config=config, sources=sources, device=chosen, out=out, say=say)


@app.command()
def evaluate(out: ReportOption, assets: AssetsOption = None) -> None:
    """Measure the reference model on its held-out pictures and write the report: tables, figures, README.md."""
    from prune_lab.runtime import progress_shown

    with importing():
        from recipes.reference_model.evaluate import evaluate_reference

    with progress_shown():
        evaluate_reference(out, assets=assets, curves=None if assets is None else assets / "curves")
    typer.echo(out / "README.md")


@app.command()
def demo_prompts(
    out: Annotated[
        Path, typer.Option("--out", help="Where the scores of all held-out captions are written, a CSV.")
    ],
    steps: Annotated[int, typer.Option("--steps", help="Denoising steps of a picture; the demo's.")] = 20,
) -> None:
    """Score what the model draws for every held-out caption, and say which the demo shows."""
    from prune_lab.runtime import progress_shown

    with importing():
        from recipes.reference_model.demo_prompts import drawn_well, score_captions

    with progress_shown():
        scores = score_captions(out, steps=steps)
    for caption in drawn_well(scores):
        typer.echo(caption)


if __name__ == "__main__":
    app(prog_name="python -m recipes.reference_model")
