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
from prune_lab.repair import Choice, repair
from prune_lab.runs import Run
from prune_lab.runtime import track, write_frame
from prune_lab.surgery import save_unet
from prune_lab.workflow.measuring import ensure_probe
from prune_lab.workflow.searching import ensure_plans, left_out
from prune_lab.workflow.teacher import Teacher

REPAIRED_COLUMNS = ("plan", "plan_id", "kind", "applied", "impact_before", "impact_after")


# Candidates --------------------------------------------------------------------------------------------------


def ensure_candidates(run: Run, teacher: Teacher | None = None) -> tuple[Candidate, ...]:
    """Every native plan of the run as a smaller model; writes candidates/<id>/{plan.json, unet/, profile.json}.

    Plans that are not native are left out here and named with the reason in the ranking.
    """
    teacher = teacher or Teacher(run)
    plans = [plan for plan in ensure_plans(run, teacher) if not left_out(teacher, plan)]
    return tuple(_candidate(run, teacher, plan) for plan in track(plans, "building candidates"))


def _candidate(run: Run, teacher: Teacher, plan: PruningPlan) -> Candidate:
    paths = run.candidate(plan.id)
    if not run.done(paths.profile):
        settings = teacher.config.profile
        build_candidate(
            teacher.source,
            plan,
            paths.folder,
            device=teacher.device,
            dtype=teacher.dtype,
            batch=settings.batch,
            runs=settings.runs,
            warmup=settings.warmup,
        )
    return load_candidate(paths.folder, teacher.architecture)


def ensure_data(run: Run, teacher: Teacher | None = None) -> TrainingData:
    """Training pictures as latents and text embeddings, the same for every candidate.

    Shipped ones are written to data.safetensors, those that ``data.source`` names to data/, unless it names a finished
    cache or ``data.cached`` is false.
    """
    if run.done(run.data):
        return LatentData.load(run.data)
    if is_cache(run.data_dir):
        return LatentCache.load(run.data_dir)
    teacher = teacher or Teacher(run)
    if teacher.config.data.source:
        return training_data(teacher.pipeline, teacher.config.data, run.data_dir)
    settings = teacher.config.distill
    pictures = teacher.pictures("train", settings.pictures, settings.seed)
    return cached_data(run.data, teacher.pipeline, pictures.pixels, pictures.captions)


def training_and_validation(run: Run, teacher: Teacher) -> tuple[TrainingData, Probe]:
    """What students are trained on, and the held-out rows whose loss judges them.

    Of pictures that the user gave ``probe.samples`` are kept back, in their first variant, and never trained on; of the
    shipped ones the held-out split serves, pictures that the scores have not seen.
    """
    data = ensure_data(run, teacher)
    if not teacher.config.data.source:
        return data, teacher.validation
    settings = teacher.config.probe
    training, kept_back = held_out(data, settings.samples, settings.seed)
    rows = kept_back.rows(torch.arange(settings.samples), torch.zeros(settings.samples, dtype=torch.int64))
    unnamed = [""] * settings.samples
    validation = probe_of_latents(
        teacher.pipeline,
        rows.mean,
        unnamed,
        unnamed,
        timesteps=settings.timesteps,
        seed=settings.seed + 1,
        text=(rows.embeddings, rows.added),
    )
    return training, validation


def ensure_repaired(run: Run, teacher: Teacher | None = None) -> pd.DataFrame:
    """A row per candidate: its impact before and after the repair of its cuts; columns REPAIRED_COLUMNS.

    Writes candidates/<id>/{repair.csv, repaired/}. Nothing, and no rows, with ``repair.kind`` none.
    """
    teacher = teacher or Teacher(run)
    kind = teacher.config.repair.kind
    candidates = ensure_candidates(run, teacher) if kind != "none" else ()
    rows = []
    for candidate in track(candidates, "repairing candidates"):
        paths = candidate.paths
        if not run.done(paths.repaired):
            _repair(run, teacher, candidate)
        tried = pd.read_csv(paths.repair, dtype={"cut": str, "reason": str})
        applied = tried[tried["applied"]]
        measured = tried["impact_before"].dropna()
        before = float(measured.iloc[0]) if len(measured) else math.nan
        after = float(applied["impact_after"].iloc[-1]) if len(applied) else before
        rows.append((candidate.plan.label, candidate.plan.id, kind, len(applied), before, after))
    return pd.DataFrame(rows, columns=list(REPAIRED_COLUMNS))


def _repair(run: Run, teacher: Teacher, candidate: Candidate) -> None:
    student = load_student(candidate, device=teacher.device)
    report = repair(
        student,
        teacher.unet,
        candidate.plan,
        ensure_probe(run, teacher),
        kind=cast("Choice", teacher.config.repair.kind),
    )
    write_frame(candidate.paths.repair, report.frame())
    save_unet(
        student,
        candidate.paths.repaired,
        candidate.plan,
        {"plan": candidate.plan.text, "plan_id": candidate.plan.id, "repair": report.kind},
    )
