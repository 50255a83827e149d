"""Orders of the same groups by several criteria: the rank of every group by each, and how the orders agree.

Criteria have units of their own, so their numbers are never compared: ranks are, and correlations of ranks. Loads no
torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import kendalltau, spearmanr

from prune_lab.errors import DataError
from prune_lab.schemas import ORDERS_COLUMNS, RANK

_KEY = ["kind", "group", "blocks"]
_SEVERAL = {"inner": "inner stages"}  # a kind of groups, of several


def rank_agreement(one: NDArray[np.float64], other: NDArray[np.float64]) -> tuple[float, float]:
    """(Spearman, Kendall's tau-b) rank correlations of two lists of scores; NaN if one is constant or they are below
    three.
    """
    if len(one) < 3 or len(np.unique(one)) < 2 or len(np.unique(other)) < 2:
        return float("nan"), float("nan")
    return float(spearmanr(one, other).statistic), float(kendalltau(one, other).statistic)


def criteria_in(scores: pd.DataFrame) -> tuple[str, ...]:
    """The criteria in a table of scores, the one that leads first."""
    return tuple(dict.fromkeys(map(str, scores["criterion"])))


def ranks_of(scores: pd.DataFrame) -> pd.Series:
    """The rank of each row of ``scores`` among the groups of its kind by its criterion: 1 has the least impact.

    Equal impacts have equal ranks, the first of those that they take up.
    """
    impacts = scores.groupby(["criterion", "kind"], sort=False)["impact"]
    return impacts.rank(method="min").astype(int).rename("rank")


def side_by_side(scores: pd.DataFrame) -> pd.DataFrame:
    """A row per group, in the order in which they were scored: group, kind, blocks, starred, and of each criterion its
    impact (a column of its name) and its rank (``<criterion>_rank``, see ``ranks_of``).

    Raises DataError where the criteria scored different groups.
    """
    ranked = scores.assign(rank=ranks_of(scores))
    (first, *others) = (rows.reset_index(drop=True) for _, rows in ranked.groupby("criterion", sort=False))
    found = first[["group", "kind", "blocks", "starred"]].copy()
    for rows in (first, *others):
        name = str(rows["criterion"].iloc[0])
        if not rows[_KEY].equals(first[_KEY]):
            raise DataError(
                f"asked for criteria side by side, found other groups scored by {name} than by "
                f"{first['criterion'].iloc[0]}; score them together: prune-lab score --criterion A --criterion B"
            )
        found[name], found[f"{name}{RANK}"] = rows["impact"], rows["rank"]
    return found


def _compared(table: pd.DataFrame) -> Sequence[tuple[str, pd.DataFrame]]:
    """(what is compared, its rows) of a table side by side: the blocks that can be removed; of one without any each
    kind of group by itself.
    """
    blocks = table[(table["kind"] == "block") & ~table["starred"].astype(bool)]
    if len(blocks):
        return [("blocks", blocks)]
    return [(_SEVERAL.get(str(kind), f"{kind}s"), rows) for kind, rows in table.groupby("kind", sort=False)]


def orders_agreement(scores: pd.DataFrame) -> pd.DataFrame:
    """How every two criteria in a table of scores order the blocks that can be removed, columns ORDERS_COLUMNS:
    Spearman's rank correlation, Kendall's tau-b, and the ``count`` of blocks.

    Both are missing of fewer than three blocks, or where a criterion gives all the same. A table without single blocks
    is compared kind by kind (``over``). ``importance.agreement`` has intervals, where single samples are known.
    """
    names, table = criteria_in(scores), side_by_side(scores)
    rows = [
        (one, other, *rank_agreement(part[one].to_numpy(float), part[other].to_numpy(float)), over, len(part))
        for over, part in _compared(table)
        for one, other in itertools.combinations(names, 2)
    ]
    return pd.DataFrame(rows, columns=list(ORDERS_COLUMNS))
