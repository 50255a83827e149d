"""Closed-form repair of what a removal leaves, before any training, with plain diffusers weights as the outcome."""

from prune_lab.repair.activations import inserted
from prune_lab.repair.cuts import Cut, Reader, find_cuts, student_paths
from prune_lab.repair.fitting import Change
from prune_lab.repair.folding import Kind, Side, fold, why_not
from prune_lab.repair.repairing import repair
from prune_lab.repair.reports import Choice, Repair, RepairReport

__all__ = [
    "Change",
    "Choice",
    "Cut",
    "Kind",
    "Reader",
    "Repair",
    "RepairReport",
    "Side",
    "find_cuts",
    "fold",
    "inserted",
    "repair",
    "student_paths",
    "why_not",
]
