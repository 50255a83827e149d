"""Plans, candidates and models side by side: their costs, and their quality where it was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from prune_lab.assets import SHIPPED_MODELS
from prune_lab.blocks import Architecture, CountedUnit
from prune_lab.candidates import load_candidate
from prune_lab.distill import load_recovery
from prune_lab.errors import PlanError, PruneLabError
from prune_lab.export.students import model_folder_in, provenance_in
from prune_lab.models import PRESETS, resolve_model
from prune_lab.models.files import json_object
from prune_lab.plans import PruningPlan, is_native, plan_of, read_plan, read_plans
from prune_lab.profiling import CostTable, PlanCost, cost_table
from prune_lab.runs import (
    CandidatePaths,
    Manifests,
    Run,
    load_run_config,
    open_run,
    read_records,
    run_around,
)
from prune_lab.runs.manifest_files import FOLDER
from prune_lab.schemas import COMPARISON_COLUMNS, RANKING
from prune_lab.session import Session
from prune_lab.workflow.intact import check_intact, check_parts
from prune_lab.workflow.measuring import ensure_costs, ensure_scores
from prune_lab.workflow.objectives import one_shot
from prune_lab.workflow.searching import ensure_plans, goes_by, relative_costs
from prune_lab.workflow.widths import check_chosen, measured_impacts, predicted_of

_LATENCY = ("median_ms", "latency_change", "latency_low", "latency_high")
_MEASURED = (*_LATENCY, "loss_before", "loss_after", "clip_before", "clip_after")


def compared_plans(session: Session, texts: Sequence[str]) -> tuple[pd.DataFrame, tuple[PruningPlan, ...]]:
    """One row per plan for the run's model, itself first, with COMPARISON_COLUMNS; and the plans.

    ``impact`` is measured on the run's probe, ``predicted_impact`` the sum of the blocks' scores; losses and latency
    of the run's own plans are added. Raises PlanError for a text that is no plan.
    """
    check_intact(session)
    run = session.run
    architecture, costs = session.architecture, ensure_costs(session)
    importance, impact_of = ensure_scores(session), one_shot(session)
    known = ensure_plans(session) if run.done(run.searched) else ()
    plans = []
    for text in texts:
        named = [plan for plan in known if goes_by(plan, text)]
        plans += named or list(_plans(text, architecture, session.config.model))
    narrower = [plan for plan in plans if plan.widths]
    check_chosen(architecture, narrower)
    sets = [frozenset(plan.removed) for plan in plans if not plan.widths]
    of_whole = iter(impact_of(sets) if sets else ())
    of_narrower = iter(measured_impacts(session, narrower))
    impacts = [next(of_narrower if plan.widths else of_whole) for plan in plans]
    ranking = (
        read_records(run.ranking, RANKING).set_index("plan_id") if run.done(run.ranking) else pd.DataFrame()
    )
    rows = [_plan_row(session.config.model, "model", plan_of(architecture, ()), costs)]
    for plan, impact in zip(plans, impacts, strict=True):
        measured = {"predicted_impact": predicted_of(session, plan, importance), "impact": float(impact)}
        if plan.id in ranking.index:
            measured |= {name: float(ranking[name][plan.id]) for name in _MEASURED}
        rows.append({**_plan_row(_title(plan), "plan", plan, costs), **measured})
    return pd.DataFrame(rows, columns=list(COMPARISON_COLUMNS)), tuple(plans)


def _title(plan: PruningPlan) -> str:
    return plan.name or plan.text


def block_maps(architecture: Architecture, plans: Sequence[PruningPlan]) -> tuple[str, ...]:
    """The model as lines of text, a column for each plan: R, A and T for residual, attention and transformer blocks
    that stay, a small letter for one that loses layers inside it or is narrower, a dot for one that is gone.
    """
    around = {layer.name: layer.inside for layer in architecture.layers}
    home = {site.name: around.get(site.block, site.block) for site in architecture.sites}
    names = [_title(plan) for plan in plans]

    def letter(block: CountedUnit, plan: PruningPlan) -> str:
        if block.name in plan.removed:
            return "."
        loses = {around.get(name) for name in plan.removed} | {home[width.site] for width in plan.widths}
        return block.kind[0] if block.name in loses else block.kind[0].upper()

    cells = [
        ["".join(letter(block, plan) for block in architecture.stage_blocks(stage)) for plan in plans]
        for stage in architecture.stages
    ]
    widths = [max(len(name), *(len(row[place]) for row in cells)) for place, name in enumerate(names)]
    lines = [("", names), *zip(architecture.stages, cells, strict=True)]
    return tuple(
        f"{stage:<4}  "
        + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for stage, row in lines
    )


TargetKind = Literal["run", "candidate", "model", "plan"]


def kind_of_target(text: str) -> TargetKind:
    """What there is to compare under this text: a run or candidate by its folder, a model by its name or place, else a
    plan.
    """
    folder = Path(text)
    if (folder / "config.toml").is_file():
        return "run"
    if CandidatePaths(folder).profile.exists() or (folder / FOLDER).is_dir():
        return "candidate"
    listed = folder.suffix in (".json", ".txt") and folder.name != "config.json"
    return "model" if text in (*SHIPPED_MODELS, *PRESETS) or (folder.exists() and not listed) else "plan"


def _teacher_of(folder: Path) -> str:
    """The model that the student in ``folder`` was cut from, where it says so and that is there; else empty."""
    inner = model_folder_in(folder)
    source = str(provenance_in(inner).get("source", ""))
    if not source or not (inner / "plan.json").is_file():
        return ""
    try:  # another model may be called so here
        same = resolve_model(source).architecture.signature == json_object(inner / "plan.json").get(
            "architecture"
        )
    except PruneLabError:
        return ""
    return source if same else ""


def compared_with(targets: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The model that ``targets`` are compared with where nobody names one, and those that are left to compare.

    It is that of the first target: a model itself, or the teacher that a student names; the model of a run or of a
    candidate in one. Where plans come first it is the shipped U-Net.
    """
    first, folder, kind = targets[0], Path(targets[0]), kind_of_target(targets[0])
    if kind == "model":
        teacher = _teacher_of(folder)
        return (teacher, tuple(targets)) if teacher else (first, tuple(targets[1:]))
    around = folder if kind == "run" else run_around(folder) if kind == "candidate" else None
    named = load_run_config(open_run(around, must_exist=True)).model if around else "reference"
    return named, tuple(targets)


def comparison(model: str, targets: Sequence[str]) -> pd.DataFrame:
    """One row per target, ``model`` itself first; columns COMPARISON_COLUMNS, changes relative to ``model``.

    A target is a run folder (its ranking), a candidate folder (its profile and recovery), a model as ``resolve_model``
    reads it, or a plan for ``model``. Values that were not measured are missing. Raises PlanError for a text that is
    none of these, and the errors of reading the others.
    """
    architecture = resolve_model(model).architecture
    costs = cost_table(architecture)
    rows = [_plan_row(model, "model", plan_of(architecture, ()), costs)]
    for target in targets:
        folder, kind = Path(target), kind_of_target(target)
        if kind == "run":
            rows += _of_run(open_run(folder, must_exist=True), costs)
        elif kind == "candidate":
            rows.append(_of_candidate(folder, costs))
        elif kind == "model":
            total = cost_table(resolve_model(target).architecture).total
            rows.append(_row(target, "model", total, costs) | _plan_in(folder, architecture))
        else:
            plans = _plans(target, architecture, model)
            rows += [_plan_row(_title(plan), "plan", plan, costs) for plan in plans]
    return pd.DataFrame(rows, columns=list(COMPARISON_COLUMNS))


def _plans(text: str, architecture: Architecture, model: str) -> tuple[PruningPlan, ...]:
    try:
        return read_plans(text, architecture)
    except PlanError as error:
        raise PlanError(
            f"asked to compare {text!r}, which is no run, candidate or model folder, and as a plan for {model}: {error}"
        ) from None


def _row(name: str, kind: str, cost: PlanCost, whole: CostTable) -> dict[str, Any]:
    figures = relative_costs(cost, whole.total)
    return {"name": name, "kind": kind, "blocks_removed": None, **figures, "native": None}


def _plan_in(folder: Path, architecture: Architecture) -> dict[str, Any]:
    """What the plan beside a model in ``folder`` says of it; empty where it is no student of ``architecture``."""
    path = model_folder_in(folder) / "plan.json"
    if not path.is_file() or json_object(path).get("architecture") != architecture.signature:
        return {}
    plan = read_plan(path, architecture)
    return {"blocks_removed": len(plan.removed), "native": plan.form == "native"}


def _plan_row(name: str, kind: str, plan: PruningPlan, costs: CostTable) -> dict[str, Any]:
    built = plan.built("own") if plan.widths and plan.form == "native" else plan
    row = _row(name, kind, costs.of(built), costs)
    return {**row, "blocks_removed": len(plan.removed), "native": is_native(costs.architecture, plan)}


def _of_candidate(folder: Path, costs: CostTable) -> dict[str, Any]:
    if (around := run_around(folder)) is not None:
        check_parts(Run(around), Manifests(around), folder)
    candidate, recovery = load_candidate(folder, costs.architecture), load_recovery(folder)
    latency, change = candidate.profile.latency, candidate.profile.change
    known = {} if change is None else {name: getattr(change, name) for name in ("change", "low", "high")}
    return {
        **_plan_row(candidate.plan.label, "candidate", candidate.plan, costs),
        "median_ms": latency.median_ms if latency else math.nan,
        **{f"latency_{name}": value for name, value in known.items()},
        "loss_before": recovery.before if recovery else math.nan,
        "loss_after": recovery.after if recovery else math.nan,
    }


def _of_run(run: Run, costs: CostTable) -> list[dict[str, Any]]:
    check_intact(Session(run))
    frame = read_records(run.needs(run.ranking, "rank"), RANKING)
    rows = []
    for row in frame.to_dict("records"):
        macs, paper_macs = int(row["macs"]), int(row["paper_macs"])
        cost = PlanCost(int(row["params"]), macs, macs - paper_macs)
        figures = {name: float(row[name]) for name in _MEASURED}
        made = _row(f"{run.folder.name}: {row['plan']}", str(row["origin"]), cost, costs)
        rows.append({**made, **figures, "blocks_removed": int(row["blocks_removed"])})
    return rows
