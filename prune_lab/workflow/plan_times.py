"""What is known of the time of plans that were timed in turns with the teacher: for their files, and in words."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import pandas as pd

from prune_lab.errors import PruneLabError
from prune_lab.plans import PruningPlan
from prune_lab.profiling import Change, CostTable, pixels_per_latent, turns_of_frame
from prune_lab.runs import read_records
from prune_lab.schemas import ROUNDS
from prune_lab.search import parse_budget, split_budgets
from prune_lab.session import Session
from prune_lab.session.parts import rounds_part
from prune_lab.workflow.measuring import service_of


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


def _ends(change: Change) -> str:
    """The interval of a measured time as shares of the teacher's, in brackets; empty where it has none."""
    if change.low is None or change.high is None:
        return ""
    return f" ({1 + change.low:.3f}x to {1 + change.high:.3f}x)"


_ASKED_FOR = ", for a budget of "
_OF_THE_SEARCH = "; the search that found the plan measured "


def _measured_before(plan: PruningPlan) -> str:
    """What the search that found ``plan`` measured, as it is written in it; empty where it says nothing of its time."""
    return plan.timed.rpartition(_OF_THE_SEARCH)[2]


def with_time(session: Session, plan: PruningPlan, *, share: float | None = None) -> PruningPlan:
    """``plan``, which says how it was timed in turns with the teacher, where it was, beside what it said before;
    ``share`` of the teacher's time is what was asked for.
    """
    change = timed_changes(session).get(plan.id)
    if change is None:
        return plan
    where = service_of(session).text(session.architecture.config, pixels_per_latent(session.source))
    asked = "" if share is None else f"{_ASKED_FOR}{share:.3f}x"
    rounds = f"in turns, {change.rounds} rounds, {where}{asked}"
    words = f"{1 + change.change:.3f}x of the teacher's{_ends(change)}, {rounds}"
    before = _measured_before(plan)
    if before and before != words:
        words += f"{_OF_THE_SEARCH}{before}"
    return dataclasses.replace(plan, timed=words)


def timed_anew(session: Session, plan: PruningPlan) -> str:
    """A line on a ``plan`` whose time was measured here and by the search that found it, with a warning where it misses
    here what was asked for there; empty for any other.
    """
    now, before = with_time(session, plan).timed, _measured_before(plan)
    if not before or _OF_THE_SEARCH not in now:
        return ""
    asked = re.search(rf"{_ASKED_FOR}(\d+\.\d+)x", before)
    missed = asked is not None and 1 + timed_changes(session)[plan.id].change > float(asked[1])
    warning = f"; here it is SLOWER than the {asked[1]}x asked for" if asked is not None and missed else ""
    return f"time of {plan.label}: measured here {now}{warning}"


def _doubt(change: Change, share: float) -> str:
    """What is said where the interval of a measured time holds the budget."""
    if change.low is None or change.high is None or not 1 + change.low < share < 1 + change.high:
        return ""
    return ", but not beyond doubt: the interval holds it; time more rounds (profile.runs) on a quiet machine"


def _shares(session: Session, costs: CostTable, budgets: str) -> Iterator[float]:
    """The shares of the teacher's time that the budgets on latency among ``budgets`` ask for."""
    for text in split_budgets(budgets):
        if not text.strip().startswith("latency"):
            continue
        try:
            budget = parse_budget(text, session.architecture, costs)
        except PruneLabError:
            continue
        assert costs.total.latency_ms is not None
        yield budget.limit / costs.total.latency_ms


def shares_asked(session: Session, costs: CostTable, frame: pd.DataFrame) -> dict[str, float]:
    """By plan id of ``frame``, of plans that were searched, the least share of the teacher's time that was asked."""
    found = {
        row["plan_id"]: min(_shares(session, costs, row["budgets"]), default=None)
        for row in frame.to_dict(orient="records")
    }
    return {name: share for name, share in found.items() if share is not None}


def time_notes(session: Session, costs: CostTable, frame: pd.DataFrame) -> tuple[str, ...]:
    """A line for each row of ``frame``, of plans that were searched, that has a budget on latency and was timed: what
    was predicted, what was measured, and whether that is within the budget.
    """
    changes, lines = timed_changes(session), []
    for row in frame.to_dict(orient="records"):
        change = changes.get(row["plan_id"])
        if change is None:
            continue
        for share in _shares(session, costs, row["budgets"]):
            word = "within" if 1 + change.change <= share else "SLOWER than"
            lines.append(
                f"{row['plan']}: predicted {1 + row['latency_change']:.3f}x of the teacher's time, measured in turns "
                f"{1 + change.change:.3f}x{_ends(change)}: {word} the {share:.3f}x asked for{_doubt(change, share)}"
            )
    return tuple(lines)
