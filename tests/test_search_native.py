"""The search against brute force over what is native and what is built: every family, all sets of blocks."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from prune_lab.blocks import Architecture, architecture_of
from prune_lab.counting import count_macs
from prune_lab.errors import BudgetError, FormError
from prune_lab.families import Form, meta_model
from prune_lab.forms import layout_of, within_form
from prune_lab.plans import PruningPlan, is_native, plan_of
from prune_lab.profiling import CostTable, cost_table
from prune_lab.search import Budget, Constraints, Effects, search_plans
from prune_lab.search.program import Program
from prune_lab.search.space import space_of
from tests.tiny_models import TINY_TRANSFORMERS, tiny_config

SIZES: dict[str, Any] = {"latent": 8, "tokens": 6}
_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
}
UNETS: Mapping[str, dict[str, Any]] = {
    "of pictures": {
        **_UNET,
        "_class_name": "UNet2DModel",
        "down_block_types": ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"],
    },
    "with a text": {
        **_UNET,
        "_class_name": "UNet2DConditionModel",
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
        "mid_block_type": None,
        "cross_attention_dim": 12,
    },
}
# As many blocks as make rules of several of them bind.
DEEPER: Mapping[str, int] = {"HunyuanDiT2DModel": 8, "LatteTransformer3DModel": 4}
# Families in which some blocks cannot leave alone, or cost otherwise together.
FAST = ("SD3Transformer2DModel", "HunyuanDiT2DModel", "LatteTransformer3DModel", "with a text")


def config_of(name: str) -> dict[str, Any]:
    if name in UNETS:
        return UNETS[name]
    return tiny_config(name, **({"num_layers": DEEPER[name]} if name in DEEPER else {}))


@functools.cache
def costs_of(name: str) -> CostTable:
    return cost_table(architecture_of(config_of(name)), **SIZES)


def all_plans(architecture: Architecture) -> Iterator[PruningPlan]:
    names = [block.name for block in architecture.blocks if block.removable]
    assert len(names) <= 8
    for size in range(len(names) + 1):
        for removed in itertools.combinations(names, size):
            yield plan_of(architecture, removed)


def others_long(*fast: str) -> list[Any]:
    names = [*TINY_TRANSFORMERS, *UNETS]
    return [name if name in fast else pytest.param(name, marks=pytest.mark.long) for name in names]


@pytest.mark.parametrize("name", others_long(*FAST))
def test_the_native_plans_that_are_searched_are_those_that_are_native(name: str) -> None:
    costs = costs_of(name)
    architecture, chance = costs.architecture, random.Random(name)
    native = {
        frozenset(plan.removed): plan for plan in all_plans(architecture) if is_native(architecture, plan)
    }
    space = space_of(architecture, costs, (), Constraints())
    chosen = [frozenset().union(*options) for options in itertools.product(*space.levels)]
    searched = [removed for removed in chosen if space.satisfies_rules(removed)]
    assert set(searched) == set(native)
    assert len(searched) == len(native), "a plan is listed twice"
    program = Program(space, Effects(dict.fromkeys((block.name for block in architecture.named), 0.0)))
    for removed, plan in native.items():
        for metric in ("params", "macs"):
            whole, left = (one.amount(metric) for one in (costs.total, costs.of(plan)))
            saved = program.savings(metric) @ program.values(removed)
            assert saved == pytest.approx(1e4 * (whole - left) / whole)
    for plan in chance.sample(list(native.values()), min(2, len(native))):
        config = layout_of(architecture, plan).config
        assert costs.of(plan).macs == count_macs(config, **SIZES).total
        assert costs.of(plan).params == sum(one.numel() for one in meta_model(config).parameters())


def as_built(architecture: Architecture, form: Form) -> Iterator[PruningPlan]:
    for plan in all_plans(architecture):
        built = within_form(architecture, plan, form)
        try:
            layout_of(architecture, built)
        except FormError:
            continue
        if built.form in ("native", form):
            yield built


@pytest.mark.parametrize("form", ["native", "own", "neutral"])
@pytest.mark.parametrize("name", others_long("SD3Transformer2DModel", "with a text"))
def test_the_best_plan_is_found_at_the_price_of_what_is_built(name: str, form: Form) -> None:
    costs = costs_of(name)
    architecture, chance = costs.architecture, random.Random(name)
    if form == "neutral" and architecture.family.neutral is None:
        pytest.skip("no block of the class can stay and do nothing")
    impacts = {block.name: chance.random() for block in architecture.named}
    effects, rules = Effects(impacts), Constraints(form=form)
    plans = [(plan, costs.of(plan).macs) for plan in as_built(architecture, form)]
    amounts = sorted({macs for _, macs in plans})
    for limit in {*chance.sample(amounts, min(3, len(amounts))), amounts[0], amounts[-1]}:
        (found,) = search_plans(
            architecture, effects, costs, [Budget("macs", limit, f"macs<={limit}")], constraints=rules
        )
        best = min(sum(impacts[name] for name in plan.removed) for plan, macs in plans if macs <= limit)
        assert effects.of(found.removed) == pytest.approx(best)
        assert costs.of(found).macs <= limit
        assert found.form == within_form(architecture, found, form).form
    least = Budget("macs", amounts[0] - 1, "macs<=1%")
    with pytest.raises(BudgetError, match=f"plan has macs {amounts[0]:,} of"):
        search_plans(architecture, effects, costs, [least], constraints=rules)
