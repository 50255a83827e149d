"""The verb that writes a smaller model: prune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.models import model_of
from prune_lab.cli.output import show


@app.command(short_help="Write MODEL without the blocks of a plan.")
def prune(
    model: options.ModelArgument,
    plan: Annotated[
        str,
        typer.Option(
            "--plan",
            callback=options.plan_checked,
            help='Plan: bk-small, "bk-base -Md", "-Dn1.R2 -Dn1.A2", plan.json, or plans.json#2, the second that search '
            "wrote (or #NAME); ~BLOCK.heads=2/4 keeps 2 of 4 heads.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    revision: options.RevisionOption = "",
    subfolder: options.SubfolderOption = "",
    read_variant: options.ReadVariantOption = "",
    form: Annotated[
        str | None,
        typer.Option(
            "--form",
            help="native, neutral, own or padded; default: native (a plain config) where there is one, else own (code "
            "of its own in the folder). padded: narrower blocks as zeros at full width, to try them.",
        ),
    ] = None,
    dtype: options.DtypeOption = None,
    variant: Annotated[
        str,
        typer.Option(
            "--variant", help="Names all files with weights: fp16 for x.fp16.safetensors; else plain names."
        ),
    ] = "",
    force: options.ForceOption = False,
    dry_run: options.DryRunOption = False,
    as_json: options.JsonOption = False,
    wide: options.WideOption = False,
) -> None:
    """Write MODEL without the blocks of a plan: a pipeline (or model) folder that plain diffusers loads.

    Before the folder gets its name a process of its own loads it and compares it with MODEL without these blocks.
    """
    if not dry_run:
        from prune_lab.surgery import get_ready_to_prove

        get_ready_to_prove()  # it imports meanwhile
    chosen = model_of(model, options.found_by(revision, subfolder, read_variant))
    table = chosen.prune(plan, out, form=form, dtype=dtype, variant=variant, force=force, dry_run=dry_run)
    show(table, as_json=as_json, wide=wide)
