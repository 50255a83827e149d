"""Plans within a budget on latency: found by what parts save, timed in turns with the teacher, and corrected.

What blocks save adds up only nearly, and what narrower ones save only roughly, so each plan that is found is built and
timed. Where it is slower than asked, the limit is moved down in proportion to what was saved and the search is done
again; where it is faster by more than ``NEAR`` of the whole, it is moved up, to between that plan and the next that was
timed and is slower. A few plans are timed, each with a line. Of those within the budget the one that loses least is
kept; where there is none, the fastest, and a line says so.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from prune_lab.errors import BudgetError, PruneLabError
from prune_lab.plans import PruningPlan
from prune_lab.profiling import Change, CostTable, pixels_per_latent, turns_of_frame
from prune_lab.runs import read_records
from prune_lab.runtime import note
from prune_lab.schemas import ROUNDS
from prune_lab.search import Budget, parse_budget, split_budgets
from prune_lab.session import Session
from prune_lab.session.parts import rounds_part
from prune_lab.workflow.measuring import ensure_turns, service_of

TRIES = 6  # plans that are timed for a budget, at most
_SEARCHES = 16  # of which some may find nothing that is so fast, or what was timed already
NEAR = 0.02  # of the whole: how much faster than asked a plan may be before a slower one is looked for
_MARGIN = 1.01  # times what is to be saved is aimed at: a limit met exactly is missed every other time
_LEAST = 0.01  # of the whole: the tightest limit that is tried
_APART = 0.002  # of the whole: limits that are nearer to one another are not told apart


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


def _faster(tried: Sequence[Timed], share: float) -> float:
    """The share of the time to predict, so that ``share`` is measured, where all of ``tried`` are slower."""
    tightest = min(tried, key=lambda one: one.predicted)
    saved = 1 - tightest.measured
    if saved <= 0:  # nothing to be in proportion to
        return tightest.predicted - (1 - tightest.predicted) / 2
    return 1 - max(1 - tightest.predicted, 1e-6) * _MARGIN * (1 - share) / saved


def _nearer(tried: Sequence[Timed], share: float) -> tuple[float, float]:
    """The share of the time to predict, so that ``share`` is measured, where some of ``tried`` are faster, and the
    share that it stays below: that of the next plan that was timed and is slower, or of the teacher.
    """
    low = max((one for one in tried if one.measured <= share), key=lambda one: one.predicted)
    over = [one for one in tried if one.measured > share and one.predicted > low.predicted]
    high, slow = min(((one.predicted, one.measured) for one in over), default=(1.0, 1.0))
    aim = 1 - _MARGIN * (1 - share)
    # in proportion at first; where that was tried and is still too slow, time goes up in a step: halfway
    halve = len(over) > 1 and tried[-1] in over
    part = 0.5 if halve else min(max((aim - low.measured) / max(slow - low.measured, 1e-6), 0.1), 0.9)
    return low.predicted + part * (high - low.predicted), high


def _line(number: int, tried: Timed, share: float, most: int) -> str:
    """What is said of a plan that was timed."""
    word = "within it" if tried.measured <= share else "slower than asked"
    times = f"predicted {tried.predicted:.3f}x, measured {tried.measured:.3f}x of the teacher's time"
    return f"timed {number} of at most {most}: {times}, {word}; predicted impact {tried.loss:.4g}"


def _summary(tried: Sequence[Timed], kept: Timed, share: float, most: int) -> str:
    """What became of the search: how many plans were timed, and which of them is kept."""
    within = [one for one in tried if one.measured <= share]
    number = f"number {tried.index(kept) + 1}"
    times = f"predicted {kept.predicted:.3f}x, measured {kept.measured:.3f}x of the teacher's time in turns"
    if not within:
        less = "" if most > 1 else "; ask for less, or leave --solver out, which searches again"
        count = "none of them" if len(tried) > 1 else "it"
        return f"{len(tried)} timed, {count} within it; kept is {number}, the fastest: {times}, SLOWER than asked{less}"
    plans = "plan is" if len(within) == 1 else "plans are"
    far = ""
    if most > 1 and kept.measured < share - NEAR:
        far = "; no plan nearer to it was found that is within it"
    words = ", of these the one with the least predicted impact" if len(within) > 1 else ""
    return f"{len(within)} {plans} within it of {len(tried)} timed; kept is {number}{words}: {times}{far}"


def timing_note(budgets: Sequence[str], tries: int) -> str:
    """What a search within ``budgets`` is going to time, in a line; empty where none is on latency."""
    timed = sum("latency" in text for text in budgets)
    if not timed:
        return ""
    plans = f"up to {tries} plans are" if tries > 1 else "the plan that is found is"
    each = f" for each of {timed} budgets" if timed > 1 else ""
    return (
        f"to keep a budget on latency, {plans} built and timed in turns with the teacher{each}, after blocks are "
        "scored and timed: this takes minutes, of a large model hours"
    )


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
    # of the limit: below the one nothing is so fast, at the other a plan was too slow
    low, high = _LEAST, 1.0
    for _ in range(_SEARCHES):
        at_most = asked if limit == share else Budget("latency_ms", limit * whole, asked.text)
        found = False
        try:
            plans = solve([*others, at_most])
        except BudgetError:
            if not tried:
                raise
            low = max(low, limit)  # nothing is so fast
        else:
            if not any(plan.changes for plan in plans):
                return plans
            found = plans not in [one.plans for one in tried]
        if found:
            tried.append(_timed(session, costs, plans, loss_of))
            if tries > 1:
                note(f"{asked.text}: {_line(len(tried), tried[-1], share, tries)}")
            if share - NEAR <= tried[-1].measured <= share or len(tried) == tries:
                break
        within = [one for one in tried if one.measured <= share]
        if within:
            aim, high = _nearer(tried, share)
            # the same plan as before: the next one needs more time
            limit = aim if found else (limit + high) / 2
            if high - limit < _APART:
                break
        else:
            high = min(one.predicted for one in tried)
            limit = max(_faster(tried, share), _LEAST) if found else (low + min(limit, high)) / 2
            if limit <= low:
                limit = (low + high) / 2
            if high - low < _APART:
                break
    within = [one for one in tried if one.measured <= share]
    kept = min(within, key=lambda one: one.loss) if within else min(tried, key=lambda one: one.measured)
    note(f"{asked.text}: {_summary(tried, kept, share, tries)}")
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
