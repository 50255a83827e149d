"""Shared prefixes give the naive loop's answers, with fewer multiply-adds: the U-Net, whose ``naive`` is ``bypassed``.

``test_replay`` has the loop that shares no code with it, and the models that cannot be replayed.
"""

from __future__ import annotations

import copy
from typing import Any

import accelerate
import psutil
import pytest
import torch
from conftest import SHAPES, TINY_UNET, build_unet
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_lab.blocks import architecture_of, block_groups
from prune_lab.errors import ReplayError, UnknownBlockError, UnremovableBlockError, UnsupportedModelError
from prune_lab.families import plain_config
from prune_lab.models import preset_config
from prune_lab.plans import gone_with, parse_plan, plan_of
from prune_lab.prefix_sharing import (
    ComputeCost,
    fitting_batch,
    predict_without,
    state_bytes,
)
from prune_lab.prefix_sharing.replay import replayed
from prune_lab.probes import Probe, predict, random_probe
from prune_lab.surgery import bypassed

# Latents as small as can be: each model runs once for every group of its blocks.
SMALL = {**TINY_UNET, "sample_size": 8}
MODELS = {
    **{name: {**shape, "sample_size": 8} for name, shape in SHAPES.items()},
    "odd latent": {**SMALL, "sample_size": 10},
    "no mid": {**SMALL, "mid_block_type": None},
    "one layer": {**SMALL, "layers_per_block": 1},
    "no mid, one layer": {**SMALL, "mid_block_type": None, "layers_per_block": 1},
}


def naive(unet: Any, probe: Probe, removed: list[tuple[str, ...]]) -> list[torch.Tensor]:
    """Everything run anew for every set."""
    answers = []
    for blocks in removed:
        with bypassed(unet, blocks, stand_in=True):
            answers.append(predict(unet, probe))
    return answers


def shared(
    unet: Any, probe: Probe, removed: list[tuple[str, ...]], **options: Any
) -> tuple[list[torch.Tensor], ComputeCost]:
    """The same by shared prefixes."""
    architecture, compute = architecture_of(unet), ComputeCost()
    gone = [gone_with(architecture, blocks, stand_in=True) for blocks in removed]
    parts = list(predict_without(unet, probe, gone, compute=compute, **options))
    rows = [row for part, _ in parts for row in range(len(probe))[part]]
    assert rows == list(range(len(probe)))
    return [torch.cat(answers) for answers in zip(*(found for _, found in parts), strict=True)], compute


def assert_equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    """Computed in float64 and rounded once, so only a wrong replay can differ by more than that rounding."""
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-7, atol=2e-7 * float(other.abs().max()))


RARE = ("sd-v2", "sdxl", "odd latent", "no mid", "one layer")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in RARE else name for name in MODELS]
)
def test_every_group_of_every_model_family(name: str) -> None:
    unet = build_unet(MODELS[name]).double()
    probe = random_probe(unet.config, samples=3, seed=0, timesteps=3)
    kinds = ("block", "pair", "stage")
    groups = [one.blocks for kind in kinds for one in block_groups(architecture_of(unet), kind)]
    removed = [(), *groups]
    found, _ = shared(unet, probe, removed, batch=2)
    wanted = naive(unet, probe, removed)
    assert_equal(found, wanted)
    assert not any(
        torch.equal(one, wanted[0]) for one in wanted[1:]
    )  # the groups are not all the same question


@pytest.fixture(scope="module")
def exact_unet() -> Any:
    """The tiny U-Net in float64."""
    return build_unet(TINY_UNET).double()


@settings(max_examples=6)
@given(data=st.data())
def test_any_plans_at_any_width(exact_unet: Any, data: st.DataObject) -> None:
    names = [block.name for block in architecture_of(exact_unet).blocks]
    plans = st.lists(st.sampled_from(names), unique=True, max_size=12).map(tuple)
    removed = data.draw(st.lists(plans, min_size=1, max_size=8))
    removed += [parse_plan("bk-tiny", architecture_of(exact_unet)).removed]
    probe = random_probe(exact_unet.config, samples=2, seed=1, timesteps=2)
    found, compute = shared(exact_unet, probe, removed, width=data.draw(st.integers(1, 9)))
    assert_equal(found, naive(exact_unet, probe, removed))
    assert compute.macs <= compute.naive_macs


@pytest.mark.long
def test_float32_answers_are_the_naive_ones_to_a_millionth(tiny_unet: Any) -> None:
    removed = [(), *((block.name,) for block in architecture_of(tiny_unet).blocks)]
    probe = random_probe(tiny_unet.config, samples=4, seed=0, timesteps=4)
    found, _ = shared(tiny_unet, probe, removed)
    alone, _ = shared(tiny_unet, probe, removed, width=1)
    for one, exact, other in zip(found, alone, naive(tiny_unet, probe, removed), strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-6
        assert torch.equal(exact, other)


def test_the_model_and_every_mode_come_back(tiny_unet: Any) -> None:
    tiny_unet.train()
    probe = random_probe(tiny_unet.config, samples=2, seed=0, timesteps=2)
    before = {name: value.clone() for name, value in tiny_unet.state_dict().items()}
    answers = predict_without(tiny_unet, probe, [frozenset({"Md.A1"})], batch=1)
    next(answers)  # and never finished
    assert not torch.is_inference_mode_enabled()
    assert tiny_unet.training
    assert all(torch.equal(value, before[name]) for name, value in tiny_unet.state_dict().items())


def test_the_units_are_all_blocks_and_samplers_in_order_of_execution(
    tiny_unet: Any, tiny_inputs: dict[str, Any]
) -> None:
    order: list[str] = []
    units = {unit.path: unit for unit in architecture_of(tiny_unet).units}
    for path in units:
        tiny_unet.get_submodule(path).register_forward_hook(lambda *_, path=path: order.append(path))
    tiny_unet(**tiny_inputs)
    assert order == list(units)
    assert sum(unit.takes_skip for unit in units.values()) == 12
    assert sum(unit.gives_skip for unit in units.values()) == 11  # and the first convolution


def test_the_bound_for_the_blocks_of_stable_diffusion_by_hand() -> None:
    architecture = architecture_of(preset_config("sd-v1.4"))
    units = architecture.units
    costs = [unit.macs for unit in units]
    names = [unit.name for unit in units]
    # Removing a block leaves all that comes after it; one pass of the whole U-Net gives the prefixes.
    after = sum(sum(costs[names.index(block.name) + 1 :]) for block in architecture.blocks)
    bound = 38 * architecture.total_macs / (after + architecture.total_macs)
    assert bound == pytest.approx(1.71, abs=0.01)


def test_the_multiply_adds_are_counted_to_the_last(tiny_unet: Any) -> None:
    architecture = architecture_of(tiny_unet)
    probe = random_probe(tiny_unet.config, samples=3, seed=0, timesteps=3)
    _, alone = shared(tiny_unet, probe, [()])
    assert alone.macs == alone.naive_macs == 3 * architecture.total_macs
    assert alone.forwards == 3
    blocks = [(block.name,) for block in architecture.blocks]
    _, compute = shared(tiny_unet, probe, [(), *blocks], batch=3)
    units = architecture.units
    rest = architecture.total_macs - sum(unit.macs for unit in units)
    suffixes = [
        sum(unit.macs for unit in units[place + 1 :])
        for place, one in enumerate(units)
        if one.kind in ("resnet", "attention")
    ]
    assert compute.macs == 3 * (architecture.total_macs + sum(suffixes) + rest * len(suffixes))
    assert compute.naive_macs == 3 * 39 * architecture.total_macs
    assert compute.saving == compute.naive_macs / compute.macs > 1.5


def test_equal_sets_are_computed_once(tiny_unet: Any) -> None:
    probe = random_probe(tiny_unet.config, samples=2, seed=0, timesteps=2)
    once, twice = (shared(tiny_unet, probe, [("Dn1.R2",)] * count) for count in (1, 2))
    assert once[1].macs == twice[1].macs
    assert torch.equal(twice[0][0], twice[0][1])


def test_rows_and_states_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = architecture_of(preset_config("sd-v1.4"))
    one = state_bytes(architecture)
    assert 100e6 < one < 300e6  # the skips of a row take 26.5 MB, the widest hidden tensor 16
    free = psutil.virtual_memory()._replace(available=int(40.5 * one / 0.4))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    fitted = [fitting_batch(architecture, rows, torch.device("cpu")) for rows in (1, 4, 32)]
    assert fitted == [(1, 40), (4, 10), (5, 8)]
    small = architecture_of(TINY_UNET)  # memory for thousands, but a processor wants no larger calls
    assert fitting_batch(small, 32, torch.device("cpu")) == (32, 4)


def test_another_forward_pass_is_replayed_as_it_is(tiny_unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk that was written after diffusers' own forward pass had to refuse this; the model's own never differs."""
    probe = random_probe(tiny_unet.config, samples=2, seed=0, timesteps=2)
    stage = tiny_unet.mid_block
    forward = type(stage).forward
    plain, _ = shared(tiny_unet, probe, [("Md.A1",)], width=1)
    monkeypatch.setattr(type(stage), "forward", lambda *args, **kwargs: 1.01 * forward(*args, **kwargs))
    found, _ = shared(tiny_unet, probe, [("Md.A1",)], width=1)
    assert torch.equal(found[0], naive(tiny_unet, probe, [("Md.A1",)])[0])
    assert not torch.equal(found[0], plain[0])


def test_unknown_and_unremovable_blocks_are_named(tiny_unet: Any) -> None:
    architecture = architecture_of(tiny_unet)
    with pytest.raises(UnknownBlockError, match="Dn9"):
        gone_with(architecture, ["Dn9.R1"])
    with pytest.raises(UnremovableBlockError, match=r"Dn2\.R1"):
        gone_with(architecture, ["Dn2.R1"])
    assert gone_with(architecture, ["Dn2.R1"], stand_in=True) == {"Dn2.R1"}
    tiny = gone_with(architecture, parse_plan("bk-tiny", architecture).removed)
    assert {"Dn3.down", "Up1.up"} <= tiny


def test_additions_that_change_what_blocks_give_are_refused(tiny_unet: Any) -> None:
    """A T2I-Adapter adds to what a stage gave, in place; an IP-Adapter brings weights that no config describes."""
    unet, architecture = copy.deepcopy(tiny_unet), architecture_of(tiny_unet)
    probe = random_probe(plain_config(unet), samples=1, seed=0, timesteps=1)
    ((_, inputs),) = probe.batches(1, unet)
    sizes = [(8, 16), (16, 8), (32, 4), (32, 2)]
    features = [torch.randn(1, channels, size, size) for channels, size in sizes]

    def with_features(copies: int) -> torch.Tensor:
        given = [feature.repeat(copies, 1, 1, 1) for feature in features]
        return unet(**inputs, down_intrablock_additional_residuals=given, return_dict=False)[0]

    sets = [frozenset[str](), frozenset({"Md.R2"}), frozenset({"Up2.A2"})]
    with torch.no_grad():
        assert not torch.equal(with_features(1), unet(**inputs, return_dict=False)[0])
        with pytest.raises(ReplayError, match=r"Dn4\.R2 gave before.*changed it in place"):
            list(replayed(unet, architecture, with_features, sets))
    unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k_ip = torch.nn.ModuleList(
        [torch.nn.Linear(4, 4)]
    )
    with pytest.raises(UnsupportedModelError, match="an IP-Adapter is attached"):
        list(predict_without(unet, probe, sets))


@pytest.mark.parametrize("way", ["cpu_offload", "enable_model_cpu_offload"])
def test_a_model_whose_weights_accelerate_keeps_elsewhere(way: str, tiny_unet: Any) -> None:
    """Its tensors are on ``meta`` between two calls, or come when it is called: the answers are the same."""
    model = copy.deepcopy(tiny_unet)
    probe = random_probe(plain_config(model), samples=2, seed=0, timesteps=2)
    sets = [frozenset({"Dn2.A1"}), frozenset({"Up2.A2", "Md.R2"}), frozenset[str]()]
    ((_, wanted),) = predict_without(model, probe, sets, batch=2, width=1)
    if way == "cpu_offload":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert model.device.type == "meta"
    else:  # what a pipeline does with each of its models
        accelerate.cpu_offload_with_hook(model, execution_device=torch.device("cpu"))
    for width in (1, 3):
        ((_, found),) = predict_without(model, probe, sets, batch=2, width=width)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0 if width == 1 else 5e-5)
    with bypassed(model, plan_of(architecture_of(model), sets[0])):
        torch.testing.assert_close(predict(model, probe), wanted[0], rtol=0, atol=0)
