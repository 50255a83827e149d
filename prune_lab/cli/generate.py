"""The verb that draws pictures: generate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.models import model_of


@app.command(short_help="Draw pictures with MODEL.")
def generate(
    model: options.ModelArgument,
    out: Annotated[Path, typer.Option("--out", help="PNG to write; several pictures become one grid.")],
    prompt: Annotated[
        list[str],
        typer.Option(
            "--prompt",
            help='What to draw; may be repeated. A model of classes is asked for "class 7" or by its name; one that '
            "reads no text needs none.",
        ),
    ] = [],  # noqa: B006 - typer makes a new list for every call
    seed: Annotated[int, typer.Option("--seed", help="Seed of the first picture of each prompt.")] = 0,
    count: Annotated[int, typer.Option("--count", help="Pictures per prompt, seeds seed, seed+1, ...")] = 1,
    steps: options.DrawingStepsOption = None,
    guidance: options.GuidanceOption = None,
    resolution: options.ResolutionOption = None,
    revision: options.RevisionOption = "",
    subfolder: options.SubfolderOption = "",
    variant: options.VariantOption = "",
    device: options.DeviceOption = None,
    dtype: options.DtypeOption = None,
    force: options.ForceOption = False,
) -> None:
    """Draw pictures with MODEL; one row per prompt, one column per seed."""
    from prune_lab.config import check_numbers
    from prune_lab.evaluation import generate as draw
    from prune_lab.evaluation import prompts_for, save_grid
    from prune_lab.models import drawing_asked, load_pipeline
    from prune_lab.models.protection import check_apart, check_file
    from prune_lab.runtime import pick_device, pick_dtype, progress_shown

    check_numbers(seed=seed, count=count, steps=steps, guidance=guidance, resolution=resolution)
    check_file(out, {"the model": (model,)}, "pictures", force=force)
    source = model_of(model, options.found_by(revision, subfolder, variant)).source
    out = check_apart(out, {"the model": source.places})
    prompts = prompts_for(source.config, prompt)
    pipeline = load_pipeline(
        source,
        device=pick_device(device or "auto"),
        dtype=pick_dtype(dtype or "float32"),
    )
    seeds = tuple(range(seed, seed + count))
    with progress_shown():
        taken, scale = drawing_asked(source, steps, guidance)
        pictures = draw(pipeline, prompts, seeds, steps=taken, guidance=scale, resolution=resolution)
    save_grid(out, pictures, columns=count)
    drawn = f"{len(pictures)} {'picture' if len(pictures) == 1 else 'pictures'}"
    typer.echo(f"wrote {out}: {drawn} of {pictures.shape[-1]} x {pictures.shape[-2]} pixels", err=True)
