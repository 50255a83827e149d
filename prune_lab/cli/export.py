"""The verb that writes a model for other programs: export."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.models import model_of
from prune_lab.cli.output import show
from prune_lab.errors import DataError, StorageError, UnsupportedModelError
from prune_lab.runtime import path_text, read_json

_READS_TEXT = "ConditionModel"  # and of these the one that a single file can hold
_OWN_UNET = "PrunedUNet"  # what the classes of U-Nets with code of their own are called by


def _refuse_own_code(model: str) -> None:
    """Raise UnsupportedModelError where ``model`` is the folder of a student with code of its own, for which a single
    file has no place. Its config tells, so nothing else is read, and nothing imported.
    """
    folders = [Path(model), Path(model, "unet")] if os.path.isdir(model) else []  # noqa: PTH112 - may be too long
    path = next((one / "config.json" for one in folders if (one / "config.json").is_file()), None)
    try:
        config = None if path is None else read_json(path)
    except (DataError, StorageError):  # said by what reads it as a model
        return
    name = str(config.get("_class_name")) if isinstance(config, dict) else ""
    if not isinstance(config, dict) or not (name.startswith(_OWN_UNET) and name.endswith(_READS_TEXT)):
        return
    narrower, removed = bool(config.get("widths")), bool(config.get("removed"))
    form = "padded" if narrower and not removed else "neutral"
    shown = path_text(Path(model))
    both = narrower and removed  # no plain class may have the one without the other
    without = ", PLAN its plan without the widths (~...)," if both else ""
    raise UnsupportedModelError(
        f"asked to export {shown}, a student with code of its own (form own), for which a single file has no place; "
        f"what it can hold is written by prune-lab prune MODEL --plan {'PLAN' if both else shown} --form {form} --out "
        f"DIR, with MODEL what it was cut from{without} and weights that are MODEL's, untrained; --to onnx or openvino "
        "takes this student as it is"
    )


@app.command(short_help="Write MODEL in a format that other programs read.")
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
    if to == "single-file" and not subfolder:
        _refuse_own_code(model)
    chosen = model_of(model, options.found_by(revision, subfolder, variant))
    table = chosen.export(out, to, form=form, dtype=dtype, weights=weights, force=force)
    show(table, as_json=as_json, wide=wide)
