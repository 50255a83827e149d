"""The verb that writes a smaller model: prune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.output import emit
from prune_lab.cli.run_context import model_found


@app.command()
def prune(
    model: options.ModelArgument,
    plan: Annotated[
        str, typer.Option("--plan", help='Plan: bk-small, "bk-base -Md", "-Dn1.R2 -Dn1.A2", plan.json.')
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    revision: options.RevisionOption = "",
    subfolder: options.SubfolderOption = "",
    read_variant: options.ReadVariantOption = "",
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
    """Write MODEL without the blocks of a plan: a pipeline (or U-Net) folder that plain diffusers loads.

    Before the folder gets its name a process of its own loads it and compares it with MODEL without these blocks.
    """
    from prune_lab.errors import PlanError
    from prune_lab.export import write_card
    from prune_lab.plans import native_layout, read_plans
    from prune_lab.profiling import cost_table
    from prune_lab.runtime import pick_dtype
    from prune_lab.surgery import get_ready_to_prove, prune_pipeline

    if not dry_run:
        get_ready_to_prove()  # it imports meanwhile
    source = model_found(model, revision=revision, subfolder=subfolder, variant=read_variant)
    architecture = source.architecture
    plans = read_plans(plan, architecture)
    if len(plans) != 1:
        raise PlanError(
            f"asked to prune by {plan}, found {len(plans)} plans in it; give a file with one plan"
        )
    (chosen,) = plans
    native_layout(architecture, chosen)  # says what is in the way, also with --dry-run
    costs = cost_table(architecture)
    before, after = costs.total, costs.of(chosen)
    row = {
        "model": model,
        "plan": chosen.label if chosen.name else chosen.text,
        "plan_id": chosen.id,
        "folder": str(out),
        "written": not dry_run,
        "blocks_removed": len(chosen.removed),
        "params": after.params,
        "params_change": after.params / before.params - 1,
        "macs": after.macs,
        "macs_change": after.macs / before.macs - 1,
    }
    if not dry_run:
        number_format = pick_dtype(dtype) if dtype else None
        prune_pipeline(
            source,
            chosen,
            out,
            force=force,
            dtype=number_format,
            variant=variant,
            finish=lambda folder: write_card(folder, chosen, source),
        )
    emit("pruned", [row], as_json=as_json, wide=wide, title="Would write" if dry_run else "Written")
