"""The report of a repair: the corrections that were tried and their effect, as data and as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from prune_lab.plans import PruningPlan
from prune_lab.repair.cuts import Cut, Narrowing
from prune_lab.repair.folding import CorrectionKind, Side
from prune_lab.schemas import REPAIR_COLUMNS

RepairKind = Literal["shift", "scale-shift", "linear", "refit", "best"]


@dataclass(frozen=True, slots=True)
class Repair:
    """One correction that was tried at a cut, or where a block is narrower. All errors and impacts are measured on
    held-out rows.

    ``cut_error`` is the mean squared difference to the teacher's tensors at the cut, relative to their mean square;
    ``impact`` is the same of the prediction, with all earlier repairs applied. ``side`` is the unit that gets the
    correction: the one before the cut, so that all consumers see it, or the one after it, so that only the main path
    does. If the correction does not fold, the figures are those of a separate module, which is not kept.
    """

    cut: Cut | Narrowing
    kind: CorrectionKind
    side: Side
    folds: bool  # whether it can be folded exactly into the unit on that side
    applied: bool
    reason: str  # why it was not applied; empty when it was
    # NaN where nothing was fitted. The ridge penalty, relative to the mean variance; infinite: only a shift.
    strength: float = math.nan
    cut_error_before: float = math.nan
    cut_error_after: float = math.nan
    impact_before: float = math.nan
    impact_after: float = math.nan

    @property
    def unit(self) -> str:
        """The unit that the correction is folded into."""
        return self.cut.before if self.side == "before" else self.cut.after


@dataclass(frozen=True, slots=True)
class RepairReport:
    """The repairs tried at every cut of ``plan``, in order, and the impact on held-out rows before and after."""

    plan: PruningPlan
    kind: RepairKind
    cuts: tuple[Cut, ...]
    repairs: tuple[Repair, ...]
    fitted_rows: int
    heldout_rows: int
    impact_before: float
    impact_after: float

    @property
    def applied(self) -> tuple[Repair, ...]:
        """The repairs that were folded into the student's weights, in order of execution."""
        return tuple(repair for repair in self.repairs if repair.applied)

    def frame(self) -> pd.DataFrame:
        """One row per correction, in the order of trying, columns REPAIR_COLUMNS."""
        rows = [
            [
                repair.cut.label,
                ", ".join(consumer.text for consumer in repair.cut.mismatched),
                *(getattr(repair, column) for column in REPAIR_COLUMNS[2:]),
            ]
            for repair in self.repairs
        ]
        return pd.DataFrame(rows, columns=list(REPAIR_COLUMNS))
