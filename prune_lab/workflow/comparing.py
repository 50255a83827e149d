"""Plans, candidates and models side by side: their costs, and their quality where it was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from prune_lab.blocks import Architecture
from prune_lab.candidates import load_candidate
from prune_lab.distill import load_recovery
from prune_lab.errors import PlanError
from prune_lab.models import resolve_model
from prune_lab.plans import PruningPlan, is_native, plan_of, read_plans
from prune_lab.profiling import CostTable, PlanCost, cost_table
from prune_lab.runs import CandidatePaths, Run, open_run
from prune_lab.schemas import COMPARISON_COLUMNS
from prune_lab.search import predicted_impact
from prune_lab.session import Session
from prune_lab.workflow.measuring import ensure_costs, ensure_scores
from prune_lab.workflow.searching import ensure_plans, goes_by, impact_of_sets

_MEASURED = ("median_ms", "loss_before", "loss_after", "clip_before", "clip_after")


def compared_plans(session: Session, texts: Sequence[str]) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """One row per plan for the run's model, itself first, with COMPARISON_COLUMNS; and maps of them, line by line.

    ``impact`` is measured on the run's probe, ``predicted_impact`` the sum of the blocks' scores; losses and latency
    of the run's own plans are added. Raises PlanError for a text that is no plan.
    """
    run = session.run
    architecture, costs = session.architecture, ensure_costs(session)
    importance, impact_of = ensure_scores(session), impact_of_sets(session)
    known = ensure_plans(session) if run.done(run.searched) else ()
    plans = []
    for text in texts:
        named = [plan for plan in known if goes_by(plan, text)]
        plans += named or list(_plans(text, architecture, session.config.model))
    impacts = impact_of([frozenset(plan.removed) for plan in plans])
    ranking = pd.read_csv(run.ranking).set_index("plan_id") if run.done(run.ranking) else pd.DataFrame()
    teacher_plan = plan_of(architecture, ())
    rows = [_row(session.config.model, "model", costs.total, costs, teacher_plan, architecture)]
    for plan, impact in zip(plans, impacts, strict=True):
        measured = {"predicted_impact": predicted_impact(plan, importance), "impact": float(impact)}
        if plan.id in ranking.index:
            measured |= {name: float(ranking[name][plan.id]) for name in _MEASURED}
        name = plan.label if plan.name else plan.text
        rows.append(_row(name, "plan", costs.of(plan), costs, plan, architecture, measured))
    return pd.DataFrame(rows, columns=list(COMPARISON_COLUMNS)), block_maps(architecture, plans)


def block_maps(architecture: Architecture, plans: Sequence[PruningPlan]) -> tuple[str, ...]:
    """The U-Net as lines of text, a column for each plan: R and A for blocks that stay, a dot for one that is gone."""
    names = [plan.label if plan.name else plan.text for plan in plans]
    cells = [
        [
            "".join(
                "." if block.name in plan.removed else block.kind[0].upper()
                for block in architecture.stage_blocks(stage)
            )
            for plan in plans
        ]
        for stage in architecture.stages
    ]
    widths = [max(len(name), *(len(row[place]) for row in cells)) for place, name in enumerate(names)]
    lines = [("", names), *zip(architecture.stages, cells, strict=True)]
    return tuple(
        f"{stage:<4}  "
        + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for stage, row in lines
    )


def comparison(model: str, targets: Sequence[str]) -> pd.DataFrame:
    """One row per target, ``model`` itself first; columns COMPARISON_COLUMNS, changes relative to ``model``.

    A target is a run folder (its ranking), a candidate folder (its profile and recovery), a model as ``resolve_model``
    reads it, or a plan for ``model``. Values that were not measured are missing. Raises PlanError for a text that is
    none of these, and the errors of reading the others.
    """
    architecture = resolve_model(model).architecture
    costs = cost_table(architecture)
    rows = [_row(model, "model", costs.total, costs, plan_of(architecture, ()), architecture)]
    for target in targets:
        folder = Path(target)
        if (folder / "config.toml").is_file():
            rows += _of_run(open_run(folder, must_exist=True), costs)
        elif CandidatePaths(folder).profile.is_file():
            rows.append(_of_candidate(folder, costs, architecture))
        elif folder.suffix not in (".json", ".txt") and folder.exists():
            total = cost_table(resolve_model(target).architecture).total
            rows.append(_row(target, "model", total, costs))
        else:
            rows += [
                _row(
                    plan.label if plan.name else plan.text, "plan", costs.of(plan), costs, plan, architecture
                )
                for plan in _plans(target, architecture, model)
            ]
    return pd.DataFrame(rows, columns=list(COMPARISON_COLUMNS))


def _plans(text: str, architecture: Architecture, model: str) -> tuple[PruningPlan, ...]:
    try:
        return read_plans(text, architecture)
    except PlanError as error:
        raise PlanError(
            f"asked to compare {text!r}, which is no run, candidate or model folder, and as a plan for {model}: {error}"
        ) from None


def _row(
    name: str,
    kind: str,
    cost: PlanCost,
    whole: CostTable,
    plan: PruningPlan | None = None,
    architecture: Architecture | None = None,
    measured: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    total = whole.total
    return {
        "name": name,
        "kind": kind,
        "blocks_removed": None if plan is None else len(plan.removed),
        "params": cost.params,
        "params_change": cost.params / total.params - 1,
        "macs": cost.macs,
        "macs_change": cost.macs / total.macs - 1,
        "paper_macs": cost.paper_macs,
        "paper_macs_change": cost.paper_macs / total.paper_macs - 1,
        "native": None if plan is None or architecture is None else is_native(architecture, plan),
        **(measured or {}),
    }


def _of_candidate(folder: Path, costs: CostTable, architecture: Architecture) -> dict[str, Any]:
    candidate = load_candidate(folder, architecture)
    latency = candidate.profile.latency
    recovery = load_recovery(folder)
    return _row(
        candidate.plan.label,
        "candidate",
        costs.of(candidate.plan),
        costs,
        candidate.plan,
        architecture,
        measured={
            "median_ms": latency.median_ms if latency else math.nan,
            "loss_before": recovery.before if recovery else math.nan,
            "loss_after": recovery.after if recovery else math.nan,
        },
    )


def _of_run(run: Run, costs: CostTable) -> list[dict[str, Any]]:
    frame = pd.read_csv(run.needs(run.ranking, "rank"))
    rows = []
    for row in frame.to_dict("records"):
        macs, paper_macs = int(row["macs"]), int(row["paper_macs"])
        cost = PlanCost(int(row["params"]), macs, macs - paper_macs)
        figures = {name: float(row[name]) for name in _MEASURED}
        made = _row(f"{run.folder.name}: {row['plan']}", str(row["origin"]), cost, costs, measured=figures)
        rows.append({**made, "blocks_removed": int(row["blocks_removed"])})
    return rows
