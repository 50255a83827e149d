"""What a repair tried and what it came to, as data and as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from prune_lab.plans import PruningPlan
from prune_lab.repair.cuts import Cut
from prune_lab.repair.folding import Kind, Side
from prune_lab.schemas import REPAIR_COLUMNS

Choice = Literal["shift", "scale-shift", "linear", "refit", "best"]


@dataclass(frozen=True, slots=True)
class Repair:
    """One change that was tried at a cut. All errors and impacts are those of held-out rows.

    ``cut_error`` is the mean squared difference to the teacher's tensors at the cut, relative to their mean square;
    ``impact`` that of the prediction, with the repairs applied before. ``side`` says whether the change goes into the
    unit before the cut, where every reader gets it, or into the one after it, where only the main path does. Where it
    does not fold, the figures are those of the map as a module of its own, which is not kept.
    """

    cut: Cut
    kind: Kind
    side: Side
    folds: bool  # whether an exact fold into the unit on that side exists
    applied: bool
    reason: str  # why it was not applied; empty when it was
    # Not a number where nothing was fitted. The ridge is relative to the mean variance; infinite: a mere shift.
    strength: float = math.nan
    cut_error_before: float = math.nan
    cut_error_after: float = math.nan
    impact_before: float = math.nan
    impact_after: float = math.nan

    @property
    def unit(self) -> str:
        """The unit whose weights the change goes into."""
        return self.cut.before if self.side == "before" else self.cut.after


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What was tried at every cut that ``plan`` leaves, in order, and what it came to on the held-out rows."""

    plan: PruningPlan
    kind: Choice
    cuts: tuple[Cut, ...]
    repairs: tuple[Repair, ...]
    fitted_rows: int
    judged_rows: int
    impact_before: float
    impact_after: float

    @property
    def applied(self) -> tuple[Repair, ...]:
        """The repairs that are in the student's weights now, in order of execution."""
        return tuple(repair for repair in self.repairs if repair.applied)

    def frame(self) -> pd.DataFrame:
        """One row per change tried, in the order of trying: cut, also_read_by, kind, side, unit, folds, applied,
        reason, strength, cut_error_before, cut_error_after, impact_before, impact_after.
        """
        rows = [
            [
                repair.cut.label,
                ", ".join(reader.text for reader in repair.cut.torn),
                *(getattr(repair, column) for column in REPAIR_COLUMNS[2:]),
            ]
            for repair in self.repairs
        ]
        return pd.DataFrame(rows, columns=list(REPAIR_COLUMNS))
