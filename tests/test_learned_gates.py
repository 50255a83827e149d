"""Gates that are learnt beside a low-rank update: what they find, that budgets hold, and that the teacher stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import TINY_UNET, build_unet
from tiny_models import tiny_model

from prune_lab.blocks import architecture_of
from prune_lab.errors import BudgetError, ConfigError
from prune_lab.probes import random_probe
from prune_lab.profiling import cost_table
from prune_lab.search import ANY_PLAN, Constraints, learned_gates, parse_budget


def useless(model: Any, name: str) -> None:
    """The block ``name`` adds nothing to its input."""
    block = model.get_submodule(architecture_of(model).block(name).path)
    with torch.no_grad():
        for layer in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[-1]):
            layer.weight.zero_()
            layer.bias.zero_()


def setting(model: Any, *budgets: str) -> tuple[Any, ...]:
    architecture = architecture_of(model)
    costs = cost_table(architecture)
    probe = random_probe(model.config, samples=8, seed=0, timesteps=4)
    return model, probe, costs, [parse_budget(text, architecture, costs) for text in budgets]


@pytest.mark.parametrize("name", ["B2", "B3"])
def test_a_block_that_does_nothing_is_found(name: str) -> None:
    model = tiny_model("PixArtTransformer2DModel")
    useless(model, name)
    found = learned_gates(*setting(model, "macs<=85%"), steps=40, rank=2, rate=0.3)
    assert found.plans[0].removed == (name,)
    assert min(found.values, key=lambda block: found.values[block]) == name


def test_the_budget_is_met_and_the_teacher_stays() -> None:
    model = build_unet(TINY_UNET).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = setting(model, "macs<=80%", "params<=as:bk-base")
    found = learned_gates(*given, steps=4, count=2)
    for plan in found.plans:
        assert all(budget.allows(given[2].of(plan)) for budget in given[3])
        assert Constraints().allow(architecture_of(model), plan)
    assert len(found.plans) == 2
    assert found.losses[0] > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_rules_hold_and_equal_seeds_give_equal_plans() -> None:
    given = setting(tiny_model("PixArtTransformer2DModel"), "macs<=60%")
    rules = Constraints(keep=("B2",), form="own")
    one, same, other = (learned_gates(*given, rules, steps=6, seed=seed) for seed in (0, 0, 1))
    assert one == same
    assert one.losses != other.losses
    assert "B2" not in one.plans[0].removed


def test_what_it_costs_is_told() -> None:
    given = setting(tiny_model("PixArtTransformer2DModel"), "macs<=85%")
    plain = learned_gates(*given, steps=4, rank=0, batch=4)
    # the answers of the model itself, and of each step a pass forward and one backward, which counts as two
    assert plain.compute.forwards == 8 + 4 * 3 * 4
    assert learned_gates(*given, steps=4, rank=2, batch=4).compute.forwards > plain.compute.forwards


def test_the_update_makes_up_for_the_masks() -> None:
    """With one plan alone the masks are always the same, and the loss falls by the update."""
    given = setting(tiny_model("PixArtTransformer2DModel"), "macs<=85%")
    rules = Constraints(keep=("B1", "B2", "B4"), form="own")
    found = learned_gates(*given, rules, steps=40, rank=4, update_rate=1e-2)
    still = learned_gates(*given, rules, steps=40, rank=0)
    assert sum(found.losses[-8:]) < 0.7 * sum(still.losses[-8:])


def test_mistakes_are_named() -> None:
    given = setting(tiny_model("PixArtTransformer2DModel"), "macs<=85%")
    with pytest.raises(ConfigError, match="gates with steps 1, rank 4"):
        learned_gates(*given, steps=1)
    with pytest.raises(BudgetError, match="macs<=1%"):
        learned_gates(*setting(given[0], "macs<=1%"), ANY_PLAN)
