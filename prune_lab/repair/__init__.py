"""Closed-form repair of a pruned model before any training; the result is a plain diffusers model."""

from prune_lab.repair.bench import LEAST_PICTURES
from prune_lab.repair.repairing import repair
from prune_lab.repair.reports import RepairKind, RepairReport
from prune_lab.repair.shared import MemoryShortError, SharedRepair

__all__ = ["LEAST_PICTURES", "MemoryShortError", "RepairKind", "RepairReport", "SharedRepair", "repair"]
