"""Steps that evaluate: pictures of teacher and students for the same prompts and seeds, the ranking, the report."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from prune_lab.blocks import BlockGroup
from prune_lab.candidates import load_candidate
from prune_lab.distill import load_heldout, load_recovery
from prune_lab.engines import PictureJob, clip_of, draw_prompts, engine_of, picture_frame
from prune_lab.evaluation import heldout_loss, read_pictures, save_pictures
from prune_lab.plans import PruningPlan
from prune_lab.profiling import TEACHER
from prune_lab.ranking import (
    CandidateResult,
    Ranking,
    Verdict,
    rank,
    ranking_from_frame,
    tournament_from_frame,
)
from prune_lab.report import write_report
from prune_lab.runs import Run, read_records
from prune_lab.runtime import write_frame
from prune_lab.schemas import PICTURES_COLUMNS, RANKING, TOURNAMENT
from prune_lab.session import Session, ensure_probe, tell_roles, training_and_validation
from prune_lab.session.parts import (
    lacking,
    pictures_part,
    prompts_part,
    ranking_part,
    record,
    report_part,
    teacher_pictures_part,
)
from prune_lab.workflow.distilling import check_distilled
from prune_lab.workflow.intact import check_intact
from prune_lab.workflow.measuring import ensure_costs, ensure_reductions, ensure_turns
from prune_lab.workflow.searching import ensure_plans, left_out
from prune_lab.workflow.students import ensure_candidates
from prune_lab.workflow.widths import measured_impacts

# Pictures ----------------------------------------------------------------------------------------------------


def ensure_pictures(session: Session) -> tuple[Path, ...]:
    """Folders of pictures by the teacher, and by each candidate before and after distillation.

    All draw the same prompts with the same seeds. Writes pictures/teacher/ and candidates/<id>/pictures/{pruned,
    distilled}/, a PNG for every prompt and seed, and pictures/prompts.csv.
    """
    run, candidates = session.run, ensure_candidates(session)
    check_distilled(session, [one.plan for one in candidates])
    frame, prompts = picture_frame(session), prompts_part(session)
    if lacking(session, prompts):
        write_frame(run.picture_prompts, frame)
        record(session, prompts)
    wanted = {teacher_pictures_part(session): PictureJob(run.teacher_pictures)}
    for one in candidates:
        paths = one.paths
        wanted[pictures_part(session, one.plan, "pruned")] = PictureJob(paths.pictures_pruned, one)
        distilled = pictures_part(session, one.plan, "distilled")
        if run.done(paths.distilled_model):
            wanted[distilled] = PictureJob(paths.pictures_distilled, one, "distilled")
        else:
            lacking(session, distilled)  # of an earlier distillation
    missing = lacking(session, *wanted)
    drawn = engine_of(session).draw(session, [wanted[part] for part in missing]) if missing else ()
    for part, pixels in zip(missing, drawn, strict=True):
        save_pictures(wanted[part].folder, pixels, frame["file"].tolist())
        record(session, part)
    return tuple(job.folder for job in wanted.values())


def _mean_score(session: Session, folder: Path) -> float:
    if not session.run.done(folder):
        return math.nan
    return float(
        clip_of(session, read_pictures(folder, picture_frame(session)["file"].tolist())).double().mean()
    )


# Ranking -----------------------------------------------------------------------------------------------------


def one_shot_impacts(session: Session, plans: Iterable[PruningPlan]) -> dict[str, float]:
    """Impact of each whole plan by the run's criterion on its probe, by plan id, measured and not added up; of plans
    that make blocks narrower by output-mse alone, NaN by another.
    """
    plans = list(plans)
    groups = [BlockGroup(plan.id, "plan", plan.removed) for plan in plans if not plan.widths and plan.removed]
    entries = engine_of(session).score(session, groups).entries if groups else ()
    found = {entry.group.name: entry.impact for entry in entries}
    narrower = [plan for plan in plans if plan.widths]
    known = session.config.score.criterion == "output-mse"
    impacts = measured_impacts(session, narrower) if known else [math.nan] * len(narrower)
    return found | dict(zip((plan.id for plan in narrower), impacts, strict=True))


def _teacher_result(session: Session) -> CandidateResult:
    costs, reductions = ensure_costs(session).total, ensure_reductions(session)
    own = reductions[reductions["plan"] == "teacher"]  # that of the run comes first
    losses = heldout_loss(session.model, training_and_validation(session)[1]).double()
    loss, score = float(losses.mean()), _mean_score(session, session.run.teacher_pictures)
    return CandidateResult(
        plan="teacher",
        plan_id="teacher",
        origin="teacher",
        blocks_removed=0,
        params=costs.params,
        macs=costs.macs,
        paper_macs=costs.paper_macs,
        median_ms=float(own["median_ms"].iloc[0]),
        latency_change=0.0,
        impact_one_shot=0.0,
        loss_before=loss,
        loss_after=loss,
        clip_before=score,
        clip_after=score,
        heldout=tuple(losses.tolist()),
    )


def _candidate_result(
    session: Session, plan: PruningPlan, impact: float, fate: Verdict | None
) -> CandidateResult:
    run, costs = session.run, ensure_costs(session).of(plan)
    paths = run.candidate(plan.id)
    recovery = load_recovery(paths.folder)
    built = run.done(paths.profile)
    change = load_candidate(paths.folder, session.architecture).profile.change if built else None
    whole = ensure_turns(session, ())[TEACHER].latency.median_ms
    losses: tuple[float, ...] = ()
    if recovery and recovery.status == "done" and run.done(paths.heldout):
        losses = tuple(map(float, load_heldout(paths.folder).loc[recovery.steps]))
    return CandidateResult(
        plan=plan.label,
        plan_id=plan.id,
        origin="search" if plan.origin == "search" else "control",
        blocks_removed=len(plan.removed),
        form=plan.form,
        params=costs.params,
        macs=costs.macs,
        paper_macs=costs.paper_macs,
        # Milliseconds of different rounds do not compare; changes do.
        median_ms=whole * (1 + change.change) if change else math.nan,
        latency_change=change.change if change else math.nan,
        latency_low=math.nan if change is None or change.low is None else change.low,
        latency_high=math.nan if change is None or change.high is None else change.high,
        impact_one_shot=impact,
        loss_before=recovery.before if recovery else math.nan,
        loss_after=recovery.after if recovery else math.nan,
        clip_before=_mean_score(session, paths.pictures_pruned),
        clip_after=_mean_score(session, paths.pictures_distilled),
        steps=recovery.steps if recovery else 0,
        rung=fate.rung if fate else None,
        heldout=losses,
        failure=recovery.reason if recovery else "",
        dropped=fate.reason if fate and fate.fate == "dropped" else "",
        left_out=left_out(session, plan) or ("" if recovery else "it was not distilled"),
    )


def ensure_ranking(session: Session) -> Ranking:
    """The candidates in order of quality at their cost, with those left out and why; writes ranking.csv.

    Pictures that are missing are drawn first. Distillation is not started from here: a candidate without it is
    left out.
    """
    run, plans = session.run, ensure_plans(session)
    ensure_pictures(session)
    ensure_probe(session)
    ensure_costs(session)
    ensure_reductions(session)
    part = ranking_part(session, plans)
    if not lacking(session, part):
        return ranking_from_frame(read_records(run.ranking, RANKING))
    impacts = one_shot_impacts(session, plans)
    fates = {}
    if run.done(run.tournament):
        fates = tournament_from_frame(read_records(run.tournament, TOURNAMENT)).fates
    contenders = [
        _candidate_result(session, plan, impacts.get(plan.id, 0.0), fates.get(plan.id)) for plan in plans
    ]
    ranking = rank([_teacher_result(session), *contenders])
    write_frame(run.ranking, ranking.frame())
    record(session, part)
    return ranking


def written_report(run: Run) -> Path:
    """report/index.html, written from the tables and pictures that are there.

    Raises DataError where something of the run is not what a step wrote (see ``check_intact``).
    """
    session = Session(run)
    check_intact(session)
    path = write_report(run)
    session.manifests.record(report_part(run))
    return path


def ensure_report(session: Session) -> Path:
    """report/index.html from the tables and pictures that are there; written anew when one of them was changed."""
    run, part = session.run, report_part(session.run)
    return written_report(run) if lacking(session, part) else run.report


# Models outside of a run -------------------------------------------------------------------------------------


def quality(session: Session, model: Any, told: set[str] | None = None) -> dict[str, float | str]:
    """``loss`` (held-out denoising), ``clip`` (mean score) and ``clip_low`` of ``model`` in the teacher's pipeline.

    NaN is what cannot be had, with the reasons in ``not_measured``: the loss without pictures, shipped or of
    ``data.source``, the scores without a scorer. ``told`` are lines on the data that need not be shown again.
    """
    tell_roles(session, told)
    # What a model draws itself is no measure by which models can be compared.
    judged = session.data_origin in ("shipped", "own")
    loss = float(heldout_loss(model, session.validation).double().mean()) if judged else math.nan
    scores = clip_of(session, draw_prompts(session, model))
    why = {"loss": "" if judged else "no held-out pictures; give --data DIR"}
    why["clip"] = "" if session.scorer else session.scorer_choice.reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in why.items() if reason)
    scored = {"clip": float(scores.double().mean()), "clip_low": float(scores.min())}
    return {"loss": loss, **scored, "not_measured": reasons}


def quality_frame(session: Session) -> pd.DataFrame:
    """One row per set of pictures: plan, plan_id, weights (teacher, pruned, distilled), pictures, clip, clip_low.

    ``clip`` is the mean CLIP score of the pictures, ``clip_low`` the lowest. Pictures that are missing are drawn.
    """
    run = session.run
    ensure_pictures(session)
    rows = [("teacher", "teacher", "teacher", run.teacher_pictures)]
    for plan in ensure_plans(session):
        paths = run.candidate(plan.id)
        rows.append((plan.label, plan.id, "pruned", paths.pictures_pruned))
        rows.append((plan.label, plan.id, "distilled", paths.pictures_distilled))
    values = []
    for *of, path in rows:
        if run.done(path):
            scores = clip_of(session, read_pictures(path, picture_frame(session)["file"].tolist()))
            values.append((*of, len(scores), float(scores.mean()), float(scores.min())))
    return pd.DataFrame(values, columns=list(PICTURES_COLUMNS))
