"""Searches that measure, on impacts that are known: what they find, what they pay, and that they keep to the rules."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY_UNET

from prune_lab.blocks import architecture_of
from prune_lab.errors import BudgetError, ConfigError, DataError, PlanError
from prune_lab.plans import is_native, native_choices, parse_plan, plan_of
from prune_lab.profiling import CostTable, activation_table, cost_table
from prune_lab.search import (
    ANY_PLAN,
    Budget,
    Constraints,
    Effects,
    Quota,
    bk_control,
    controls_at,
    evolve_plans,
    fit_interactions,
    greedy_plan,
    local_search,
    lowest_one_shot,
    parse_budget,
    predicted_impact,
    random_median,
    sample_near,
    search_plans,
    uniform_control,
    within,
)

ARCHITECTURE = architecture_of(TINY_UNET)  # the 38 blocks of SD
COSTS = cost_table(ARCHITECTURE)
REMOVABLE = [block.name for block in ARCHITECTURE.blocks if block.removable]
BUDGET = parse_budget("macs<=66%", ARCHITECTURE, COSTS)
BOTH = [Constraints(), ANY_PLAN]


class Meter:
    """An ``impact_of`` with known effects that remembers what it was asked."""

    def __init__(self, effects: Effects) -> None:
        self.effects = effects
        self.batches: list[list[frozenset[str]]] = []

    def __call__(self, sets: Sequence[frozenset[str]]) -> np.ndarray:
        self.batches.append(list(sets))
        return np.array([self.effects.of(removed) for removed in sets])

    @property
    def asked(self) -> list[frozenset[str]]:
        return list(itertools.chain.from_iterable(self.batches))


def effects(seed: int = 0, pairs: int = 0, size: float = 1.0) -> Effects:
    """Log-uniform impacts, and pairs that cost more together than apart."""
    drawn = np.random.default_rng(seed)
    impacts = dict(zip(REMOVABLE, (10 ** drawn.uniform(-2, 0, len(REMOVABLE))).tolist(), strict=True))
    chosen = [frozenset(drawn.choice(REMOVABLE, 2, replace=False).tolist()) for _ in range(pairs)]
    return Effects(impacts, {pair: size * float(drawn.uniform(0.5, 1)) for pair in chosen})


def allowed(
    plan: Any, constraints: Constraints, budgets: Sequence[Budget] = (BUDGET,), costs: Any = COSTS
) -> bool:
    return within(plan, budgets, costs) and constraints.allow(ARCHITECTURE, plan)


# Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("constraints", BOTH)
def test_everything_keeps_to_a_budget_on_memory(tmp_path: Path, constraints: Constraints) -> None:
    """With the plan's own peak, which is no sum: the exact search, samples, greedy, local search, evolution."""
    costs = dataclasses.replace(COSTS, activations=activation_table(ARCHITECTURE))
    budget = parse_budget("memory<=70%", ARCHITECTURE, costs)
    place, meter = (ARCHITECTURE, costs, [budget]), Meter(effects(2, pairs=4))
    (best,) = search_plans(ARCHITECTURE, meter.effects, costs, [budget], constraints=constraints)
    drawn = sample_near(*place, 12, 3, constraints, band=0.1)
    assert all(costs.of(plan).memory >= 0.9 * budget.limit for plan in drawn)
    greedy = greedy_plan(*place, meter, constraints)
    near = local_search(*place, meter, drawn[0], constraints)
    points = evolve_plans(*place, meter, constraints, folder=tmp_path, trials=20, population=10)
    for plan in (best, *drawn, greedy.plan, near.plan, *(point.plan for point in points)):
        assert allowed(plan, constraints, [budget], costs)
        assert meter.effects.of(plan.removed) >= meter.effects.of(best.removed) - 1e-9


# Sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constraints", BOTH)
def test_samples_lie_just_below_the_budget(constraints: Constraints) -> None:
    plans = sample_near(ARCHITECTURE, COSTS, [BUDGET], 12, seed=3, constraints=constraints)
    assert len({plan.id for plan in plans}) == 12
    for plan in plans:
        assert allowed(plan, constraints)
        assert COSTS.of(plan).macs >= 0.95 * BUDGET.limit
    assert plans == sample_near(ARCHITECTURE, COSTS, [BUDGET], 12, seed=3, constraints=constraints)
    assert plans != sample_near(ARCHITECTURE, COSTS, [BUDGET], 12, seed=4, constraints=constraints)
    # Of any kind: random, and so not a few plans with changes.
    distances = [len(set(a.removed) ^ set(b.removed)) for a, b in itertools.combinations(plans, 2)]
    assert np.median(distances) >= 6


def test_a_sample_of_all_there_is() -> None:
    """A space of a dozen plans: every one is drawn, also those far below the budget, and no more."""
    free = {"Dn4.R1", "Dn4.R2", "Up1.R1", "Up1.R2", "Up1.R3"}
    rules = Constraints(keep=tuple(name for name in REMOVABLE if name not in free))
    (level,) = [choices for choices in native_choices(ARCHITECTURE) if any("Dn4.R1" in o for o in choices)]
    expected = {option for option in level if option <= free}
    budget = parse_budget("macs<=100%", ARCHITECTURE, COSTS)
    plans = sample_near(ARCHITECTURE, COSTS, [budget], 50, 0, rules, band=1e-4)
    assert {frozenset(plan.removed) for plan in plans} == expected
    assert len(expected) > 3


def test_samples_out_of_reach() -> None:
    with pytest.raises(BudgetError, match="smallest native plan"):
        sample_near(ARCHITECTURE, COSTS, [Budget("macs", 1, "macs<=1")], 3)
    with pytest.raises(ConfigError, match="at least 1"):
        sample_near(ARCHITECTURE, COSTS, [BUDGET], 0)


# Greedy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "constraints", [*BOTH, Constraints(remove=("Dn1.A2",), quotas=(Quota("Up4", 2, 2),))]
)
@pytest.mark.parametrize("seed", range(3))
def test_greedy_meets_budgets_and_rules(constraints: Constraints, seed: int) -> None:
    meter = Meter(effects(seed, pairs=20))
    budgets = [BUDGET, parse_budget("params<=75%", ARCHITECTURE, COSTS)]
    found = greedy_plan(ARCHITECTURE, COSTS, budgets, meter, constraints)
    assert allowed(found.plan, constraints, budgets)
    assert found.impact == pytest.approx(meter.effects.of(found.plan.removed))
    assert found.measured == len(meter.asked) == len(set(meter.asked))
    (best,) = search_plans(ARCHITECTURE, meter.effects, COSTS, budgets, constraints=constraints)
    (worst,) = random_worst(meter.effects, budgets, constraints)
    assert predicted_impact(best, meter.effects) <= found.impact + 1e-9
    assert found.impact < predicted_impact(worst, meter.effects)


def random_worst(known: Effects, budgets: Sequence[Budget], constraints: Constraints) -> tuple[Any]:
    plans = sample_near(ARCHITECTURE, COSTS, budgets, 8, 0, constraints)
    return (max(plans, key=lambda plan: predicted_impact(plan, known)),)


def test_greedy_by_hand_rescoring() -> None:
    """Two blocks that are cheap apart and dear together: the second is measured again and passed over."""
    free = ["Dn1.A1", "Dn1.A2", "Up4.A1"]
    saved = {name: COSTS.part(name).macs for name in free}
    assert len(set(saved.values())) == 1  # equal savings, so impacts decide
    rules = Constraints(keep=tuple(name for name in REMOVABLE if name not in free), form="own")
    known = Effects({"Dn1.A1": 1.0, "Dn1.A2": 2.0, "Up4.A1": 3.0}, {frozenset({"Dn1.A1", "Dn1.A2"}): 5.0})
    limit = COSTS.total.macs - 2 * saved["Dn1.A1"]
    meter = Meter(known)
    found = greedy_plan(ARCHITECTURE, COSTS, [Budget("macs", limit, "two")], meter, rules)
    assert set(found.plan.removed) == {"Dn1.A1", "Up4.A1"}
    assert found.impact == 4.0
    assert [len(batch) for batch in meter.batches] == [3, 1, 1]


def test_greedy_is_lazy() -> None:
    """Without interactions no old measurement is wrong: one batch of all, then one measurement per step."""
    meter = Meter(effects(1))
    found = greedy_plan(ARCHITECTURE, COSTS, [BUDGET], meter, ANY_PLAN)
    assert len(meter.batches[0]) == len(REMOVABLE)
    assert all(len(batch) == 1 for batch in meter.batches[1:])
    assert found.measured < 3 * len(REMOVABLE)


def test_greedy_never_enters_a_dead_end() -> None:
    """Only one block of the stage may go, and the budget needs the dearest one: the cheaper ones are passed over."""
    stage = "Up4"
    free = [block.name for block in ARCHITECTURE.stage_blocks(stage) if block.removable]
    big = max(free, key=lambda name: COSTS.part(name).macs)
    assert min(COSTS.part(name).macs for name in free) < COSTS.part(big).macs
    dear = [name for name in free if COSTS.part(name).macs == COSTS.part(big).macs]
    known = Effects({name: 1e6 if name in dear else 1.0 for name in REMOVABLE})
    limit = COSTS.total.macs - COSTS.part(big).macs
    others = tuple(name for name in ARCHITECTURE.stages if name != stage)
    rules = Constraints(quotas=(Quota(stage, 1),), keep=others, form="own")
    found = greedy_plan(ARCHITECTURE, COSTS, [Budget("macs", limit, "one")], Meter(known), rules)
    (removed,) = found.plan.removed
    assert removed in dear


@pytest.mark.parametrize(
    "answer", [lambda sets: np.full(len(sets), np.nan), lambda sets: np.zeros(len(sets) + 1)]
)
def test_a_bad_measurement_is_an_error(answer: Any) -> None:
    with pytest.raises(DataError, match="one for each set"):
        greedy_plan(ARCHITECTURE, COSTS, [BUDGET], answer)


# Descent ---------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("constraints", BOTH)
def test_local_search_ends_where_no_neighbour_is_better(constraints: Constraints) -> None:
    known = effects(2, pairs=30)
    start = sample_near(ARCHITECTURE, COSTS, [BUDGET], 1, 0, constraints)[0]
    meter = Meter(known)
    found = local_search(ARCHITECTURE, COSTS, [BUDGET], meter, start, constraints)
    assert allowed(found.plan, constraints)
    assert found.impact == pytest.approx(known.of(found.plan.removed))
    assert found.impact < known.of(start.removed)
    assert found.measured == len(meter.asked) == len(set(meter.asked))
    again = local_search(ARCHITECTURE, COSTS, [BUDGET], Meter(known), found.plan, constraints)
    assert again.plan == found.plan
    # One block more, one less, or one for another; only native ones where asked.
    gone = frozenset(found.plan.removed)
    flips = [gone ^ {name} for name in REMOVABLE]
    flips += [gone ^ {a, b} for a, b in itertools.product(gone, set(REMOVABLE) - gone)]
    for removed in flips:
        plan = plan_of(ARCHITECTURE, removed)
        if within(plan, [BUDGET], COSTS) and (constraints.form != "native" or is_native(ARCHITECTURE, plan)):
            assert known.of(removed) >= found.impact - 1e-12


def test_local_search_batches_a_round_and_stops_when_told() -> None:
    start = sample_near(ARCHITECTURE, COSTS, [BUDGET], 1, 0, ANY_PLAN)[0]
    meter = Meter(effects(2))
    found = local_search(ARCHITECTURE, COSTS, [BUDGET], meter, start, ANY_PLAN, rounds=1)
    assert len(meter.batches) == 2
    assert len(set(found.plan.removed) ^ set(start.removed)) in (1, 2)


def test_local_search_needs_a_start_within_the_rules() -> None:
    meter = Meter(effects())
    with pytest.raises(PlanError, match="over a budget"):
        local_search(ARCHITECTURE, COSTS, [BUDGET], meter, parse_plan("teacher", ARCHITECTURE))
    with pytest.raises(PlanError, match="no native plan"):
        local_search(ARCHITECTURE, COSTS, [BUDGET], meter, parse_plan("-Dn1.R2 -Md.R1", ARCHITECTURE))
    kept = Constraints(keep=("Md",))
    with pytest.raises(PlanError, match="start from"):
        local_search(ARCHITECTURE, COSTS, [BUDGET], meter, parse_plan("bk-small", ARCHITECTURE), kept)
    assert not meter.batches


# Evolution -------------------------------------------------------------------------------------------------------


def timed_costs() -> CostTable:
    """Times that disagree with MACs, so that both matter."""
    drawn = np.random.default_rng(9)
    parts = [dataclasses.replace(part, latency_ms=float(drawn.uniform(0.1, 1))) for part in COSTS.parts]
    return dataclasses.replace(COSTS, parts=tuple(parts))


@pytest.mark.parametrize("constraints", BOTH)
def test_evolution_gives_a_front_within_the_rules(tmp_path: Path, constraints: Constraints) -> None:
    known, prices = effects(4, pairs=10), timed_costs()
    meter = Meter(known)
    points = evolve_plans(
        ARCHITECTURE, prices, [BUDGET], meter, constraints, folder=tmp_path, trials=36, population=12
    )
    assert points
    for point in points:
        assert allowed(point.plan, constraints, costs=prices)
        assert point.impact == pytest.approx(known.of(point.plan.removed))
        assert point.costs["macs"] == COSTS.of(point.plan).macs
    worth = [(p.impact, p.costs["macs"], p.costs["latency_ms"]) for p in points]
    for one, other in itertools.permutations(worth, 2):
        assert not all(a <= b for a, b in zip(one, other, strict=True))
    assert len(meter.asked) == len(set(meter.asked))  # never twice
    assert all(within(plan_of(ARCHITECTURE, removed), [BUDGET], COSTS) for removed in meter.asked)
    first = [known.of(removed) for removed in meter.batches[0]]
    assert min(point.impact for point in points) <= min(first)
    born = [int(point.plan.name.removeprefix("evolution-")) for point in points]
    assert max(born) > 12  # later generations have something to add to random plans


def test_evolution_goes_on_where_it_stopped(tmp_path: Path) -> None:
    known = effects(5)
    place = (ARCHITECTURE, COSTS, [BUDGET])
    whole = Meter(known)
    expected = evolve_plans(*place, whole, folder=tmp_path / "whole", trials=36, population=12)

    class Broken(Meter):
        def __call__(self, sets: Sequence[frozenset[str]]) -> np.ndarray:
            if len(self.batches) == 2:
                raise KeyboardInterrupt
            return super().__call__(sets)

    broken, rest = Broken(known), Meter(known)
    with pytest.raises(KeyboardInterrupt):
        evolve_plans(*place, broken, folder=tmp_path / "cut", trials=36, population=12)
    found = evolve_plans(*place, rest, folder=tmp_path / "cut", trials=36, population=12)
    assert [(p.plan, p.impact) for p in found] == [(p.plan, p.impact) for p in expected]
    assert broken.asked + rest.asked == whole.asked
    done = Meter(known)
    assert len(evolve_plans(*place, done, folder=tmp_path / "cut", trials=36, population=12)) == len(expected)
    assert not done.batches
    with pytest.raises(ConfigError, match="populations"):
        evolve_plans(*place, done, folder=tmp_path / "cut", trials=5, population=12)


def test_evolution_with_more_trials_measures_nothing_again(tmp_path: Path) -> None:
    """A space of few plans: all are known soon, and known plans stay known in the folder."""
    free = {"Dn4.R1", "Dn4.R2", "Up1.R1", "Up1.R2", "Up1.R3"}
    rules = Constraints(keep=tuple(name for name in REMOVABLE if name not in free))
    first, second = Meter(effects(1)), Meter(effects(1))
    for meter, trials in ((first, 6), (second, 15)):
        points = evolve_plans(
            ARCHITECTURE, COSTS, [], meter, rules, folder=tmp_path, trials=trials, population=6
        )
        assert min(point.impact for point in points) == 0.0
    assert first.batches
    assert not set(first.asked) & set(second.asked)


# Interactions ----------------------------------------------------------------------------------------------------


def test_pairs_that_matter_are_found_and_solved_for() -> None:
    """Six strong pairs, three of them in the plan that looks best without: found, foretold, and avoided."""
    additive = effects(6)
    (blind,) = search_plans(ARCHITECTURE, additive, COSTS, [BUDGET], constraints=ANY_PLAN)
    tempting = [frozenset(blind.removed[place : place + 2]) for place in (0, 2, 4)]
    strong = dict.fromkeys((*tempting, *list(effects(6, pairs=3).interactions)), 2.5)
    known = Effects(additive.impacts, strong)
    plans = sample_near(ARCHITECTURE, COSTS, [BUDGET], 160, seed=1, constraints=ANY_PLAN, band=0.3)
    noise = np.random.default_rng(0).normal(0, 0.02, len(plans))
    fit = fit_interactions(
        plans, [predicted_impact(plan, known) + e for plan, e in zip(plans, noise, strict=True)]
    )
    assert fit.r2 > 0.95
    assert fit.rank_correlation > 0.95
    assert fit.additive_r2 < 0.9
    assert {frozenset(row[:2]) for row in fit.pairs[:6]} == set(known.interactions)
    sizes = [abs(row[2]) for row in fit.pairs]
    assert sizes == sorted(sizes, reverse=True)
    (plan,) = search_plans(ARCHITECTURE, fit.effects, COSTS, [BUDGET], constraints=ANY_PLAN)
    assert predicted_impact(plan, known) < 0.2 * predicted_impact(blind, known)


def test_noise_has_no_merit() -> None:
    """Held-out figures are honest: screening 561 pairs on noise must not look like a discovery."""
    plans = sample_near(ARCHITECTURE, COSTS, [BUDGET], 60, seed=2, constraints=ANY_PLAN)
    fit = fit_interactions(plans, np.random.default_rng(1).normal(size=60))
    assert fit.r2 < 0.1
    assert abs(fit.rank_correlation) < 0.4


def test_additive_impacts_need_no_pairs() -> None:
    known = effects(7)
    plans = sample_near(ARCHITECTURE, COSTS, [BUDGET], 120, seed=1, constraints=ANY_PLAN, band=0.3)
    fit = fit_interactions(plans, [predicted_impact(plan, known) for plan in plans])
    assert fit.additive_r2 > 0.99
    assert sum(abs(effect) for *_, effect in fit.pairs) < 0.1


def test_a_prior_keeps_blocks_that_no_plan_removes() -> None:
    known = effects(8)
    rules = Constraints(keep=("Md",), form="own")
    plans = sample_near(ARCHITECTURE, COSTS, [BUDGET], 30, seed=1, constraints=rules)
    impacts = [3 * predicted_impact(plan, known) for plan in plans]  # together three times as bad as alone
    fit = fit_interactions(plans, impacts, prior=known.impacts)
    assert fit.r2 > 0.99
    for name in REMOVABLE:
        assert fit.effects.impacts[name] == pytest.approx(3 * known.impacts[name], rel=1e-3)
    blind = fit_interactions(plans, impacts)
    assert not any(name.startswith("Md") for name in blind.effects.impacts)
    with pytest.raises(DataError, match=r"no score of Md\.A1, Md\.R1, Md\.R2"):
        search_plans(ARCHITECTURE, blind.effects, COSTS, [BUDGET], constraints=ANY_PLAN)


def test_too_few_plans_to_fit() -> None:
    plans = sample_near(ARCHITECTURE, COSTS, [BUDGET], 5)
    with pytest.raises(DataError, match="at least 20 plans"):
        fit_interactions(plans, [1.0] * 5)
    with pytest.raises(DataError, match="19 of them finite"):
        fit_interactions(plans * 4, [1.0] * 19 + [np.inf])


def test_impacts_that_do_not_differ_have_no_merit() -> None:
    plans = sample_near(ARCHITECTURE, COSTS, [BUDGET], 20)
    fit = fit_interactions(plans, [1.0] * 20)
    assert np.isnan(fit.r2)
    assert np.isnan(fit.rank_correlation)
    assert not fit.pairs


# Controls --------------------------------------------------------------------------------------------------------


def test_the_bk_control_is_the_largest_that_fits() -> None:
    for preset in ("bk-base", "bk-small", "bk-tiny"):
        budget = parse_budget(f"macs<={preset}", ARCHITECTURE, COSTS)
        found = bk_control(ARCHITECTURE, COSTS, [budget])
        assert found is not None
        assert found.name == preset
    tiny = COSTS.of(parse_plan("bk-tiny", ARCHITECTURE)).macs
    assert bk_control(ARCHITECTURE, COSTS, [Budget("macs", tiny - 1, "less")]) is None
    budget = parse_budget("macs<=bk-base", ARCHITECTURE, COSTS)
    assert bk_control(ARCHITECTURE, COSTS, [budget], Constraints(keep=("Dn1",))) is None
    other = architecture_of(TINY_UNET | {"layers_per_block": 1})
    assert bk_control(other, cost_table(other), []) is None


@pytest.mark.parametrize("constraints", BOTH)
@pytest.mark.parametrize("share", ["85%", "66%", "bk-tiny"])
def test_uniform_is_one_pattern_in_all_outer_stages(constraints: Constraints, share: str) -> None:
    budget = parse_budget(f"macs<={share}", ARCHITECTURE, COSTS)
    plan = uniform_control(ARCHITECTURE, COSTS, [budget], constraints)
    assert plan is not None
    assert plan.name == "uniform"
    assert allowed(plan, constraints, [budget])
    outer = [
        block for block in ARCHITECTURE.blocks if block.stage not in ("Md", "Dn4", "Up1") and block.removable
    ]
    pattern = {name.split(".")[1] for name in plan.removed if not name.startswith(("Md", "Dn4", "Up1"))}
    assert pattern
    assert all((block.name in plan.removed) == (block.name.split(".")[1] in pattern) for block in outer)


@pytest.mark.parametrize("constraints", BOTH)
def test_all_controls_meet_the_budget_under_their_names(constraints: Constraints) -> None:
    known, budget = effects(3), parse_budget("macs<=bk-small", ARCHITECTURE, COSTS)
    plans = controls_at(
        ARCHITECTURE,
        known,
        COSTS,
        [budget],
        constraints,
        impact_of=Meter(known),
        similarity=effects(9),
        draws=9,
    )
    names = ["bk-small", "uniform", "random-median", "lowest-one-shot", "similarity"]
    assert [plan.name for plan in plans] == names
    assert all(allowed(plan, constraints, [budget]) for plan in plans)
    assert plans[-1] == search_plans(ARCHITECTURE, effects(9), COSTS, [budget], constraints=constraints)[0]
    fewer = controls_at(ARCHITECTURE, known, COSTS, [budget], constraints, draws=9)
    assert [plan.name for plan in fewer] == names[:3]


def test_random_median_and_lowest_one_shot_by_hand() -> None:
    known = effects(3)
    drawn = sample_near(ARCHITECTURE, COSTS, [BUDGET], 9, seed=5)
    impacts = sorted(predicted_impact(plan, known) for plan in drawn)
    median = random_median(ARCHITECTURE, known, COSTS, [BUDGET], draws=9, seed=5)
    assert predicted_impact(median, known) == impacts[4]
    meter = Meter(known)
    lowest = lowest_one_shot(ARCHITECTURE, COSTS, [BUDGET], meter, draws=9, seed=5)
    assert predicted_impact(lowest, known) == impacts[0]
    assert [len(batch) for batch in meter.batches] == [9]
