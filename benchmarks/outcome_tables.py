"""What studies keep of the lines of ``benchmarks.outcomes``: outcomes.csv, a row per unit and look, and rows.parquet,
the losses of all held-out rows at the looks that are compared.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from prune_lab.runtime import write_frame


def read_tables(out: Path, unit: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(outcomes.csv, rows.parquet) of ``out``; empty ones, with the columns of a ``unit``, where they are not there."""
    table, rows = out / "outcomes.csv", out / "rows.parquet"
    empty = pd.DataFrame(columns=[*unit, "step"])
    return (
        pd.read_csv(table, dtype={"plan_id": str}) if table.is_file() else empty,
        pd.read_parquet(rows) if rows.is_file() else empty,
    )


def append_tables(out: Path, unit: Sequence[str], looks: pd.DataFrame, rows: pd.DataFrame) -> None:
    """Put ``looks`` and ``rows`` into the tables of ``out``; what is there of the same unit and look is replaced."""
    if looks.empty:
        return
    outcomes, before = read_tables(out, unit)
    write_frame(out / "outcomes.csv", merged(outcomes, looks, [*unit, "step"]))
    every = merged(before, rows, [*unit, "step", "row"])
    if len(every):
        small = {"loss": "float32", "row": "int16", "step": "int16", "seed": "int16"}
        every.astype(small).to_parquet(out / "rows.parquet", index=False)


def tables_of(
    line: Mapping[str, Any], unit: Mapping[str, Any], said: Sequence[str], compared: Container[int]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(a row per look, a row per look in ``compared`` and held-out row) of one ``line``.

    ``unit`` tells its rows from all others; ``said`` are the names of what else of the line a look's row says.
    """
    looks, rows = [], []
    told = {name: line[name] for name in said}
    for text, losses in line["losses"].items():
        step = int(text)
        looks.append({**unit, "step": step, "loss": sum(losses) / len(losses), **told})
        if step in compared:
            rows += [{**unit, "step": step, "row": row, "loss": loss} for row, loss in enumerate(losses)]
    return looks, rows


def merged(before: pd.DataFrame, more: pd.DataFrame, key: Sequence[str]) -> pd.DataFrame:
    """Both, in a fixed order; of rows with the same key the later one."""
    parts = [one for one in (before, more) if len(one)]
    if not parts:
        return before
    every = pd.concat(parts, ignore_index=True).drop_duplicates(list(key), keep="last")
    return every.sort_values(list(key), ignore_index=True)


def made_on(outcomes: pd.DataFrame) -> str:
    """On what, and how, the outcomes were made."""
    devices, versions = (", ".join(sorted(set(outcomes[name].astype(str)))) for name in ("device", "torch"))
    return f"{devices}, float32, TF32 off, torch {versions}; batches of 8, rate 2e-4"
