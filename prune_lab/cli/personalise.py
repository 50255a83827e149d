"""The verb that teaches a model one subject: personalise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.models import model_of
from prune_lab.cli.output import show


@app.command(short_help="Teach MODEL a subject from a few pictures (DreamBooth).")
def personalise(
    model: options.ModelArgument,
    images: Annotated[Path, typer.Option("--images", help="Folder of pictures of the subject, four or so.")],
    token: Annotated[
        str, typer.Option("--token", help="Words that are to mean the subject, such as sks11df.")
    ],
    subject_class: Annotated[
        str, typer.Option("--class", metavar="WORDS", help="What the subject is one of, such as dog.")
    ],
    out: Annotated[
        Path, typer.Option("--out", help="Folder to write: a pipeline, or with --lora the LoRA alone.")
    ],
    template: Annotated[
        str,
        typer.Option("--template", help="Prompt, with {} for the subject, as in 'a photo of {}'."),
    ] = "a photo of {}",
    class_images: Annotated[
        Path | None,
        typer.Option("--class-images", help="Folder of pictures of the class; default: MODEL draws them."),
    ] = None,
    class_count: Annotated[
        int | None, typer.Option("--class-count", help="Pictures of the class that MODEL draws (200).")
    ] = None,
    class_steps: Annotated[
        int | None,
        typer.Option(
            "--class-steps",
            help="Denoising steps of each of these, and of --pictures (25, or 4 of a model of few steps).",
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            "--guidance",
            help="Classifier-free guidance scale of all of these (7.5, or 1 of a model of few steps).",
        ),
    ] = None,
    prior_weight: Annotated[
        float | None,
        typer.Option("--prior-weight", help="Weight of the pictures of the class (1); 0: there are none."),
    ] = None,
    lora: Annotated[
        int | None,
        typer.Option("--lora", metavar="RANK", help="Train a LoRA of this rank; default: the whole model."),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Steps of training (800).")] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", help="Pictures of the subject per step, and as many of the class (1)."),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate", help="Default: 1e-6, with --lora 1e-4; the shipped U-Net needs 2e-4 and 4e-3."
        ),
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="Format of the passes: float32 (default) or bfloat16.")
    ] = None,
    pictures: Annotated[
        int | None,
        typer.Option(
            "--pictures",
            help="Of each of three prompts, drawn before and after, for the sheet in OUT (2); 0: no sheet.",
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            "--context",
            help="Prompt on the sheet that shows {} elsewhere; default: the template, on the beach.",
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for a third more work.")
    ] = False,
    revision: options.RevisionOption = "",
    subfolder: options.SubfolderOption = "",
    variant: options.VariantOption = "",
    device: options.DeviceOption = None,
    seed: options.SeedOption = None,
    force: options.ForceOption = False,
    as_json: options.JsonOption = False,
    wide: options.WideOption = False,
) -> None:
    """Teach MODEL to draw one subject from a few pictures of it (DreamBooth): the whole model, or a LoRA.

    The token stands for the subject in prompts from then on. Pictures of its class, which MODEL draws itself and which
    are kept in the cache for any other OUT, keep it from forgetting what others look like. What is written is plain
    diffusers, and proved; pictures.png in it shows what MODEL draws before and after. The same command again goes on
    where it was stopped.
    """
    from prune_lab.errors import ConfigError

    if lora == 0:
        raise ConfigError(
            "asked for lora = 0; give a rank from 1 on, or leave --lora away to train the whole model"
        )
    found = model_of(model, options.found_by(revision, subfolder, variant), device=device)
    table = found.personalise(
        images,
        out,
        token=token,
        subject_class=subject_class,
        class_images=class_images,
        force=force,
        template=template,
        lora=lora,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        prior_weight=prior_weight,
        class_count=class_count,
        class_steps=class_steps,
        guidance=guidance,
        seed=seed,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        pictures=pictures,
        context=context,
    )
    show(table, as_json=as_json, wide=wide)
