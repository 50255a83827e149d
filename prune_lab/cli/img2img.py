"""The verb that changes a picture: img2img."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.output import show


def _numbers(text: str) -> tuple[float, ...]:
    """The numbers in ``text``, such as 0.3,0.5. Raises ConfigError for another text."""
    from prune_lab.errors import ConfigError

    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"asked for the strengths {text!r:.60}; give numbers such as 0.3,0.5,0.7") from None


@app.command(short_help="Change a picture with each MODEL, by strength.")
def img2img(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=options.MODEL_HELP)],
    picture: Annotated[
        Path, typer.Option("--picture", help="The picture to change; the square in its middle is taken.")
    ],
    prompt: Annotated[str, typer.Option("--prompt", help="What to change it towards.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out", help="Folder to write: pictures, sweep.csv and sweep.png, of several seeds means.csv."
        ),
    ],
    mask: Annotated[
        Path | None,
        typer.Option("--mask", help="A picture: only what is white in it is drawn anew (inpainting)."),
    ] = None,
    strengths: Annotated[
        str,
        typer.Option(
            "--strengths", help="Shares of the steps that are taken; 1 keeps nothing of the picture."
        ),
    ] = "0.2,0.35,0.5,0.65,0.8,0.9",
    seed: Annotated[int, typer.Option("--seed", help="Seed of the noise; the same for all models.")] = 0,
    seeds: Annotated[
        int,
        typer.Option(
            "--seeds",
            "--count",
            help="Pictures per strength, seeds seed, seed+1, ...; of several the table has means, spreads, and which "
            "models are not told apart.",
        ),
    ] = 1,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            help="Denoising steps at strength 1; default: 25, or 8 of a model that was distilled for few.",
        ),
    ] = None,
    guidance: options.GuidanceOption = None,
    scorer: Annotated[
        str, typer.Option("--scorer", help="CLIP folder or hub id that judges; default: that of MODEL.")
    ] = "",
    device: options.DeviceOption = None,
    dtype: options.DtypeOption = None,
    force: options.ForceOption = False,
    as_json: options.JsonOption = False,
    wide: options.WideOption = False,
) -> None:
    """Change a picture towards a prompt with each MODEL (SDEdit), at several strengths and with the same noise.

    Beside the pictures stand the CLIP score with the prompt, the likeness to the picture, and how far pixels are from
    it and from what the first MODEL made of it, so that students stand beside their teacher. One picture says little of
    a model: --seeds 5 shows which differences last.
    """
    from prune_lab.api.applying import img2img as change
    from prune_lab.config import check_numbers

    check_numbers(seed=seed, seeds=seeds)
    found = change(
        *models,
        picture=picture,
        prompt=prompt,
        out=out,
        mask=mask,
        strengths=_numbers(strengths),
        seeds=tuple(range(seed, seed + seeds)),
        steps=steps,
        guidance=guidance,
        scorer=scorer,
        device=device or "auto",
        dtype=dtype or "float32",
        force=force,
    )
    if found.means is None:
        show(found, as_json=as_json, wide=wide)
        return
    show(found.means, as_json=as_json, wide=wide)
    for line in found.notes:
        typer.echo(f"note: {line}", err=True)
