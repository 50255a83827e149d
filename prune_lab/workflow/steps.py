"""The steps of a run in order, with the files that each writes and the parts by which it is done and redone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from prune_lab.distill import load_recovery
from prune_lab.engines import needs_scores
from prune_lab.errors import DataError
from prune_lab.models import ModelSource
from prune_lab.plans import PruningPlan
from prune_lab.runs import Part, Run
from prune_lab.session import Session, ensure_data, ensure_probe
from prune_lab.session.parts import (
    blocks_part,
    captions_part,
    costs_part,
    data_part,
    distilled_part,
    latency_part,
    pictures_part,
    plans_part,
    probe_part,
    profile_part,
    prompts_part,
    pruned_part,
    ranking_part,
    reductions_part,
    repaired_part,
    repairs_part,
    report_part,
    rounds_part,
    scores_part,
    shares_part,
    sources_part,
    steps_part,
    teacher_pictures_part,
    tournament_part,
    validation_part,
    width_scores_part,
)
from prune_lab.workflow.distilling import ensure_distilled
from prune_lab.workflow.measuring import (
    ensure_blocks,
    ensure_costs,
    ensure_reductions,
    ensure_scores,
    ensure_shares,
)
from prune_lab.workflow.ranking import ensure_pictures, ensure_ranking, ensure_report
from prune_lab.workflow.searching import ensure_plans, plans_there
from prune_lab.workflow.students import ensure_candidates, ensure_repaired
from prune_lab.workflow.widths import ensure_width_scores, needs_width_scores

Paths = Callable[[Run], tuple[Path, ...]]
Parts = Callable[[Session, Sequence[PruningPlan]], Iterable[Part]]


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a run."""

    name: str  # ``SETTINGS`` names the step that reads a setting first
    does: str
    ensure: Callable[[Session], object]
    products: Paths  # files and folders that it writes
    parts: Parts  # what of it is done, and redone, by itself; of the plans that can be built
    alone: bool = True  # whether a model without its pipeline is enough for it


def _of_candidates(*parts: str) -> Paths:
    """These paths of every candidate, by the names of the attributes of ``CandidatePaths``."""
    return lambda run: tuple(getattr(run.candidate(one), part) for one in run.plan_ids() for part in parts)


def _files(*names: str) -> Paths:
    """These paths of a run, by the names of the attributes of ``Run``."""
    return lambda run: tuple(getattr(run, name) for name in names)


def _pictures(run: Run) -> tuple[Path, ...]:
    drawn = _of_candidates("pictures_pruned", "pictures_distilled")(run)
    return run.picture_prompts, run.teacher_pictures, *drawn


def _distilled(run: Run) -> tuple[Path, ...]:
    return run.tournament, run.curves_dir, *_of_candidates("recovery", "heldout", "grids", "distilled")(run)


def _one(part: Callable[[Session], Part]) -> Parts:
    return lambda session, _plans: (part(session),)


def _of_each(*parts: Callable[[Session, PruningPlan], Part]) -> Parts:
    return lambda session, plans: [part(session, plan) for part in parts for plan in plans]


def _ensure_all_scores(session: Session) -> None:
    ensure_scores(session)
    if needs_width_scores(session.config):
        ensure_width_scores(session)


def _score_parts(session: Session, _plans: Sequence[PruningPlan]) -> Iterable[Part]:
    """Those of the parts of blocks too, where widths are searched."""
    whole = scores_part(session)
    return (whole, width_scores_part(session)) if needs_width_scores(session.config) else (whole,)


def _plan_parts(session: Session, _plans: Sequence[PruningPlan]) -> Iterable[Part]:
    timed = session.run.done(session.run.latency) or "latency" in " ".join(session.config.search.budgets)
    return (latency_part(session), plans_part(session)) if timed else (plans_part(session),)


def _repaired_parts(session: Session, plans: Sequence[PruningPlan]) -> Iterable[Part]:
    """The repaired models and their table; none where ``repair.kind`` is none."""
    if session.config.repair.kind == "none":
        return ()
    return [*(repaired_part(session, plan) for plan in plans), repairs_part(session, plans)]


def _data_parts(session: Session, _plans: Sequence[PruningPlan]) -> Iterable[Part]:
    own = session.data_origin in ("own", "drawn")
    return (validation_part(session), data_part(session)) if own else (data_part(session),)


def _distilled_parts(session: Session, plans: Sequence[PruningPlan]) -> Iterable[Part]:
    scored = needs_scores(session)
    yield from (distilled_part(session, plan, scored=scored) for plan in plans)
    if session.config.rank.eta:
        yield tournament_part(session, plans)
    if session.config.distill.random_conditioning:
        yield captions_part(session)


def _picture_parts(session: Session, plans: Sequence[PruningPlan]) -> Iterable[Part]:
    yield from (prompts_part(session), teacher_pictures_part(session))
    for plan in plans:
        yield pictures_part(session, plan, "pruned")
        recovery = None
        with contextlib.suppress(DataError):  # damaged: it will be made again
            recovery = load_recovery(session.run.candidate(plan.id).folder)
        if recovery is None or recovery.status == "done":
            yield pictures_part(session, plan, "distilled")


# The one statement of the order. A step asks earlier ones for their results; a test sees that none asks a later one.
STEPS: tuple[Step, ...] = (
    Step(
        "blocks",
        "lists the blocks of the model",
        ensure_blocks,
        _files("choices", "blocks"),
        _one(blocks_part),
    ),
    Step(
        "probe",
        "encodes held-out pictures and captions",
        ensure_probe,
        _files("probe", "sources"),
        lambda session, _plans: (sources_part(session), probe_part(session)),
    ),
    Step(
        "scores",
        "removes each block, pair and stage in turn and measures the damage",
        _ensure_all_scores,
        _files("importance_parts", "criteria", "importance", "width_scores_dir"),
        _score_parts,
    ),
    Step(
        "costs",
        "counts parameters and multiply-adds of every block",
        ensure_costs,
        _files("costs"),
        _one(costs_part),
    ),
    Step(
        "plans",
        "searches the best plans under each budget",
        ensure_plans,
        _files("plans_dir", "latency"),
        _plan_parts,
    ),
    Step(
        "candidates",
        "cuts and profiles a smaller model for every plan",
        ensure_candidates,
        lambda run: (run.latency_rounds, *_of_candidates("folder")(run)),
        lambda session, plans: (*_of_each(pruned_part, profile_part)(session, plans), rounds_part(session)),
    ),
    Step(
        "data",
        "encodes or draws the training pictures",
        ensure_data,
        _files("data", "data_dir", "validation", "captions"),
        _data_parts,
        alone=False,
    ),
    Step(
        "repaired",
        "mends the cuts in closed form, and keeps it where the held-out loss falls",
        ensure_repaired,
        lambda run: (run.repairs, *_of_candidates("repair", "repaired", "kept")(run)),
        _repaired_parts,
        alone=False,
    ),
    Step(
        "distilled",
        "retrains every candidate from the teacher",
        ensure_distilled,
        _distilled,
        _distilled_parts,
        alone=False,
    ),
    Step(
        "reductions",
        "counts and times the model and what its named plans leave of it",
        ensure_reductions,
        _files("reductions"),
        _one(reductions_part),
    ),
    Step(
        "shares",
        "times the parts of the pipeline",
        ensure_shares,
        _files("pipeline_profile"),
        _one(shares_part),
        alone=False,
    ),
    Step(
        "pictures",
        "draws the same prompts with every model",
        ensure_pictures,
        _pictures,
        _picture_parts,
        alone=False,
    ),
    Step(
        "ranking",
        "orders the candidates by quality at their cost",
        ensure_ranking,
        _files("ranking"),
        lambda session, _plans: (ranking_part(session, plans_there(session)),),  # and who cannot be built
        alone=False,
    ),
    Step(
        "report",
        "writes the pages",
        ensure_report,
        _files("report_dir"),
        lambda session, _plans: (report_part(session.run), steps_part(session.run)),
    ),
)


def can_be_done(session: Session, step: Step) -> bool:
    """Whether there is what ``step`` works with: of a model alone there is nothing to train on and to draw with."""
    return step.alone or session.source.is_pipeline


def why_left_out(source: ModelSource) -> str:
    """Why a run of ``source`` leaves steps out, and what would do them all; empty for a whole pipeline."""
    if source.is_pipeline:
        return ""
    names = ", ".join(step.name for step in STEPS if not step.alone)
    return (
        f"{source.text} is a {source.called} alone, so these steps are left out: {names}; there is nothing to train "
        "on, to draw with and to judge by, and blocks are scored on random noise: give the folder of the whole pipeline"
    )


def steps_from(name: str) -> tuple[Step, ...]:
    """The step called ``name`` and all that follow it."""
    names = [step.name for step in STEPS]
    return STEPS[names.index(name) :]
