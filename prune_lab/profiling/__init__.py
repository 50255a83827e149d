"""Parameters, multiply-adds, latency, memory and size of a U-Net, of each of its blocks, and of what plans leave."""

from __future__ import annotations

from prune_lab.profiling.costs import Cost, CostTable, PlanCost, cost_table
from prune_lab.profiling.latency import Latency, measure_latency, measure_memory_growth, profile_blocks
from prune_lab.profiling.macs import Macs, count_macs
from prune_lab.profiling.models import Profile, profile, profile_from_dict
from prune_lab.profiling.pipelines import profile_pipeline
from prune_lab.profiling.reductions import random_unet, reduction_table

__all__ = [
    "Cost",
    "CostTable",
    "Latency",
    "Macs",
    "PlanCost",
    "Profile",
    "cost_table",
    "count_macs",
    "measure_latency",
    "measure_memory_growth",
    "profile",
    "profile_blocks",
    "profile_from_dict",
    "profile_pipeline",
    "random_unet",
    "reduction_table",
]
