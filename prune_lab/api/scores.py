"""Scores as they are shown: by one criterion a row per group, by several the criteria side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from prune_lab.orders import criteria_in, orders_agreement, ranks_of, side_by_side
from prune_lab.report import Theme
from prune_lab.tables import Table, records


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ComparedScores(Table):
    """Scores by several criteria: ``frame()`` has a row per criterion and group, with intervals.

    It shows itself side by side, a row per group, and says how every two criteria agree.
    """

    side_by_side: Table = field(kw_only=True)
    agreement: Table = field(kw_only=True)

    def records(self) -> list[dict[str, Any]]:
        """The rows as plain dictionaries, each with its rank (``ranks_of``), and with how its criterion agrees with
        every other one.
        """
        agrees: dict[str, list[dict[str, Any]]] = {name: [] for name in criteria_in(self.data)}
        for row in records(self.agreement.data):
            one, other = row.pop("criterion"), row.pop("other")
            agrees[one].append({"with": other, **row})
            agrees[other].append({"with": one, **row})
        rows = records(self.data.assign(rank=ranks_of(self.data)))
        return [{**row, "agreement": agrees[row["criterion"]]} for row in rows]

    def __repr__(self) -> str:
        return f"{self.side_by_side!r}\n\n{self.agreement!r}"

    def _repr_html_(self) -> str:
        return self.side_by_side._repr_html_() + self.agreement._repr_html_()


def scores_table(
    scores: pd.DataFrame, title: str, draw: Callable[[Theme], Figure] | None = None, *, of: str = ""
) -> Table:
    """The ``scores`` of the model ``of``, called ``title`` where they are by one criterion."""
    names = criteria_in(scores)
    if len(names) < 2:
        return Table("scores", scores, title, draw)
    model = f", {of}" if of else ""
    beside = Table(
        "side by side",
        side_by_side(scores),
        f"Scores by {len(names)} criteria{model}; in brackets the rank among groups of its kind, 1: the least impact",
        draw,
        ("criteria have units of their own: compare their ranks, not their numbers",),
        # what cannot be removed has ranks, too
        shown=("group", *(("starred",) if scores["starred"].astype(bool).any() else ()), *names),
    )
    agree = orders_agreement(scores)
    what = "blocks that can be removed" if set(agree["over"]) == {"blocks"} else "same groups"
    agreement = Table("orders", agree, f"How every two of these criteria order the {what}{model}")
    return ComparedScores(
        "scores", scores, beside.title, draw, beside.notes, side_by_side=beside, agreement=agreement
    )
