"""The ranking: candidates in order of quality, with their costs, and the candidates without a rank with the reason."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import pandas as pd

from prune_lab.errors import DataError
from prune_lab.ranking.paired import tie_groups
from prune_lab.schemas import RANKING_COLUMNS

Origin = Literal["teacher", "control", "search"]
Status = Literal["teacher", "ranked", "dropped", "left out", "failed"]

_ENTRY_COLUMNS = ("rank", "tie_group", "pareto", "status", "reason")
_COUNTS = ("rank", "tie_group", "blocks_removed", "params", "macs", "paper_macs", "steps", "rung")
_LATENCY = ("median_ms", "latency_change", "latency_low", "latency_high")
_FIGURES = (*_LATENCY, "impact_one_shot", "loss_before", "loss_after", "clip_before", "clip_after")
_KINDS = dict.fromkeys(_COUNTS, "Int64") | dict.fromkeys(_FIGURES, "float64") | {"pareto": "boolean"}
_REASON_FIELDS = {"failed": "failure", "left out": "left_out", "dropped": "dropped"}  # by status


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CandidateResult:
    """Costs and measurements of one candidate, or of the teacher; NaN means not measured.

    ``latency_change`` is the median of the ratios to the teacher's times in the same rounds, less one, with the ends of
    its interval; ``median_ms`` is the teacher's median changed by it. ``impact_one_shot`` is the impact of removing the
    whole plan before training, ``loss_*`` the held-out denoising loss and ``clip_*`` the mean CLIP score before and
    after the distillation of ``steps`` steps. ``heldout`` holds the
    losses after it of each row, the same rows for all candidates; empty if unknown. ``rung`` is the last rung of the
    tournament at which the candidate was measured, None without a tournament. Three fields give the reason why a
    candidate is not at the end: ``failure`` (building or training failed), ``left_out`` (not trained), ``dropped``
    (dropped by the tournament at its rung).
    """

    plan: str
    plan_id: str
    origin: Origin
    blocks_removed: int
    params: int
    macs: int
    paper_macs: int
    median_ms: float = math.nan
    latency_change: float = math.nan
    latency_low: float = math.nan
    latency_high: float = math.nan
    impact_one_shot: float = math.nan
    loss_before: float = math.nan
    loss_after: float = math.nan
    clip_before: float = math.nan
    clip_after: float = math.nan
    steps: int = 0
    rung: int | None = None
    heldout: tuple[float, ...] = ()
    failure: str = ""
    left_out: str = ""
    dropped: str = ""
    form: str = "native"  # how the student is built (``prune_lab.forms``)


@dataclasses.dataclass(frozen=True, slots=True)
class RankingEntry:
    """The position of a candidate: rank 0 is the teacher, 1 the best candidate, None a candidate without a rank.

    Candidates of one ``tie_group`` (from 1) are tied with the first of the group by their paired losses, so their ranks
    within the group mean nothing; None where the losses of each row are unknown. ``pareto`` is None where it does not
    apply.
    """

    result: CandidateResult
    rank: int | None
    pareto: bool | None
    status: Status
    reason: str = ""
    tie_group: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Ranking:
    """The teacher, the candidates from best to worst, then the candidates without a rank.

    Candidates that reached the end come before those that were dropped; of the dropped, later rungs come first.
    """

    entries: tuple[RankingEntry, ...]

    def frame(self) -> pd.DataFrame:
        """One row per entry in order, columns RANKING_COLUMNS; unknown values are missing, never zero.

        Where a student is not of the native form, ``form`` is one more column.
        """
        forms = [entry.result.form for entry in self.entries]
        columns = [*RANKING_COLUMNS, *(["form"] if set(forms) - {"native"} else [])]
        rows = [
            [getattr(entry if name in _ENTRY_COLUMNS else entry.result, name) for name in columns]
            for entry in self.entries
        ]
        return pd.DataFrame(rows, columns=columns).astype(_KINDS)


def pareto_front(results: Iterable[CandidateResult]) -> frozenset[str]:
    """Plan ids on the Pareto front: no other has parameters, MACs and loss all as low, and one of them lower."""
    points = {one.plan_id: (one.params, one.macs, one.loss_after) for one in results}
    return frozenset(
        plan_id
        for plan_id, point in points.items()
        if not any(
            other != point and all(theirs <= own for theirs, own in zip(other, point, strict=True))
            for other in points.values()
        )
    )


def _not_ranked(result: CandidateResult, steps: int) -> tuple[Status, str] | None:
    """Status and reason of a candidate that cannot be ranked; None for one that can."""
    if result.failure:
        return "failed", result.failure
    if result.left_out:
        return "left out", result.left_out
    if not math.isfinite(result.loss_after):
        return "left out", "its held-out loss after distillation was not measured"
    if not result.dropped and result.steps != steps:
        return "left out", f"distilled for {result.steps} steps, the ranking compares {steps}"
    return None


def _stage_reached(result: CandidateResult) -> tuple[int, int, int]:
    """Sort key of how far a candidate came, the furthest first; only candidates with equal keys can be compared."""
    if not result.dropped:
        return 0, 0, 0
    return 1, -(result.rung or 0), -result.steps


def _order(result: CandidateResult) -> tuple[float, float, float, float, str]:
    clip = -result.clip_after if math.isfinite(result.clip_after) else math.inf
    return result.loss_after, clip, result.params, result.macs, result.plan_id


def _tie_groups(ranked: Sequence[CandidateResult]) -> dict[str, int]:
    """Tie group by plan id where the losses of each row are known, numbered on from one rung to the next."""
    groups: dict[str, int] = {}
    for _, comparable in itertools.groupby(ranked, key=_stage_reached):
        start = max(groups.values(), default=0)
        own = tie_groups({one.plan_id: one.heldout for one in comparable if one.heldout})
        groups |= {plan_id: start + group for plan_id, group in own.items()}
    return groups


def rank(results: Sequence[CandidateResult]) -> Ranking:
    """The ranking of ``results``: by held-out loss after equally many steps, then by CLIP score, then by size.

    The teacher (origin "teacher") comes first at rank 0 and is not compared. Candidates that the tournament dropped are
    ranked after those that reached the end: later rungs first, then by their loss at the rung. Candidates that failed,
    were not measured, or were distilled for another number of steps than most follow without a rank, with the reason.
    Tie groups are formed where the losses of each row are known. The Pareto front is over parameters, MACs and held-out
    loss, of the teacher and the candidates that reached the end. Raises DataError when two results have the same plan.
    """
    repeated = [plan_id for plan_id, count in Counter(one.plan_id for one in results).items() if count > 1]
    if repeated:
        raise DataError(f"asked to rank plan {repeated[0]} twice; give every plan once")
    teachers = [one for one in results if one.origin == "teacher"]
    candidates = [one for one in results if one.origin != "teacher"]
    finished = Counter(
        one.steps
        for one in candidates
        if not one.failure and not one.left_out and not one.dropped and math.isfinite(one.loss_after)
    )
    steps = max(finished, key=lambda count: (finished[count], count), default=0)
    not_ranked = {one.plan_id: reason for one in candidates if (reason := _not_ranked(one, steps))}
    ranked = sorted(
        (one for one in candidates if one.plan_id not in not_ranked),
        key=lambda one: (_stage_reached(one), _order(one)),
    )
    groups = _tie_groups(ranked)
    finalists = [one for one in ranked if not one.dropped]
    front = pareto_front([*(one for one in teachers if math.isfinite(one.loss_after)), *finalists])
    entries = [RankingEntry(one, 0, one.plan_id in front, "teacher") for one in teachers]
    for number, one in enumerate(ranked, start=1):
        group = groups.get(one.plan_id)
        if one.dropped:
            entries.append(RankingEntry(one, number, None, "dropped", one.dropped, group))
        else:
            entries.append(RankingEntry(one, number, one.plan_id in front, "ranked", tie_group=group))
    rest = (one for one in candidates if one.plan_id in not_ranked)
    entries += [RankingEntry(one, None, None, *not_ranked[one.plan_id]) for one in rest]
    return Ranking(tuple(entries))


def ranking_from_frame(frame: pd.DataFrame) -> Ranking:
    """The ranking in ``frame``, read from the CSV of ``Ranking.frame``; ``heldout`` is not part of it and stays empty.

    Raises DataError when columns are missing.
    """
    if missing := [name for name in RANKING_COLUMNS if name not in frame]:
        raise DataError(f"asked to read a ranking, found no column {missing[0]!r}; run prune-lab rank again")
    entries = []
    columns = [name for name in (*RANKING_COLUMNS, "form") if name in frame]
    for row in frame[columns].astype(_KINDS).to_dict("records"):
        known: dict[str, Any] = {str(name): value for name, value in row.items() if not pd.isna(value)}
        position = {name: known.pop(name, None) for name in _ENTRY_COLUMNS}
        reason = position["reason"] = position["reason"] or ""
        if position["status"] in _REASON_FIELDS:
            known[_REASON_FIELDS[position["status"]]] = reason
        known |= {name: str(known[name]) for name in ("plan", "plan_id")}
        entries.append(RankingEntry(CandidateResult(**known), **position))
    return Ranking(tuple(entries))
