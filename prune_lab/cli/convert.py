"""The verb that fits what was made for a teacher to its student: convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.output import emit, records
from prune_lab.errors import PlanError
from prune_lab.schemas import CONVERTED_COLUMNS


@app.command(short_help="Fit a LoRA, ControlNet or IP-Adapter to a student.")
def convert(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="lora, controlnet or ip-adapter.")] = "",
    given: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="What was made for the teacher; a ControlNet's folder."),
    ] = None,
    plan: Annotated[
        str,
        typer.Option(
            "--plan",
            metavar="STUDENT",
            callback=options.plan_checked,
            help="Folder of the student, or its plan together with --model.",
        ),
    ] = "",
    out: Annotated[
        Path | None, typer.Option("--out", help="File (of a ControlNet the folder) to write.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", help="The teacher, where --plan is not a folder that knows it.")
    ] = "",
    show: Annotated[
        str, typer.Option("--show", metavar="STUDENT", help="Say what fits the student, and convert nothing.")
    ] = "",
    force: options.ForceOption = False,
    as_json: options.JsonOption = False,
    wide: options.WideOption = False,
) -> None:
    """Fit a LoRA, a ControlNet or an IP-Adapter of a teacher to its student."""
    from prune_lab.export import CONVERSIONS, compatibility, student_of
    from prune_lab.models.protection import check_apart

    if show:
        rows = records(compatibility(student_of(show, model)))
        emit("compatibility", rows, as_json=as_json, wide=wide, title=f"What fits {show}")
        return
    if not (kind and given and plan and out):
        raise PlanError("asked to convert; write KIND FILE --plan STUDENT --out FILE, or --show STUDENT")
    if kind not in CONVERSIONS:
        raise PlanError(f"asked to convert a {kind!r}; what can be converted: {', '.join(CONVERSIONS)}")
    check_apart(out, {"the file": (given,), "the student": (plan,), "the model": (model,)})
    student = student_of(plan, model)
    found = CONVERSIONS[kind](student, given, out, force=force)
    for note in found.notes:
        typer.echo(f"note: {note}", err=True)
    if found.dropped_from:
        typer.echo(f"without a place: what belongs to {' '.join(found.dropped_from)}", err=True)
    written = (kind, str(out), found.parts, found.kept, found.renamed, found.dropped)
    cells = (*written, list(found.dropped_from), student.plan.label, student.plan.id)
    row = dict(zip(CONVERTED_COLUMNS, cells, strict=True))
    emit("converted", [row], as_json=as_json, wide=wide, title="Written")
