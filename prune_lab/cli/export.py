"""The verb that writes a model for other programs: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.models import model_of
from prune_lab.cli.output import show


@app.command()
def export(
    model: options.ModelArgument,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="single-file (one .safetensors for ComfyUI); onnx, openvino (a folder that draws without torch); "
            "executorch, coreml (a folder for devices).",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="File, or for a runtime folder, to write.")],
    revision: options.RevisionOption = "",
    subfolder: options.SubfolderOption = "",
    variant: options.VariantOption = "",
    form: Annotated[
        str,
        typer.Option("--form", help="native, or neutral: a mid stage that is gone is there as the identity."),
    ] = "native",
    dtype: options.DtypeOption = None,
    weights: Annotated[
        str,
        typer.Option(
            "--weights", help="For a runtime: float32, float16 (openvino, coreml) or int8 (onnx, openvino)."
        ),
    ] = "",
    force: options.ForceOption = False,
    as_json: options.JsonOption = False,
    wide: options.WideOption = False,
) -> None:
    """Write MODEL, a student or any other, in a format that other programs read."""
    chosen = model_of(model, options.found_by(revision, subfolder, variant))
    table = chosen.export(out, to, form=form, dtype=dtype, weights=weights, force=force)
    show(table, as_json=as_json, wide=wide)
