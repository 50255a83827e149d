"""A tournament by successive halving: everyone trains a little, the better part goes on, and so to the end.

Decisions only, no training: ``play`` asks for losses and is told. What it decides by are paired differences on common
rows, so that nobody is dropped for a difference that the rows do not show.

Reference: Jamieson and Talwalkar, arXiv:1502.07943. There the order of the means decides; here ties go on together.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from prune_lab.errors import ConfigError, DataError
from prune_lab.ranking.paired import Difference, paired_difference
from prune_lab.schemas import TOURNAMENT_COLUMNS

_T = TypeVar("_T")
Fate = Literal["kept", "dropped", "failed"]
HeldoutLosses = NDArray[np.float64] | str
"""The held-out loss of every row, or why there is none."""
Measure = Callable[[Sequence[str], int], Mapping[str, HeldoutLosses]]
"""Trains the named students on until each has taken that many steps; what they have come to, by name."""
Draw = Callable[[Sequence[str], int], Mapping[str, NDArray[np.float64]]]
"""The CLIP score of the named students, as they are after that many steps, for every prompt and seed, by name."""


# Rungs -----------------------------------------------------------------------------------------------------------


def first_rung(steps: int, eta: int, warmup: int) -> int:
    """Steps of the first rung when none are asked for: ``steps`` over the highest power of ``eta`` that leaves enough.

    Enough is twice the ``warmup`` of the learning rate and no less than ten: before that a student has hardly moved.
    """
    least, first = max(2 * warmup, 10), steps
    while first // eta >= least:
        first //= eta
    return first


def rungs(steps: int, eta: int, first: int) -> tuple[int, ...]:
    """Steps at which the tournament decides: ``first``, ``first * eta`` and so on, and last of all ``steps``.

    One that would lie within the square root of ``eta`` before the end is left out: it would save next to nothing.
    Raises ConfigError for an ``eta`` below 2 and a ``first`` outside of 1 to ``steps``.
    """
    if eta < 2 or not 1 <= first <= steps:
        raise ConfigError(
            f"asked for rungs from {first} to {steps} steps with eta = {eta}; eta must be 2 or more, the first rung "
            "at least 1 step and no more than the last"
        )
    found, rung = [], first
    while rung * math.sqrt(eta) <= steps:
        found.append(rung)
        rung *= eta
    return (*found, steps)


# Nouns -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one rung decided about one contender, and by what.

    ``loss`` is the mean held-out loss at ``steps``, ``clip`` the mean CLIP score where pictures were drawn; ``place``
    counts from 1, None for a control, which takes no place, and for one that failed. The ``difference`` is the paired
    one in loss to ``against``: the last who survives by place, at the last rung the first; None for that one itself.
    ``tied`` says whether it holds zero.
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
        """Whether it went on from here, or came to the end."""
        return self.fate == "kept"


@dataclasses.dataclass(frozen=True, slots=True)
class Tournament:
    """All verdicts, rung by rung, each rung in order of loss with the failed at its end."""

    names: tuple[str, ...]
    rungs: tuple[int, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def fates(self) -> dict[str, Verdict]:
        """The last verdict on everyone, in the order of ``names``."""
        last = {verdict.name: verdict for verdict in self.verdicts}
        return {name: last[name] for name in self.names}

    @property
    def survivors(self) -> tuple[str, ...]:
        """Those who came to the end, controls among them, in order of loss there."""
        return tuple(one.name for one in self.verdicts if one.rung == len(self.rungs) and one.kept)

    @property
    def cost(self) -> int:
        """Steps of single students that were taken; who failed counts up to the rung that was to come."""
        return sum(verdict.steps for verdict in self.fates.values())

    @property
    def full_cost(self) -> int:
        """Steps of single students if everyone had been trained to the end."""
        return len(self.names) * self.rungs[-1]

    def frame(self) -> pd.DataFrame:
        """One row per verdict, columns TOURNAMENT_COLUMNS; what there is not is missing."""
        rows = []
        for verdict in self.verdicts:
            row = {
                field.name: getattr(verdict, field.name)
                for field in dataclasses.fields(verdict)
                if field.name != "difference"
            }
            gap = verdict.difference or Difference(math.nan, math.nan, math.nan)
            rows.append(row | {"difference": gap.mean, "low": gap.low, "high": gap.high})
        frame = pd.DataFrame(rows, columns=list(TOURNAMENT_COLUMNS))
        kinds = dict.fromkeys(("rung", "steps", "place"), "Int64") | {"tied": "boolean"}
        return frame.astype(kinds | dict.fromkeys(("loss", "clip", "difference", "low", "high"), "float64"))


# The tournament --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Rung:
    """One rung while it is judged: which it is, and the losses of those who are still whole, in order of their mean."""

    number: int
    of: int
    steps: int
    losses: Mapping[str, NDArray[np.float64]]

    def said(self, reason: str) -> str:
        return f"at rung {self.number} of {self.of}, {self.steps} steps: {reason}"

    def kept(self, name: str, place: int | None, against: str, reason: str = "") -> Verdict:
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

    def dropped(self, verdict: Verdict, reason: str) -> Verdict:
        return dataclasses.replace(verdict, fate="dropped", reason=self.said(reason))


def _answered(answers: Mapping[str, _T], names: Sequence[str], what: str, steps: int) -> dict[str, _T]:
    """``answers`` for ``names``, in their order."""
    if silent := [name for name in names if name not in answers]:
        raise DataError(
            f"asked for the {what} of {silent[0]} after {steps} steps, found no answer; give values or a reason"
        )
    return {name: answers[name] for name in names}


def _whole(
    answers: Mapping[str, HeldoutLosses], number: int, steps: int
) -> tuple[dict[str, NDArray[np.float64]], list[Verdict]]:
    """(losses in order of their mean, verdicts on those who failed)."""
    losses, failed = {}, []
    for name, answer in answers.items():
        if isinstance(answer, str):
            reason = answer
        elif not len(answer) or not np.isfinite(answer).all():
            reason = f"its held-out loss after {steps} steps is not finite"
        else:
            losses[name] = np.asarray(answer, dtype=np.float64)
            continue
        failed.append(Verdict(rung=number, steps=steps, name=name, fate="failed", reason=reason))
    # Stable: those with exactly one loss stay in the order in which they were named.
    ordered = sorted(losses, key=lambda name: float(losses[name].mean()))
    return {name: losses[name] for name in ordered}, failed


def _by_pictures(rung: _Rung, found: dict[str, Verdict], tied: Sequence[str], last: str, draw: Draw) -> None:
    """Put into ``found`` the CLIP scores of ``last`` and of those ``tied`` with it, and drop who scores lower."""
    scores = _answered(draw([last, *tied], rung.steps), [last, *tied], "CLIP score", rung.steps)
    for name, values in scores.items():
        found[name] = dataclasses.replace(found[name], clip=float(np.mean(values)))
        if name != last and paired_difference(values, scores[last]).verdict == "lower":
            lack = paired_difference(scores[last], values)
            reason = f"tied on loss with the last survivor, its CLIP score is lower by {lack}"
            found[name] = rung.dropped(found[name], reason)


def _halved(
    rung: _Rung, rivals: Sequence[str], eta: int, most: int, draw: Draw | None
) -> tuple[dict[str, Verdict], str]:
    """(the verdicts on ``rivals``, which are in order of mean loss, the last who survives by place)."""
    quota = math.ceil(len(rivals) / eta)
    last = rivals[quota - 1]
    found = {name: rung.kept(name, place, last) for place, name in enumerate(rivals, start=1)}
    for name in rivals[quota:]:
        if not found[name].tied:
            gap = found[name].difference
            found[name] = rung.dropped(found[name], f"worse than the last survivor by {gap}")
    tied = [name for name in rivals[quota:] if found[name].kept]
    if tied and draw is not None and rung.number > 1:
        _by_pictures(rung, found, tied, last, draw)
    going = [name for name in tied if found[name].kept]
    room = (most - 1) * quota
    for name in going[:room]:
        reason = rung.said("goes on because it is tied with the last survivor")
        found[name] = dataclasses.replace(found[name], reason=reason)
    for name in going[room:]:
        reason = f"tied with the last survivor, but no more than {most * quota} may go on"
        found[name] = rung.dropped(found[name], reason)
    return found, last


def _checked(names: Sequence[str], steps: Sequence[int], eta: int, keep: Collection[str], most: int) -> None:
    if len(set(names)) != len(names):
        raise ConfigError("asked for a tournament of contenders with one name; name every one differently")
    if unknown := sorted(set(keep) - set(names)):
        raise ConfigError(f"asked to keep {unknown[0]!r} in the tournament, which is none of its contenders")
    if not steps or list(steps) != sorted(set(steps)) or steps[0] < 1 or eta < 1 or most < 1:
        raise ConfigError(
            f"asked for a tournament with the rungs {list(steps)}, eta = {eta} and most = {most}; rungs are rising "
            "numbers of steps above zero, eta and most 1 or more"
        )


def play(
    names: Sequence[str],
    rungs: Sequence[int],
    eta: int,
    measure: Measure,
    *,
    keep: Collection[str] = (),
    draw: Draw | None = None,
    most: int = 2,
) -> Tournament:
    """The tournament of ``names`` over ``rungs``: at each but the last the best 1/``eta`` go on, rounded up.

    Whoever ties on held-out loss with the last of these goes on too, lowest mean loss first, until ``most`` times as
    many do. From the second rung on, where ``draw`` is given, those are dropped again whose CLIP score is lower than
    the last survivor's. ``keep`` names controls, which go on to the end and take nobody's place. A failed one is out.
    ``measure`` is asked once at each rung, and only about those who are still in. Raises ConfigError for an impossible
    tournament, DataError when ``measure`` or ``draw`` does not answer for everyone.
    """
    _checked(names, rungs, eta, keep, most)
    verdicts: list[Verdict] = []
    going = tuple(names)
    for number, steps in enumerate(rungs, start=1):
        if not going:
            break
        answers = _answered(measure(going, steps), going, "held-out loss", steps)
        losses, failed = _whole(answers, number, steps)
        rung = _Rung(number, len(rungs), steps, losses)
        rivals = [name for name in losses if name not in keep]
        against, found = "", {}
        if number == len(rungs):
            against = next(iter(losses), "")
            found = {name: rung.kept(name, place, against) for place, name in enumerate(rivals, start=1)}
        elif rivals:
            found, against = _halved(rung, rivals, eta, most, draw)
        for name in losses:
            if name in keep:
                found[name] = rung.kept(name, None, against, "a control, which always goes on")
        verdicts += [*(found[name] for name in losses), *failed]
        going = tuple(name for name in going if name in found and found[name].kept)
    return Tournament(tuple(names), tuple(rungs), tuple(verdicts))


def tournament_from_frame(frame: pd.DataFrame) -> Tournament:
    """The tournament whose ``frame()`` was written as CSV; names in order of loss at the first rung.

    Raises DataError when columns are missing.
    """
    missing = [name for name in TOURNAMENT_COLUMNS if name not in frame.columns]
    if missing:
        raise DataError(
            f"asked to read a tournament, found no column {missing[0]!r}; run prune-lab rank again"
        )
    verdicts = []
    for row in frame.to_dict("records"):
        gap = Difference(float(row["difference"]), float(row["low"]), float(row["high"]))
        verdicts.append(
            Verdict(
                rung=int(row["rung"]),
                steps=int(row["steps"]),
                name=str(row["name"]),
                loss=float(row["loss"]),
                clip=float(row["clip"]),
                place=None if pd.isna(row["place"]) else int(row["place"]),
                fate=row["fate"],
                tied=None if pd.isna(row["tied"]) else bool(row["tied"]),
                against="" if pd.isna(row["against"]) else str(row["against"]),
                difference=None if math.isnan(gap.mean) else gap,
                reason="" if pd.isna(row["reason"]) else str(row["reason"]),
            )
        )
    names = dict.fromkeys(verdict.name for verdict in verdicts)
    return Tournament(tuple(names), tuple(sorted({verdict.steps for verdict in verdicts})), tuple(verdicts))
