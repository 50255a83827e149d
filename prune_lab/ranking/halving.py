"""A tournament by successive halving: all candidates train for a few steps, the better part goes on, and so on.

This module only decides; ``run_tournament`` gets the losses from a function of its caller, which does the training.
Decisions use paired differences on common rows, so that no candidate is dropped for a difference that may be chance.

Reference: Jamieson and Talwalkar, arXiv:1502.07943. There the order of the means decides; here tied candidates go on
together.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from prune_lab.errors import ConfigError, DataError
from prune_lab.ranking.paired import Difference, paired_difference
from prune_lab.schemas import TOURNAMENT_COLUMNS

_T = TypeVar("_T")
_KINDS = {
    **dict.fromkeys(("rung", "steps", "place"), "Int64"),
    **dict.fromkeys(("loss", "clip", "difference", "low", "high"), "float64"),
    "tied": "boolean",
}
Fate = Literal["kept", "dropped", "failed"]
HeldoutLosses = NDArray[np.float64] | str
"""The held-out loss of every row, or the reason why there is none."""
TrainAndMeasure = Callable[[Sequence[str], int], Mapping[str, HeldoutLosses]]
"""(names, steps) -> held-out losses by name, after training each of the named students up to that many steps."""
ScoreImages = Callable[[Sequence[str], int], Mapping[str, NDArray[np.float64]]]
"""(names, steps) -> CLIP scores by name, one for every prompt and seed, of students that have taken these steps."""


# Rungs -----------------------------------------------------------------------------------------------------------


def first_rung(steps: int, eta: int, warmup: int) -> int:
    """Default number of steps of the first rung: ``steps`` divided by ``eta`` as often as enough steps remain.

    Enough means twice the ``warmup`` of the learning rate and at least ten: before that a student has hardly changed.
    """
    least, first = max(2 * warmup, 10), steps
    while first // eta >= least:
        first //= eta
    return first


def rungs(steps: int, eta: int, first: int) -> tuple[int, ...]:
    """Steps at which the tournament decides: ``first``, ``first * eta`` and so on, and finally ``steps``.

    A rung above ``steps`` divided by the square root of ``eta`` is left out: it would save almost nothing.
    Raises ConfigError for an ``eta`` below 2 and a ``first`` outside of 1 to ``steps``.
    """
    if eta < 2 or not 1 <= first <= steps:
        raise ConfigError(
            f"asked for rungs from {first} to {steps} steps with eta = {eta}; eta must be 2 or more, the first rung "
            "at least 1 step and no more than the last"
        )
    decisions, rung = [], first
    while rung * math.sqrt(eta) <= steps:
        decisions.append(rung)
        rung *= eta
    return (*decisions, steps)


# Results ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The decision of one rung on one candidate, and the figures behind it.

    ``loss`` is the mean held-out loss at ``steps``, ``clip`` the mean CLIP score where images were generated. ``place``
    is the position by loss, from 1; None for controls, which are not counted, and for a failed candidate.
    ``difference`` is the paired difference in loss to the candidate ``against``: the last survivor by place, or the
    best candidate at the last rung; None for that candidate itself. ``tied`` says whether its interval contains zero.
    """

    rung: int
    steps: int
    name: str
    loss: float = math.nan
    clip: float = math.nan
    place: int | None = None
    fate: Fate = "kept"
    tied: bool | None = None
    against: str = ""
    difference: Difference | None = None
    reason: str = ""

    @property
    def kept(self) -> bool:
        """Whether the candidate goes on, or has reached the end."""
        return self.fate == "kept"


@dataclasses.dataclass(frozen=True, slots=True)
class Tournament:
    """All verdicts, rung by rung; each rung in order of loss, failed candidates last."""

    names: tuple[str, ...]
    rungs: tuple[int, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def fates(self) -> dict[str, Verdict]:
        """The last verdict on each candidate, in the order of ``names``."""
        last = {verdict.name: verdict for verdict in self.verdicts}
        return {name: last[name] for name in self.names}

    @property
    def survivors(self) -> tuple[str, ...]:
        """The candidates that reached the end, controls included, in order of loss."""
        return tuple(one.name for one in self.verdicts if one.rung == len(self.rungs) and one.kept)

    @property
    def cost(self) -> int:
        """Training steps of all students together; a failed one counts up to the rung that it did not reach."""
        return sum(verdict.steps for verdict in self.fates.values())

    @property
    def full_cost(self) -> int:
        """Training steps of all students together if each had been trained to the end."""
        return len(self.names) * self.rungs[-1]

    def frame(self) -> pd.DataFrame:
        """One row per verdict, columns TOURNAMENT_COLUMNS; values that do not exist are missing."""
        rows = []
        for verdict in self.verdicts:
            gap = verdict.difference or Difference(math.nan, math.nan, math.nan)
            figures = {"difference": gap.mean, "low": gap.low, "high": gap.high}
            rows.append(dataclasses.asdict(verdict) | figures)
        return pd.DataFrame(rows, columns=list(TOURNAMENT_COLUMNS)).astype(_KINDS)


# The tournament --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Rung:
    """One rung: its number of how many, its steps, and the losses of candidates that did not fail, best mean first."""

    number: int
    count: int
    steps: int
    losses: Mapping[str, NDArray[np.float64]]

    def reason(self, text: str) -> str:
        return f"at rung {self.number} of {self.count}, {self.steps} steps: {text}"

    def keep(self, name: str, place: int | None, against: str, reason: str = "") -> Verdict:
        gap = (
            paired_difference(self.losses[name], self.losses[against]) if against not in ("", name) else None
        )
        return Verdict(
            rung=self.number,
            steps=self.steps,
            name=name,
            loss=float(self.losses[name].mean()),
            place=place,
            tied=gap.tie if gap else None,
            against=against if gap else "",
            difference=gap,
            reason=reason,
        )

    def drop(self, verdict: Verdict, reason: str) -> Verdict:
        return dataclasses.replace(verdict, fate="dropped", reason=self.reason(reason))


def _complete(values: Mapping[str, _T], names: Sequence[str], quantity: str, steps: int) -> dict[str, _T]:
    """``values`` of ``names``, in their order. Raises DataError when one is missing."""
    if missing := [name for name in names if name not in values]:
        raise DataError(
            f"asked for the {quantity} of {missing[0]} after {steps} steps, found none; give values or a reason"
        )
    return {name: values[name] for name in names}


def _without_failed(
    heldout: Mapping[str, HeldoutLosses], number: int, steps: int
) -> tuple[dict[str, NDArray[np.float64]], list[Verdict]]:
    """(finite losses in order of their mean, verdicts on the failed candidates)."""
    losses, failed = {}, []
    for name, values in heldout.items():
        if isinstance(values, str):
            reason = values
        elif not len(values) or not np.isfinite(values).all():
            reason = f"its held-out loss after {steps} steps is not finite"
        else:
            losses[name] = np.asarray(values, dtype=np.float64)
            continue
        failed.append(Verdict(rung=number, steps=steps, name=name, fate="failed", reason=reason))
    # The sort is stable: candidates with exactly equal losses stay in the order of their names in the call.
    ordered = sorted(losses, key=lambda name: float(losses[name].mean()))
    return {name: losses[name] for name in ordered}, failed


def _drop_by_clip(
    rung: _Rung, verdicts: dict[str, Verdict], tied: Sequence[str], last: str, clip_scores: ScoreImages
) -> None:
    """Add CLIP scores to ``verdicts``, and drop the candidates ``tied`` with ``last`` whose score is lower."""
    scores = _complete(clip_scores([last, *tied], rung.steps), [last, *tied], "CLIP score", rung.steps)
    for name, values in scores.items():
        verdicts[name] = dataclasses.replace(verdicts[name], clip=float(np.mean(values)))
        if name != last and paired_difference(values, scores[last]).direction == "lower":
            gap = paired_difference(scores[last], values)
            reason = f"tied on loss with the last survivor, its CLIP score is lower by {gap}"
            verdicts[name] = rung.drop(verdicts[name], reason)


def _halve(
    rung: _Rung, ordered: Sequence[str], eta: int, most: int, clip_scores: ScoreImages | None
) -> tuple[dict[str, Verdict], str]:
    """(verdicts on the candidates ``ordered`` by mean loss, the last survivor by place)."""
    quota = math.ceil(len(ordered) / eta)
    last = ordered[quota - 1]
    verdicts = {name: rung.keep(name, place, last) for place, name in enumerate(ordered, start=1)}
    for name in ordered[quota:]:
        if not verdicts[name].tied:
            gap = verdicts[name].difference
            verdicts[name] = rung.drop(verdicts[name], f"worse than the last survivor by {gap}")
    tied = [name for name in ordered[quota:] if verdicts[name].kept]
    if tied and clip_scores is not None and rung.number > 1:
        _drop_by_clip(rung, verdicts, tied, last, clip_scores)
        tied = [name for name in tied if verdicts[name].kept]
    room = (most - 1) * quota
    for name in tied[:room]:
        reason = rung.reason("goes on because it is tied with the last survivor")
        verdicts[name] = dataclasses.replace(verdicts[name], reason=reason)
    for name in tied[room:]:
        reason = f"tied with the last survivor, but no more than {most * quota} may go on"
        verdicts[name] = rung.drop(verdicts[name], reason)
    return verdicts, last


def _check_arguments(
    names: Sequence[str], rungs: Sequence[int], eta: int, keep: Collection[str], most: int
) -> None:
    if len(set(names)) != len(names):
        raise ConfigError("asked for a tournament with two candidates of one name; give each its own name")
    if unknown := sorted(set(keep) - set(names)):
        raise ConfigError(f"asked to keep {unknown[0]!r} in the tournament, which is none of its candidates")
    if not rungs or list(rungs) != sorted(set(rungs)) or rungs[0] < 1 or eta < 1 or most < 1:
        raise ConfigError(
            f"asked for a tournament with the rungs {list(rungs)}, eta = {eta} and most = {most}; rungs are rising "
            "numbers of steps above zero, eta and most 1 or more"
        )


def run_tournament(
    names: Sequence[str],
    rungs: Sequence[int],
    eta: int,
    measure: TrainAndMeasure,
    *,
    keep: Collection[str] = (),
    clip_scores: ScoreImages | None = None,
    most: int = 2,
) -> Tournament:
    """The tournament of ``names`` over ``rungs``: at each rung but the last the best 1/``eta`` (rounded up) go on.

    Candidates that are tied on held-out loss with the last of these go on too, lowest mean loss first, up to ``most``
    times as many in all. From the second rung on, if ``clip_scores`` is given, tied candidates with a lower CLIP score
    than that last survivor are dropped. ``keep`` names controls, which always go on and are not counted. Failed
    candidates leave the tournament. ``measure`` is called once per rung, with the candidates that are still in.
    Raises ConfigError for impossible arguments, DataError when ``measure`` or ``clip_scores`` leaves out a candidate.
    """
    _check_arguments(names, rungs, eta, keep, most)
    verdicts: list[Verdict] = []
    running = tuple(names)
    for number, steps in enumerate(rungs, start=1):
        if not running:
            break
        heldout = _complete(measure(running, steps), running, "held-out loss", steps)
        losses, failed = _without_failed(heldout, number, steps)
        rung = _Rung(number, len(rungs), steps, losses)
        ordered = [name for name in losses if name not in keep]
        against, decided = "", {}
        if number == len(rungs):
            against = next(iter(losses), "")
            decided = {name: rung.keep(name, place, against) for place, name in enumerate(ordered, start=1)}
        elif ordered:
            decided, against = _halve(rung, ordered, eta, most, clip_scores)
        for name in losses:
            if name in keep:
                decided[name] = rung.keep(name, None, against, "a control, which always goes on")
        verdicts += [*(decided[name] for name in losses), *failed]
        running = tuple(name for name in running if name in decided and decided[name].kept)
    return Tournament(tuple(names), tuple(rungs), tuple(verdicts))


def tournament_from_frame(frame: pd.DataFrame) -> Tournament:
    """The tournament in ``frame``, read from the CSV of ``Tournament.frame``; names in order of loss at the first rung.

    Raises DataError when columns are missing.
    """
    if missing := [name for name in TOURNAMENT_COLUMNS if name not in frame]:
        raise DataError(
            f"asked to read a tournament, found no column {missing[0]!r}; run prune-lab rank again"
        )
    verdicts = []
    for row in frame[list(TOURNAMENT_COLUMNS)].astype(_KINDS).to_dict("records"):
        known: dict[str, Any] = {str(name): value for name, value in row.items() if not pd.isna(value)}
        known |= {name: str(known[name]) for name in ("name", "against") if name in known}
        gap = Difference(*(known.pop(name, math.nan) for name in ("difference", "low", "high")))
        verdicts.append(Verdict(**known, difference=None if math.isnan(gap.mean) else gap))
    names = dict.fromkeys(verdict.name for verdict in verdicts)
    return Tournament(tuple(names), tuple(sorted({verdict.steps for verdict in verdicts})), tuple(verdicts))
