"""Which candidates the figures show: of many the best, the controls and the front. The tables hold all of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from prune_lab.report.format import enumeration
from prune_lab.report.tables import PlanRow, RunTables

FEW = 30  # as many are all shown: their marks can be told apart
_MOST = 20  # of the best, of the controls and of the front


def _ids(ranking: pd.DataFrame, plans: tuple[PlanRow, ...]) -> set[str]:
    """Ids of the first of the ranking, of the controls and of the front; in order of the plans without a ranking."""
    controls = [plan.id for plan in plans if plan.origin == "control"][:_MOST]
    ordered = ranking[ranking["origin"] != "teacher"].sort_values("rank", kind="stable", na_position="last")
    best = ordered["plan_id"].head(_MOST).tolist() or [plan.id for plan in plans[:_MOST]]
    on_front = ordered[ordered["pareto"].map(str).isin(("True", "1.0", "1"))].sort_values("params")
    # Of a long front some from end to end: the cheap ones are seldom among the best.
    spread = np.linspace(0, max(0, len(on_front) - 1), min(_MOST, len(on_front))).round().astype(int)
    return {*controls, *best, *on_front["plan_id"].iloc[spread]}


def shown_in_figures(tables: RunTables) -> RunTables:
    """``tables`` with the plans, loss curves and pictures of the candidates that figures show; the ranking is whole."""
    if len(tables.plans) <= FEW:
        return tables
    ranking = tables.ranking
    nothing = pd.DataFrame(columns=["origin", "rank", "plan_id", "pareto", "params"])
    chosen = _ids(nothing if ranking is None else ranking, tables.plans)
    return replace(
        tables,
        plans=tuple(plan for plan in tables.plans if plan.id in chosen),
        recoveries={plan_id: curve for plan_id, curve in tables.recoveries.items() if plan_id in chosen},
        pictures=tuple(pair for pair in tables.pictures if pair[0].id in chosen),
    )


def shown_note(tables: RunTables) -> str:
    """The sentence that says which candidates the figures show; empty where that is all of them."""
    drawn = shown_in_figures(tables)
    if len(drawn.plans) == len(tables.plans):
        return ""
    front = [] if tables.ranking is None else ["the Pareto front"]
    which = enumeration(["the controls", *front, f"the best {_MOST}"])
    return f"Figures show {len(drawn.plans)} of {len(tables.plans)} candidates: {which}. The tables hold all of them."
