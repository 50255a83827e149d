"""Steps that judge: pictures of teacher and students for the same prompts and seeds, the ranking, the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from prune_lab.blocks import BlockGroup
from prune_lab.candidates import Candidate, State, load_candidate, load_student
from prune_lab.distill import load_heldout, load_recovery
from prune_lab.errors import DataError
from prune_lab.evaluation import clip_scores, heldout_loss, save_grid
from prune_lab.importance import ImportanceTable, score
from prune_lab.plans import PruningPlan
from prune_lab.ranking import (
    CandidateResult,
    Ranking,
    Verdict,
    rank,
    ranking_from_frame,
    tournament_from_frame,
)
from prune_lab.report import write_report
from prune_lab.runtime import track, write_frame
from prune_lab.schemas import PICTURES_COLUMNS
from prune_lab.workflow.measuring import ensure_costs, ensure_reductions, run_scoring_context
from prune_lab.workflow.searching import ensure_plans, left_out, origin_of
from prune_lab.workflow.session import Session, drawn
from prune_lab.workflow.students import ensure_candidates, training_and_validation

COLUMNS, GAP = 4, 2  # of a grid of pictures
SHOWN = (".csv", ".json", ".png", ".toml")  # what a report reads


# Pictures ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PictureJob:
    """A sheet of pictures: where it goes and who draws it, a candidate before or after distillation, or the teacher."""

    path: Path
    candidate: Candidate | None = None
    distilled: bool = False


def drawn_for(session: Session, candidate: Candidate | None, distilled: bool) -> Tensor:
    """The pictures of one grid, uint8 (prompts x seeds, 3, H, W)."""
    if candidate is None:
        return drawn(session, session.unet)
    state: State = "distilled" if distilled else "pruned"
    return drawn(session, load_student(candidate, state, device=session.device, dtype=session.dtype))


def _draw_here(session: Session, grids: Sequence[PictureJob]) -> Iterator[Tensor]:
    for grid in track(grids, "drawing for each model"):
        yield drawn_for(session, grid.candidate, grid.distilled)


def _draw_on_ray(session: Session, grids: Sequence[PictureJob]) -> Iterator[Tensor]:
    from prune_lab.workflow.remote import draw_on_ray  # which draws with what is above

    yield from draw_on_ray(session, grids)


_DRAW = {"local": _draw_here, "ray": _draw_on_ray}


def ensure_pictures(session: Session) -> tuple[Path, ...]:
    """Grids drawn by the teacher, by each candidate as it was cut, and after distillation; same prompts and seeds.

    Writes pictures/teacher.png and candidates/<id>/pictures_{pruned,distilled}.png.
    """
    run = session.run
    wanted = [PictureJob(run.teacher_pictures)]
    for candidate in ensure_candidates(session):
        wanted.append(PictureJob(candidate.paths.pictures_pruned, candidate))
        if run.done(candidate.paths.distilled_unet):
            wanted.append(PictureJob(candidate.paths.pictures_distilled, candidate, distilled=True))
    missing = [grid for grid in wanted if not run.done(grid.path)]
    if missing:
        sheets = _DRAW[session.config.rank.engine](session, missing)
        for grid, pixels in zip(missing, sheets, strict=True):
            save_grid(grid.path, pixels, columns=COLUMNS, gap=GAP)
    return tuple(grid.path for grid in wanted)


def read_grid(path: Path, count: int) -> Tensor:
    """The ``count`` pictures of a grid that a step of a run drew, uint8 (count, 3, H, W).

    Raises DataError when the sheet does not divide into so many.
    """
    with Image.open(path) as image:
        sheet = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    height, width = (sheet.shape[1] + GAP) // rows, (sheet.shape[2] + GAP) // columns
    if (height * rows - GAP, width * columns - GAP) != tuple(sheet.shape[1:]):
        raise DataError(
            f"asked to read {count} pictures from {path}, found a sheet of {sheet.shape[2]} x {sheet.shape[1]} pixels "
            "that does not divide into them; remove it and run the step again"
        )
    cells = [(row * height, column * width) for row in range(rows) for column in range(columns)][:count]
    return torch.stack([sheet[:, y : y + height - GAP, x : x + width - GAP] for y, x in cells])


def picture_scores(session: Session, path: Path) -> Tensor:
    """CLIP score of every picture in the grid ``path`` against its prompt, (prompts x seeds,)."""
    prompts = [prompt for prompt in session.prompts for _ in session.config.evaluate.seeds]
    return clip_scores(session.scorer, read_grid(path, len(prompts)), prompts)


def _mean_score(session: Session, path: Path) -> float:
    return float(picture_scores(session, path).double().mean()) if session.run.done(path) else math.nan


# Ranking -----------------------------------------------------------------------------------------------------


def _score_here(session: Session, groups: Sequence[BlockGroup]) -> ImportanceTable:
    return score(run_scoring_context(session), groups, session.config.score.criterion, bootstrap=0)


def _score_on_ray(session: Session, groups: Sequence[BlockGroup]) -> ImportanceTable:
    from prune_lab.workflow.remote import score_on_ray

    return score_on_ray(session, groups)


_SCORE = {"local": _score_here, "ray": _score_on_ray}


def one_shot_impacts(session: Session, plans: Iterable[PruningPlan]) -> dict[str, float]:
    """Impact of each whole plan by the run's criterion on its probe, by plan id: what adding up only predicts."""
    groups = [BlockGroup(plan.id, "plan", plan.removed) for plan in plans if plan.removed]
    table = _SCORE[session.config.rank.engine](session, groups)
    return {entry.group.name: entry.impact for entry in table.entries}


def _teacher_itself(session: Session) -> CandidateResult:
    costs = ensure_costs(session).total
    reductions = ensure_reductions(session)
    own = reductions[(reductions["plan"] == "teacher") & (reductions["model"] == session.config.model)]
    _, validation = training_and_validation(session)
    losses = heldout_loss(session.unet, validation).double()
    loss = float(losses.mean())
    score = _mean_score(session, session.run.teacher_pictures)
    return CandidateResult(
        plan="teacher",
        plan_id="teacher",
        origin="teacher",
        blocks_removed=0,
        params=costs.params,
        macs=costs.macs,
        paper_macs=costs.paper_macs,
        median_ms=float(own["median_ms"].iloc[0]),
        impact_one_shot=0.0,
        loss_before=loss,
        loss_after=loss,
        clip_before=score,
        clip_after=score,
        heldout=tuple(losses.tolist()),
    )


def _contender(session: Session, plan: PruningPlan, impact: float, fate: Verdict | None) -> CandidateResult:
    run = session.run
    costs = ensure_costs(session).of(plan)
    paths = run.candidate(plan.id)
    recovery = load_recovery(paths.folder)
    built = run.done(paths.profile)
    latency = load_candidate(paths.folder, session.architecture).profile.latency if built else None
    losses: tuple[float, ...] = ()
    if recovery and recovery.status == "done" and run.done(paths.heldout):
        row = load_heldout(paths.folder).loc[recovery.steps].to_numpy(dtype=np.float64)
        losses = tuple(float(loss) for loss in row)
    return CandidateResult(
        plan=plan.label,
        plan_id=plan.id,
        origin=origin_of(run, plan.id),
        blocks_removed=len(plan.removed),
        params=costs.params,
        macs=costs.macs,
        paper_macs=costs.paper_macs,
        median_ms=latency.median_ms if latency else math.nan,
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
    run = session.run
    if run.done(run.ranking):
        return ranking_from_frame(pd.read_csv(run.ranking))
    plans = ensure_plans(session)
    ensure_pictures(session)
    impacts = one_shot_impacts(session, plans)
    fates = tournament_from_frame(pd.read_csv(run.tournament)).fates if run.done(run.tournament) else {}
    contenders = [_contender(session, plan, impacts.get(plan.id, 0.0), fates.get(plan.id)) for plan in plans]
    ranking = rank([_teacher_itself(session), *contenders])
    write_frame(run.ranking, ranking.frame())
    return ranking


def ensure_report(session: Session) -> Path:
    """report/index.html from the tables and pictures that are there; written anew when one of them is newer."""
    run = session.run
    shown = (
        path for path in run.folder.rglob("*") if path.suffix in SHOWN and run.report_dir not in path.parents
    )
    newest = max((path.stat().st_mtime_ns for path in shown if path != run.steps), default=0)
    if run.done(run.report) and run.report.stat().st_mtime_ns >= newest:
        return run.report
    return write_report(run)


# Models outside of a run -------------------------------------------------------------------------------------


def quality(session: Session, unet: Any) -> dict[str, float]:
    """``loss`` (held-out denoising), ``clip`` (mean score) and ``clip_low`` of ``unet`` in the teacher's pipeline."""
    loss = heldout_loss(unet, session.validation).double().mean()
    prompts = [prompt for prompt in session.prompts for _ in session.config.evaluate.seeds]
    scores = clip_scores(session.scorer, drawn(session, unet), prompts)
    return {"loss": float(loss), "clip": float(scores.double().mean()), "clip_low": float(scores.min())}


def quality_frame(session: Session) -> pd.DataFrame:
    """One row per grid of the run: plan, plan_id, weights (teacher, pruned, distilled), pictures, clip, clip_low.

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
    for plan_label, plan_id, weights, path in rows:
        if run.done(path):
            scores = picture_scores(session, path)
            values.append(
                (plan_label, plan_id, weights, len(scores), float(scores.mean()), float(scores.min()))
            )
    return pd.DataFrame(values, columns=list(PICTURES_COLUMNS))
