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
from prune_lab.importance.intervals import impacts_of
from prune_lab.prefix_sharing import ComputeCost
from prune_lab.schemas import IMPORTANCE_COLUMNS, PARTS_COLUMNS

BUCKETS = 10  # parts of the noise schedule for which impacts are given separately


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


@dataclass(frozen=True, slots=True, eq=False)
class ImportanceTable:
    """Impacts of many groups by one criterion on one probe, in the order in which the groups were given."""

    entries: tuple[Importance, ...]
    criterion: str
    probe: str  # digest
    model: str
    values: NDArray[np.float64] | None = field(default=None, repr=False)
    """(groups, rows) value of every sample, NaN where a race skipped it; None in a table read from a file."""
    scales: NDArray[np.float64] | None = field(default=None, repr=False)
    """(rows,) divisors of the values: impact = values.sum() / scales.sum() (``intervals.impacts_of``)."""
    samples: Samples | None = field(default=None, repr=False)
    """The samples that the columns of ``values`` belong to."""
    compute: ComputeCost | None = None
    """The cost of measuring, without values that came from a cache; None in a table read from a file."""

    @property
    def impacts(self) -> NDArray[np.float64]:
        """(groups,) in table order."""
        return np.array([entry.impact for entry in self.entries])

    def of_kind(self, kind: GroupKind) -> tuple[Importance, ...]:
        """The entries of one kind of group, in table order."""
        return tuple(entry for entry in self.entries if entry.group.kind == kind)

    def ranked(self, kind: GroupKind = "block") -> tuple[Importance, ...]:
        """The entries of one kind, least impact first; equal impacts stay in table order."""
        return tuple(sorted(self.of_kind(kind), key=lambda entry: entry.impact))

    def block_impacts(self) -> dict[str, float]:
        """Impact of every block that was scored alone, by block name."""
        return {entry.group.blocks[0]: entry.impact for entry in self.of_kind("block")}

    def frame(self) -> pd.DataFrame:
        """One row per group, columns IMPORTANCE_COLUMNS; ``blocks`` holds the names with spaces between them."""
        rows = [
            (
                entry.group.name,
                entry.group.kind,
                " ".join(entry.group.blocks),
                entry.starred,
                entry.impact,
                entry.low,
                entry.high,
                entry.samples,
                self.criterion,
                self.probe,
                self.model,
            )
            for entry in self.entries
        ]
        return pd.DataFrame(rows, columns=list(IMPORTANCE_COLUMNS))

    def parts(self, *, length: int = 1000) -> pd.DataFrame:
        """Impacts on parts of the samples: a row per group and tenth of the noise schedule or kind of prompt.

        Columns PARTS_COLUMNS: ``part`` is "timesteps" or "prompts", ``of`` names the part ("200-299", "faces"). Each
        impact is relative to the scales of its own samples, so parts can be compared with each other. ``length`` is the
        number of timesteps of the schedule. Empty for a criterion without timesteps and prompts, or a table read from a
        file.
        """
        rows = [
            (entry.group.name, entry.group.kind, self.criterion, part, name, float(impact), int(samples))
            for part, name, inside in self._parts(length)
            for entry, impact, samples in zip(self.entries, *self._impacts_of(inside), strict=True)
        ]
        # An empty frame has columns of type object, which would spread to a frame that it is concatenated with.
        return pd.DataFrame(rows, columns=list(PARTS_COLUMNS)).astype({"impact": float, "samples": int})

    def _parts(self, length: int) -> Iterator[tuple[str, str, NDArray[np.bool_]]]:
        if self.samples is None or self.values is None:
            return
        if self.samples.timesteps is not None:
            bucket = self.samples.timesteps * BUCKETS // length
            for number in np.unique(bucket):
                first, last = number * length // BUCKETS, (number + 1) * length // BUCKETS - 1
                yield "timesteps", f"{first}-{last}", bucket == number
        kinds = np.array(self.samples.prompts)
        for name in dict.fromkeys(self.samples.prompts):
            if name:
                yield "prompts", name, kinds == name

    def _impacts_of(self, inside: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """(groups,) impacts on the samples ``inside`` (R,), and how many of these each group was measured on."""
        assert self.values is not None
        assert self.scales is not None
        values = self.values[:, inside]
        return impacts_of(values, self.scales[inside]), (~np.isnan(values)).sum(axis=1)


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
