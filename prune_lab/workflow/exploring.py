"""Answers to what a reader asks of a finished run: why these blocks, what a wider budget buys, where scores mislead.

Nothing is measured and nothing is written here: searches go by the scores of the run, pictures and losses are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from prune_lab.errors import BudgetError, ConfigError
from prune_lab.evaluation import read_pictures
from prune_lab.plans import PruningPlan, refuse_widths
from prune_lab.profiling import COUNTED, CostTable
from prune_lab.schemas import (
    CHOICE_COLUMNS,
    PICTURE_CHANGE_COLUMNS,
    SURPRISE_COLUMNS,
    TOURNAMENT_COLUMNS,
    WIDER_COLUMNS,
)
from prune_lab.search import Budget, Constraints, parse_budget, predicted_impact, search_plans, split_budgets
from prune_lab.session import Session, read_scores
from prune_lab.workflow.searching import costs_of, relative_costs, searched
from prune_lab.workflow.targets import constraints_of

# Why these blocks, and what a wider budget buys ----------------------------------------------------------------------


def _budgets(text: str, session: Session, costs: CostTable) -> tuple[Budget, ...]:
    return tuple(parse_budget(one, session.architecture, costs) for one in split_budgets(text))


def budgets_of(session: Session, plan: PruningPlan, costs: CostTable) -> tuple[Budget, ...]:
    """The budgets that the run found ``plan`` under; of any other plan, its own parameters."""
    table = searched(session.run) if session.run.done(session.run.searched) else None
    if table is not None:
        asked = table.loc[(table["plan_id"] == plan.id) & (table["origin"] == "search"), "budget"]
        if len(asked):
            return _budgets(asked.iloc[0], session, costs)
    return _budgets(f"params<={costs.of(plan).params}", session, costs)


def choices_frame(session: Session, plan: PruningPlan, budget: str = "") -> pd.DataFrame:
    """Why each block stays or goes in ``plan``: one row per block, columns CHOICE_COLUMNS.

    ``extra_impact`` is how much more predicted impact the best plan within the same budget has that decides the other
    way about this block, compared with the best plan of all; missing where no such plan exists, and ``reason`` says
    why. It is above zero wherever the search was right to decide so. ``budget`` defaults to that of the plan, or to
    its own parameters. Raises RunError before blocks are scored, BudgetError for a budget that no plan meets.
    """
    refuse_widths([plan], "explain")
    architecture, costs, scores = session.architecture, costs_of(session), read_scores(session.run)
    budgets = _budgets(budget, session, costs) if budget else budgets_of(session, plan, costs)
    rules, impacts = constraints_of(session.config), scores.block_impacts()

    def best(rules: Constraints) -> PruningPlan:
        return search_plans(architecture, scores, costs, budgets, constraints=rules)[0]

    least = predicted_impact(best(rules), scores)
    rows = []
    for block in architecture.blocks:
        removed, extra, instead, reason = block.name in plan.removed, float("nan"), "", ""
        if not block.removable:
            reason = f"cannot be removed: it {block.reason}"
        else:
            rule = "keep" if removed else "remove"
            other = (
                dataclasses.replace(rules, keep=(*rules.keep, block.name))
                if removed
                else dataclasses.replace(rules, remove=(*rules.remove, block.name))
            )
            try:
                found = best(other)
                extra, instead = predicted_impact(found, scores) - least, found.text
                reason = f"to {rule} it costs more impact" if extra > 0 else f"to {rule} it costs nothing"
            except (BudgetError, ConfigError):  # no plan is left, or a rule says the opposite
                reason = f"no plan within the budget and the rules can {rule} it"
        figures = (impacts.get(block.name, float("nan")), block.params, block.macs, extra)
        rows.append((block.name, block.kind, removed, *figures, instead, reason))
    return pd.DataFrame(rows, columns=list(CHOICE_COLUMNS))


def wider_frame(session: Session, budgets: Sequence[str], more: float) -> pd.DataFrame:
    """What a budget wider by the share ``more`` would buy: one row per budget, columns WIDER_COLUMNS.

    ``more`` 0.1 is 10 %. ``impact_change`` is relative to the best plan's predicted impact within the budget as it is;
    ``come_back`` and ``go`` name the blocks by which the two plans differ. Raises BudgetError for a budget that no plan
    meets, RunError before blocks are scored.
    """
    architecture, costs, scores = session.architecture, costs_of(session), read_scores(session.run)
    rules, rows = constraints_of(session.config), []
    for text in budgets:
        narrow = _budgets(text, session, costs)
        wide = [
            dataclasses.replace(one, limit=int(limit) if one.metric in COUNTED else limit)
            for one in narrow
            for limit in [one.limit * (1 + more)]
        ]
        now, then = (
            search_plans(architecture, scores, costs, asked, constraints=rules)[0] for asked in (narrow, wide)
        )
        before, after = predicted_impact(now, scores), predicted_impact(then, scores)
        left = relative_costs(costs.of(then), costs.total)
        rows.append(
            {
                "budget": ", ".join(one.text for one in narrow),
                "predicted_impact": before,
                "wider_impact": after,
                "impact_change": after / before - 1 if before else float("nan"),
                "params_change": left["params_change"],
                "macs_change": left["macs_change"],
                "come_back": " ".join(name for name in now.removed if name not in then.removed),
                "go": " ".join(name for name in then.removed if name not in now.removed),
                "plan": then.text,
            }
        )
    return pd.DataFrame(rows, columns=list(WIDER_COLUMNS))


# Scores against outcomes ---------------------------------------------------------------------------------------------


def surprises_frame(ranking: pd.DataFrame) -> pd.DataFrame:
    """Where score and outcome disagree: one row per candidate that was trained to the end, columns SURPRISE_COLUMNS.

    Places are 1 for the best; ``places_lost`` is how many places a plan fell from the order by impact in one shot to
    the order by held-out loss after distillation, below zero where it rose. The furthest fallen come first.
    """
    ended = ranking[(ranking["status"] == "ranked") & ranking["loss_after"].notna()].copy()
    ended["place_by_impact"] = ended["impact_one_shot"].rank(method="min").astype(int)
    ended["place_by_loss"] = ended["loss_after"].rank(method="min").astype(int)
    ended["places_lost"] = ended["place_by_loss"] - ended["place_by_impact"]
    ordered = ended.sort_values("places_lost", ascending=False, kind="stable", ignore_index=True)
    return ordered[list(SURPRISE_COLUMNS)]


def rungs_frame(curves: pd.DataFrame) -> pd.DataFrame:
    """The held-out loss and the place of every candidate at each validation, for a run without a tournament.

    ``curves`` are all recorded losses, with columns plan_id, step, part and value. Columns TOURNAMENT_COLUMNS, where
    ``name`` is a plan's id; nobody is dropped.
    """
    losses = curves[(curves["part"] == "validation") & (curves["step"] > 0)]
    losses = losses.sort_values(["step", "value"], ignore_index=True)
    by_step = losses.groupby("step")
    frame = pd.DataFrame(
        {
            "rung": by_step.ngroup() + 1,
            "steps": losses["step"],
            "name": losses["plan_id"],
            "loss": losses["value"],
            "place": by_step["value"].rank(method="min").astype(int),
            "fate": "kept",
            "reason": "no tournament: all are trained to the end",
        }
    )
    return frame.reindex(columns=list(TOURNAMENT_COLUMNS))


# Pictures ------------------------------------------------------------------------------------------------------------


def picture_changes(
    prompts: pd.DataFrame, teacher: Path, folders: Mapping[tuple[str, str, str], Path]
) -> pd.DataFrame:
    """Which pictures changed most: one row per picture of a student, the most changed first.

    ``difference`` is the root mean square difference from the teacher's picture of the same prompt and seed, as a share
    of the full range: 0 is the same picture, 1 is black for white. ``prompts`` has the columns file, prompt and seed;
    ``folders`` are keyed by (plan, plan id, weights). Columns PICTURE_CHANGE_COLUMNS. Raises DataError for pictures
    that cannot be read.
    """
    wanted = read_pictures(teacher).double() / 255
    rows = []
    for (plan, plan_id, weights), folder in folders.items():
        drawn = read_pictures(folder).double() / 255
        differences = (drawn - wanted).square().flatten(1).mean(dim=1).sqrt().tolist()
        for row, difference in zip(prompts.sort_values("file").to_dict("records"), differences, strict=True):
            rows.append((row["prompt"], row["seed"], plan, plan_id, weights, difference, row["file"]))
    frame = pd.DataFrame(rows, columns=list(PICTURE_CHANGE_COLUMNS))
    return frame.sort_values("difference", ascending=False, kind="stable", ignore_index=True)
