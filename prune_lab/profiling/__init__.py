"""Parameters, multiply-adds, latency, memory and size of a U-Net, of each of its blocks, and of what plans leave."""

from __future__ import annotations

from prune_lab.profiling.activations import ActivationTable, UnitMemory, activation_table
from prune_lab.profiling.cost_table import (
    COUNTED,
    METRICS,
    CostTable,
    Counted,
    Metric,
    PartCost,
    PlanCost,
    PlanCosts,
    cost_table,
    latency_disagreement,
)
from prune_lab.profiling.latency import (
    Latency,
    LatencyTable,
    MeasuredPlan,
    Saving,
    latency_table_from_dict,
    measure_latency,
)
from prune_lab.profiling.latency_differences import forward_ms, measure_latency_table
from prune_lab.profiling.live_memory import LiveBytes, live_peak, measure_memory_growth
from prune_lab.profiling.plan_matrix import (
    REST,
    PlanMatrix,
    SamplerGroup,
    as_matrix,
    as_plans,
    groups_gone,
    random_native_plans,
    sampler_groups,
)
from prune_lab.profiling.profile import Profile, profile, profile_from_dict
from prune_lab.profiling.profile_tables import profile_blocks, profile_pipeline, random_unet, reduction_table

__all__ = [
    "COUNTED",
    "METRICS",
    "REST",
    "ActivationTable",
    "CostTable",
    "Counted",
    "Latency",
    "LatencyTable",
    "LiveBytes",
    "MeasuredPlan",
    "Metric",
    "PartCost",
    "PlanCost",
    "PlanCosts",
    "PlanMatrix",
    "Profile",
    "SamplerGroup",
    "Saving",
    "UnitMemory",
    "activation_table",
    "as_matrix",
    "as_plans",
    "cost_table",
    "forward_ms",
    "groups_gone",
    "latency_disagreement",
    "latency_table_from_dict",
    "live_peak",
    "measure_latency",
    "measure_latency_table",
    "measure_memory_growth",
    "profile",
    "profile_blocks",
    "profile_from_dict",
    "profile_pipeline",
    "random_native_plans",
    "random_unet",
    "reduction_table",
    "sampler_groups",
]
