"""The training of a run's candidates up to a step, which all engines share: set-up, rungs, losses."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from accelerate import PartialState

from prune_lab.candidates import Candidate, State, load_student
from prune_lab.distill import (
    FEATURE_VARIANTS,
    DistillSetup,
    Student,
    distill_together,
    feature_pairs,
    load_heldout,
    load_recovery,
)
from prune_lab.engines.pictures import draw_prompts
from prune_lab.evaluation import save_grid
from prune_lab.forms import layout_of
from prune_lab.ranking import HeldoutLosses, first_rung, rungs
from prune_lab.session import Session, ensure_captions, read_scores, training_and_validation

if TYPE_CHECKING:
    from torch import nn


def rungs_of(session: Session) -> tuple[int, ...]:
    """Steps at which the candidates of the run are compared; the last alone where it plays no tournament."""
    rank, distill = session.config.rank, session.config.distill
    if not rank.eta:
        return (distill.steps,)
    first = rank.first or first_rung(distill.steps, rank.eta, distill.warmup)
    return rungs(distill.steps, rank.eta, first)


def controls_among(session: Session, candidates: Sequence[Candidate]) -> list[str]:
    """Plan ids of the candidates that no rung drops: the controls, where ``rank.keep_controls`` is set."""
    keep = session.config.rank.keep_controls
    return [one.plan.id for one in candidates if keep and one.plan.origin == "control"]


def distill_setup_of(session: Session) -> DistillSetup:
    """The set-up that all students of the run are trained with."""
    # A cache is built by all processes together; the rest by one.
    order = (
        contextlib.nullcontext() if session.data_origin != "shipped" else PartialState().main_process_first()
    )
    with order:
        data, validation = training_and_validation(session)

    def draw_grid(model: nn.Module, path: Path) -> None:
        save_grid(path, draw_prompts(session, model))

    return DistillSetup(
        session.model,
        data,
        session.pipeline.scheduler,
        session.config.distill,
        validation,
        session.device,
        draw=draw_grid,
        logs=session.run.curves_dir,
        others=ensure_captions(session) if session.config.distill.random_conditioning else None,
    )


def needs_scores(session: Session) -> bool:
    """Whether the feature loss of the run weights blocks by their scores."""
    return FEATURE_VARIANTS[session.config.distill.loss_variant].by_sensitivity


def student_of(session: Session, candidate: Candidate) -> Student:
    """The student that ``candidate`` is before any training, repaired where the run repairs.

    Raises RunError when the run has no scores and ``needs_scores``.
    """
    impacts = read_scores(session.run).block_impacts() if needs_scores(session) else None
    state: State = "pruned" if session.config.repair.kind == "none" else "repaired"
    points = FEATURE_VARIANTS[session.config.distill.loss_variant].points
    return Student(
        # in float32 whatever the teacher's format: rounding first would cost it digits
        partial(load_student, candidate, state),
        feature_pairs(session.architecture, candidate.plan, points, sensitivities=impacts),
        candidate.folder,
        layout_of(session.architecture, candidate.plan).frozen,
        candidate.plan.title,
    )


def _ended(session: Session, candidate: Candidate, steps: int) -> bool:
    """Whether nothing is left to do up to ``steps``; the settings of a run do not change under it."""
    found = load_recovery(candidate.folder)
    if found is None or found.steps > steps:
        return found is not None
    trained = session.run.done(candidate.paths.distilled_model)
    return found.status == "failed" or (found.steps == steps and trained)


def train_to(
    session: Session, candidates: Sequence[Candidate], steps: int, *, keep_checkpoint: bool = False
) -> None:
    """Distil ``candidates`` together until each has taken ``steps`` steps; those that have, or failed, are left alone.

    Writes candidates/<id>/{recovery.csv, heldout.csv, distilled/}. With ``keep_checkpoint`` they can go on from there.
    """
    with PartialState().main_process_first():
        waiting = [student_of(session, one) for one in candidates if not _ended(session, one, steps)]
    if waiting:
        distill_together(distill_setup_of(session), waiting, until=steps, keep_checkpoint=keep_checkpoint)


def heldout_losses_after(candidates: Sequence[Candidate], steps: int) -> dict[str, HeldoutLosses]:
    """Held-out losses (rows,) float64 after ``steps`` steps, or why there are none, by plan id."""
    found: dict[str, HeldoutLosses] = {}
    for one in candidates:
        recovery = load_recovery(one.folder)
        losses = load_heldout(one.folder) if one.paths.heldout.is_file() else None
        if losses is not None and steps in losses.index:
            found[one.plan.id] = losses.loc[steps].to_numpy(dtype=np.float64)
        elif recovery is not None and recovery.status == "failed":
            found[one.plan.id] = recovery.reason
        else:
            found[one.plan.id] = f"it was not judged after {steps} steps"
    return found
