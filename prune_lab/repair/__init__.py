"""Closed-form repair of a pruned U-Net before any training; the result is a plain diffusers model."""

from prune_lab.repair.activations import corrected
from prune_lab.repair.cuts import Consumer, Cut, find_cuts, student_paths
from prune_lab.repair.fitting import Correction
from prune_lab.repair.folding import CorrectionKind, Side, fold, why_not
from prune_lab.repair.repairing import repair
from prune_lab.repair.reports import Repair, RepairKind, RepairReport

__all__ = [
    "Consumer",
    "Correction",
    "CorrectionKind",
    "Cut",
    "Repair",
    "RepairKind",
    "RepairReport",
    "Side",
    "corrected",
    "find_cuts",
    "fold",
    "repair",
    "student_paths",
    "why_not",
]
