"""Steps that train students: all together for equally many steps, or by a tournament in which the worse drop out."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from prune_lab.candidates import Candidate, State, load_student
from prune_lab.distill import (
    FEATURE_VARIANTS,
    DistillSetup,
    Recovery,
    Student,
    distill_together,
    feature_pairs,
    load_heldout,
    load_recovery,
)
from prune_lab.errors import RunError
from prune_lab.evaluation import clip_scores, save_grid
from prune_lab.processes import gather_object, is_main, join, main_process_first
from prune_lab.ranking import (
    HeldoutLosses,
    Tournament,
    first_rung,
    run_tournament,
    rungs,
    tournament_from_frame,
)
from prune_lab.runs import Run
from prune_lab.runtime import note, write_frame
from prune_lab.schemas import RECOVERY_SUMMARY_COLUMNS
from prune_lab.surgery import pipeline_with
from prune_lab.workflow.measuring import ensure_scores
from prune_lab.workflow.searching import ensure_plans, origin_of, plan_named
from prune_lab.workflow.session import Session, drawn
from prune_lab.workflow.students import (
    ensure_candidates,
    ensure_repaired,
    training_and_validation,
)

if TYPE_CHECKING:
    from torch import nn


# Together ----------------------------------------------------------------------------------------------------


def _draw(session: Session, unet: nn.Module, path: Path) -> None:
    """A grid of the run's prompts by a student in training."""
    save_grid(path, drawn(session, unet))


def distill_setup_of(session: Session) -> DistillSetup:
    """What all students of the run are trained with."""
    # A cache is built by all processes together; the rest by one.
    alike = contextlib.nullcontext() if session.config.data.source else main_process_first()
    with alike:
        data, validation = training_and_validation(session)
    return DistillSetup(
        session.unet,
        data,
        session.pipeline.scheduler,
        session.config.distill,
        validation,
        session.device,
        draw=partial(_draw, session),
        logs=session.run.curves_dir,
    )


def student_of(session: Session, candidate: Candidate) -> Student:
    """The student that ``candidate`` is before any training, repaired where the run repairs."""
    variant = FEATURE_VARIANTS[session.config.distill.loss_variant]
    sensitivities = None
    if variant.by_sensitivity:
        entries = ensure_scores(session).entries
        sensitivities = {one.group.name: one.impact for one in entries if one.group.kind == "block"}
    state: State = "pruned" if session.config.repair.kind == "none" else "repaired"
    return Student(
        # in float32 whatever the teacher's format: rounding first would cost it digits
        partial(load_student, candidate, state),
        feature_pairs(session.architecture, candidate.plan, variant.points, sensitivities=sensitivities),
        candidate.folder,
    )


def _ended(run: Run, candidate: Candidate, steps: int) -> bool:
    """Whether nothing is left to do up to ``steps``; the settings of a run do not change under it."""
    found = load_recovery(candidate.folder)
    if found is None or found.steps > steps:
        return found is not None
    return found.status == "failed" or (found.steps == steps and run.done(candidate.paths.distilled_unet))


def train_to(
    session: Session, candidates: Sequence[Candidate], steps: int, *, keep_checkpoint: bool = False
) -> None:
    """Distil ``candidates`` together until each has taken ``steps`` steps; those that have, or failed, are left alone.

    Writes candidates/<id>/{recovery.csv, heldout.csv, distilled/}. With ``keep_checkpoint`` they can go on from there.
    """
    with main_process_first():
        waiting = [student_of(session, one) for one in candidates if not _ended(session.run, one, steps)]
    if waiting:
        distill_together(distill_setup_of(session), waiting, until=steps, keep_checkpoint=keep_checkpoint)


# By a tournament ---------------------------------------------------------------------------------------------


def measured(candidates: Sequence[Candidate], steps: int) -> dict[str, HeldoutLosses]:
    """Held-out losses after ``steps`` steps, or why there are none, by plan id."""
    found: dict[str, HeldoutLosses] = {}
    for one in candidates:
        recovery = load_recovery(one.folder)
        losses = load_heldout(one.folder)
        if steps in losses.index:
            found[one.plan.id] = losses.loc[steps].to_numpy(dtype=np.float64)
        elif recovery is not None and recovery.status == "failed":
            found[one.plan.id] = recovery.reason
        else:
            found[one.plan.id] = f"it was not judged after {steps} steps"
    return found


def _clip_at(
    session: Session, candidates: Sequence[Candidate]
) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """CLIP score of every prompt and seed, drawn with the averaged weights as they are now, by plan id.

    One process draws for all, so that all decide alike.
    """
    prompts = [prompt for prompt in session.prompts for _ in session.config.evaluate.seeds]
    found = {}
    for one in candidates if is_main() else ():
        student = load_student(one, "distilled", device=session.device, dtype=session.dtype)
        scores = clip_scores(session.scorer, drawn(session, student), prompts)
        found[one.plan.id] = scores.double().numpy()
    return gather_object(found)[0]


def rungs_of(session: Session) -> tuple[int, ...]:
    """Steps at which the tournament of the run decides."""
    rank, distill = session.config.rank, session.config.distill
    first = rank.first or first_rung(distill.steps, rank.eta, distill.warmup)
    return rungs(distill.steps, rank.eta, first)


def _play(session: Session, candidates: Sequence[Candidate]) -> Tournament:
    named = {one.plan.id: one for one in candidates}

    def chosen(names: Collection[str]) -> list[Candidate]:
        return [named[name] for name in names]

    def measure(names: Sequence[str], steps: int) -> Mapping[str, HeldoutLosses]:
        note(f"rung of {steps} steps: {len(names)} candidates")
        # One that has been there before, in a run that was interrupted, is read and not trained again.
        train_to(session, chosen(names), steps, keep_checkpoint=True)
        return measured(chosen(names), steps)

    settings = session.config.rank
    controls = [name for name in named if origin_of(session.run, name) == "control"]
    return run_tournament(
        list(named),
        rungs_of(session),
        settings.eta,
        measure,
        keep=controls if settings.keep_controls else (),
        clip_scores=(lambda names, _steps: _clip_at(session, chosen(names))) if settings.clip else None,
    )


def _play_on_ray(session: Session, candidates: Sequence[Candidate]) -> Tournament:
    from prune_lab.workflow.remote import play_on_ray  # which trains with what is above

    return play_on_ray(session, candidates)


_ENGINES = {"local": _play, "ray": _play_on_ray}


def ensure_tournament(session: Session, candidates: Sequence[Candidate]) -> Tournament:
    """Who of ``candidates`` was kept at which rung, by paired held-out losses; writes tournament.csv.

    Survivors of a rung go on from their state. An interrupted tournament goes on where it was: what was measured at
    a rung is read, and the same is decided again.
    """
    run = session.run
    if run.done(run.tournament):
        return tournament_from_frame(pd.read_csv(run.tournament))
    tournament = _ENGINES[session.config.rank.engine](session, candidates)
    if not is_main():
        return tournament
    write_frame(run.tournament, tournament.frame())
    for one in candidates:  # four times the weights, and nobody goes on from here
        one.paths.checkpoint.unlink(missing_ok=True)
    return tournament


def ensure_distilled(session: Session, *, only: tuple[str, ...] = ()) -> tuple[Recovery, ...]:
    """What the distillation makes of each candidate, all on the same data, noise and timesteps.

    With ``rank.eta`` in the settings by successive halving (see ``ensure_tournament``): not everyone gets all steps.
    Writes candidates/<id>/{recovery.csv, heldout.csv, distilled/}; a candidate that was interrupted goes on from its
    checkpoint. ``only`` names some of the plans (see ``plan_named``), which then get all steps. Under ``accelerate
    launch`` the main process prepares and all distil. Raises PlanError when a name is none of the run's.
    """
    join()
    with main_process_first():
        ensure_repaired(session)
        plans = ensure_plans(session)
        wanted = {plan_named(plans, text, session).id for text in only} or {plan.id for plan in plans}
        chosen = [one for one in ensure_candidates(session) if one.plan.id in wanted]
    if session.config.rank.eta and not only:
        ensure_tournament(session, chosen)
    else:
        train_to(session, chosen, session.config.distill.steps)
    found = (load_recovery(one.folder) for one in chosen)
    return tuple(recovery for recovery in found if recovery is not None)


def save_students(
    session: Session, out: Path, *, only: tuple[str, ...] = (), force: bool = False
) -> tuple[Path, ...]:
    """Pipeline folders of distilled students that plain diffusers loads: ``out`` for one, ``out``/<label> for more.

    ``only`` names some of the plans. Raises RunError when none of them was distilled, StorageError when ``out`` holds
    something and ``force`` is not given.
    """
    run = session.run
    plans = ensure_plans(session)
    chosen = [plan_named(plans, text, session) for text in only] or list(plans)
    there = [plan for plan in chosen if run.done(run.candidate(plan.id).distilled_unet)]
    if not there:
        raise RunError(
            f"asked to write distilled students of {run.folder}, found none; see the reasons in the table, or "
            "distil them with prune-lab distill"
        )
    folders = [out] if len(chosen) == 1 else [out / re.sub(r"[^\w.+-]+", "-", plan.label) for plan in there]
    return tuple(
        pipeline_with(session.source, run.candidate(plan.id).distilled_unet, folder, force=force)
        for plan, folder in zip(there, folders, strict=True)
    )


def recovery_frame(session: Session) -> pd.DataFrame:
    """One row per candidate that was distilled, in order of the plans; columns RECOVERY_SUMMARY_COLUMNS."""
    rows = []
    for plan in ensure_plans(session):
        recovery = load_recovery(session.run.candidate(plan.id).folder)
        if recovery is not None:
            figures = (recovery.before, recovery.after, recovery.seconds, recovery.reason)
            rows.append((plan.label, plan.id, recovery.status, recovery.steps, *figures))
    return pd.DataFrame(rows, columns=list(RECOVERY_SUMMARY_COLUMNS))
