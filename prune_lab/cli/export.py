"""The verb that writes a model for other programs: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.output import emit
from prune_lab.cli.run_context import model_found


@app.command()
def export(
    model: options.ModelArgument,
    to: Annotated[str, typer.Option("--to", help="Format: single-file (one .safetensors for ComfyUI).")],
    out: Annotated[Path, typer.Option("--out", help="File to write.")],
    revision: options.RevisionOption = "",
    subfolder: options.SubfolderOption = "",
    variant: options.VariantOption = "",
    form: Annotated[
        str,
        typer.Option("--form", help="native, or neutral: a mid stage that is gone is there as the identity."),
    ] = "native",
    dtype: options.DtypeOption = None,
    force: options.ForceOption = False,
    as_json: options.JsonOption = False,
    wide: options.WideOption = False,
) -> None:
    """Write MODEL, a student or any other, in a format that other programs read."""
    from prune_lab.errors import UnsupportedModelError
    from prune_lab.export import EXPORT_TARGETS
    from prune_lab.runtime import pick_dtype, progress_shown

    if to not in EXPORT_TARGETS:
        raise UnsupportedModelError(
            f"asked to export to {to!r}; formats that can be written: {', '.join(EXPORT_TARGETS)}"
        )
    chosen = pick_dtype(dtype) if dtype else None
    source = model_found(model, revision=revision, subfolder=subfolder, variant=variant)
    with progress_shown():
        exported = EXPORT_TARGETS[to](source, out, dtype=chosen, form=form, force=force)
    for line in exported.notes:
        typer.echo(f"note: {line}", err=True)
    row = {
        "model": model,
        "format": to,
        "file": str(exported.path),
        "tensors": exported.num_tensors,
        "bytes": exported.num_bytes,
    }
    emit("exported", [row], as_json=as_json, wide=wide, title="Written")
