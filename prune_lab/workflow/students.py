"""Steps that make students: candidates cut from the teacher, and the repair of their cuts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import pandas as pd

from prune_lab.candidates import Candidate, build_candidate, load_candidate, load_student, profile_candidate
from prune_lab.repair import RepairKind, repair
from prune_lab.runs import read_records
from prune_lab.runtime import track, write_frame
from prune_lab.schemas import REPAIRED_COLUMNS, REPAIRS
from prune_lab.session import Session, ensure_probe
from prune_lab.session.parts import lacking, profile_part, pruned_part, record, repaired_part
from prune_lab.surgery import save_model
from prune_lab.workflow.measuring import ensure_turns, service_of
from prune_lab.workflow.searching import ensure_plans, left_out

# Candidates --------------------------------------------------------------------------------------------------


def ensure_candidates(session: Session) -> tuple[Candidate, ...]:
    """Every plan of the run that can be built, as a model; writes candidates/<id>/{plan.json, pruned/, profile.json}.

    Each is built in the form of its plan. All are built first and then timed in turns with the teacher. Plans that
    cannot be built are left out here and named with the reason in the ranking.
    """
    plans = [plan for plan in ensure_plans(session) if not left_out(session, plan)]
    place: dict[str, Any] = {"device": session.device, "dtype": session.dtype}
    cuts = {pruned_part(session, plan): plan for plan in plans}
    for part in track(lacking(session, *cuts), "building candidates"):
        build_candidate(session.source, cuts[part], part.folder, profiled=False, **place)
        record(session, part)
    profiles = {profile_part(session, plan): plan for plan in plans}
    if missing := lacking(session, *profiles):
        times = ensure_turns(session, [profiles[part] for part in missing])
        service = service_of(session)
        for part in track(missing, "profiling candidates"):
            plan = profiles[part]
            profile_candidate(Candidate(plan, part.folder), times[plan.id], service)
            record(session, part)
    candidates = (
        load_candidate(session.run.candidate(plan.id).folder, session.architecture) for plan in plans
    )
    # names and origin as the run has them
    return tuple(dataclasses.replace(one, plan=plan) for one, plan in zip(candidates, plans, strict=True))


def ensure_repaired(session: Session) -> pd.DataFrame:
    """A row per candidate: its impact before and after the repair of its cuts; columns REPAIRED_COLUMNS.

    Writes candidates/<id>/{repair.csv, repaired/}. Nothing, and no rows, with ``repair.kind`` none.
    """
    kind = session.config.repair.kind
    if kind == "none":
        return pd.DataFrame(columns=list(REPAIRED_COLUMNS))
    candidates = ensure_candidates(session)
    ensure_probe(session)
    parts = [repaired_part(session, one.plan) for one in candidates]
    missing, rows = lacking(session, *parts), []
    for candidate, part in track(list(zip(candidates, parts, strict=True)), "repairing candidates"):
        paths = candidate.paths
        if part in missing:
            _repair(session, candidate)
            record(session, part)
        tried = read_records(paths.repair, REPAIRS)
        applied = tried[tried["applied"]]
        measured = tried["impact_before"].dropna()
        before = float(measured.iloc[0]) if len(measured) else math.nan
        after = float(applied["impact_after"].iloc[-1]) if len(applied) else before
        rows.append((candidate.plan.label, candidate.plan.id, kind, len(applied), before, after))
    return pd.DataFrame(rows, columns=list(REPAIRED_COLUMNS))


def _repair(session: Session, candidate: Candidate) -> None:
    student, plan = load_student(candidate, device=session.device), candidate.plan
    kind = cast("RepairKind", session.config.repair.kind)
    report = repair(student, session.model, plan, ensure_probe(session), kind=kind)
    write_frame(candidate.paths.repair, report.frame())
    notes = {"plan": plan.text, "plan_id": plan.id, "repair": report.kind}
    save_model(student, candidate.paths.repaired, plan, notes)
