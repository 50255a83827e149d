"""Search: equal to brute force, exact at the limit, ties to the cheaper, and a way out of an impossible budget."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_lab.blocks import Architecture, BlockGroup, architecture_of
from prune_lab.errors import BudgetError, DataError
from prune_lab.importance import Importance, ImportanceTable
from prune_lab.plans import PruningPlan, is_native, native_choices, parse_plan, plan_of
from prune_lab.profiling import COUNTED, CostTable, PlanCost, cost_table
from prune_lab.search import (
    Budget,
    check_reachable,
    parse_budget,
    predicted_impact,
    search_plans,
    split_budgets,
)

# Two levels of different width, so there are starred blocks, and few enough native plans to price every one.
SMALL: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [8, 16],
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}
ARCHITECTURE = architecture_of(SMALL)
COSTS = cost_table(ARCHITECTURE)
PLANS = [
    plan_of(ARCHITECTURE, frozenset().union(*choice))
    for choice in itertools.product(*native_choices(ARCHITECTURE))
]
PRICES = [COSTS.of(plan) for plan in PLANS]


def scored(architecture: Architecture, impacts: dict[str, float]) -> ImportanceTable:
    entries = tuple(
        Importance(BlockGroup(name, "block", (name,)), impact, impact, impact, 1)
        for name, impact in impacts.items()
    )
    return ImportanceTable(entries, criterion="output-mse", probe="", model=architecture.signature)


def evenly(architecture: Architecture) -> ImportanceTable:
    """Impacts that differ from block to block and have no ties among plans worth speaking of."""
    return scored(
        architecture,
        {block.name: math.sqrt(place + 2) % 1 for place, block in enumerate(architecture.blocks)},
    )


def brute_force(
    impacts: dict[str, float], budgets: list[Budget]
) -> list[tuple[float, PruningPlan, PlanCost]]:
    """Every native plan within the budgets with its impact, best first; written without the search's code."""
    allowed = [
        (math.fsum(impacts[name] for name in plan.removed), plan, price)
        for plan, price in zip(PLANS, PRICES, strict=True)
        if all(getattr(price, budget.metric) <= budget.limit for budget in budgets)
    ]
    return sorted(allowed, key=lambda entry: entry[0])


@pytest.fixture(scope="module")
def sd() -> tuple[Architecture, CostTable]:
    """A network with SD's 38 block names."""
    config = SMALL | {
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "block_out_channels": [8, 16, 32, 32],
        "sample_size": 16,
    }
    architecture = architecture_of(config)
    return architecture, cost_table(architecture)


# Against brute force ---------------------------------------------------------------------------------------------


def test_choices_are_all_the_native_plans() -> None:
    """The space that is searched, against trying every subset of the removable blocks of a one-layer network."""
    architecture = architecture_of(SMALL | {"layers_per_block": 1})
    names = [block.name for block in architecture.blocks if block.removable]
    subsets = itertools.chain.from_iterable(
        itertools.combinations(names, size) for size in range(len(names) + 1)
    )
    plans = (plan_of(architecture, subset) for subset in subsets)
    native = {plan.removed for plan in plans if is_native(architecture, plan)}
    found = {
        plan_of(architecture, frozenset().union(*choice)).removed
        for choice in itertools.product(*native_choices(architecture))
    }
    assert found == native
    assert len(native) > 4


IMPACTS = st.one_of(
    st.floats(0, 1),
    st.floats(1e-9, 1e-3),
    st.floats(-0.1, 0.5),  # removing a block can help the denoising loss
    st.integers(0, 3).map(float),  # ties
)


@settings(max_examples=60)
@given(st.data())
def test_equal_to_brute_force(data: st.DataObject) -> None:
    impacts = {block.name: data.draw(IMPACTS) for block in ARCHITECTURE.blocks}
    budgets = []
    for metric in data.draw(st.lists(st.sampled_from(COUNTED), max_size=2, unique=True)):
        at = data.draw(st.sampled_from(PRICES))  # a limit that some plan meets exactly, or misses by one
        budgets.append(Budget(metric, getattr(at, metric) - data.draw(st.integers(0, 1)), metric))
    best = brute_force(impacts, budgets)
    importance = scored(ARCHITECTURE, impacts)
    if not best:
        with pytest.raises(BudgetError):
            search_plans(ARCHITECTURE, importance, COSTS, budgets)
        return
    count = data.draw(st.integers(1, 3))
    plans = search_plans(ARCHITECTURE, importance, COSTS, budgets, count=count)
    rounding = 1e-8 * max(map(abs, impacts.values()))
    assert len({plan.removed for plan in plans}) == len(plans) == min(count, len(best))
    for plan, (impact, _, _) in zip(plans, best, strict=False):
        assert all(budget.allows(COSTS.of(plan)) for budget in budgets)
        assert predicted_impact(plan, importance) == pytest.approx(impact, abs=rounding)
    if budgets:
        metric = budgets[0].metric
        tied = [getattr(price, metric) for impact, _, price in best if impact == best[0][0]]
        if predicted_impact(plans[0], importance) == best[0][0]:
            assert getattr(COSTS.of(plans[0]), metric) <= min(tied)


def test_ties_go_to_the_cheaper_plan() -> None:
    nothing_matters = scored(ARCHITECTURE, {block.name: 0.0 for block in ARCHITECTURE.blocks})
    (plan,) = search_plans(
        ARCHITECTURE, nothing_matters, COSTS, [Budget("params", COSTS.total.params, "params<=100%")]
    )
    assert COSTS.of(plan).params == min(price.params for price in PRICES)


def test_a_plan_at_the_limit_is_within_it_and_one_over_is_not(sd: tuple[Architecture, CostTable]) -> None:
    architecture, costs = sd
    importance = evenly(architecture)
    (plan,) = search_plans(architecture, importance, costs, [parse_budget("macs<=60%", architecture, costs)])
    at = costs.of(plan).macs
    (same,) = search_plans(architecture, importance, costs, [Budget("macs", at, "macs")])
    assert same == plan
    (other,) = search_plans(architecture, importance, costs, [Budget("macs", at - 1, "macs")])
    assert costs.of(other).macs < at
    assert predicted_impact(other, importance) >= predicted_impact(plan, importance)


# What comes back -------------------------------------------------------------------------------------------------


def test_bk_plans_bound_the_answer(sd: tuple[Architecture, CostTable]) -> None:
    """At the budget of a BK plan the search is at least as good as the BK plan, which is one of its choices."""
    architecture, costs = sd
    importance = evenly(architecture)
    for preset in ("bk-base", "bk-small", "bk-tiny"):
        control = parse_plan(preset, architecture)
        for metric in COUNTED:
            budget = parse_budget(f"{metric}<={preset}", architecture, costs)
            assert budget.allows(costs.of(control))
            (plan,) = search_plans(architecture, importance, costs, [budget])
            assert budget.allows(costs.of(plan))
            assert predicted_impact(plan, importance) <= predicted_impact(control, importance)
            assert is_native(architecture, plan)
            assert not any(architecture.block(name).starred for name in plan.removed)


def test_starred_blocks_stay_even_when_they_are_worth_less_than_nothing(
    sd: tuple[Architecture, CostTable],
) -> None:
    architecture, costs = sd
    worthless = {block.name: -1.0 if block.starred else 1.0 for block in architecture.blocks}
    (plan,) = search_plans(architecture, scored(architecture, worthless), costs, [])
    assert plan.removed == ()


def test_samplers_leave_with_an_inner_stage(sd: tuple[Architecture, CostTable]) -> None:
    """With the innermost stages worthless, the budget of Tiny without those stages' samplers is still met."""
    architecture, costs = sd
    inner = [block.name for block in architecture.blocks if block.stage in ("Dn4", "Md", "Up1")]
    impacts = {block.name: 0.0 if block.name in inner else 1.0 for block in architecture.blocks}
    blocks = sum(architecture.block(name).params for name in inner)
    samplers = sum(s.params for s in architecture.samplers if s.name in ("Dn3.down", "Up1.up"))
    assert samplers > 0
    limit = architecture.total_params - blocks - samplers
    (plan,) = search_plans(architecture, scored(architecture, impacts), costs, [Budget("params", limit, "p")])
    assert set(plan.removed) == set(inner)


def test_names_and_distinct_plans(sd: tuple[Architecture, CostTable]) -> None:
    architecture, costs = sd
    importance = evenly(architecture)
    budgets = [parse_budget(text, architecture, costs) for text in ("params <= bk-small", "macs<=62.5%")]
    plans = search_plans(architecture, importance, costs, budgets, count=5)
    assert [plan.name for plan in plans] == [
        f"search-params-bk-small-macs-62.5pct-{number}" for number in range(1, 6)
    ]
    assert len({plan.id for plan in plans}) == 5
    impacts = [predicted_impact(plan, importance) for plan in plans]
    assert impacts == sorted(impacts)
    assert plans == search_plans(architecture, importance, costs, budgets, count=5)


def test_fewer_plans_than_asked_when_fewer_exist() -> None:
    smallest = min(price.params for price in PRICES)
    there = sum(price.params == smallest for price in PRICES)
    plans = search_plans(
        ARCHITECTURE, evenly(ARCHITECTURE), COSTS, [Budget("params", smallest, "params")], count=there + 3
    )
    assert len(plans) == there


def test_a_block_without_a_score_is_an_error() -> None:
    impacts = {block.name: 1.0 for block in ARCHITECTURE.blocks if block.name != "Dn1.A2"}
    with pytest.raises(DataError, match=r"no score of Dn1\.A2"):
        search_plans(ARCHITECTURE, scored(ARCHITECTURE, impacts), COSTS, [])
    with pytest.raises(DataError, match=r"Dn1\.A2"):
        predicted_impact(parse_plan("-Dn1.A2", ARCHITECTURE), scored(ARCHITECTURE, impacts))


# Budgets ---------------------------------------------------------------------------------------------------------


def test_budgets_read_as_written(sd: tuple[Architecture, CostTable]) -> None:
    architecture, costs = sd
    total = costs.total
    small = costs.of(parse_plan("bk-base -Md", architecture))
    limits = {
        "params<=482346884": 482346884,
        "params <= 1_000": 1000,
        "params<=20k": 20000,
        "macs<=1.5M": 1500000,
        "macs<=66%": total.macs * 66 // 100,
        "paper-macs<= 12.5 %": total.paper_macs * 125 // 1000,
        "params<=bk-small": small.params,
        "macs<=bk-base -Md": small.macs,
        "paper_macs<=bk-small": small.macs - small.attention_macs,
        "params<=teacher": total.params,
        "macs<=0.66x": total.macs * 66 // 100,
        "params<=6,000,000": 6_000_000,
        "params<=as:bk-small": small.params,
        "macs<= as: bk-base -Md": small.macs,
    }
    for text, limit in limits.items():
        budget = parse_budget(text, architecture, costs)
        assert (budget.limit, budget.metric) == (limit, text.replace("-m", "_m").split("<=")[0].strip()), text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("66%", "paper_macs, latency or memory"),
        ("flops<=5", "paper_macs, latency or memory"),
        ("latency<=5", "measure a latency table"),
        ("memory<=0.5x", "found no activation memory of the plans"),
        ("macs<=5GB", "as a plan"),
        ("macs<66%", "paper_macs, latency or memory"),
        ("macs<=", "paper_macs, latency or memory"),
        ("macs<=-5", "give an amount above 0"),
        ("latency<=-0.5x", "give an amount above 0"),
        ("latency<=0x", "no model takes so little; give an amount above 0"),
        ("latency<=0", "no model takes so little"),
        ("latency<=0.0ms@cpu", "no model takes so little"),
        ("memory<=0%", "no model takes so little"),
        ("macs<=a lot", "as a plan"),
        ("macs<=0.65", "write 65% or 0.65x"),
        ("params<= .5", r"write 50% or \.5x"),
        ("params<=-Dn9.R1", r"Dn9\.R1"),
        ("params<=-Dn2.R1", r"Dn2\.R1"),
    ],
)
def test_budgets_that_cannot_be_read(text: str, found: str) -> None:
    with pytest.raises(BudgetError, match=found) as caught:
        parse_budget(text, ARCHITECTURE, COSTS)
    assert "\n" not in str(caught.value)


def test_a_comma_parts_budgets_but_not_the_digits_of_one() -> None:
    assert split_budgets("macs<=65%, params<=6,000,000") == ("macs<=65%", " params<=6,000,000")
    service = "latency<=0.7x@float16,512,batch=1"
    assert split_budgets(f"{service}, macs<=65%,params<=6,000,000") == (
        service,
        " macs<=65%",
        "params<=6,000,000",
    )
    assert split_budgets("params<=bk-small,latency<=0.7x") == ("params<=bk-small", "latency<=0.7x")


@pytest.mark.parametrize("metric", COUNTED)
def test_an_impossible_budget_says_what_would_work(metric: str) -> None:
    smallest = min(getattr(price, metric) for price in PRICES)
    asked = parse_budget(f"{metric}<={smallest - 1}", ARCHITECTURE, COSTS)
    with pytest.raises(BudgetError) as caught:
        search_plans(ARCHITECTURE, evenly(ARCHITECTURE), COSTS, [asked])
    message = str(caught.value)
    with pytest.raises(BudgetError, match=re.escape(message)):  # known without any score
        check_reachable(ARCHITECTURE, COSTS, [asked])
    assert asked.text in message
    assert f"{smallest:,} of" in message
    for remedy in re.findall(r"\w+<=[\d.]+%?", message.split("; give ")[1]):
        budget = parse_budget(remedy, ARCHITECTURE, COSTS)
        check_reachable(ARCHITECTURE, COSTS, [budget])
        assert search_plans(ARCHITECTURE, evenly(ARCHITECTURE), COSTS, [budget])


def test_budgets_that_are_impossible_together() -> None:
    least = {metric: min(getattr(price, metric) for price in PRICES) for metric in ("params", "macs")}
    cheap = [price for price in PRICES if price.params <= least["params"]]
    reachable = min(price.macs for price in cheap)
    first = Budget("params", least["params"], "params<=least")
    second = Budget("macs", reachable - 1, "macs<=less")
    with pytest.raises(BudgetError, match=f"within params<=least has macs {reachable:,} of"):
        search_plans(ARCHITECTURE, evenly(ARCHITECTURE), COSTS, [first, second])


@pytest.mark.parametrize("text", ["macs<=0,65", "params<=1,5M", "params<=12,34", "macs<=\uff16\uff15%"])
def test_a_comma_that_may_be_a_decimal_point_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match="cannot read"):
        parse_budget(text, ARCHITECTURE, COSTS)
