"""From scores, prices and rules to plans: budgets and constraints, the exact solver, and the searches that measure."""

from __future__ import annotations

from prune_lab.search.budgets import (
    Budget,
    check_budget_text,
    parse_budget,
    service_named,
    split_budgets,
    within,
)
from prune_lab.search.constraints import ANY_PLAN, Constraints, Limit, Quota, check_single, parse_quota
from prune_lab.search.controls import (
    bk_control,
    controls_at,
    lowest_one_shot,
    named_plans,
    random_median,
    similarity_control,
    uniform_control,
)
from prune_lab.search.depth_and_width import check_reachable_narrower, depth_and_width
from prune_lab.search.effects import Effects, predicted_impact
from prune_lab.search.evolution import evolve_plans
from prune_lab.search.exact import check_reachable, search_plans, sweep_plans
from prune_lab.search.greedy import greedy_plan
from prune_lab.search.interactions import InteractionFit, fit_interactions
from prune_lab.search.learned_gates import GateResult, learned_gates
from prune_lab.search.local_search import local_search
from prune_lab.search.results import FrontPoint, ImpactOf, SearchResult
from prune_lab.search.sampling import sample_near
from prune_lab.search.widths import narrowed_to, predicted_loss

__all__ = [
    "ANY_PLAN",
    "Budget",
    "Constraints",
    "Effects",
    "FrontPoint",
    "GateResult",
    "ImpactOf",
    "InteractionFit",
    "Limit",
    "Quota",
    "SearchResult",
    "bk_control",
    "check_budget_text",
    "check_reachable",
    "check_reachable_narrower",
    "check_single",
    "controls_at",
    "depth_and_width",
    "evolve_plans",
    "fit_interactions",
    "greedy_plan",
    "learned_gates",
    "local_search",
    "lowest_one_shot",
    "named_plans",
    "narrowed_to",
    "parse_budget",
    "parse_quota",
    "predicted_impact",
    "predicted_loss",
    "random_median",
    "sample_near",
    "search_plans",
    "service_named",
    "similarity_control",
    "split_budgets",
    "sweep_plans",
    "uniform_control",
    "within",
]
