"""A sweep over several seeds in numbers: means, spreads, and which models are not told apart.

Noise is the same for all models, so differences to the first model are paired by seed, and their intervals hold what
seeds change. Another floor than zero is not needed: that of ``evaluate`` stands for seeds where intervals are over
prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd

from prune_lab.ranking.paired import Better, paired_difference, verdict_on
from prune_lab.schemas import SWEEP_MEAN_COLUMNS

# Whether more of it is better; of how much of the picture is left nobody knows what was wanted.
COMPARED: Mapping[str, Better] = {
    "clip": "higher",
    "likeness": "neither",
    "pixel_error": "neither",
    "kept_error": "lower",
}
FEW_SEEDS = 5  # the t interval of fewer is more than 3.2 standard errors to either side


def _mean(values: pd.Series[float], name: str) -> dict[str, float]:
    spread = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    return {name: float(values.mean()), f"{name}_spread": spread}


def _compared(values: pd.Series[float], first: pd.Series[float] | None, name: str) -> dict[str, object]:
    """Mean and spread of a metric over seeds, and its difference to that of the ``first`` model (None: it is that)."""
    row: dict[str, object] = {**_mean(values, name)}
    row |= dict.fromkeys((f"{name}_difference", f"{name}_low", f"{name}_high"), math.nan)
    row[f"{name}_verdict"] = ""
    if first is not None and values.notna().all() and first.notna().all():
        found = paired_difference(values, first)
        row |= {f"{name}_difference": found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
        row[f"{name}_verdict"] = verdict_on(found.mean, found.low, found.high, COMPARED[name])
    return row


def sweep_means(frame: pd.DataFrame) -> pd.DataFrame:
    """A row for each model and strength of the ``frame`` of a sweep, columns SWEEP_MEAN_COLUMNS, in its order.

    ``_spread`` is the standard deviation over seeds, ``_low`` and ``_high`` are the ends of the paired 95 % t interval
    of the difference to the first model, each for one comparison alone.
    """
    first = str(frame["model"].iloc[0])
    groups = {key: rows.sort_values("seed") for key, rows in frame.groupby(["model", "strength"], sort=False)}
    found = []
    for (model, strength), rows in groups.items():
        other = None if model == first else groups[first, strength]
        row: dict[str, object] = {"model": model, "strength": strength, "seeds": len(rows)}
        row |= {name: rows[name].iloc[0] for name in ("prompt", "passes")}
        for name in COMPARED:
            row |= _compared(rows[name], None if other is None else other[name], name)
        row |= _mean(rows["from_first"], "from_first")
        found.append(row | {"seconds": float(rows["seconds"].mean())})
    return pd.DataFrame(found, columns=list(SWEEP_MEAN_COLUMNS))
