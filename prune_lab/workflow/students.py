"""Steps that make students: candidates cut from the teacher, and the repair of their cuts."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch

from prune_lab.candidates import Candidate, build_candidate, load_candidate, load_student, profile_candidate
from prune_lab.evaluation import heldout_loss
from prune_lab.models.streamed import is_streamed
from prune_lab.plans import PruningPlan
from prune_lab.repair import LEAST_PICTURES, MemoryShortError, RepairKind, RepairReport, SharedRepair, repair
from prune_lab.runs import read_records
from prune_lab.runs.records import read_typed
from prune_lab.runtime import note, track, write_frame, write_json
from prune_lab.schemas import REPAIR_COLUMNS, REPAIRED_COLUMNS, REPAIRS
from prune_lab.session import Session, deciding_probe, ensure_probe
from prune_lab.session.parts import lacking, profile_part, pruned_part, record, repaired_part, repairs_part
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
    """A row per candidate: its impact before and after the repair of its cuts, its losses, and whether the repair was
    kept; columns REPAIRED_COLUMNS.

    A repair is kept if the mean loss of the model falls by it on rows that nothing else looks at (``deciding_probe``);
    where it is not, the repaired model is the one that was cut. Writes candidates/<id>/{repair.csv, kept.json,
    repaired/} and repairs.csv. Nothing, and no rows, with ``repair.kind`` none.
    """
    kind = session.config.repair.kind
    if kind == "none":
        return pd.DataFrame(columns=list(REPAIRED_COLUMNS))
    candidates = ensure_candidates(session)
    ensure_probe(session)
    parts = [repaired_part(session, one.plan) for one in candidates]
    missing, rows = lacking(session, *parts), []
    bench = _Repairing(session) if missing else None
    for candidate, part in track(list(zip(candidates, parts, strict=True)), "repairing candidates"):
        paths = candidate.paths
        if bench is not None and part in missing:
            bench.repair(candidate)
            record(session, part)
        tried, verdict = read_records(paths.repair, REPAIRS), read_verdict(paths.kept)
        applied = tried[tried["applied"]]
        measured = tried["impact_before"].dropna()
        before = float(measured.iloc[0]) if len(measured) else math.nan
        after = float(applied["impact_after"].iloc[-1]) if len(applied) else before
        found = (candidate.plan.label, candidate.plan.id, kind, len(applied), before, after)
        rows.append((*found, verdict.kept, verdict.loss_before, verdict.loss_after, verdict.rows))
    frame = pd.DataFrame(rows, columns=list(REPAIRED_COLUMNS))
    table = repairs_part(session, [one.plan for one in candidates])
    if lacking(session, table):
        write_frame(session.run.repairs, frame)
        record(session, table)
    return frame


@dataclasses.dataclass(frozen=True, slots=True)
class RepairVerdict:
    """Whether a repair was kept, and the mean losses without and with it that decided it, on so many rows."""

    kept: bool
    loss_before: float
    loss_after: float
    rows: int


def read_verdict(path: Path) -> RepairVerdict:
    """The verdict in the file at ``path``. Raises DataError where it is damaged."""
    return read_typed(path, RepairVerdict)


class _Repairing:
    """The repair of the candidates of a run, with what they have in common."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._kind = cast("RepairKind", session.config.repair.kind)
        self._probe = ensure_probe(session)
        self._rows = deciding_probe(session)
        self._shared: SharedRepair | None = None
        pictures = len(set(self._probe.pictures.tolist()))
        self._possible = pictures >= LEAST_PICTURES
        if not self._possible:
            note(
                f"repair left out: the probe has {pictures} pictures, and it takes {LEAST_PICTURES} to fit on some and "
                "hold out others (probe.samples, or probe.drawn of what the model draws)"
            )
            return
        # In half precision a correction would be rounded where it is tried.
        if session.dtype == torch.float32 and not is_streamed(session.model):
            self._shared = SharedRepair(session.model, self._probe, kind=self._kind)

    def repair(self, candidate: Candidate) -> None:
        """Write what the repair of ``candidate`` tried, the model after it, and whether it was kept."""
        device, paths, plan = self._session.device, candidate.paths, candidate.plan
        student = load_student(candidate, device=device)
        before = float(heldout_loss(student, self._rows).double().mean())
        report = self._repaired(student, plan) if self._possible else None
        after = float(heldout_loss(student, self._rows).double().mean())
        kept = after < before
        if report is not None and report.applied and not kept:
            student = load_student(candidate, device=device)
            note(
                f"{plan.title}: the repair is not kept, the loss on {len(self._rows)} rows that it was not fitted on "
                f"goes from {before:.4g} to {after:.4g}"
            )
        write_frame(
            paths.repair, pd.DataFrame(columns=list(REPAIR_COLUMNS)) if report is None else report.frame()
        )
        write_json(paths.kept, dataclasses.asdict(RepairVerdict(kept, before, after, len(self._rows))))
        notes = {"plan": plan.text, "plan_id": plan.id, "repair": self._kind if kept else "none"}
        save_model(student, paths.repaired, plan, notes)

    def _repaired(self, student: Any, plan: PruningPlan) -> RepairReport:
        if self._shared is not None and not plan.widths:
            try:
                return self._shared.repair(student, plan)
            except MemoryShortError as error:
                note(f"repairing plan by plan: {error}")
                self._shared = None
        return repair(student, self._session.model, plan, self._probe, kind=self._kind)
