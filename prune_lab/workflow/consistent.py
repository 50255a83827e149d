"""The verb that teaches a student to draw in a few steps, and the pipeline folder that comes of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd

from prune_lab.distill import Consistency, check_consistency, distill_consistency, lcm_scheduler
from prune_lab.engines.training import distill_setup_of
from prune_lab.errors import RunError
from prune_lab.models import ModelSource, check_same_class, check_teaches_few, load_model
from prune_lab.models.written import PLAN, PROVENANCE, beside, form_of_zeros
from prune_lab.runtime import note, read_text, write_text
from prune_lab.schemas import CONSISTENT_COLUMNS
from prune_lab.session import Session, tell_roles
from prune_lab.surgery import pipeline_with
from prune_lab.surgery.parts import rename_part

FEW = 4  # steps that such a student is asked for
_LEAST = 100  # steps of training: after 30 the shipped U-Net's student was worse than before
_CARD = "README.md"
_ASKED = "num_inference_steps=25"


def _check_form(student: ModelSource) -> None:
    if form := form_of_zeros(student.model_folder):
        raise RunError(
            f"asked for consistency distillation of {student.text}, found a student in the {form} form, whose "
            "zeros would be trained away; give the same plan in its native or own form (prune-lab prune --form)"
        )


def _told(how: Consistency) -> str:
    return (
        f"\n## Steps\n\nThis student was distilled to draw in few steps (consistency distillation, arXiv:2310.04378, "
        f"over {how.grid} steps of its teacher). A guidance of {how.guidance:g} is baked in: draw with {FEW} steps and "
        "`guidance_scale=1.0`, by the LCMScheduler that lies beside it.\n"
    )


def _finished(folder: Path, scheduler: Any, how: Consistency) -> None:
    """The pipeline ``folder`` draws with ``scheduler``, and its card says how."""
    for path in (folder / "scheduler").iterdir():
        path.unlink()
    scheduler.save_config(folder / "scheduler")
    rename_part(folder, "scheduler", ("diffusers", type(scheduler).__name__))
    card = folder / _CARD
    if card.is_file():
        text = read_text(card).replace(_ASKED, f"num_inference_steps={FEW}, guidance_scale=1.0")
        write_text(card, text + _told(how))


def distil_consistent(
    session: Session, student: ModelSource, out: Path, how: Consistency, *, force: bool = False
) -> pd.DataFrame:
    """One row, columns CONSISTENT_COLUMNS, on ``student`` after consistency distillation from the model of ``session``.

    The pipeline goes to ``out``, with LCMScheduler in it; state and curve lie in the run folder, from which the same
    command goes on. Raises ConfigError for a student of another class, RunError and UnsupportedModelError as
    ``distill_consistency`` does.
    """
    _check_form(student)
    plan, provenance = (beside(student.model_folder, name) for name in (PLAN, PROVENANCE))
    check_teaches_few(session.source)
    check_same_class(student, session.source)
    folder = session.run.folder / "consistency"
    lcm_scheduler(
        session.pipeline.scheduler, how.grid
    )  # what cannot be done says so before anything is encoded
    tell_roles(session)
    setup = dataclasses.replace(distill_setup_of(session), draw=None, others=None)
    model = load_model(student, device=session.device)
    check_consistency(setup, model, how)
    settings = setup.settings
    if settings.steps < _LEAST:
        note(
            f"{settings.steps} steps of consistency distillation are few: a student draws worse by it, in {FEW} steps, "
            "too, until it has learnt to; 300 are usual"
        )
    done = {
        "teacher": session.source.name,
        "steps": settings.steps,
        "samples per step": settings.batch,
        "learning rate": settings.learning_rate,
        "guidance": how.guidance,
        "grid": how.grid,
    }
    notes = provenance | {"consistency": done}
    paths = distill_consistency(setup, model, folder, how, notes, plan=plan or None, force=force)
    losses = pd.read_csv(paths.losses)
    scheduler = lcm_scheduler(session.pipeline.scheduler, how.grid)
    pipeline_with(
        student if student.is_pipeline else session.source,
        paths.model,
        out,
        force=force,
        finish=lambda written: _finished(written, scheduler, how),
    )
    last = losses["loss"].tail(max(1, len(losses) // 10)).mean()
    losses_of = (float(losses["loss"].iloc[0]), float(last), float(losses["seconds"].iloc[-1]))
    row = (student.text, session.source.text, len(losses), how.guidance, how.grid, *losses_of, str(out))
    return pd.DataFrame([row], columns=list(CONSISTENT_COLUMNS))
