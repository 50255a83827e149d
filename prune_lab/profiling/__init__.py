"""Parameters, multiply-adds, latency, memory and size of a model, of each of its blocks, and of what plans leave."""

from __future__ import annotations

from prune_lab.config.budget_texts import COUNTED, METRICS, Counted, Metric, split_service
from prune_lab.live_bytes import LiveBytes, live_peak
from prune_lab.profiling.activations import ActivationTable, UnitMemory, activation_table
from prune_lab.profiling.cost_table import CostTable, cost_table, savings_in
from prune_lab.profiling.disagreement import (
    latency_disagreement,
    latency_warnings,
    part_disagreements,
    plan_disagreements,
)
from prune_lab.profiling.latency import (
    Latency,
    LatencyTable,
    MeasuredPlan,
    Saving,
    latency_table_from_dict,
    measure_latency,
)
from prune_lab.profiling.latency_cache import (
    keep_latency,
    kept_latency,
    latency_file,
    latency_key,
    latency_words,
)
from prune_lab.profiling.latency_parts import forward_ms, measure_latency_table
from prune_lab.profiling.live_memory import measure_memory_growth
from prune_lab.profiling.plan_costs import (
    PartCost,
    PlanCost,
    PlanCosts,
)
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
from prune_lab.profiling.profile_tables import profile_blocks, profile_pipeline, reduction_table
from prune_lab.profiling.random_weights import random_model
from prune_lab.profiling.runtime_tables import runtime_table, services_of
from prune_lab.profiling.service import (
    BACKENDS,
    Service,
    check_asked_size,
    check_frames,
    drawn_latent,
    latent_of_pixels,
    picture_size,
    pixels_per_latent,
    read_service,
    size_text,
)
from prune_lab.profiling.timed_plans import TEACHER, fits_into_one_process, time_plans
from prune_lab.profiling.turns import (
    Change,
    ComparedLatency,
    Turns,
    change_of,
    median_interval,
    time_in_turns,
    turns_of_frame,
)
from prune_lab.profiling.width_costs import unit_costs
from prune_lab.profiling.width_latency import measure_width_savings
from prune_lab.profiling.width_savings import UnitSaving, WidthSavings

__all__ = [
    "BACKENDS",
    "COUNTED",
    "METRICS",
    "REST",
    "TEACHER",
    "ActivationTable",
    "Change",
    "ComparedLatency",
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
    "Service",
    "Turns",
    "UnitMemory",
    "UnitSaving",
    "WidthSavings",
    "activation_table",
    "as_matrix",
    "as_plans",
    "change_of",
    "check_asked_size",
    "check_frames",
    "cost_table",
    "drawn_latent",
    "fits_into_one_process",
    "forward_ms",
    "groups_gone",
    "keep_latency",
    "kept_latency",
    "latency_disagreement",
    "latency_file",
    "latency_key",
    "latency_table_from_dict",
    "latency_warnings",
    "latency_words",
    "latent_of_pixels",
    "live_peak",
    "measure_latency",
    "measure_latency_table",
    "measure_memory_growth",
    "measure_width_savings",
    "median_interval",
    "part_disagreements",
    "picture_size",
    "pixels_per_latent",
    "plan_disagreements",
    "profile",
    "profile_blocks",
    "profile_from_dict",
    "profile_pipeline",
    "random_model",
    "random_native_plans",
    "read_service",
    "reduction_table",
    "runtime_table",
    "sampler_groups",
    "savings_in",
    "services_of",
    "size_text",
    "split_service",
    "time_in_turns",
    "time_plans",
    "turns_of_frame",
    "unit_costs",
]
