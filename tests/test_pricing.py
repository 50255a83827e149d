"""Pricing: matrices against single plans, materialised models and hand-made walks; latency by a clock wound by hand."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_lab.blocks import Architecture, architecture_of
from prune_lab.counting import count_macs
from prune_lab.errors import (
    BudgetError,
    ConfigError,
    DataError,
    NonNativePlanError,
    PlanError,
    UnremovableBlockError,
)
from prune_lab.families import example_inputs, meta_model
from prune_lab.models import preset_config
from prune_lab.plans import native_layout, parse_plan, plan_of, removed_samplers
from prune_lab.profiling import (
    ActivationTable,
    LatencyTable,
    MeasuredPlan,
    activation_table,
    as_matrix,
    as_plans,
    cost_table,
    groups_gone,
    latency_disagreement,
    latency_table_from_dict,
    live_peak,
    measure_latency_table,
    random_native_plans,
    sampler_groups,
)
from prune_lab.profiling import latency as latency_module
from prune_lab.profiling.activations import UnitMemory
from prune_lab.profiling.latency_parts import pass_by_parts
from prune_lab.surgery import materialise

CONTROLS = ("bk-base", "bk-small", "bk-tiny")
TWO_STAGES: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [8, 8],  # no block is starred: every plan closes, even the empty U-Net
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}


@pytest.fixture(scope="session")
def tiny(tiny_unet_shared: Any) -> Architecture:
    return architecture_of(tiny_unet_shared)


@pytest.fixture(scope="session")
def two_stages() -> Architecture:
    return architecture_of(TWO_STAGES)


def random_matrix(architecture: Architecture, count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Random plans, every fourth of them with all of the innermost stages gone."""
    generator = np.random.default_rng(seed)
    chance = generator.random((count, 1))
    matrix = generator.random((count, len(architecture.named))) < chance
    for group in sampler_groups(architecture)[:1]:  # SDXL has none: blocks further in must stay
        matrix[::4, list(group.places)] = True
    matrix[:, [block.starred for block in architecture.named]] = False
    return matrix


# Matrices --------------------------------------------------------------------------------------------------


def test_plans_become_rows_and_come_back(tiny: Architecture) -> None:
    plans = tuple(parse_plan(text, tiny) for text in ("teacher", *CONTROLS, "-Dn1.A1 -Up4.R2"))
    matrix = as_matrix(plans, tiny)
    assert (matrix.shape, matrix.dtype) == ((5, 38), np.bool_)
    assert matrix.sum(axis=1).tolist() == [0, 14, 17, 20, 2]
    assert [tiny.blocks[place].name for place in np.flatnonzero(matrix[4])] == ["Dn1.A1", "Up4.R2"]
    assert as_plans(matrix, tiny) == plans
    assert as_matrix([], tiny).shape == (0, 38)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_samplers_leave_with_the_same_plans_as_one_by_one(seed: int) -> None:
    for config in (preset_config("sd-v1.4"), TWO_STAGES):
        architecture = architecture_of(config)
        groups = sampler_groups(architecture)
        matrix = random_matrix(architecture, 8, seed)
        for gone, plan in zip(groups_gone(matrix, groups), as_plans(matrix, architecture), strict=True):
            names = {
                name for group, left in zip(groups, gone, strict=True) if left for name in group.samplers
            }
            assert names == set(removed_samplers(architecture, plan))


def test_which_samplers_can_leave() -> None:
    (group,) = sampler_groups(architecture_of(preset_config("sd-v1.4")))
    assert (group.samplers, len(group.blocks)) == (("Dn3.down", "Up1.up"), 2 + 3 + 3)
    assert sampler_groups(architecture_of(preset_config("sdxl-base"))) == ()  # Dn3.R1 changes the width


def test_a_matrix_of_something_else_is_refused(tiny: Architecture) -> None:
    costs = cost_table(tiny)
    for wrong in (np.zeros((2, 37), np.bool_), np.zeros((2, 38)), np.zeros(38, np.bool_), [[True]]):
        with pytest.raises(PlanError, match=r"boolean matrix \(plans, 38\), found"):
            costs.of_many(wrong)  # type: ignore[arg-type]
    starred = np.zeros((3, 38), np.bool_)
    place = [block.name for block in tiny.blocks].index("Dn2.R1")
    starred[2, place] = True
    with pytest.raises(UnremovableBlockError, match=rf"Dn2\.R1.*changes the width.*column {place} False"):
        costs.of_many(starred)
    with pytest.raises(PlanError, match="row of a plan for architecture"):
        as_matrix([parse_plan("bk-base", architecture_of(preset_config("sd-v1.4")))], tiny)


def test_random_native_plans_differ_and_can_be_built(tiny: Architecture, two_stages: Architecture) -> None:
    plans = random_native_plans(tiny, 12, seed=3)
    assert len({plan.id for plan in plans}) == 12
    assert all(plan.removed for plan in plans)
    for plan in plans:
        native_layout(tiny, plan)
    assert plans == random_native_plans(tiny, 12, seed=3) != random_native_plans(tiny, 12, seed=4)
    with pytest.raises(PlanError, match="asked for 500 different native plans"):
        random_native_plans(two_stages, 500)


# Counted prices --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["sd-v1.4", pytest.param("sdxl-base", marks=pytest.mark.long)])
def test_a_matrix_is_priced_like_plan_by_plan(preset: str) -> None:
    architecture = architecture_of(preset_config(preset))
    costs = cost_table(architecture, batch=2, dtype=torch.float16)
    matrix = random_matrix(architecture, 200)
    prices = costs.of_many(matrix)
    one_by_one = [costs.of(plan) for plan in as_plans(matrix, architecture)]
    for name in ("params", "macs", "attention_macs", "paper_macs", "weight_bytes"):
        column = getattr(prices, name)
        assert column.dtype == np.int64
        assert column.tolist() == [getattr(cost, name) for cost in one_by_one]
    assert prices.latency_ms is None
    assert prices.activation_bytes is None
    assert prices.memory is None
    assert len(prices) == 200


def test_every_metric_of_a_matrix_equals_plan_by_plan(tiny_unet: Any, tiny: Architecture) -> None:
    table = measured_table(tiny_unet, Timer(tiny_unet), rounds=2, warmup=0)
    costs = cost_table(tiny, latency=table, activations=activation_table(tiny))
    matrix = random_matrix(tiny, 50)
    found, frame = costs.of_many(matrix), costs.of_many(matrix).frame()
    one_by_one = [costs.of(plan) for plan in as_plans(matrix, tiny)]
    for name in (
        "weight_bytes",
        "latency_ms",
        "activation_bytes",
        "memory",
    ):  # to the last bit, milliseconds too
        assert getattr(found, name).tolist() == [getattr(cost, name) for cost in one_by_one]
        assert frame[name].tolist() == getattr(found, name).tolist()
    assert one_by_one[0].memory == one_by_one[0].weight_bytes + one_by_one[0].activation_bytes
    assert [cost.latency_ms for cost in one_by_one] == pytest.approx(
        [table.predict(plan) for plan in as_plans(matrix, tiny)]
    )
    assert list(costs.frame().columns[-2:]) == ["tokens", "latency_ms"]
    with pytest.raises(BudgetError, match="measure a latency table"):
        cost_table(tiny).total.amount("latency_ms")
    with pytest.raises(BudgetError, match="asked for a budget on memory, found no activation memory"):
        cost_table(tiny).total.amount("memory")
    assert set(cost_table(tiny).total.amounts()) == {"params", "macs", "paper_macs"}


@pytest.mark.parametrize("name", ["tiny", "two stages"])
def test_peaks_never_grow_when_more_is_removed(name: str, tiny: Architecture) -> None:
    architecture = {"tiny": tiny, "two stages": architecture_of(TWO_STAGES)}[name]
    table, removable = activation_table(architecture), [block.removable for block in architecture.blocks]
    matrix = random_matrix(architecture, 400)
    if name == "two stages":  # every plan there is
        matrix = np.array(list(itertools.product([False, True], repeat=len(architecture.blocks))))
    peaks = table.of_many(matrix)
    for place in np.flatnonzero(removable):
        more = matrix.copy()
        more[:, place] = True
        assert (table.of_many(more) <= peaks).all(), architecture.blocks[place].name


def test_the_papers_parameters_from_a_matrix() -> None:
    architecture = architecture_of(preset_config("sd-v1.4"))
    matrix = as_matrix([parse_plan(text, architecture) for text in ("teacher", *CONTROLS)], architecture)
    found = cost_table(architecture).of_many(matrix)
    assert found.params.tolist() == [859_520_964, 579_384_964, 482_346_884, 323_384_964]
    assert (found.paper_macs / 1e9).round(1).tolist() == [339.0, 223.9, 217.9, 205.2]


@pytest.mark.long
@settings(max_examples=2)
@given(seed=st.integers(0, 10_000))
def test_prices_equal_the_materialised_models(seed: int, tiny_unet_shared: Any, tiny: Architecture) -> None:
    plans = random_native_plans(tiny, 2, seed=seed)
    found = cost_table(tiny, latent=8, tokens=5).of_many(as_matrix(plans, tiny))
    for plan, params, macs, attention in zip(
        plans, found.params, found.macs, found.attention_macs, strict=True
    ):
        student = materialise(tiny_unet_shared, plan)
        count = count_macs(student.config, latent=8, tokens=5)
        assert params == sum(parameter.numel() for parameter in student.parameters())
        assert (macs, attention) == (count.total, count.attention)


def test_sums_beyond_what_a_float_holds_are_exact(tiny: Architecture) -> None:
    costs = cost_table(tiny)
    large = tuple(dataclasses.replace(part, macs=10**10 * part.macs + 1) for part in costs.parts)
    costs = dataclasses.replace(costs, parts=large)
    assert costs.total.macs > 2**53
    matrix = random_matrix(tiny, 50)
    found = costs.of_many(matrix)
    assert found.macs.tolist() == [costs.of(plan).macs for plan in as_plans(matrix, tiny)]


def test_more_plans_than_are_priced_at_a_time(tiny: Architecture) -> None:
    costs = cost_table(tiny, activations=activation_table(tiny))
    matrix = random_matrix(tiny, 20_000)
    together, reversed_ = costs.of_many(matrix), costs.of_many(matrix[::-1])
    pd.testing.assert_frame_equal(together.frame(), reversed_.frame()[::-1].reset_index(drop=True))
    assert len(costs.of_many(matrix[:0])) == 0


def test_prices_as_a_frame(tiny: Architecture) -> None:
    columns = ["params", "macs", "attention_macs", "paper_macs", "weight_bytes"]
    unknown = ["latency_ms", "activation_bytes", "memory"]
    frame = cost_table(tiny).of_many(random_matrix(tiny, 3)).frame()
    assert list(frame.columns) == [*columns, *unknown]
    assert frame[unknown].isna().all(axis=None)
    assert frame["params"].dtype == "int64"


# Activation memory -----------------------------------------------------------------------------------------


def peak_of_student(config: Mapping[str, Any], dtype: torch.dtype, **sizes: int) -> int:
    unet = torch.nn.Module.to(meta_model(config), dtype)
    return live_peak(unet, example_inputs(unet.config, device="meta", dtype=dtype, **sizes))


def test_what_a_residual_block_holds_by_hand(tiny: Architecture) -> None:
    table = activation_table(tiny)
    unit = table.units[0]
    tensor = 4 * 8 * 16 * 16  # eight channels of 16 x 16 in float32
    # Its last line holds the result of the second convolution, the sum with the input, and that divided by 1.0; all
    # along the projected time embedding, one number a channel.
    assert (unit.name, unit.input_bytes, unit.output_bytes) == ("Dn1.R1", tensor, tensor)
    assert unit.workspace_bytes == 3 * tensor + 4 * 8
    text, latents, embedding = 77 * 16, 4 * 16 * 16, 32
    # Latents, text and a whole number for the timestep; its sine waves, and the embedding made of them.
    assert table.kept_bytes == 4 * (text + latents + 8 + embedding) + 8


def test_what_an_attention_block_holds_by_hand(tiny: Architecture) -> None:
    unit = activation_table(tiny).units[1]
    tensor = 4 * 8 * 16 * 16
    # The gated layer is the widest: 8 times the width before the gate, 4 of the gate's half, 4 of the product. Beside
    # it what was projected in, the hidden state, the last attention's result, and the norm of the hidden state.
    assert unit.name == "Dn1.A1"
    assert unit.workspace_bytes == (8 + 4 + 4 + 4) * tensor


@settings(max_examples=4)
@given(seed=st.integers(0, 10_000))
def test_peaks_equal_those_of_materialised_models(seed: int, tiny: Architecture) -> None:
    half = bool(seed % 2)
    dtype = torch.float16 if half else torch.float32
    plans = random_native_plans(tiny, 2, seed=seed)
    found = activation_table(tiny, dtype=dtype).of_many(as_matrix(plans, tiny))
    for plan, peak in zip(plans, found.tolist(), strict=True):
        assert peak == peak_of_student(native_layout(tiny, plan).config, dtype), plan.text


def test_peaks_of_the_papers_students() -> None:
    architecture = architecture_of(preset_config("sd-v1.4"))
    table = activation_table(architecture, dtype="float16")
    plans = [parse_plan(text, architecture) for text in ("teacher", *CONTROLS, "-Md")]
    found = table.of_many(as_matrix(plans, architecture)).tolist()
    layouts = [native_layout(architecture, plan).config for plan in plans]
    assert found == [peak_of_student(config, torch.float16) for config in layouts]
    # Of the outermost stages all three keep the same, and only there the peak is decided.
    assert found[1] == found[2] == found[3] < found[0] == found[4] == table.total


@pytest.mark.parametrize(("latent", "tokens"), [(9, 5), (24, 40)])  # 9 is odd: upsamplers are told their size
def test_peaks_at_another_size(latent: int, tokens: int, tiny: Architecture) -> None:
    plan = parse_plan("bk-small", tiny)
    (found,) = activation_table(tiny, latent=latent, tokens=tokens).of_many(as_matrix([plan], tiny))
    config = native_layout(tiny, plan).config
    assert found == peak_of_student(config, torch.float32, latent=latent, tokens=tokens)


def by_hand(table: ActivationTable, gone: set[str]) -> int:
    """The peak by following every tensor: numbers for tensors, sets for what holds on to them."""
    sizes = {0: table.first_bytes}

    def made(size: int) -> int:
        sizes[len(sizes)] = size
        return len(sizes) - 1

    def total(*holders: set[int]) -> int:
        return sum(sizes[tensor] for tensor in set().union(*holders))

    # Once to see which tensor each residual block of an up stage reads.
    hidden, skips, read = 0, [0], set()
    trace: list[tuple[UnitMemory, int, int | None]] = []  # unit, hidden after it, skip that it takes
    for unit in table.units:
        skip = skips.pop() if unit.takes_skip else None
        if unit.name not in gone:
            hidden = made(unit.output_bytes)
            read |= set() if skip is None else {skip}
        skips += [hidden] if unit.gives_skip else []
        trace.append((unit, hidden, skip))
    assert not skips
    # Again to add up who is alive.
    stack, stage, held, peaks = [0], "Dn1", set[int](), []
    hidden = entered = 0
    for unit, after, _ in trace:
        if unit.stage != stage:
            stage, entered = unit.stage, hidden
            count = sum(other.takes_skip for other in table.units if other.stage == stage)
            held = {
                stack.pop() for _ in range(count)
            } & read  # diffusers cuts them off the list for the stage
        if unit.name not in gone:
            waiting = (set(stack) & read) | held
            if unit.takes_skip:  # hidden has gone into the concatenation
                alive = total(waiting, {entered}) + unit.input_bytes
            else:
                alive = total(waiting, {entered}, {hidden})
            peaks.append(alive + unit.workspace_bytes)
        hidden = after
        stack += [hidden] if unit.gives_skip else []
    return table.kept_bytes + max([*peaks, total(held, {hidden}) + table.head_bytes])


@pytest.mark.parametrize("name", ["tiny", "two stages", "sdxl"])
def test_peaks_of_any_plan_equal_a_walk_tensor_by_tensor(name: str, tiny: Architecture) -> None:
    configs = {"tiny": tiny.config, "two stages": TWO_STAGES, "sdxl": preset_config("sdxl-base")}
    architecture = architecture_of(configs[name])
    table = activation_table(architecture)
    matrix = random_matrix(architecture, 300)
    for plan, peak in zip(as_plans(matrix, architecture), table.of_many(matrix).tolist(), strict=True):
        gone = set(plan.removed) | set(removed_samplers(architecture, plan))
        assert peak == by_hand(table, gone), plan.text


def test_nothing_left_but_the_ends(two_stages: Architecture) -> None:
    table = activation_table(two_stages)
    everything = np.ones((1, len(two_stages.blocks)), np.bool_)
    tensor = 4 * 8 * 8 * 8
    # What the first convolution made, the last norm of it, and the norm's mean and deviation of each of four groups.
    assert table.of_many(everything).tolist() == [table.kept_bytes + 2 * tensor + 4 * 2 * 4]


def test_the_activation_table_as_a_frame(tiny: Architecture) -> None:
    table = activation_table(tiny, dtype="bfloat16")
    frame = table.frame()
    columns = ["name", "kind", "input_bytes", "output_bytes", "workspace_bytes", "live_bytes"]
    assert list(frame.columns) == columns
    assert list(frame["name"][:6]) == ["Dn1.R1", "Dn1.A1", "Dn1.R2", "Dn1.A2", "Dn1.down", "Dn2.R1"]
    assert (frame["kind"] == "sampler").sum() == 6
    assert frame["live_bytes"].max() == table.total
    assert (table.dtype, table.latent, table.tokens) == ("bfloat16", (16, 16), 77)


def test_batches_hold_as_many_times_the_bytes(tiny: Architecture) -> None:
    unet = meta_model(tiny.config)
    assert (
        live_peak(unet, example_inputs(tiny.config, batch=3, device="meta"))
        == 3 * activation_table(tiny).total
    )


# Latency ---------------------------------------------------------------------------------------------------

REST_MS = 20.0
MS_PER_PARAM = 1e-3


class Timer:
    """A clock wound by hand: a pass takes so long per parameter that is there, ``slowness`` times as long at a call."""

    def __init__(self, unet: Any) -> None:
        self.model = unet
        self.calls = 0
        self.batches: set[int] = set()
        self.gradients: set[bool] = set()
        self.students: set[int] = set()

    def plain(self, unet: Any) -> float:
        return REST_MS + MS_PER_PARAM * sum(parameter.numel() for parameter in unet.parameters())

    def slowness(self) -> float:
        return 1.0

    def interruption(self, part: int) -> float:
        return 1.0

    def __call__(self, unet: Any, inputs: Mapping[str, Any]) -> float:
        self.calls += 1
        self.batches.add(len(inputs["sample"]))
        self.gradients.add(torch.is_grad_enabled() or unet.training)
        if unet is not self.model:
            self.students.add(id(unet))
        return self.plain(unet) * self.slowness()

    def parts(
        self, unet: Any, paths: Mapping[str, str], inputs: Mapping[str, Any]
    ) -> tuple[float, dict[str, float]]:
        """Each part takes so long per parameter of its own; what interrupts it makes the pass as much longer."""
        whole, slowness = self(unet, inputs), self.slowness()
        found = {}
        for place, (name, path) in enumerate(paths.items()):
            own = MS_PER_PARAM * sum(parameter.numel() for parameter in unet.get_submodule(path).parameters())
            found[name] = own * slowness * self.interruption(100 * self.calls + place)
            whole += found[name] - own * slowness
        return whole, found


def expected_ms(architecture: Architecture, text: str) -> float:
    costs = cost_table(architecture)
    return REST_MS + MS_PER_PARAM * costs.of(parse_plan(text, architecture)).params


def measured_table(unet: Any, timer: Timer, **settings: Any) -> LatencyTable:
    return measure_latency_table(unet, timer=timer, parts_timer=timer.parts, **settings)


def test_a_pass_gives_each_block_its_time(tiny_unet: Any, tiny: Architecture) -> None:
    timer = Timer(tiny_unet.train())
    before = {path: id(module) for path, module in tiny_unet.named_modules()}
    table = measured_table(tiny_unet, timer, rounds=3, warmup=2, batch=2, latent=8, tokens=5)
    assert timer.calls == 2 + 3  # a pass times all parts
    assert (timer.batches, timer.gradients) == ({2}, {False})
    assert {path: id(module) for path, module in tiny_unet.named_modules()} == before
    assert tiny_unet.training
    assert table.whole.median_ms == pytest.approx(expected_ms(tiny, "teacher"))
    assert (table.whole.runs, table.whole.warmup) == (3, 2)
    params = {cost.name: cost.params for cost in cost_table(tiny).parts}
    assert [saving.name for saving in table.savings[-2:]] == ["Up4.A3", "Dn3.down+Up1.up"]
    for saving in table.savings:
        wanted = MS_PER_PARAM * sum(params[part] for part in saving.name.split("+"))
        assert (saving.measured_ms, saving.p10_ms, saving.p90_ms) == (pytest.approx(wanted, rel=1e-6),) * 3
    assert (table.batch, table.latent, table.tokens, table.scale) == (2, (8, 8), 5, 1.0)
    assert table.median_error_percent is None
    assert table.environment.dtype == "float32"


def test_predictions_of_a_matrix(tiny_unet: Any, tiny: Architecture) -> None:
    table = measured_table(tiny_unet, Timer(tiny_unet), rounds=2, warmup=0, latent=8)
    texts = ("teacher", *CONTROLS, "-Dn1.A1 -Up4.R2", "-Dn4 -Md -Up1")
    plans = [parse_plan(text, tiny) for text in texts]
    wanted = [expected_ms(tiny, text) for text in texts]
    assert [table.predict(plan) for plan in plans] == pytest.approx(wanted, rel=1e-6)
    assert table.predict(plans[3]) == pytest.approx(wanted[3], rel=1e-6)
    prices = cost_table(tiny, latent=8, latency=table).of_many(as_matrix(plans, tiny))
    assert prices.latency_ms == pytest.approx(wanted, rel=1e-6)


def test_parts_add_up_to_every_plan(tiny_unet: Any, tiny: Architecture) -> None:
    table = measured_table(tiny_unet, Timer(tiny_unet), rounds=2, warmup=0, latent=8)
    parts = table.part_ms()
    assert set(parts) == {cost.name for cost in cost_table(tiny).parts}
    assert sum(parts.values()) == pytest.approx(table.whole.median_ms)
    for text in (*CONTROLS, "-Dn1.A1 -Up4.R2", "-Dn4 -Md -Up1"):
        plan = parse_plan(text, tiny)
        left = set(parts) - {*plan.removed, *removed_samplers(tiny, plan)}
        assert sum(parts[name] for name in left) == pytest.approx(table.predict(plan))


class Tiring(Timer):
    """A machine that gets slower all the time, to three times at the thousandth call."""

    def slowness(self) -> float:
        return 1 + 2e-3 * self.calls


class Interrupted(Timer):
    """A machine on which in some passes a part takes eight times as long, another each time."""

    def interruption(self, part: int) -> float:
        return 8.0 if (7 * part**2) % 311 < 2 else 1.0


def shares(table: LatencyTable) -> np.ndarray[Any, Any]:
    return np.array([saving.measured_ms for saving in table.savings[:-1]]) / table.whole.median_ms


@pytest.mark.parametrize(("kind", "runs"), [(Tiring, 2), (Interrupted, 9)])
def test_neither_drift_nor_interruptions_matter(kind: type[Timer], runs: int, tiny_unet: Any) -> None:
    quiet = measured_table(tiny_unet, Timer(tiny_unet), rounds=2, warmup=0, latent=8)
    other = measured_table(tiny_unet, kind(tiny_unet), rounds=runs, warmup=0, latent=8)
    assert shares(other) == pytest.approx(shares(quiet), rel=1e-6)


class OtherStudents(Timer):
    """A machine on which students save 1.25 times what bypasses save."""

    def plain(self, unet: Any) -> float:
        took = super().plain(unet)
        return took if unet is self.model else took - 0.25 * (super().plain(self.model) - took)


def test_calibration_makes_up_for_what_bypasses_do_not_save(tiny_unet: Any, tiny: Architecture) -> None:
    calibrate, held_out = random_native_plans(tiny, 3), [parse_plan(text, tiny) for text in CONTROLS]
    timer = OtherStudents(tiny_unet)
    table = measured_table(
        tiny_unet, timer, calibrate=calibrate, held_out=held_out, rounds=2, warmup=1, latent=8
    )
    assert table.scale == pytest.approx(1.25)
    assert [check.use for check in table.checks] == ["calibrate"] * 3 + ["held-out"] * 3
    assert table.errors_percent() == pytest.approx([0, 0, 0], abs=1e-9)
    assert table.worst_error_percent == pytest.approx(0, abs=1e-9)
    # The passes by parts, then six rounds of the whole and six students: the intervals are narrow at once.
    assert timer.calls == 1 + 2 + 7 * (1 + 6)
    assert len(timer.students) == 6
    uncalibrated = measured_table(tiny_unet, OtherStudents(tiny_unet), held_out=held_out, rounds=2, latent=8)
    whole, student = expected_ms(tiny, "teacher"), uncalibrated.checks[2].measured_ms
    predicted = expected_ms(tiny, "bk-tiny")
    assert student == pytest.approx(whole - 1.25 * (whole - predicted), rel=1e-6)
    assert uncalibrated.scale == 1.0
    assert uncalibrated.errors_percent()[2] == pytest.approx(100 * (predicted / student - 1), rel=1e-5)
    assert uncalibrated.median_error_percent == pytest.approx(np.median(uncalibrated.errors_percent()))


def test_one_bad_plan_does_not_upset_the_scale(tiny_unet: Any, tiny: Architecture) -> None:
    table = measured_table(tiny_unet, Timer(tiny_unet), rounds=2, warmup=0, latent=8)
    whole = table.whole.median_ms

    def measured(text: str, factor: float, use: str = "calibrate") -> MeasuredPlan:
        plan = parse_plan(text, tiny)
        return MeasuredPlan(plan, use, whole - factor * (whole - table.predict(plan)))  # type: ignore[arg-type]

    good = [measured("bk-base", 1.1), measured("bk-small", 1.1)]
    assert latency_module.calibrated(table, good).scale == pytest.approx(1.1)
    assert latency_module.calibrated(table, [*good, measured("bk-tiny -Dn1.A1", 9)]).scale == pytest.approx(
        1.1
    )
    few = [measured("-Md", 1.1), measured("bk-tiny", 9, "held-out")]
    assert latency_module.calibrated(table, few).scale == pytest.approx(1.1)
    assert latency_module.calibrated(table, [measured("bk-tiny", -1)]).scale == 0.0


@pytest.mark.parametrize(
    ("pairs", "wanted"),
    [([(3.0, 1.0)], 3.0), ([(1.0, 1.0), (2.0, 1.0)], 1.5), ([(5.0, 1.0), (1.0, 3.0), (2.0, 1.0)], 1.0)],
)
def test_weighted_medians(pairs: list[tuple[float, float]], wanted: float) -> None:
    assert latency_module._weighted_median(pairs) == wanted


class Contrary(Timer):
    """A stopwatch that gives Dn1.A1 less than no time."""

    def parts(
        self, unet: Any, paths: Mapping[str, str], inputs: Mapping[str, Any]
    ) -> tuple[float, dict[str, float]]:
        whole, found = super().parts(unet, paths, inputs)
        return whole, {**found, "Dn1.A1": found["Dn1.A1"] - 1000.0}


def test_savings_below_zero_are_kept_and_not_predicted_with(tiny_unet: Any, tiny: Architecture) -> None:
    table = measured_table(tiny_unet, Contrary(tiny_unet), rounds=2, warmup=0, latent=8)
    frame = table.frame().set_index("name")
    assert frame.loc["Dn1.A1", "measured_ms"] == pytest.approx(
        -1000 + MS_PER_PARAM * tiny.block("Dn1.A1").params
    )
    assert frame.loc["Dn1.A1", "saved_ms"] == 0
    assert table.predict(parse_plan("-Dn1.A1", tiny)) == table.whole.median_ms
    assert min(table.part_ms().values()) >= 0


def test_the_latency_table_as_frames_and_files(tiny_unet: Any, tiny: Architecture) -> None:
    plans = random_native_plans(tiny, 3)
    table = measured_table(
        tiny_unet,
        OtherStudents(tiny_unet),
        calibrate=plans[:1],
        held_out=plans[1:],
        rounds=2,
        latent=8,
        seed=5,
    )
    frame = table.frame()
    assert list(frame.columns) == ["name", "kind", "measured_ms", "p10_ms", "p90_ms", "saved_ms", "share"]
    assert list(frame["kind"]) == ["block"] * 34 + ["samplers", "rest"]
    assert frame["saved_ms"].sum() == pytest.approx(table.whole.median_ms)
    assert frame["share"].sum() == pytest.approx(1)
    checks = table.checks_frame()
    assert list(checks.columns) == ["plan", "removed", "use", "measured_ms", "predicted_ms", "error_percent"]
    assert list(checks["plan"]) == [plan.id for plan in plans]
    values = json.loads(json.dumps(table.as_dict()))
    again = latency_table_from_dict(values, tiny)
    assert again == table
    pd.testing.assert_frame_equal(again.frame(), frame)
    matrix = random_matrix(tiny, 20)
    predicted = [cost_table(tiny, latent=8, latency=one).of_many(matrix).latency_ms for one in (again, table)]
    assert (predicted[0] == predicted[1]).all()


def test_damaged_latency_tables_are_refused(tiny_unet: Any, tiny: Architecture) -> None:
    values = measured_table(tiny_unet, Timer(tiny_unet), rounds=2, warmup=0, latent=8).as_dict()
    with pytest.raises(PlanError, match="found one of"):
        latency_table_from_dict(values, architecture_of(preset_config("sd-v1.4")))
    for damaged in ({**values, "whole": None}, {**values, "more": 1}, {}, [], {**values, "checks": [{}]}):
        with pytest.raises(DataError, match="asked to read a latency table, found"):
            latency_table_from_dict(damaged, tiny)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="savings are missing"):
        latency_table_from_dict({**values, "savings": values["savings"][1:]}, tiny)


def test_plans_that_cannot_be_timed_are_refused_before_anything_is(
    tiny_unet: Any, tiny: Architecture
) -> None:
    base, lone, nothing = (parse_plan(text, tiny) for text in ("bk-base", "-Dn1.A1", "teacher"))
    other = parse_plan("bk-base", architecture_of(preset_config("sd-v1.4")))
    timer = Timer(tiny_unet)
    for wrong, error, words in (
        ({"calibrate": [lone]}, NonNativePlanError, "Dn1 would keep"),
        ({"held_out": [other]}, PlanError, "made for architecture"),
        ({"held_out": [nothing]}, ConfigError, "removes nothing"),
        ({"calibrate": [base], "held_out": [base.named("mine")]}, ConfigError, "give it once"),
        ({"rounds": 1}, ConfigError, "at least 2 runs"),
    ):
        with pytest.raises(error, match=words):
            measured_table(tiny_unet, timer, **wrong)  # type: ignore[arg-type]
    assert timer.calls == 0


class Noisy(Timer):
    """A machine on which every part takes up to so much longer or shorter."""

    def __init__(self, unet: Any, noise: float) -> None:
        super().__init__(unet)
        self.drawn, self.noise = np.random.default_rng(0), noise

    def interruption(self, part: int) -> float:
        return float(self.drawn.uniform(1 - self.noise, 1 + self.noise))


def test_it_takes_as_many_passes_as_its_intervals_need(tiny_unet: Any) -> None:
    def passes(noise: float) -> int:
        timer = Noisy(tiny_unet, noise)
        table = measured_table(tiny_unet, timer, rounds=60, warmup=0, latent=8, mark=0.002)
        assert timer.calls == table.whole.runs
        return table.whole.runs

    assert passes(0.0) == 6
    assert 6 < passes(0.1) < 60
    assert passes(0.9) == 60


def test_every_part_of_a_real_pass_is_timed_from_the_end_of_the_one_before(
    tiny_unet: Any, tiny: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that only some calls advance: a part, a concatenation before it, the stem and the head."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    before = {path: id(module) for path, module in tiny_unet.named_modules()}

    def takes(seconds: float, function: Any) -> Any:
        def slowed(*args: Any, **kwargs: Any) -> Any:
            now[0] += seconds
            return function(*args, **kwargs)

        return slowed

    for path, seconds in (("conv_in", 100), ("conv_out", 200), ("mid_block.attentions.0", 3)):
        module = tiny_unet.get_submodule(path)
        monkeypatch.setattr(module, "forward", takes(seconds, module.forward))
    monkeypatch.setattr(torch, "cat", takes(1, torch.cat))
    paths = {unit.name: unit.path for unit in tiny.units}
    with torch.inference_mode():
        whole, parts = pass_by_parts(tiny_unet, paths, example_inputs(tiny.config))
    assert list(parts) == list(paths)
    up = {block.name for block in tiny.blocks if block.takes_skip}
    assert {
        name for name, took in parts.items() if took == 1000
    } == up  # of each the concatenation with its skip
    assert parts["Md.A1"] == 3000
    assert sum(parts.values()) == 1000 * (3 + 12)
    assert whole >= 1000 * (100 + 200) + sum(parts.values())
    assert {path: id(module) for path, module in tiny_unet.named_modules()} == before


def test_a_failing_pass_leaves_the_unet_as_it_was(tiny_unet: Any, tiny: Architecture) -> None:
    before = {path: id(module) for path, module in tiny_unet.named_modules()}
    with pytest.raises(RuntimeError):
        pass_by_parts(
            tiny_unet,
            {unit.name: unit.path for unit in tiny.units},
            {
                "sample": torch.zeros(1),
                **{name: value for name, value in example_inputs(tiny.config).items() if name != "sample"},
            },
        )
    assert {path: id(module) for path, module in tiny_unet.named_modules()} == before


def test_compiled_blocks_are_those_of_a_shell(
    tiny_unet: Any, tiny: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []

    def record(module: Any) -> None:
        compiled.append(module)

    monkeypatch.setattr(torch.nn.Module, "compile", record)
    own = set(map(id, tiny_unet.modules()))
    plan = parse_plan("bk-tiny", tiny)
    table = measure_latency_table(
        tiny_unet, calibrate=[plan], rounds=2, warmup=0, latent=8, tokens=5, backend="compiled"
    )
    assert table.backend == "compiled"
    kinds = Counter(type(module).__name__ for module in compiled)
    assert kinds.keys() == {"ResnetBlock2D", "BasicTransformerBlock"}
    assert kinds["ResnetBlock2D"] == 22 + 9  # of the whole, and of Tiny
    assert own.isdisjoint(map(id, compiled))


def test_a_real_clock_gives_a_whole_table(tiny_unet: Any, tiny: Architecture) -> None:
    plan = plan_of(tiny, parse_plan("bk-tiny", tiny).removed)
    table = measure_latency_table(tiny_unet, calibrate=[plan], rounds=2, warmup=0, latent=8, tokens=5)
    assert table.whole.median_ms > 0
    costs = cost_table(tiny, latent=8, tokens=5, latency=table)
    assert np.isfinite(costs.of_many(random_matrix(tiny, 5)).latency_ms).all()
    assert table.checks[0].plan == plan


# MACs against latency --------------------------------------------------------------------------------------


def test_where_macs_and_latency_disagree(tiny_unet: Any, tiny: Architecture) -> None:
    costs = cost_table(tiny, latent=8)
    table = measured_table(tiny_unet, Timer(tiny_unet), rounds=2, warmup=0, latent=8)
    frame = latency_disagreement(costs, table)
    columns = ["name", "kind", "macs", "macs_share", "saved_ms", "latency_share", "ratio", "gap"]
    assert list(frame.columns) == columns
    assert frame[["macs_share", "latency_share"]].sum().tolist() == pytest.approx([1, 1])
    assert frame["macs"].sum() == costs.total.macs
    assert frame["gap"].abs().is_monotonic_decreasing
    rows = frame.set_index("name")
    block = tiny.block("Up2.A1")
    share = MS_PER_PARAM * block.params / table.whole.median_ms, costs.part("Up2.A1").macs / costs.total.macs
    assert rows.loc["Up2.A1", "ratio"] == pytest.approx(share[0] / share[1], rel=1e-6)
    assert rows.loc["Up2.A1", "gap"] == pytest.approx(share[0] - share[1], rel=1e-6)
    both = costs.part("Dn3.down").macs + costs.part("Up1.up").macs
    assert rows.loc["Dn3.down+Up1.up", "macs"] == both


def test_tables_of_other_models_or_sizes_are_refused(tiny_unet: Any, tiny: Architecture) -> None:
    table = measured_table(tiny_unet, Timer(tiny_unet), rounds=2, warmup=0, latent=8)
    with pytest.raises(
        ConfigError, match="16 x 16 latent with 77 tokens, found a latency table at 8 x 8 with 77"
    ):
        latency_disagreement(cost_table(tiny), table)
    with pytest.raises(ConfigError, match="found an activation table at 16 x 16 with 5"):
        cost_table(tiny, activations=activation_table(tiny, tokens=5))
    with pytest.raises(PlanError, match="found an activation table of"):
        cost_table(tiny, activations=activation_table(architecture_of(preset_config("sd-v1.4"))))
