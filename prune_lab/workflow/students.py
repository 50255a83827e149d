"""Steps that make students: candidates cut from the teacher, the repair of their cuts, and their training data."""

from __future__ import annotations

import math
from typing import cast

import pandas as pd
import torch

from prune_lab.candidates import Candidate, build_candidate, load_candidate, load_student
from prune_lab.distill import (
    LatentCache,
    LatentData,
    TrainingData,
    cached_data,
    held_out,
    is_cache,
    training_data,
)
from prune_lab.plans import PruningPlan
from prune_lab.probes import Probe, probe_of_latents
from prune_lab.repair import RepairKind, repair
from prune_lab.runtime import track, write_frame
from prune_lab.schemas import REPAIRED_COLUMNS
from prune_lab.surgery import save_unet
from prune_lab.workflow.measuring import ensure_probe
from prune_lab.workflow.searching import ensure_plans, left_out
from prune_lab.workflow.session import Session

# Candidates --------------------------------------------------------------------------------------------------


def ensure_candidates(session: Session) -> tuple[Candidate, ...]:
    """Every native plan of the run as a smaller model; writes candidates/<id>/{plan.json, unet/, profile.json}.

    Plans that are not native are left out here and named with the reason in the ranking.
    """
    plans = [plan for plan in ensure_plans(session) if not left_out(session, plan)]
    return tuple(_candidate(session, plan) for plan in track(plans, "building candidates"))


def _candidate(session: Session, plan: PruningPlan) -> Candidate:
    paths = session.run.candidate(plan.id)
    if not session.run.done(paths.profile):
        settings = session.config.profile
        build_candidate(
            session.source,
            plan,
            paths.folder,
            device=session.device,
            dtype=session.dtype,
            batch=settings.batch,
            runs=settings.runs,
            warmup=settings.warmup,
        )
    return load_candidate(paths.folder, session.architecture)


def ensure_data(session: Session) -> TrainingData:
    """Training pictures as latents and text embeddings, the same for every candidate.

    Shipped ones are written to data.safetensors, those that ``data.source`` names to data/, unless it names a finished
    cache or ``data.cached`` is false.
    """
    run = session.run
    if run.done(run.data):
        return LatentData.load(run.data)
    if is_cache(run.data_dir):
        return LatentCache.load(run.data_dir)
    if session.config.data.source:
        return training_data(session.pipeline, session.config.data, run.data_dir)
    settings = session.config.distill
    pictures = session.pictures("train", settings.pictures, settings.seed)
    return cached_data(run.data, session.pipeline, pictures.pixels, pictures.captions)


def training_and_validation(session: Session) -> tuple[TrainingData, Probe]:
    """What students are trained on, and the held-out rows whose loss judges them.

    Of pictures that the user gave ``probe.samples`` are kept back, in their first variant, and never trained on; of the
    shipped ones the held-out split serves, pictures that the scores have not seen.
    """
    data = ensure_data(session)
    if not session.config.data.source:
        return data, session.validation
    settings = session.config.probe
    training, kept_back = held_out(data, settings.samples, settings.seed)
    rows = kept_back.rows(torch.arange(settings.samples), torch.zeros(settings.samples, dtype=torch.int64))
    unnamed = [""] * settings.samples
    validation = probe_of_latents(
        session.pipeline,
        rows.mean,
        unnamed,
        unnamed,
        timesteps=settings.timesteps,
        seed=settings.seed + 1,
        text=(rows.embeddings, rows.added),
    )
    return training, validation


def ensure_repaired(session: Session) -> pd.DataFrame:
    """A row per candidate: its impact before and after the repair of its cuts; columns REPAIRED_COLUMNS.

    Writes candidates/<id>/{repair.csv, repaired/}. Nothing, and no rows, with ``repair.kind`` none.
    """
    kind = session.config.repair.kind
    candidates = ensure_candidates(session) if kind != "none" else ()
    rows = []
    for candidate in track(candidates, "repairing candidates"):
        paths = candidate.paths
        if not session.run.done(paths.repaired):
            _repair(session, candidate)
        tried = pd.read_csv(paths.repair, dtype={"cut": str, "reason": str})
        applied = tried[tried["applied"]]
        measured = tried["impact_before"].dropna()
        before = float(measured.iloc[0]) if len(measured) else math.nan
        after = float(applied["impact_after"].iloc[-1]) if len(applied) else before
        rows.append((candidate.plan.label, candidate.plan.id, kind, len(applied), before, after))
    return pd.DataFrame(rows, columns=list(REPAIRED_COLUMNS))


def _repair(session: Session, candidate: Candidate) -> None:
    student = load_student(candidate, device=session.device)
    report = repair(
        student,
        session.unet,
        candidate.plan,
        ensure_probe(session),
        kind=cast("RepairKind", session.config.repair.kind),
    )
    write_frame(candidate.paths.repair, report.frame())
    save_unet(
        student,
        candidate.paths.repaired,
        candidate.plan,
        {"plan": candidate.plan.text, "plan_id": candidate.plan.id, "repair": report.kind},
    )
