"""Plans: what is removed and narrowed, as data; in files; and the plain model that is left."""

from prune_lab.plans.files import plan_from_json, read_one_plan, read_plan, read_plans
from prune_lab.plans.left import (
    choices_to_json,
    chosen_units,
    gone_with,
    is_native,
    native_choices,
    native_layout,
    removed_samplers,
    units_gone,
)
from prune_lab.plans.plan import PruningPlan, named_plans, parse_plan, plan_of, refuse_widths

__all__ = [
    "PruningPlan",
    "choices_to_json",
    "chosen_units",
    "gone_with",
    "is_native",
    "named_plans",
    "native_choices",
    "native_layout",
    "parse_plan",
    "plan_from_json",
    "plan_of",
    "read_one_plan",
    "read_plan",
    "read_plans",
    "refuse_widths",
    "removed_samplers",
    "units_gone",
]
