"""What studies keep of the lines of ``benchmarks.outcomes``: outcomes.csv, a row per unit and look, and rows.parquet,
the losses of all held-out rows at the looks that are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
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


Line = Mapping[str, Any]


def frames_of_study(
    lines: Iterable[Line],
    study: str,
    unit: Callable[[Line], Mapping[str, Any]],
    said: Sequence[str],
    compared: Container[int] | None = None,
    ended: Container[str] = ("done",),
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(a row per look, a row per look in ``compared`` and held-out row) of the ``lines`` of one ``study``.

    ``study`` is the first word of what their jobs name; ``unit`` tells the rows of a line from all others; ``said``
    are the names of what else of the line a look's row says. Only the last look is compared where ``compared`` is
    None; ``ended`` are the states in which the students of a line may be.
    """
    looks: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for line in lines:
        if line["study"].split()[0] != study or line["status"] not in ended:
            continue
        own, told = unit(line), {name: line[name] for name in said}
        kept = (line["steps"],) if compared is None else compared
        for text, losses in line["losses"].items():
            step = int(text)
            looks.append({**own, "step": step, "loss": sum(losses) / len(losses), **told})
            if step in kept:
                rows += [{**own, "step": step, "row": row, "loss": loss} for row, loss in enumerate(losses)]
    return pd.DataFrame(looks), pd.DataFrame(rows)


def in_parts(plans: Mapping[str, Any], together: int) -> Iterator[dict[str, Any]]:
    """``plans``, by name, ``together`` at a time."""
    names = list(plans)
    for first in range(0, len(names), together):
        yield {name: plans[name] for name in names[first : first + together]}


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
