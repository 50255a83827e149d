"""The step that trains students: all for the same number of steps, or by a tournament that drops the worse ones."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
from accelerate import PartialState

from prune_lab.candidates import Candidate
from prune_lab.distill import Recovery, load_recovery
from prune_lab.engines import engine_of, needs_scores, rungs_of
from prune_lab.errors import RunError
from prune_lab.export import write_card
from prune_lab.models import note_trained_for_many, weight_files
from prune_lab.models.files import read_headers
from prune_lab.plans import PruningPlan
from prune_lab.processes import init_processes, is_main
from prune_lab.ranking import Tournament, tournament_from_frame
from prune_lab.runs import read_records
from prune_lab.runtime import write_frame
from prune_lab.schemas import RECOVERY_SUMMARY_COLUMNS, TOURNAMENT
from prune_lab.session import Session, ensure_captions, origin_of, tell_roles, training_and_validation
from prune_lab.session.parts import distilled_part, lacking, record, tournament_part
from prune_lab.surgery import pipeline_with
from prune_lab.workflow.measuring import ensure_scores
from prune_lab.workflow.plan_times import timed_anew, with_time
from prune_lab.workflow.searching import ensure_plans, plan_named
from prune_lab.workflow.students import ensure_candidates, ensure_repaired, read_verdict


def _train_again(session: Session, candidates: Sequence[Candidate], tournament: Tournament) -> None:
    """Train ``candidates`` as far as they came in ``tournament``, whose decisions stay."""
    frame = tournament.frame()
    for one in candidates:
        came = frame.loc[frame["name"] == one.plan.id, "steps"].max()
        engine_of(session).train(session, [one], [steps for steps in rungs_of(session) if steps <= came])


def ensure_tournament(
    session: Session, candidates: Sequence[Candidate], untrained: Sequence[Candidate] = ()
) -> Tournament:
    """Which of ``candidates`` were kept at which rung, by paired held-out losses; writes tournament.csv.

    Once it was played its decisions stand: those that are ``untrained`` are trained as far as they came.
    """
    run, part = session.run, tournament_part(session, [one.plan for one in candidates])
    with PartialState().main_process_first():
        played = not lacking(session, part)
    if played:
        tournament = tournament_from_frame(read_records(run.tournament, TOURNAMENT))
        _train_again(session, untrained, tournament)
    else:
        tournament = engine_of(session).train(session, candidates, rungs_of(session))
    if not is_main():
        return tournament
    if not played:
        write_frame(run.tournament, tournament.frame())
        record(session, part)
    for one in (
        untrained if played else candidates
    ):  # four times the weights, and no candidate goes on from here
        one.paths.checkpoint.unlink(missing_ok=True)
    return tournament


def ensure_distilled(session: Session, *, only: tuple[str, ...] = ()) -> tuple[Recovery, ...]:
    """The recovery of each candidate by distillation, all on the same data, noise and timesteps.

    With ``rank.eta`` by successive halving (see ``ensure_tournament``), so that not all candidates get all steps.
    Writes candidates/<id>/{recovery.csv, heldout.csv, distilled/}; a candidate that was interrupted goes on from its
    checkpoint. ``only`` names some of the plans (see ``plan_named``), which then get all steps. Under ``accelerate
    launch`` the main process prepares and all distil. Raises PlanError when a name is none of the run's.
    """
    init_processes()
    with PartialState().main_process_first():
        tell_roles(session)
        note_trained_for_many(session.source)
        plans = ensure_plans(session)
        wanted = {plan_named(plans, text, session).id for text in only} or {plan.id for plan in plans}
        chosen = [one for one in ensure_candidates(session) if one.plan.id in wanted]
        if needs_scores(session):
            ensure_scores(session)
    # A cache is built by all processes together; the rest by one.
    with PartialState().main_process_first() if session.data_origin == "shipped" else nullcontext():
        training_and_validation(session)
    if session.config.distill.random_conditioning:
        ensure_captions(session)
    with PartialState().main_process_first():
        ensure_repaired(session)
    scored = needs_scores(session)
    parts = [distilled_part(session, one.plan, scored=scored) for one in chosen]
    with PartialState().main_process_first():
        untrained = lacking(session, *parts)
    if session.config.rank.eta and not only:
        waiting = [one for one, part in zip(chosen, parts, strict=True) if part in untrained]
        ensure_tournament(session, chosen, waiting)
    else:
        engine_of(session).train(session, chosen, (session.config.distill.steps,))
    found = [load_recovery(one.folder) for one in chosen]
    for part, recovery in zip(parts, found, strict=True):
        if recovery is not None:
            record(session, part)
    return tuple(recovery for recovery in found if recovery is not None)


def check_distilled(session: Session, plans: Sequence[PruningPlan]) -> None:
    """Raise RunError where the files of a distillation are not those that it wrote, for what only reads them."""
    scored = needs_scores(session)
    for plan in plans:
        part = distilled_part(session, plan, scored=scored)
        verdict = session.manifests.verdict(part)
        if verdict.by == "outputs":
            raise RunError(
                f"asked for the distilled {plan.label} of {session.run.folder}, found that {verdict.why} since; "
                f"make it again with: prune-lab run --run {session.run.folder}"
            )


def _data_of(session: Session) -> str:
    """What a student was trained on, without a path of this machine."""
    named = session.config.data.source
    return {
        "shipped": "the pictures that ship with prune-lab",
        "own": Path(named).name if Path(named).exists() else named,
        "drawn": "pictures that the parent drew",
        "none": "noise, and what the parent makes of it",
    }[origin_of(session.config, session.source)]


def _repair_of(session: Session, plan: PruningPlan) -> tuple[str, bool]:
    """(how the cut of ``plan`` was repaired before it was distilled, empty for not at all; whether that was kept)."""
    kind, verdict = session.config.repair.kind, session.run.candidate(plan.id).kept
    if kind == "none" or not session.run.done(verdict):
        return "", False
    return kind, read_verdict(verdict).kept


_FORMATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _format_of(files: Sequence[Path]) -> str:
    """The number format of most weights in safetensors ``files``."""
    sizes: Counter[str] = Counter()
    for dtype, shape in read_headers(files).values():
        sizes[dtype] += math.prod(shape)
    ((most, _),) = sizes.most_common(1)
    return _FORMATS.get(most, most)


def number_format_text(parent: Sequence[Path], student: Sequence[Path]) -> str:
    """The number format of the weights in the files ``student``, and how one comes to that of the ``parent``; empty
    where both have the same.
    """
    was, now = _format_of(parent), _format_of(student)
    if was == now:
        return ""
    return (
        f"{now}, in which students are trained; the parent's is {was}: load it with torch_dtype=torch.{was}"
    )


def _format_told(session: Session, plan: PruningPlan) -> str:
    source, model = session.source, session.run.candidate(plan.id).distilled_model
    if not source.has_weights or source.random_seed is not None or not session.run.done(model):
        return ""
    return number_format_text(source.weight_paths, weight_files(model))


def _training(session: Session, plan: PruningPlan) -> dict[str, object]:
    """The settings and figures of the distillation of ``plan`` by their names, for its card."""
    recovery = load_recovery(session.run.candidate(plan.id).folder)
    assert recovery is not None  # its model is there
    settings, (kind, kept) = session.config.distill, _repair_of(session, plan)
    verdict = "kept, before any training" if kept else "tried and not kept, as the held-out loss did not fall"
    number_format = _format_told(session, plan)
    return {
        **({"repair of the cut": f"{kind}: {verdict}"} if kind else {}),
        "steps": recovery.steps,
        "samples per step": settings.batch,
        "learning rate": f"{settings.learning_rate:g}",
        "weights of the losses (task, output, features)": (
            f"{settings.task_weight:g}, {settings.output_weight:g}, {settings.feature_weight:g}"
        ),
        "data": _data_of(session),
        f"held-out loss after the cut{' and its repair' if kept else ''}": f"{recovery.before:.4g}",
        "held-out loss after distillation": f"{recovery.after:.4g}",
        **({"number format": number_format} if number_format else {}),
    }


def _save_student(session: Session, plan: PruningPlan, folder: Path, force: bool) -> Path:
    source, training = session.source, _training(session, plan)
    return pipeline_with(
        source,
        session.run.candidate(plan.id).distilled_model,
        folder,
        force=force,
        finish=lambda written: write_card(written, with_time(session, plan), source, training),
    )


def distilled_notes(session: Session, *, only: tuple[str, ...] = ()) -> tuple[str, ...]:
    """What was done to the students beside what was asked for, a line each: repairs, number formats, times."""
    plans = [one for one in ensure_plans(session) if not only or one.id in only]
    plans = [one for one in plans if load_recovery(session.run.candidate(one.id).folder) is not None]
    lines = []
    if repaired := [one.label for one in plans if _repair_of(session, one)[1]]:
        lines.append(
            f"the cut of {', '.join(repaired)} was repaired before it was distilled ({session.config.repair.kind}); "
            "loss_before is measured after that; --set repair.kind=none leaves it out"
        )
    formats: dict[str, list[str]] = {}
    for one in plans:
        if told := _format_told(session, one):
            formats.setdefault(told, []).append(one.label)
    lines += [f"number format of {', '.join(labels)}: {told}" for told, labels in formats.items()]
    return (*lines, *filter(None, (timed_anew(session, one) for one in plans)))


def student_folders(session: Session, out: Path, *, only: tuple[str, ...] = ()) -> dict[str, Path]:
    """Where the student of each plan is written, by the plan's id: ``out`` for one, ``out``/<label> for more."""
    plans = ensure_plans(session)
    chosen = [plan_named(plans, text, session) for text in only] or list(plans)
    if len(chosen) == 1:
        return {chosen[0].id: out}
    return {plan.id: out / re.sub(r"[^\w.+-]+", "-", plan.label) for plan in chosen}


def save_students(
    session: Session, out: Path, *, only: tuple[str, ...] = (), force: bool = False
) -> tuple[Path, ...]:
    """Pipeline folders of distilled students that plain diffusers loads: ``out`` for one, ``out``/<label> for more.

    ``only`` names some of the plans. Raises RunError when none of them was distilled, StorageError when ``out`` holds
    something and ``force`` is not given.
    """
    run, folders = session.run, student_folders(session, out, only=only)
    plans = {plan.id: plan for plan in ensure_plans(session)}
    there = [plans[one] for one in folders if run.done(run.candidate(one).distilled_model)]
    check_distilled(session, there)
    if not there:
        raise RunError(
            f"asked to write distilled students of {run.folder}, found none; see the reasons in the table, or "
            "distil them with prune-lab distill"
        )
    return tuple(_save_student(session, plan, folders[plan.id], force) for plan in there)


def recovery_frame(session: Session) -> pd.DataFrame:
    """One row per candidate that was distilled, in order of the plans; columns RECOVERY_SUMMARY_COLUMNS."""
    rows = []
    for plan in ensure_plans(session):
        recovery = load_recovery(session.run.candidate(plan.id).folder)
        if recovery is not None:
            figures = (recovery.before, recovery.after, recovery.seconds, recovery.reason)
            rows.append((plan.label, plan.id, recovery.status, recovery.steps, *figures))
    return pd.DataFrame(rows, columns=list(RECOVERY_SUMMARY_COLUMNS))
