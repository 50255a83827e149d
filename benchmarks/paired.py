"""What ends with less loss, beyond chance: differences paired over held-out rows and seeds, and who wins everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from benchmarks.rows import rows_of
from prune_lab.ranking import Difference, paired_difference

COVERAGE = 0.975  # the quantile on either side of a 95 % interval
INTERVAL = (
    "95 % intervals are paired over held-out rows and seeds, which are both taken as drawn from many: the variance of "
    "the mean is that over rows plus that over seeds, with Welch's degrees of freedom; with one seed it is over rows "
    "alone. None is corrected for the number of comparisons."
)


def by_seed(rows: pd.DataFrame, seed: str = "seed") -> pd.DataFrame:
    """Losses of ``rows``: a row per seed, a column per held-out row, the mean where there are several."""
    return rows.pivot_table(index=seed, columns="row", values="loss", aggfunc="mean")


def crossed_difference(one: pd.DataFrame, other: pd.DataFrame) -> Difference:
    """``one`` minus ``other``, both (seeds, held-out rows), on the seeds that both have; NaN where they share none."""
    shared = one.index.intersection(other.index)
    if not len(shared):
        return Difference(float("nan"), float("nan"), float("nan"))
    if list(one.columns) != list(other.columns):
        raise ValueError("asked to pair losses of different held-out rows")
    found = one.loc[shared].to_numpy() - other.loc[shared].to_numpy()
    if len(shared) == 1:
        return paired_difference(found[0], np.zeros_like(found[0]))
    parts = [means.var(ddof=1) / len(means) for means in (found.mean(axis=0), found.mean(axis=1))]
    mean, variance = float(found.mean()), sum(parts)
    if not variance:
        return Difference(mean, mean, mean)
    rows, seeds = found.shape[1] - 1, found.shape[0] - 1
    freedom = variance**2 / (parts[0] ** 2 / rows + parts[1] ** 2 / seeds)
    half = float(stdtrit(freedom, COVERAGE) * variance**0.5)
    return Difference(mean, mean - half, mean + half)


def compared(losses: Mapping[str, pd.DataFrame], against: str, **case: Any) -> pd.DataFrame:
    """A row per name of ``losses`` that shares a seed with ``against``: its mean loss, the difference with its
    interval, which way it points, its rank by the difference, and how many seeds are paired; ``case`` in every row.
    """
    base, found = losses[against], []
    for name, own in losses.items():
        difference = crossed_difference(own, base)
        if np.isnan(difference.mean):
            continue
        seeds = len(own.index.intersection(base.index))
        told = {"difference": difference.mean, "low": difference.low, "high": difference.high}
        loss = float(own.to_numpy().mean())
        found.append(
            {**case, "name": name, "loss": loss, **told, "direction": difference.direction, "seeds": seeds}
        )
    table = pd.DataFrame(found)
    table["rank"] = table["difference"].rank(method="min").astype(int)
    return table


def counts(table: pd.DataFrame, against: str) -> pd.DataFrame:
    """By name but ``against``: in how many cases it is lower, ties and is higher, the best first; columns of these."""
    others = table[table["name"] != against]
    found = others.groupby("name", sort=False)["direction"].value_counts().unstack(fill_value=0)
    found = found.reindex(columns=["lower", "tie", "higher"], fill_value=0)
    found["difference"] = others.groupby("name")["difference"].mean()
    return found.sort_values(["lower", "higher", "difference"], ascending=[False, True, True])


def verdict(table: pd.DataFrame, against: str, what: str) -> str:
    """Which names have less loss than ``against`` beyond their interval in every case of both models, in words.

    ``table`` has a row per case and name, as ``compared`` makes them, with a column ``model``; ``what`` the names are.
    """
    models = list(dict.fromkeys(table["model"]))
    cases = int((table["name"] == against).sum())
    if len(models) < 2:
        return f"No {what} is decided on: only {models[0]} was compared so far."
    known = counts(table, against)
    if known.empty:
        return f"No {what} is decided on: only `{against}` was measured so far."
    where = f"in all {cases} cases of {' and '.join(models)}"
    won = [f"`{name}`" for name in known.index[known["lower"] == cases]]
    if won:
        others = f" So do {', '.join(won[1:])}." if won[1:] else ""
        return f"**{won[0]} ends below `{against}` beyond its interval {where}.**{others}"
    best = next(rows_of(known))
    return (
        f"**No {what} ends below `{against}` beyond its interval {where}.** Nearest to it is `{best.Index}`: below in "
        f"{best.lower}, above in {best.higher}, no difference to be told in {best.tie} of "
        f"{best.lower + best.tie + best.higher}."
    )


def shown(row: Any, against: str) -> str:
    """The difference of a row of ``compared`` as a cell."""
    if row.name == against:
        return "0"
    if np.isnan(row.low):
        return f"{row.difference:+.4f}"
    text = f"{row.difference:+.4f} [{row.low:+.4f}, {row.high:+.4f}]"
    return f"**{text}**" if row.direction == "lower" else text
