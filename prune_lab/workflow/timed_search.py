"""Plans within a budget on latency: found by what parts save, timed in turns with the teacher, and corrected.

What blocks save adds up only nearly, and what narrower ones save only roughly, so each plan that is found is built and
timed. Where it is slower than asked, the limit is moved down in proportion to what was saved and the search is done
again; where it is faster by more than ``NEAR`` of the whole, it is moved up, to between that plan and the next that was
timed and is slower. A few plans are timed, each with a line. Of those within the budget the one that loses least is
kept; where there is none, the fastest, and a line says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prune_lab.errors import BudgetError
from prune_lab.plans import PruningPlan
from prune_lab.profiling import CostTable
from prune_lab.runtime import note
from prune_lab.search import Budget
from prune_lab.session import Session
from prune_lab.workflow.measuring import ensure_turns

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


@dataclass(slots=True)
class _Bracket:
    """Between which limits on the predicted time, as shares of the teacher's, the search goes on so that ``share`` is
    measured; ``limit`` is the next one.
    """

    share: float
    limit: float
    low: float = _LEAST
    """Nothing is so fast."""
    high: float = 1.0
    """A plan that was found so was too slow."""

    def nothing_so_fast(self) -> None:
        """No plan is within ``limit``."""
        self.low = max(self.low, self.limit)

    def narrow(self, tried: Sequence[Timed], *, new: bool) -> bool:
        """Choose the next limit after all that were ``tried``, the last of them just now where it is ``new``.

        False where no limit is left that could be told from those before.
        """
        if any(one.measured <= self.share for one in tried):
            aim, self.high = _nearer(tried, self.share)
            # the same plan as before: the next one needs more time
            self.limit = aim if new else (self.limit + self.high) / 2
            return self.high - self.limit >= _APART
        self.high = min(one.predicted for one in tried)
        halved = (self.low + min(self.limit, self.high)) / 2
        self.limit = max(_faster(tried, self.share), _LEAST) if new else halved
        if self.limit <= self.low:
            self.limit = (self.low + self.high) / 2
        return self.high - self.low >= _APART


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
    share = asked.limit / whole
    tried: list[Timed] = []
    bracket = _Bracket(share, share)
    for _ in range(_SEARCHES):
        at_most = asked if bracket.limit == share else Budget("latency_ms", bracket.limit * whole, asked.text)
        new = False
        try:
            plans = solve([*others, at_most])
        except BudgetError:
            if not tried:
                raise
            bracket.nothing_so_fast()
        else:
            if not any(plan.changes for plan in plans):
                return plans
            new = plans not in [one.plans for one in tried]
        if new:
            tried.append(_timed(session, costs, plans, loss_of))
            if tries > 1:
                note(f"{asked.text}: {_line(len(tried), tried[-1], share, tries)}")
            if share - NEAR <= tried[-1].measured <= share or len(tried) == tries:
                break
        if not bracket.narrow(tried, new=new):
            break
    within = [one for one in tried if one.measured <= share]
    kept = min(within, key=lambda one: one.loss) if within else min(tried, key=lambda one: one.measured)
    note(f"{asked.text}: {_summary(tried, kept, share, tries)}")
    return kept.plans
