"""The exact program against brute force: any plan and native ones, every kind of rule, all budgets, pairs of blocks."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_lab.blocks import architecture_of
from prune_lab.config import RunConfig, SearchConfig
from prune_lab.errors import BudgetError, ConfigError, DataError, UnknownBlockError, UnremovableBlockError
from prune_lab.plans import is_native, native_choices, plan_of, removed_samplers
from prune_lab.profiling import METRICS, CostTable, activation_table, cost_table
from prune_lab.search import (
    ANY_PLAN,
    Budget,
    Constraints,
    Effects,
    Quota,
    check_reachable,
    parse_budget,
    parse_quota,
    predicted_impact,
    search_plans,
    sweep_plans,
)
from prune_lab.search.program import Program
from prune_lab.search.space import space_of
from prune_lab.workflow.targets import constraints_of

# One width throughout, so every block can go, the inner stages with their samplers too: 12 blocks, 4096 plans.
FLAT: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}
FLAT_3 = FLAT | {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [8, 8, 8],
}
ARCHITECTURE = architecture_of(FLAT)
COSTS = cost_table(ARCHITECTURE)
NAMES = [block.name for block in ARCHITECTURE.blocks]
STAGES = ARCHITECTURE.stages
MID = [block.name for block in ARCHITECTURE.stage_blocks("Md")]
ACTIVATIONS = activation_table(ARCHITECTURE)
PARTS = [part.name for part in COSTS.parts]
BITS = np.array(list(itertools.product([0, 1], repeat=len(NAMES))))  # (plans, blocks)
SETS = [frozenset(itertools.compress(NAMES, bits)) for bits in BITS]
PLANS = [plan_of(ARCHITECTURE, removed) for removed in SETS]
SAMPLERS = [removed_samplers(ARCHITECTURE, plan) for plan in PLANS]
COUNTS = {metric: np.array([getattr(COSTS.of(plan), metric) for plan in PLANS]) for metric in METRICS[:3]}
STAYS = np.array(
    [
        [part not in removed and part not in samplers for part in PARTS]
        for removed, samplers in zip(SETS, SAMPLERS, strict=True)
    ]
)
NATIVE = np.isin(
    np.array([plan.id for plan in PLANS]),
    [
        plan_of(ARCHITECTURE, frozenset().union(*choice)).id
        for choice in itertools.product(*native_choices(ARCHITECTURE))
    ],
)


def test_the_network_has_what_the_tests_are_about() -> None:
    assert len(NAMES) == 12
    assert all(block.removable for block in ARCHITECTURE.blocks)
    assert {frozenset(samplers) for samplers in SAMPLERS} == {frozenset(), frozenset({"Dn1.down", "Up1.up"})}
    assert 4 < NATIVE.sum() < 200


# Brute force -----------------------------------------------------------------------------------------------------


def measured(prices: dict[str, float]) -> np.ndarray:
    """(plans,) what every plan leaves of a metric that is priced by part."""
    return STAYS @ np.array([prices[part] for part in PARTS])


def priced(latency: dict[str, float], weights: dict[str, int] | None = None) -> CostTable:
    """The costs with latency, and other weights, by hand."""
    parts = [dataclasses.replace(part, latency_ms=latency.get(part.name)) for part in COSTS.parts]
    if weights is not None:
        parts = [dataclasses.replace(part, weight_bytes=weights[part.name]) for part in parts]
    return dataclasses.replace(COSTS, parts=tuple(parts))


def satisfies_rules(constraints: Constraints) -> np.ndarray:
    """(plans,) which keep to the constraints; written anew, without the search's rows."""
    stage = np.array([name.split(".")[0] for name in NAMES])
    residual = np.array(["R" in name for name in NAMES])
    fine = NATIVE.copy() if constraints.form == "native" else np.ones(len(PLANS), bool)
    for names, value in ((constraints.keep, 0), (constraints.remove, 1)):
        for name in names:
            inside = (stage == name) | (np.array(NAMES) == name)
            fine &= (BITS[:, inside] == value).all(axis=1)
    for name in STAGES:
        kept = (1 - BITS[:, (stage == name) & residual]).sum(axis=1)
        fine &= kept >= constraints.least_resnets
    for quota in constraints.quotas:
        gone = BITS[:, stage == quota.stage].sum(axis=1)
        fine &= (gone <= quota.most) & (gone >= quota.least)
    if constraints.longest_run is not None:
        text = ["".join(map(str, bits)) for bits in BITS]
        longest = np.array([max(map(len, row.split("0"))) for row in text])
        fine &= longest <= constraints.longest_run
    return fine


def impacts_of(effects: Effects) -> np.ndarray:
    found = effects.offset + BITS @ np.array([effects.impacts[name] for name in NAMES])
    for pair, effect in effects.interactions.items():
        found = found + effect * BITS[:, [NAMES.index(name) for name in pair]].all(axis=1)
    return found


SIZES = st.one_of(st.floats(-0.2, 1), st.floats(1e-9, 1e-3), st.integers(-1, 3).map(float))


@st.composite
def rules(draw: st.DrawFn) -> Constraints:
    few = st.lists(st.sampled_from(NAMES), max_size=2, unique=True)
    keep = draw(st.one_of(few, st.lists(st.sampled_from(STAGES), max_size=1)))
    remove = [name for name in draw(few) if name not in keep and name.split(".")[0] not in keep]
    quotas = []
    for stage in draw(st.lists(st.sampled_from(STAGES), max_size=2, unique=True)):
        size = sum(name.startswith(stage) for name in NAMES)
        least = draw(st.sampled_from([0, 0, 1, 2]).filter(lambda n, size=size: n <= size))
        quotas.append(Quota(stage, draw(st.integers(least, size)), least))
    return Constraints(
        keep=tuple(keep),
        remove=tuple(remove),
        least_resnets=draw(st.sampled_from([0, 0, 1])),
        quotas=tuple(quotas) if draw(st.booleans()) else (),
        longest_run=draw(st.sampled_from([None, None, 1, 2, 4])),
        form=draw(st.sampled_from(("native", "own"))),
    )


@st.composite
def scores(draw: st.DrawFn) -> Effects:
    pairs = draw(
        st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)), max_size=6).map(
            lambda found: {frozenset(pair) for pair in found if pair[0] != pair[1]}
        )
    )
    sizes = {name: draw(SIZES) for name in NAMES}
    return Effects(sizes, {pair: draw(st.floats(-1, 1)) for pair in pairs}, draw(st.sampled_from([0.0, 0.5])))


@settings(max_examples=100)
@given(st.data())
def test_equal_to_brute_force(data: st.DataObject) -> None:
    effects, constraints = data.draw(scores()), data.draw(rules())
    drawn = np.random.default_rng(data.draw(st.integers(0, 99)))
    # Parts of 1/64 add up exactly in any order; less than nothing is noise of a measurement.
    latency = dict(zip(PARTS, (drawn.integers(-6, 64, len(PARTS)) / 64).tolist(), strict=True))
    # Weights that matter as much as the activations, or hardly; any block can decide the peak.
    weights = dict(zip(PARTS, drawn.integers(1, drawn.choice([9, 9000]), len(PARTS)).tolist(), strict=True))
    units = [
        dataclasses.replace(unit, workspace_bytes=int(drawn.integers(0, 40_000)))
        for unit in ACTIVATIONS.units
    ]
    activations = dataclasses.replace(ACTIVATIONS, units=tuple(units))
    memory = measured(weights) + activations.of_many(BITS.astype(bool))
    left = COUNTS | {"latency_ms": measured(latency), "memory": memory}
    fine, budgets = satisfies_rules(constraints), []
    # Limits at or just under what some allowed plan leaves, so that they bind and now and then exclude all.
    targets = np.flatnonzero(fine) if fine.any() else np.arange(len(PLANS))
    for metric in data.draw(st.lists(st.sampled_from(METRICS), max_size=3, unique=True)):
        at = left[metric][targets[data.draw(st.integers(0, len(targets) - 1))]].item()
        limit = at - (0 if metric == "latency_ms" else data.draw(st.integers(0, 1)))
        budgets.append(Budget(metric, limit, f"{metric}<={limit}"))
        fine &= left[metric] <= limit
    prices = dataclasses.replace(priced(latency, weights), activations=activations)
    if not fine.any():
        with pytest.raises(BudgetError) as caught:
            search_plans(ARCHITECTURE, effects, prices, budgets, constraints=constraints)
        with pytest.raises(BudgetError) as known:
            check_reachable(ARCHITECTURE, prices, budgets, constraints=constraints)
        assert str(known.value) == str(caught.value)
        assert "\n" not in str(caught.value)
        return
    check_reachable(ARCHITECTURE, prices, budgets, constraints=constraints)
    count, diverse = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 1, 2, 4]))
    found = search_plans(
        ARCHITECTURE, effects, prices, budgets, count=count, diverse=diverse, constraints=constraints
    )
    impacts = impacts_of(effects)
    rounding = 1e-8 * max(1e-3, *map(abs, effects.impacts.values()), *map(abs, effects.interactions.values()))
    for plan in found:
        place = SETS.index(frozenset(plan.removed))
        assert fine[place]
        assert predicted_impact(plan, effects) == pytest.approx(impacts[place], abs=rounding)
        assert impacts[place] == pytest.approx(impacts[fine].min(), abs=rounding)
        fine &= np.abs(BITS - BITS[place]).sum(axis=1) >= diverse
    assert len(found) == count or not fine.any()


def test_ties_go_to_the_cheaper_plan_of_any_kind() -> None:
    nothing = Effects(dict.fromkeys(NAMES, 0.0))
    (plan,) = search_plans(ARCHITECTURE, nothing, COSTS, [], constraints=ANY_PLAN)
    assert set(plan.removed) == set(NAMES)


def test_samplers_leave_group_by_group() -> None:
    """With two groups of inner stages each sampler is saved with its own group, not before and not later."""
    architecture = architecture_of(FLAT_3)
    costs = cost_table(architecture)
    nothing = Effects(dict.fromkeys((block.name for block in architecture.blocks), 0.0))
    program = Program(space_of(architecture, costs, (), ANY_PLAN), nothing)
    total, seen = costs.total.params, set()
    for size in range(len(architecture.stages) + 1):
        for stages in itertools.combinations(architecture.stages, size):
            removed = frozenset(block.name for block in architecture.blocks if block.stage in stages)
            plan = plan_of(architecture, removed)
            saved = (total - costs.of(plan).params) / total
            assert program.savings("params") @ program.values(removed) == pytest.approx(1e4 * saved)
            seen.add(removed_samplers(architecture, plan))
    assert sorted(map(len, seen)) == [0, 2, 4]


# What comes back -------------------------------------------------------------------------------------------------


def evenly() -> Effects:
    return Effects({name: math.sqrt(place + 2) % 1 for place, name in enumerate(NAMES)})


def test_diverse_plans_differ_in_so_many_blocks() -> None:
    budget = parse_budget("macs<=70%", ARCHITECTURE, COSTS)
    plans = search_plans(ARCHITECTURE, evenly(), COSTS, [budget], count=5, diverse=4, constraints=ANY_PLAN)
    assert len(plans) == 5
    for one, other in itertools.combinations(plans, 2):
        assert len(set(one.removed) ^ set(other.removed)) >= 4
    near = search_plans(ARCHITECTURE, evenly(), COSTS, [budget], count=5, constraints=ANY_PLAN)
    assert any(
        len(set(one.removed) ^ set(other.removed)) < 4 for one, other in itertools.combinations(near, 2)
    )


@pytest.mark.parametrize("constraints", [Constraints(), ANY_PLAN])
def test_a_sweep_is_the_front_of_its_budgets(constraints: Constraints) -> None:
    effects, shares = evenly(), [0.01, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9, 1.0]
    points = sweep_plans(ARCHITECTURE, effects, COSTS, shares, constraints=constraints)
    macs = [point.costs["macs"] for point in points]
    assert macs == sorted(set(macs))
    impacts = [point.impact for point in points]
    assert impacts == sorted(set(impacts), reverse=True)
    fine, everything = satisfies_rules(constraints), impacts_of(effects)
    reached = [
        everything[fine & (COUNTS["macs"] <= math.floor(round(share * 100) * COUNTS["macs"].max() / 100))]
        for share in shares
    ]
    assert {round(value, 9) for value in impacts} == {
        round(values.min(), 9) for values in reached if values.size
    }
    assert any(not values.size for values in reached)  # the first share is out of reach and skipped
    for point in points:
        assert point.costs["params"] == COSTS.of(point.plan).params
        assert "latency_ms" not in point.costs
    assert impacts[-1] == 0.0  # nothing has to go at 100 %


def test_a_sweep_out_of_reach() -> None:
    with pytest.raises(BudgetError, match=r"asked for macs<=2%.*smallest native plan"):
        sweep_plans(ARCHITECTURE, evenly(), COSTS, [0.01, 0.02])
    with pytest.raises(ConfigError, match="above 0"):
        sweep_plans(ARCHITECTURE, evenly(), COSTS, [])


def test_the_rule_that_binds_is_named() -> None:
    budget = parse_budget("macs<=60%", ARCHITECTURE, COSTS)
    heavy = max(ARCHITECTURE.blocks, key=lambda block: block.macs)
    light = min(ARCHITECTURE.blocks, key=lambda block: block.macs)
    smallest = COUNTS["macs"][satisfies_rules(Constraints(form="own"))].min()
    tight = Budget("macs", int(smallest), f"macs<={smallest}")
    rules = Constraints(keep=(light.name, heavy.stage), form="own")
    with pytest.raises(BudgetError) as caught:
        check_reachable(ARCHITECTURE, COSTS, [tight], constraints=rules)
    without = COUNTS["macs"][satisfies_rules(Constraints(keep=(light.name,), form="own"))].min()
    reached = COUNTS["macs"][satisfies_rules(rules)].min()
    assert f"the smallest plan has macs {reached:,} of" in str(caught.value)
    assert f"keep {heavy.stage} binds: without it macs {without:,} could be reached" in str(caught.value)
    check_reachable(ARCHITECTURE, COSTS, [budget], constraints=Constraints(form="own"))
    runs = Constraints(longest_run=1, form="own")
    with pytest.raises(BudgetError, match="longest_run 1 binds"):
        check_reachable(ARCHITECTURE, COSTS, [tight], constraints=runs)


def test_rules_that_contradict_each_other_are_named() -> None:
    rules = Constraints(remove=("Md.R1",), quotas=(Quota("Md", 0),), form="own")
    with pytest.raises(
        BudgetError, match=r"remove Md\.R1 and quota Md=0.*leave out remove Md\.R1 or quota Md=0"
    ):
        search_plans(ARCHITECTURE, evenly(), COSTS, [], constraints=rules)


def test_nothing_can_be_removed() -> None:
    (plan,) = search_plans(ARCHITECTURE, Effects({}), COSTS, [], constraints=Constraints(keep=STAGES))
    assert plan.removed == ()
    with pytest.raises(BudgetError, match="keep"):
        check_reachable(
            ARCHITECTURE, COSTS, [Budget("macs", 1, "macs<=1")], constraints=Constraints(keep=STAGES)
        )


def test_only_blocks_that_may_leave_need_a_score() -> None:
    partly = Effects({name: 1.0 for name in NAMES if name != "Dn1.A1"})
    with pytest.raises(DataError, match=r"no score of Dn1\.A1"):
        search_plans(ARCHITECTURE, partly, COSTS, [])
    assert search_plans(ARCHITECTURE, partly, COSTS, [], constraints=Constraints(keep=("Dn1.A1",)))


# Rules and prices as given ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constraints", "error", "found"),
    [
        (Constraints(keep=("Dn7",)), UnknownBlockError, r"Dn7"),
        (Constraints(keep=("Dn1.R1",), remove=("Dn1",)), ConfigError, r"Dn1\.R1 in both"),
        (Constraints(least_resnets=2), ConfigError, r"found 1 in Dn1"),
        (Constraints(quotas=(Quota("Dn9", 1),)), UnknownBlockError, r"Dn9<=1.*Dn1, Dn2, Md"),
        (Constraints(quotas=(Quota("Dn2", 2, 2),)), ConfigError, r"Dn2=2, found 1 blocks of Dn2"),
    ],
)
def test_rules_that_make_no_sense(constraints: Constraints, error: type[Exception], found: str) -> None:
    with pytest.raises(error, match=found) as caught:
        constraints.limits(ARCHITECTURE)
    assert "\n" not in str(caught.value)


def test_starred_blocks_cannot_be_asked_to_go() -> None:
    architecture = architecture_of(FLAT | {"block_out_channels": [8, 16]})
    with pytest.raises(UnremovableBlockError, match=r"Dn2\.R1.*changes the width"):
        Constraints(remove=("Dn2.R1",)).limits(architecture)
    with pytest.raises(UnremovableBlockError, match=r"remove Dn2, but Dn2\.R1"):
        Constraints(remove=("Dn2",)).limits(architecture)


@pytest.mark.parametrize(
    "bad", [{"longest_run": 0}, {"least_resnets": -1}, {"quotas": (Quota("Dn1", 1, 2),)}]
)
def test_rules_out_of_range(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Constraints(**bad)


def test_quotas_read_as_written() -> None:
    assert parse_quota(" Dn1 <= 2") == Quota("Dn1", 2)
    assert parse_quota("Up1=3") == Quota("Up1", 3, 3)
    assert parse_quota(Quota("Up1", 3, 3).text) == Quota("Up1", 3, 3)
    with pytest.raises(ConfigError, match="STAGE<=2"):
        parse_quota("Dn1<2")


@pytest.mark.parametrize(
    "rules",
    [
        *(Constraints(longest_run=longest, form="own") for longest in range(1, 12)),
        Constraints(keep=("Up2", "Md.R1"), form="own"),
        Constraints(remove=("Dn1", "Up2.A2"), form="own"),
        Constraints(least_resnets=1, form="own"),
        Constraints(quotas=(Quota("Up2", 3, 1), Quota("Md", 2, 2)), form="own"),
    ],
)
def test_rules_as_rows_are_the_rules(rules: Constraints) -> None:
    limits = rules.limits(ARCHITECTURE)
    assert [all(limit.allows(removed) for limit in limits) for removed in SETS] == satisfies_rules(
        rules
    ).tolist()


def test_what_allow_says_is_what_the_search_keeps_to() -> None:
    rules = Constraints(quotas=(Quota("Md", 2),), longest_run=3, least_resnets=1, keep=("Up2.A1",))
    fine = satisfies_rules(rules)
    assert 1 < fine.sum() < len(PLANS)
    assert [rules.allow(ARCHITECTURE, plan) for plan in PLANS[::7]] == fine[::7].tolist()
    assert not rules.allow(ARCHITECTURE, PLANS[-1])
    assert is_native(ARCHITECTURE, PLANS[0])


def test_budgets_on_what_is_measured() -> None:
    latency = dict.fromkeys(PARTS, 2.0)
    prices = dataclasses.replace(priced(latency), activations=ACTIVATIONS)
    whole = 2.0 * len(PARTS)
    limits = {
        "latency<=35ms": ("latency_ms", 35.0),
        "latency<=0.5x": ("latency_ms", whole / 2),
        "latency-ms<=25%": ("latency_ms", whole / 4),
        "latency<=1500us": ("latency_ms", 1.5),
        "latency <= 2 s": ("latency_ms", 2000.0),
        "latency<=as:-Md": ("latency_ms", whole - 6),
        "memory<=4MiB": ("memory", 4.0 * 2**20),
        "memory<=4MB": ("memory", 4e6),
        "memory<=1.5k": ("memory", 1500.0),
        "memory<=100%": ("memory", 4.0 * ARCHITECTURE.total_params + ACTIVATIONS.total),
        "memory<=as:-Md": ("memory", float(prices.of(plan_of(ARCHITECTURE, MID)).amount("memory"))),
    }
    for text, (metric, limit) in limits.items():
        budget = parse_budget(text, ARCHITECTURE, prices)
        assert (budget.metric, budget.limit) == (metric, limit), text
    slow = parse_budget("latency<=0.5x", ARCHITECTURE, prices)
    (plan,) = search_plans(ARCHITECTURE, evenly(), prices, [slow], constraints=ANY_PLAN)
    assert prices.of(plan).amount("latency_ms") <= whole / 2
    with pytest.raises(BudgetError, match="measure a latency table"):
        search_plans(ARCHITECTURE, evenly(), COSTS, [slow])
    with pytest.raises(BudgetError, match=r"latency_ms [\d.]+ of 30\.000.*give latency_ms<="):
        check_reachable(ARCHITECTURE, prices, [parse_budget("latency<=1us", ARCHITECTURE, prices)])
    del latency["Md.R1"]
    with pytest.raises(BudgetError, match="measure a latency table"):
        check_reachable(ARCHITECTURE, priced(latency), [slow])
    with pytest.raises(
        BudgetError, match=r"asked for memory<=1kB.*has memory [\d,]+ of [\d,]+.*give memory<=\d+ or"
    ):
        check_reachable(ARCHITECTURE, prices, [parse_budget("memory<=1kB", ARCHITECTURE, prices)])


def test_effects_that_make_no_sense() -> None:
    with pytest.raises(DataError, match=r"\['Md\.R1'\]"):
        Effects({}, {frozenset({"Md.R1"}): 1.0})
    with pytest.raises(DataError, match=r"none of Md\.A1\+Md\.R1"):
        Effects({"Md.R1": 0.0}, {frozenset({"Md.R1", "Md.A1"}): math.nan})
    strange = Effects(dict.fromkeys(NAMES, 0.0), {frozenset({"Md.R1", "Dn9.R1"}): 1.0})
    with pytest.raises(UnknownBlockError, match=r"Dn9\.R1"):
        search_plans(ARCHITECTURE, strange, COSTS, [])


@pytest.mark.parametrize(
    ("name", "value", "listed"),
    [
        ("keep", "Dn1,Dn2", '["Dn1", "Dn2"]'),
        ("remove", "Dn1 Dn2", '["Dn1", "Dn2"]'),
        ("quotas", "Dn1<=2, Dn2=1", '["Dn1<=2", "Dn2=1"]'),
        ("quotas", "Dn1=<2", '["STAGE<=2", "OTHER=1"]'),
    ],
)
def test_a_rule_that_is_several_says_how_several_are_written(name: str, value: str, listed: str) -> None:
    config = RunConfig(model="reference", search=SearchConfig(**{name: (value,)}))
    with pytest.raises(ConfigError) as error:
        constraints_of(config)
    told = str(error.value)
    assert value in told
    assert f"--set 'search.{name}={listed}'" in told
    assert f"{name} = {listed} under [search] in TOML" in told
