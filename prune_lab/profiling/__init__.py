"""Parameters, multiply-adds, latency, memory and size of a U-Net, of each of its blocks, and of what plans leave."""

from __future__ import annotations

from prune_lab.profiling.activations import ActivationTable, UnitMemory, activation_table
from prune_lab.profiling.costs import Cost, CostTable, PlanCost, cost_table
from prune_lab.profiling.latency import Latency, measure_latency, measure_memory_growth, profile_blocks
from prune_lab.profiling.latency_differences import forward_ms, measure_latency_table
from prune_lab.profiling.latency_table import LatencyTable, MeasuredPlan, Saving, latency_table_from_dict
from prune_lab.profiling.live_memory import LiveBytes, live_peak
from prune_lab.profiling.macs import Macs, count_macs
from prune_lab.profiling.matrices import (
    PlanMatrix,
    SamplerLevel,
    as_matrix,
    as_plans,
    levels_gone,
    random_native_plans,
    sampler_levels,
)
from prune_lab.profiling.pipelines import profile_pipeline
from prune_lab.profiling.prices import PriceList, Prices, latency_disagreement, price_list
from prune_lab.profiling.profile import Profile, profile, profile_from_dict
from prune_lab.profiling.reductions import random_unet, reduction_table

__all__ = [
    "ActivationTable",
    "Cost",
    "CostTable",
    "Latency",
    "LatencyTable",
    "LiveBytes",
    "Macs",
    "MeasuredPlan",
    "PlanCost",
    "PlanMatrix",
    "PriceList",
    "Prices",
    "Profile",
    "SamplerLevel",
    "Saving",
    "UnitMemory",
    "activation_table",
    "as_matrix",
    "as_plans",
    "cost_table",
    "count_macs",
    "forward_ms",
    "latency_disagreement",
    "latency_table_from_dict",
    "levels_gone",
    "live_peak",
    "measure_latency",
    "measure_latency_table",
    "measure_memory_growth",
    "price_list",
    "profile",
    "profile_blocks",
    "profile_from_dict",
    "profile_pipeline",
    "random_native_plans",
    "random_unet",
    "reduction_table",
    "sampler_levels",
]
