"""Who is better at equal effort: candidates in order, at their cost, with those left out and why."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import pandas as pd

from prune_lab.errors import DataError

Origin = Literal["teacher", "control", "search"]
Status = Literal["teacher", "ranked", "left out", "failed"]

RANKING_COLUMNS = (
    *("rank", "plan", "plan_id", "origin", "blocks_removed", "params", "macs", "paper_macs", "median_ms"),
    *(
        "impact_one_shot",
        "loss_before",
        "loss_after",
        "clip_before",
        "clip_after",
        "pareto",
        "status",
        "reason",
    ),
)
_COUNTS = ("blocks_removed", "params", "macs", "paper_macs")
_FIGURES = ("median_ms", "impact_one_shot", "loss_before", "loss_after", "clip_before", "clip_after")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One candidate, or the teacher, with all that was measured of it; nan is what was not measured.

    ``impact_one_shot`` is the removal impact of the plan before training, ``loss_*`` the held-out denoising loss and
    ``clip_*`` the mean CLIP score before and after the distillation of ``steps`` steps. A candidate with a ``failure``
    (built or trained in vain) or a ``left_out`` (not tried) says why there.
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
    failure: str = ""
    left_out: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a contender ended: 0 is the teacher, 1 the best candidate, None one that is not ranked."""

    contender: Contender
    rank: int | None
    pareto: bool | None
    status: Status
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Ranking:
    """Everyone who was considered: the teacher, the candidates from best to worst, then those without a rank."""

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
            rows.append(row | {name: getattr(place, name) for name in ("rank", "pareto", "status", "reason")})
        frame = pd.DataFrame(rows, columns=list(RANKING_COLUMNS))
        kinds = dict.fromkeys(("rank", *_COUNTS), "Int64") | dict.fromkeys(_FIGURES, "float64")
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
    if contender.steps != steps:
        return "left out", f"distilled for {contender.steps} steps, the ranking compares {steps}"
    return None


def rank(contenders: Sequence[Contender]) -> Ranking:
    """The ranking of ``contenders``: by held-out loss after equally many steps, then by CLIP score, then by size.

    The teacher (origin "teacher") comes first at rank 0 and competes with nobody. Candidates distilled for another
    number of steps than most, not measured or failed follow at the end without a rank, each with its reason. The Pareto
    flag is over parameters, MACs and held-out loss among the teacher and the ranked. Raises DataError for two
    contenders of one plan.
    """
    repeated = [plan_id for plan_id, count in Counter(one.plan_id for one in contenders).items() if count > 1]
    if repeated:
        raise DataError(f"asked to rank plan {repeated[0]} twice; give every plan once")
    teachers = [one for one in contenders if one.origin == "teacher"]
    candidates = [one for one in contenders if one.origin != "teacher"]
    finished = Counter(
        one.steps
        for one in candidates
        if not one.failure and not one.left_out and math.isfinite(one.loss_after)
    )
    steps = max(finished, key=lambda count: (finished[count], count), default=0)
    excuses = {one.plan_id: _excused(one, steps) for one in candidates}

    ranked = sorted(
        (one for one in candidates if excuses[one.plan_id] is None),
        key=lambda one: (
            one.loss_after,
            -one.clip_after if math.isfinite(one.clip_after) else math.inf,
            one.params,
            one.macs,
            one.plan_id,
        ),
    )
    front = pareto_front([*(one for one in teachers if math.isfinite(one.loss_after)), *ranked])
    places = [Place(one, 0, one.plan_id in front, "teacher") for one in teachers]
    places += [Place(one, i, one.plan_id in front, "ranked") for i, one in enumerate(ranked, start=1)]
    for one in candidates:
        excuse = excuses[one.plan_id]
        if excuse is not None:
            places.append(Place(one, None, None, *excuse))
    return Ranking(tuple(places))


def ranking_from_frame(frame: pd.DataFrame) -> Ranking:
    """The ranking whose ``frame()`` was written as CSV; steps are not part of it and read as 0.

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
            failure=reason if row["status"] == "failed" else "",
            left_out=reason if row["status"] == "left out" else "",
        )
        places.append(
            Place(
                contender,
                None if pd.isna(row["rank"]) else int(row["rank"]),
                None if pd.isna(row["pareto"]) else bool(row["pareto"]),
                row["status"],
                reason,
            )
        )
    return Ranking(tuple(places))
