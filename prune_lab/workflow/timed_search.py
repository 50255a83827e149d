"""Plans within a budget on latency: found by what parts save, timed in turns with the teacher, and corrected.

What blocks save adds up only nearly, and what narrower ones save only roughly, so each plan that is found is built and
timed. Where it is slower than asked, or faster by more than ``NEAR`` of the whole, the limit is moved in proportion to
what was saved and the search is done again, a few times. Of the plans that were timed within the budget the one that
loses least is kept; where there is none, the fastest, and a line says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from prune_lab.errors import BudgetError, PruneLabError
from prune_lab.plans import PruningPlan
from prune_lab.profiling import Change, CostTable, turns_of_frame
from prune_lab.runs import read_records
from prune_lab.runtime import note
from prune_lab.schemas import ROUNDS
from prune_lab.search import Budget, parse_budget, split_budgets
from prune_lab.session import Session
from prune_lab.session.parts import rounds_part
from prune_lab.workflow.measuring import ensure_turns

TRIES = 4  # plans that are timed for a budget, at most
_SEARCHES = 12  # of which some may find nothing that is so fast
NEAR = 0.02  # of the whole: how much faster than asked a plan may be before a slower one is looked for
_MARGIN = 1.01  # times what is to be saved is aimed at: a limit met exactly is missed every other time
_LEAST = 0.01  # of the whole: the tightest limit that is tried


@dataclass(frozen=True, slots=True)
class Timed:
    """Plans of one search, what the first loses by the scores, and what the slowest of them takes of the teacher's
    time, as a share: predicted, measured.
    """

    plans: tuple[PruningPlan, ...]
    loss: float
    predicted: float
    measured: float


def _timed(
    session: Session,
    costs: CostTable,
    plans: tuple[PruningPlan, ...],
    loss_of: Callable[[PruningPlan], float],
) -> Timed:
    """``plans``, timed in turns with the teacher."""
    whole, changing = costs.total.amount("latency_ms"), [plan for plan in plans if plan.changes]
    turns = ensure_turns(session, changing)
    measured, slowest = max(
        ((1 + turns[plan.id].change.change, plan) for plan in changing), key=lambda one: one[0]
    )
    return Timed(plans, loss_of(plans[0]), costs.of(slowest).amount("latency_ms") / whole, measured)


def _next_limit(tried: Timed, share: float, limit: float) -> float:
    """The share of the time to predict, so that ``share`` is measured, after ``tried`` was found for ``limit``."""
    saved = 1 - tried.measured
    if saved <= 0:  # nothing to be in proportion to
        return limit - (1 - limit) / 2
    return 1 - max(1 - tried.predicted, 1e-6) * _MARGIN * (1 - share) / saved


def within_time(
    session: Session,
    costs: CostTable,
    budgets: Sequence[Budget],
    solve: Callable[[Sequence[Budget]], tuple[PruningPlan, ...]],
    loss_of: Callable[[PruningPlan], float],
    *,
    tries: int = TRIES,
) -> tuple[PruningPlan, ...]:
    """The plans that ``solve`` finds within ``budgets``, one of them at least on latency, such that all keep to that as
    they are timed; where those of none of ``tries`` searches do, the fastest of them, with a word.

    Writes latency_rounds.csv. Raises BudgetError where nothing is predicted to be within the budgets.
    """
    whole = costs.total.latency_ms
    assert whole is not None, "a budget on latency was read by a latency table"
    others = [budget for budget in budgets if budget.metric != "latency_ms"]
    timed = [budget for budget in budgets if budget.metric == "latency_ms"]
    asked = min(timed, key=lambda budget: budget.limit)
    share = limit = asked.limit / whole
    tried: list[Timed] = []
    reached = limit  # the tightest limit so far that a plan was found for
    for _ in range(_SEARCHES):
        at_most = asked if limit == share else Budget("latency_ms", limit * whole, asked.text)
        try:
            plans = solve([*others, at_most])
        except BudgetError:
            if not tried:
                raise
            limit = (limit + reached) / 2  # nothing is so fast: as far as it gets
            continue
        reached = min(reached, limit)
        if not any(plan.changes for plan in plans):
            return plans
        if plans in [one.plans for one in tried]:
            break
        tried.append(_timed(session, costs, plans, loss_of))
        if share - NEAR <= tried[-1].measured <= share or len(tried) == tries:
            break
        limit = max(_LEAST, min(1.0, _next_limit(tried[-1], share, limit)))
    within = [one for one in tried if one.measured <= share]
    kept = min(within, key=lambda one: one.loss) if within else min(tried, key=lambda one: one.measured)
    times = f"predicted {kept.predicted:.3f}x, measured {kept.measured:.3f}x of the teacher's time"
    word = "within it" if within else "SLOWER than asked, and the fastest"
    less = "" if within or tries > 1 else "; ask for less, or leave --solver out, which searches again"
    note(f"{asked.text}: {times} in turns, {word} of {len(tried)} timed{less}")
    return kept.plans


# What is known of the time of plans --------------------------------------------------------------------------------


def timed_changes(session: Session) -> dict[str, Change]:
    """By plan id, how the time of what a plan leaves compares with the teacher's, of those timed in turns so far."""
    run = session.run
    if not run.done(run.latency_rounds):
        return {}
    if not session.trusting and session.manifests.verdict(rounds_part(session)).state != "done":
        return {}
    frame = read_records(run.latency_rounds, ROUNDS)
    found: dict[str, Change] = {}
    for _, rows in frame.groupby("timing", sort=True):
        turns = turns_of_frame(rows)
        found = {name: turns.change(name) for name in turns.names[1:]} | found
    return found


def _doubt(change: Change, share: float) -> str:
    """What is said where the interval of a measured time holds the budget."""
    if change.low is None or change.high is None or not 1 + change.low < share < 1 + change.high:
        return ""
    return ", but not beyond doubt: the interval holds it; time more rounds (profile.runs) on a quiet machine"


def time_notes(session: Session, costs: CostTable, frame: pd.DataFrame) -> tuple[str, ...]:
    """A line for each row of ``frame``, of plans that were searched, that has a budget on latency and was timed: what
    was predicted, what was measured, and whether that is within the budget.
    """
    changes, lines = timed_changes(session), []
    for row in frame.to_dict(orient="records"):
        change = changes.get(row["plan_id"])
        if change is None:
            continue
        for text in split_budgets(row["budgets"]):
            if not text.strip().startswith("latency"):
                continue
            try:
                budget = parse_budget(text, session.architecture, costs)
            except PruneLabError:
                continue
            assert costs.total.latency_ms is not None
            share, ends = budget.limit / costs.total.latency_ms, ""
            if change.low is not None and change.high is not None:
                ends = f" ({1 + change.low:.3f}x to {1 + change.high:.3f}x)"
            word = "within" if 1 + change.change <= share else "SLOWER than"
            lines.append(
                f"{row['plan']}: predicted {1 + row['latency_change']:.3f}x of the teacher's time, measured in turns "
                f"{1 + change.change:.3f}x{ends}: {word} the {share:.3f}x asked for{_doubt(change, share)}"
            )
    return tuple(lines)
