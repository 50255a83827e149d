"""Which blocks to remove: a plan as data, and the plain diffusers model that it leaves, if there is one."""

from prune_lab.plans.native import (
    NativeLayout,
    is_native,
    native_choices,
    native_layout,
    removed_samplers,
)
from prune_lab.plans.plan import (
    PLAN_PRESETS,
    PruningPlan,
    parse_plan,
    plan_from_json,
    plan_of,
    read_plans,
)

__all__ = [
    "PLAN_PRESETS",
    "NativeLayout",
    "PruningPlan",
    "is_native",
    "native_choices",
    "native_layout",
    "parse_plan",
    "plan_from_json",
    "plan_of",
    "read_plans",
    "removed_samplers",
]
