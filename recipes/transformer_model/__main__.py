"""Rebuild or measure the shipped transformer: ``python -m recipes.transformer_model train|evaluate|study``."""

from __future__ import annotations

import typer

from prune_lab.cli.options import DeviceOption
from recipes.command_line import (
    AssetsOption,
    ConfigOption,
    ModelOption,
    ReportOption,
    RunOption,
    WorkOption,
    command_line,
    importing,
    training,
)

app = command_line("the transformer")


@app.command()
def train(
    work: WorkOption, config: ConfigOption = None, device: DeviceOption = None, out: ModelOption = None
) -> None:
    """Rebuild the transformer from the pictures, VAE and text encoder that ship; the same command again resumes."""
    with importing():
        from recipes.transformer_model.build import train_shipped_transformer

    with training(device) as (chosen, say):
        train_shipped_transformer(work, config=config, device=chosen, out=out, say=say)


@app.command()
def evaluate(out: ReportOption, assets: AssetsOption = None) -> None:
    """Measure the transformer on the held-out pictures and write the report: tables, figures, README.md."""
    from prune_lab.runtime import progress_shown

    with importing():
        from recipes.transformer_model.evaluate import evaluate_transformer

    with progress_shown():
        evaluate_transformer(out, assets=assets)
    typer.echo(out / "README.md")


@app.command()
def study(work: RunOption, out: ReportOption, config: ConfigOption = None) -> None:
    """Score, prune, distil and rank what ships, with controls, and write the report: tables, figures, README.md."""
    from prune_lab.runtime import progress_shown

    with importing():
        from recipes.transformer_model.study import study_transformer

    with progress_shown():
        study_transformer(out, work, config=config)
    typer.echo(out / "README.md")


if __name__ == "__main__":
    app(prog_name="python -m recipes.transformer_model")
