"""Who is better at equal effort: candidates in order, at their cost, with those left out and why."""

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

_OF_PLACE = ("rank", "tie_group", "pareto", "status", "reason")
_COUNTS = ("blocks_removed", "params", "macs", "paper_macs", "steps", "rung")
_FIGURES = ("median_ms", "impact_one_shot", "loss_before", "loss_after", "clip_before", "clip_after")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One candidate, or the teacher, with all that was measured of it; nan is what was not measured.

    ``impact_one_shot`` is the removal impact of the plan before training, ``loss_*`` the held-out denoising loss and
    ``clip_*`` the mean CLIP score before and after the distillation of ``steps`` steps. ``heldout`` holds the losses
    after it row by row, of the same rows for everyone; empty where they were not kept. ``rung`` is the last rung of the
    tournament at which it was measured, None without one. A candidate with a ``failure`` (built or trained in vain), a
    ``left_out`` (not tried) or a ``dropped`` (trained up to its rung, and not on) says why there.
    """

    plan: str
    plan_id: str
    origin: Origin
    blocks_removed: int
    params: int
    macs: int
    paper_macs: int
    median_ms: float = math.nan
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


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a contender ended: 0 is the teacher, 1 the best candidate, None one that is not ranked.

    Those of one ``tie_group`` (from 1) cannot be told apart from its first by their paired losses, whatever their
    ranks; None where losses row by row are not known.
    """

    contender: Contender
    rank: int | None
    pareto: bool | None
    status: Status
    reason: str = ""
    tie_group: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Ranking:
    """Everyone who was considered: the teacher, the candidates from best to worst, then those without a rank.

    The candidates that came to the end stand before those that were dropped, and these by how far they came.
    """

    places: tuple[Place, ...]

    def frame(self) -> pd.DataFrame:
        """One row per contender in order, columns RANKING_COLUMNS; unknown values are missing, never zero."""
        rows = []
        for place in self.places:
            row = {
                name: getattr(place.contender, name)
                for name in RANKING_COLUMNS
                if name in Contender.__slots__
            }
            rows.append(row | {name: getattr(place, name) for name in _OF_PLACE})
        frame = pd.DataFrame(rows, columns=list(RANKING_COLUMNS))
        kinds = dict.fromkeys(("rank", "tie_group", *_COUNTS), "Int64") | dict.fromkeys(_FIGURES, "float64")
        return frame.astype(kinds | {"pareto": "boolean"})


def _cost_and_loss(contender: Contender) -> tuple[float, float, float]:
    return contender.params, contender.macs, contender.loss_after


def pareto_front(contenders: Iterable[Contender]) -> frozenset[str]:
    """Plan ids of those that nobody beats: no other has parameters, MACs and loss all as low and one of them lower."""
    points = {contender.plan_id: _cost_and_loss(contender) for contender in contenders}
    return frozenset(
        plan_id
        for plan_id, point in points.items()
        if not any(
            other != point and all(theirs <= own for theirs, own in zip(other, point, strict=True))
            for other in points.values()
        )
    )


def _excused(contender: Contender, steps: int) -> tuple[Status, str] | None:
    """Status and reason of a candidate that cannot be ranked; None for one that can."""
    if contender.failure:
        return "failed", contender.failure
    if contender.left_out:
        return "left out", contender.left_out
    if not math.isfinite(contender.loss_after):
        return "left out", "its held-out loss after distillation was not measured"
    if not contender.dropped and contender.steps != steps:
        return "left out", f"distilled for {contender.steps} steps, the ranking compares {steps}"
    return None


def _round_of(contender: Contender) -> tuple[int, int, int]:
    """What can be compared: those who came to the end, then those dropped at one rung, the later ones first."""
    if not contender.dropped:
        return 0, 0, 0
    return 1, -(contender.rung or 0), -contender.steps


def _order(contender: Contender) -> tuple[float, float, float, float, str]:
    clip = -contender.clip_after if math.isfinite(contender.clip_after) else math.inf
    return contender.loss_after, clip, contender.params, contender.macs, contender.plan_id


def _tie_groups(ranked: Sequence[Contender]) -> dict[str, int]:
    """Tie group by plan id of those with losses row by row, counted on from one round to the next."""
    groups: dict[str, int] = {}
    for _, among in itertools.groupby(ranked, key=_round_of):
        start = max(groups.values(), default=0)
        found = tie_groups({one.plan_id: one.heldout for one in among if one.heldout})
        groups |= {plan_id: start + group for plan_id, group in found.items()}
    return groups


def rank(contenders: Sequence[Contender]) -> Ranking:
    """The ranking of ``contenders``: by held-out loss after equally many steps, then by CLIP score, then by size.

    The teacher (origin "teacher") comes first at rank 0 and competes with nobody. Those who were dropped on the way
    are ranked after those who came to the end, the later dropped first, then by their loss there. Candidates distilled
    for another number of steps than most, not measured or failed follow without a rank, each with its reason. Tie
    groups are formed where the losses row by row are known. The Pareto flag is over parameters, MACs and held-out loss
    among the teacher and those who came to the end. Raises DataError for two contenders of one plan.
    """
    repeated = [plan_id for plan_id, count in Counter(one.plan_id for one in contenders).items() if count > 1]
    if repeated:
        raise DataError(f"asked to rank plan {repeated[0]} twice; give every plan once")
    teachers = [one for one in contenders if one.origin == "teacher"]
    candidates = [one for one in contenders if one.origin != "teacher"]
    finished = Counter(
        one.steps
        for one in candidates
        if not one.failure and not one.left_out and not one.dropped and math.isfinite(one.loss_after)
    )
    steps = max(finished, key=lambda count: (finished[count], count), default=0)
    excuses = {one.plan_id: _excused(one, steps) for one in candidates}

    ranked = sorted(
        (one for one in candidates if excuses[one.plan_id] is None),
        key=lambda one: (_round_of(one), _order(one)),
    )
    groups = _tie_groups(ranked)
    at_the_end = [one for one in ranked if not one.dropped]
    front = pareto_front([*(one for one in teachers if math.isfinite(one.loss_after)), *at_the_end])
    places = [Place(one, 0, one.plan_id in front, "teacher") for one in teachers]
    for number, one in enumerate(ranked, start=1):
        group = groups.get(one.plan_id)
        if one.dropped:
            places.append(Place(one, number, None, "dropped", one.dropped, group))
        else:
            places.append(Place(one, number, one.plan_id in front, "ranked", tie_group=group))
    for one in candidates:
        excuse = excuses[one.plan_id]
        if excuse is not None:
            places.append(Place(one, None, None, *excuse))
    return Ranking(tuple(places))


def _whole_number(cell: Any) -> int | None:
    return None if pd.isna(cell) else int(cell)


def ranking_from_frame(frame: pd.DataFrame) -> Ranking:
    """The ranking whose ``frame()`` was written as CSV; losses row by row are not part of it and read as empty.

    Raises DataError when columns are missing.
    """
    missing = [name for name in RANKING_COLUMNS if name not in frame.columns]
    if missing:
        raise DataError(f"asked to read a ranking, found no column {missing[0]!r}; run prune-lab rank again")
    places = []
    for row in frame.to_dict("records"):
        reason = "" if pd.isna(row["reason"]) else str(row["reason"])
        contender = Contender(
            plan=str(row["plan"]),
            plan_id=str(row["plan_id"]),
            origin=row["origin"],
            blocks_removed=int(row["blocks_removed"]),
            params=int(row["params"]),
            macs=int(row["macs"]),
            paper_macs=int(row["paper_macs"]),
            median_ms=float(row["median_ms"]),
            impact_one_shot=float(row["impact_one_shot"]),
            loss_before=float(row["loss_before"]),
            loss_after=float(row["loss_after"]),
            clip_before=float(row["clip_before"]),
            clip_after=float(row["clip_after"]),
            steps=int(row["steps"]),
            rung=_whole_number(row["rung"]),
            failure=reason if row["status"] == "failed" else "",
            left_out=reason if row["status"] == "left out" else "",
            dropped=reason if row["status"] == "dropped" else "",
        )
        places.append(
            Place(
                contender,
                _whole_number(row["rank"]),
                None if pd.isna(row["pareto"]) else bool(row["pareto"]),
                row["status"],
                reason,
                _whole_number(row["tie_group"]),
            )
        )
    return Ranking(tuple(places))
