"""Verbs that make a model folder or a picture: prune, generate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_lab.cli.application import (
    DeviceOption,
    DryRunOption,
    DtypeOption,
    ForceOption,
    JsonOption,
    ModelArgument,
    app,
)
from prune_lab.cli.output import emit


@app.command()
def prune(
    model: ModelArgument,
    plan: Annotated[
        str, typer.Option("--plan", help='Plan: bk-small, "bk-base -Md", "-Dn1.R2 -Dn1.A2", plan.json.')
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    dtype: DtypeOption = None,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write MODEL without the blocks of a plan: a pipeline (or U-Net) folder that plain diffusers loads."""
    from prune_lab.blocks import architecture_of
    from prune_lab.errors import PlanError
    from prune_lab.models import resolve_model
    from prune_lab.plans import native_layout, read_plans
    from prune_lab.profiling import cost_table
    from prune_lab.runtime import pick_dtype
    from prune_lab.surgery import prune_pipeline

    source = resolve_model(model)
    architecture = architecture_of(source.config)
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
        prune_pipeline(source, chosen, out, force=force, dtype=pick_dtype(dtype) if dtype else None)
    emit([row], as_json=as_json, title="Would write" if dry_run else "Written")


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[list[str], typer.Option("--prompt", help="What to draw; may be repeated.")],
    out: Annotated[Path, typer.Option("--out", help="PNG to write; several pictures become one grid.")],
    seed: Annotated[int, typer.Option("--seed", help="Seed of the first picture of each prompt.", min=0)] = 0,
    count: Annotated[
        int, typer.Option("--count", help="Pictures per prompt, seeds seed, seed+1, ...", min=1)
    ] = 1,
    steps: Annotated[int, typer.Option("--steps", help="Denoising steps.", min=1)] = 25,
    guidance: Annotated[float, typer.Option("--guidance", help="Classifier-free guidance scale.")] = 7.5,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    force: ForceOption = False,
) -> None:
    """Draw pictures with MODEL; one row per prompt, one column per seed."""
    from prune_lab.errors import StorageError
    from prune_lab.evaluation import generate as draw
    from prune_lab.evaluation import save_grid
    from prune_lab.models import load_pipeline, resolve_model
    from prune_lab.runtime import pick_device, pick_dtype, progress_shown

    if out.suffix.lower() != ".png":
        raise StorageError(
            f"asked to write {out}; pictures are written as PNG: give a name that ends in .png"
        )
    if out.exists() and not force:
        raise StorageError(f"asked to write {out}, which is there already; give another name or --force")
    pipeline = load_pipeline(
        resolve_model(model), device=pick_device(device or "auto"), dtype=pick_dtype(dtype or "float32")
    )
    seeds = tuple(range(seed, seed + count))
    with progress_shown():
        pictures = draw(pipeline, tuple(prompt), seeds, steps=steps, guidance=guidance)
    save_grid(out, pictures, columns=count)
    typer.echo(
        f"wrote {out}: {len(pictures)} pictures of {pictures.shape[-1]} x {pictures.shape[-2]} pixels",
        err=True,
    )
