"""Gates that are learnt beside a low-rank update: what they find, that budgets hold, and that the teacher stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_UNET, build_unet
from scipy.stats import binomtest
from tiny_models import tiny_model

from prune_lab.blocks import architecture_of
from prune_lab.errors import BudgetError, ConfigError
from prune_lab.plans import plan_of
from prune_lab.prefix_sharing import ComputeCost
from prune_lab.probes import random_probe
from prune_lab.profiling import cost_table
from prune_lab.report.document import Chart, Table
from prune_lab.report.figures import LIGHT
from prune_lab.report.gates import gate_parts
from prune_lab.runs import Run, read_records
from prune_lab.schemas import GATE_STEPS, GATE_STEPS_COLUMNS, LEARNED_GATES, LEARNED_GATES_COLUMNS
from prune_lab.search import ANY_PLAN, Constraints, GateResult, learned_gates, parse_budget
from prune_lab.search.learned_gates import Gate, GateStep
from prune_lab.workflow.gates import gate_notes, gate_steps_frame, gates_frame, write_gates


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
    names = [gate.block for gate in found.gates]
    assert names == [block.name for block in architecture_of(model).blocks if block.name in names]
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


# What was learnt, kept and shown ------------------------------------------------------------------------------------


def test_gates_say_how_often_a_block_stays_and_how_sure_that_is() -> None:
    model = tiny_model("PixArtTransformer2DModel")
    useless(model, "B3")
    given = setting(model, "macs<=85%")
    found = learned_gates(*given, steps=41, rank=2, rate=0.3)
    assert [gate.block for gate in found.gates] == ["B1", "B2", "B3", "B4"]  # in order of execution
    own = found.gates[2]
    assert own.stays == min(gate.stays for gate in found.gates) < 0.5
    assert own.sure(removed=True) == 1 - own.sure(removed=False) > 0.5
    for gate in found.gates:
        hits = round(gate.stays * gate.masks)
        assert gate.masks == 21  # of the second half
        ends = binomtest(hits, gate.masks).proportion_ci(method="wilson")
        assert (gate.low, gate.high) == pytest.approx((ends.low, ends.high), abs=1e-6)
    # one block of four leaves in each mask, so they leave 21 times together
    assert sum(21 * (1 - gate.stays) for gate in found.gates) == pytest.approx(21)
    architecture, costs = architecture_of(model), given[2]
    assert len(found.steps) == 41
    assert found.metric == "macs"
    assert {step.removed for step in found.steps} == {1}
    left = [costs.of(plan_of(architecture, [gate.block])).macs / costs.total.macs for gate in found.gates]
    assert {step.left for step in found.steps} <= set(left)
    assert max(step.left for step in found.steps) <= 0.85
    assert found.losses == tuple(step.loss for step in found.steps)


def test_where_nothing_can_leave_nothing_is_learnt() -> None:
    given = setting(tiny_model("PixArtTransformer2DModel"), "macs<=100%")
    found = learned_gates(*given, Constraints(keep=("B1", "B2", "B3", "B4")))
    assert [plan.removed for plan in found.plans] == [()]
    assert (found.gates, found.steps, found.compute.macs) == ((), (), 0)
    assert gates_frame(found, "macs<=100%").empty


def _result(**stays: float) -> GateResult:
    architecture = architecture_of(tiny_model("PixArtTransformer2DModel"))
    plans = (plan_of(architecture, ["B2"]),)
    gates = tuple(Gate(name, share, 0.1, 0.9, 20, -1.0, 0.5) for name, share in stays.items())
    steps = tuple(GateStep(1 - step / 50, 1, 0.75) for step in range(40))
    return GateResult(plans, dict.fromkeys(stays, 0.5), gates, steps, "macs", ComputeCost())


def test_what_was_learnt_is_kept_said_and_drawn(tmp_path: Path) -> None:
    run, found = Run(tmp_path), _result(B1=1.0, B2=0.0, B3=0.55)
    tables = [
        (gates_frame(found, budget), gate_steps_frame(found, budget)) for budget in ("macs<=75%", "macs<=80%")
    ]
    assert write_gates(run, tables) == (run.gates, run.gate_steps)
    gates = read_records(run.gates, LEARNED_GATES)
    assert tuple(gates.columns) == LEARNED_GATES_COLUMNS
    assert list(gates["sure"]) == [1.0, 1.0, 0.55] * 2
    assert list(gates["removed"]) == [False, True, False] * 2
    steps = read_records(run.gate_steps, GATE_STEPS)
    assert tuple(steps.columns) == GATE_STEPS_COLUMNS
    assert list(steps["step"]) == [*range(1, 41)] * 2
    line, other = gate_notes(run)
    # means of four: 1 - (0 + 1 + 2 + 3) / 4 / 50 and 1 - (36 + 37 + 38 + 39) / 4 / 50
    assert line == (
        "learned gates, macs<=75%: 40 steps, in which the loss went from 0.97 to 0.25 (means of 4); of 3 gates 2 "
        "decide as the best plan does in 95% of the last 20 masks or more; least sure: B3, which it keeps, stays in "
        "55% [10%, 90%] (plans/gates.csv, with --run)"
    )
    assert other.startswith("learned gates, macs<=80%: ")
    write_gates(run, [(tables[0][0].assign(masks=2), tables[0][1])])
    assert "; 2 masks are too few to tell how sure gates are" in gate_notes(run)[0]
    write_gates(run, tables)
    chart, table = gate_parts(gates, steps)
    assert isinstance(chart, Chart)
    assert {text.get_text() for text in chart.draw(LIGHT).axes[0].texts} == {"100%", "0%", "55%"}
    assert isinstance(table, Table)
    assert len(table.rows) == 6
    assert write_gates(run, []) == ()  # another solver has searched since
    assert gate_notes(run) == ()
    assert not run.gates.exists()
    assert gate_parts(None, None) == ()
