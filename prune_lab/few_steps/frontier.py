"""Which configurations are not beaten in both time and quality, and which lever meets a latency best."""

from __future__ import annotations

import re

import pandas as pd

from prune_lab.errors import BudgetError
from prune_lab.runtime import printable

OWN = "own"  # the scheduler that a pipeline comes with
_LIMIT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|x)\s*")


def quality_column(table: pd.DataFrame) -> str:
    """The column that quality is judged by: the CLIP score, or where there is no scorer the likeness to the teacher."""
    return "clip" if table["clip"].notna().all() else "psnr_teacher"


def baseline_of(table: pd.DataFrame) -> pd.Series:
    """The row that all are compared with: the first model, whole, by its own scheduler in the most steps asked for."""
    plain = table[
        (table["model"] == table["model"].iloc[0]) & (table["reuse"] == 1) & (table["scheduler"] == OWN)
    ]
    asked = plain[plain["role"] != "many"]
    found: pd.Series = (asked if len(asked) else plain).sort_values("steps").iloc[-1]
    return found


def lever_of(row: pd.Series, baseline: pd.Series) -> str:
    """What ``row`` does otherwise than the ``baseline``, as ``smaller model + fewer steps``."""
    levers = {
        "other model": row["model"] != baseline["model"],
        "fewer steps": row["steps"] < baseline["steps"],
        "more steps": row["steps"] > baseline["steps"],
        "scheduler": row["scheduler"] != baseline["scheduler"],
        "reuse": row["reuse"] > 1,
    }
    return " + ".join(name for name, pulled in levers.items() if pulled) or "none"


def frontier(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that no other row beats: none is at least as fast and better, or faster and as good. By time."""
    quality = quality_column(table)
    rows = table.sort_values(["median_ms", quality], ascending=[True, False])
    best = rows[quality].cummax().shift(fill_value=float("-inf"))
    return rows[rows[quality] > best]


def read_limit(text: str) -> tuple[float, str]:
    """The number and the unit, ms, s or x, of a limit such as ``200ms``, ``0.2s`` or ``0.5x``. Raises BudgetError."""
    found = _LIMIT.fullmatch(text)
    if found is None or not float(found[1]):
        raise BudgetError(
            f"cannot read the latency {printable(text, 40)!r} of a picture; write 200ms, 0.2s, or 0.5x as a share of "
            "the first model's own"
        )
    return float(found[1]), found[2]


def latency_limit(text: str, table: pd.DataFrame) -> float:
    """Milliseconds of a limit as ``read_limit`` takes it; x is a share of the baseline's. Raises BudgetError."""
    number, unit = read_limit(text)
    return number * {"ms": 1.0, "s": 1e3, "x": float(baseline_of(table)["median_ms"])}[unit]


def meets(table: pd.DataFrame, limit: str) -> pd.Series:
    """For each row whether it is within ``limit``, as ``read_limit`` takes it.

    A share is that within the rounds: they differ in what else the machine does.
    """
    number, unit = read_limit(limit)
    if unit == "x":
        return table["latency_change"] + 1 <= number
    return table["median_ms"] <= latency_limit(limit, table)


def best_by_lever(table: pd.DataFrame, limit: str) -> pd.DataFrame:
    """Of each lever, or set of them, the row of the best quality within ``limit``; the best first."""
    within = table[meets(table, limit)].sort_values(quality_column(table), ascending=False)
    return within.drop_duplicates("lever")


def first_lever(table: pd.DataFrame, limit: str) -> tuple[pd.Series, bool] | None:
    """(the row to try first within ``limit``, whether it keeps the quality); None where nothing is within it.

    Of the rows whose CLIP score is not told apart from the baseline's, or is above it, and which no other row beats in
    time and quality, the one that pulls fewest levers and is best; where there is none, or no score, the best of all.
    """
    found = best_by_lever(table, limit)
    if found.empty:
        return None
    # a score whose interval is wide is told apart from nothing: that alone recommends no row
    kept = found[(found["clip_high"] >= 0) & found.index.isin(frontier(table).index)]
    pulled = (kept if len(kept) else found)["lever"].str.count(r"\+")
    order = pulled.sort_values(kind="stable").index if len(kept) else found.index
    return found.loc[order[0]], len(kept) > 0


def beyond(table: pd.DataFrame, limit: str) -> pd.DataFrame:
    """Of each single lever that does not meet ``limit``, the fastest row."""
    single = ~table["lever"].str.contains("+", regex=False) & ~table["lever"].isin(("none", "more steps"))
    met = table["lever"][single & meets(table, limit)]
    return table[single & ~table["lever"].isin(met)].sort_values("median_ms").drop_duplicates("lever")
