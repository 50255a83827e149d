"""The table of importance: the impact of each group of blocks by one criterion, with its interval."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from prune_lab.blocks import BlockGroup, GroupKind
from prune_lab.errors import DataError
from prune_lab.importance.context import Samples
from prune_lab.importance.intervals import Floats, impacts_of
from prune_lab.prefix_sharing import ComputeCost
from prune_lab.schemas import IMPORTANCE_COLUMNS, PARTS_COLUMNS

_TENTH = 100  # timesteps of the parts of the noise schedule for which impacts are given separately


@dataclass(frozen=True, slots=True)
class Importance:
    """The impact of one group and its 95 % bootstrap interval over pictures.

    ``low`` and ``high`` are NaN when there is no interval: fewer than two pictures, or no resampling.
    """

    group: BlockGroup
    impact: float
    low: float
    high: float
    samples: int  # rows of the probe
    starred: bool = False  # it contains a block that cannot be removed and was scored with a stand-in


def _parts(samples: Samples) -> Iterator[tuple[str, str, NDArray[np.bool_]]]:
    """Part, name and samples (R,) of each part of the noise schedule and each kind of prompt (``parts`` of a table)."""
    if samples.timesteps is not None:
        first = samples.timesteps // _TENTH * _TENTH
        for timestep in np.unique(first):
            yield "timesteps", f"{timestep}-{timestep + _TENTH - 1}", first == timestep
    for name in filter(None, dict.fromkeys(samples.prompts)):
        yield "prompts", name, np.array(samples.prompts) == name


@dataclass(frozen=True, slots=True, eq=False)
class ImportanceTable:
    """Impacts of many groups by one criterion on one probe, in the order in which the groups were given."""

    entries: tuple[Importance, ...]
    criterion: str
    probe: str  # digest
    model: str
    values: Floats | None = field(default=None, repr=False)
    """(groups, rows) value of every sample, NaN where a race skipped it; None in a table read from a file."""
    scales: Floats | None = field(default=None, repr=False)
    """(rows,) divisors of the values: impact = values.sum() / scales.sum() (``intervals.impacts_of``)."""
    samples: Samples | None = field(default=None, repr=False)
    """The samples that the columns of ``values`` belong to."""
    compute: ComputeCost | None = None
    """The cost of measuring, without values that came from a cache; None in a table read from a file."""

    @property
    def impacts(self) -> Floats:
        """(groups,) in table order."""
        return np.array([entry.impact for entry in self.entries])

    def block_impacts(self) -> dict[str, float]:
        """Impact of every block that was scored alone, by block name."""
        return {entry.group.blocks[0]: entry.impact for entry in self.entries if entry.group.kind == "block"}

    def frame(self) -> pd.DataFrame:
        """One row per group, columns IMPORTANCE_COLUMNS; ``blocks`` holds the names with spaces between them."""
        rows = []
        for one in self.entries:
            group = (one.group.name, one.group.kind, " ".join(one.group.blocks), one.starred)
            measured = (one.impact, one.low, one.high, one.samples)
            rows.append((*group, *measured, self.criterion, self.probe, self.model))
        return pd.DataFrame(rows, columns=list(IMPORTANCE_COLUMNS))

    def parts(self) -> pd.DataFrame:
        """Impacts on parts of the samples: a row per group and tenth of the noise schedule or kind of prompt.

        Columns PARTS_COLUMNS: ``part`` is "timesteps" or "prompts", ``of`` names the part ("200-299", "faces"). Each
        impact is relative to the scales of its own samples, so parts can be compared with each other. Empty for a
        criterion without timesteps and prompts, or a table read from a file.
        """
        rows: list[tuple[object, ...]] = []
        if self.values is not None and self.scales is not None and self.samples is not None:
            for part, name, inside in _parts(self.samples):
                values = self.values[:, inside]
                impacts, counts = impacts_of(values, self.scales[inside]), (~np.isnan(values)).sum(axis=1)
                for entry, impact, count in zip(self.entries, impacts, counts, strict=True):
                    group = entry.group
                    rows.append((group.name, group.kind, self.criterion, part, name, impact, count))
        # An empty frame has columns of type object, which would spread to a frame that it is concatenated with.
        return pd.DataFrame(rows, columns=list(PARTS_COLUMNS)).astype({"impact": float, "samples": int})


def importance_from_frame(frame: pd.DataFrame) -> ImportanceTable:
    """The table in ``frame``, which is from ``ImportanceTable.frame`` or its CSV; without values per sample.

    Raises DataError when columns are missing, an impact is not a number, or several measurements are mixed.
    """
    missing = [column for column in IMPORTANCE_COLUMNS if column not in frame.columns]
    if missing or frame.empty:
        raise DataError(
            f"asked to read a table of importance, found {len(frame)} rows, missing columns: "
            f"{', '.join(missing) or 'none'}; make it with `prune-lab score`"
        )
    origin = frame[["criterion", "probe", "model"]].fillna("").astype(str).drop_duplicates()
    if len(origin) > 1:
        raise DataError(
            f"asked to read one table of importance, found rows of {len(origin)} combinations of criterion, probe and "
            "model; keep the rows of one of them"
        )
    unknown = sorted(map(str, set(frame["kind"]) - set(get_args(GroupKind))))
    if unknown or not np.isfinite(pd.to_numeric(frame["impact"], errors="coerce")).all():
        problem = f"kinds {', '.join(unknown)}" if unknown else "impacts that are not numbers"
        raise DataError(
            f"asked to read a table of importance, found {problem}; make it again with `prune-lab score`"
        )
    entries = tuple(
        Importance(
            group=BlockGroup(str(row["group"]), row["kind"], tuple(str(row["blocks"]).split())),
            impact=float(row["impact"]),
            low=float(row["low"]),
            high=float(row["high"]),
            samples=int(row["samples"]),
            starred=str(row["starred"]) == "True",
        )
        for row in frame.to_dict("records")
    )
    criterion, probe, model = origin.iloc[0]
    return ImportanceTable(entries, criterion=criterion, probe=probe, model=model)
