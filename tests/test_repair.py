"""What a repair fits, that its folds are exact, that it never makes a student worse and touches nothing else."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHAPES, TINY_UNET, build_unet
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import PatchEmbed
from tiny_models import TINY_TRANSFORMERS, tiny_model
from torch import Tensor

from prune_lab.blocks import architecture_of
from prune_lab.errors import ConfigError, DataError, FormError, NonNativePlanError, PlanError
from prune_lab.families.endings import known_ending
from prune_lab.plans import PruningPlan, native_choices, parse_plan, plan_of
from prune_lab.probes import Probe, predict, random_probe
from prune_lab.repair import RepairKind, repair
from prune_lab.repair.activations import corrected
from prune_lab.repair.cuts import find_cuts, student_paths
from prune_lab.repair.fitting import Correction, Moments, fit, moments_of
from prune_lab.repair.folding import fold, layer_features, why_not
from prune_lab.schemas import REPAIR_COLUMNS
from prune_lab.surgery import materialise

MODELS = {
    **SHAPES,
    "scaled mid": {**TINY_UNET, "mid_block_scale_factor": 2.0},
}
KINDS: tuple[RepairKind, ...] = ("shift", "scale-shift", "linear", "refit", "best")
FEW = [
    pytest.param(kind, marks=[] if kind in ("shift", "best") else pytest.mark.long) for kind in KINDS
]  # "best" tries all of the others


def some_plan(unet: Any, seed: int, *, levels: slice = slice(None)) -> PruningPlan:
    """A native plan with a cut on each of these levels of resolution."""
    draw, architecture = random.Random(seed), architecture_of(unet)
    cutting = frozenset(block.name for block in architecture.blocks)  # a layer inside a block leaves no cut
    choices = [level for level in native_choices(architecture) if any(cutting & option for option in level)]
    options = [[option for option in level if cutting & option] for level in choices[levels]]
    return plan_of(architecture, frozenset[str]().union(*(draw.choice(level) for level in options)))


@pytest.fixture
def probe() -> Probe:
    return random_probe(TINY_UNET, samples=12, seed=0, timesteps=6)


def probe_of(unet: Any, samples: int = 6) -> Probe:
    return random_probe(unet.config, samples=samples, seed=1, timesteps=6)


def weights(unet: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in unet.state_dict().items()}


def same(before: dict[str, Tensor], unet: Any) -> bool:
    return all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def impact(student: Any, teacher: Any, rows: Probe) -> float:
    """The definition, written down once more."""
    ours, theirs = (predict(model, rows).double() for model in (student, teacher))
    return float((ours - theirs).square().sum() / theirs.square().sum())


# Cuts ---------------------------------------------------------------------------------------------------------------


def test_the_cuts_of_base_by_hand(tiny_unet: Any) -> None:
    architecture = architecture_of(tiny_unet)
    cuts = find_cuts(architecture, parse_plan("bk-base", architecture))
    assert [cut.label for cut in cuts] == [
        "Dn1.A1 [Dn1.R2 Dn1.A2] Dn1.down",
        "Dn2.A1 [Dn2.R2 Dn2.A2] Dn2.down",
        "Dn3.A1 [Dn3.R2 Dn3.A2] Dn3.down",
        "Dn4.R1 [Dn4.R2] Md.R1",
        "Up1.R1 [Up1.R2] Up1.R3",
        "Up2.A1 [Up2.R2 Up2.A2] Up2.R3",
        "Up3.A1 [Up3.R2 Up3.A2] Up3.R3",
        "Up4.A1 [Up4.R2 Up4.A2] Up4.R3",
    ]
    assert [consumer.text for consumer in cuts[0].consumers] == [
        "Dn1.down (main, Dn1.A2)",
        "Up4.R1 (skip, Dn1.A2)",
    ]
    assert not any(cut.mismatched for cut in cuts)


def test_consecutive_blocks_and_samplers_are_one_cut(tiny_unet: Any) -> None:
    architecture = architecture_of(tiny_unet)
    tiny = find_cuts(architecture, parse_plan("bk-tiny", architecture))[2]
    assert tiny.before == "Dn3.A1"
    assert tiny.removed[:4] == ("Dn3.R2", "Dn3.A2", "Dn3.down", "Dn4.R1")
    assert tiny.removed[-1] == "Up1.up"
    assert [consumer.text for consumer in tiny.consumers] == [
        "Up2.R1 (main, Up1.up)",
        "Up2.R1 (skip, Dn3.A2)",
    ]
    assert [consumer.slot for consumer in tiny.mismatched] == ["skip"]
    first = find_cuts(architecture, plan_of(architecture, ["Dn1.R1", "Dn1.A1", "Up4.R2", "Up4.A2"]))[0]
    assert (first.before, first.after) == ("conv_in", "Dn1.R2")


@contextlib.contextmanager
def spied(unet: Any, paths: dict[str, str]) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """(inputs, outputs) of the units, by name."""
    read: dict[str, Tensor] = {}
    written: dict[str, Tensor] = {}
    handles = []
    for name, path in paths.items():

        def note(_module: Any, args: Any, output: Any, name: str = name) -> None:
            read[name] = args[0]
            written[name] = output if isinstance(output, Tensor) else output[0]

        handles.append(unet.get_submodule(path).register_forward_hook(note))
    try:
        yield read, written
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ["sd-v1", "sdxl"])
@pytest.mark.parametrize("seed", range(4))
def test_readers_read_in_both_models_what_the_cut_says(name: str, seed: int) -> None:
    teacher = build_unet(MODELS[name])
    architecture = architecture_of(teacher)
    plan = some_plan(teacher, seed) if seed else plan_of(architecture, architecture_cut(architecture))
    student = materialise(teacher, plan)
    rows = probe_of(teacher, 2)
    full = {"conv_in": "conv_in"} | {unit.name: unit.path for unit in architecture.units}
    with spied(student, student_paths(architecture, plan)) as (read, written):
        predict(student, rows)
    with spied(teacher, full) as (theirs, originals):
        predict(teacher, rows)
    cuts = find_cuts(architecture, plan)
    assert {unit for cut in cuts for unit in cut.removed} >= set(plan.removed) & {
        block.name for block in architecture.blocks
    }
    for cut in cuts:
        for consumer in cut.consumers:
            if consumer.unit == "conv_out":
                continue
            width = written[cut.before].shape[1]
            part = slice(None, width) if consumer.slot == "main" else slice(-width, None)
            assert torch.equal(read[consumer.unit][:, part], written[cut.before]), consumer
            assert torch.equal(theirs[consumer.unit][:, part], originals[consumer.teacher_source]), consumer


def architecture_cut(architecture: Any) -> frozenset[str]:
    """The innermost level as bare as it can be."""
    levels = [max(level, key=len) for level in native_choices(architecture)]
    return [level for level in levels if level & {block.name for block in architecture.blocks}][-1]


# Least squares ------------------------------------------------------------------------------------------------------


def drawn(
    pixels: int, features: int = 5, channels: int = 5, noise: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, e, wanted) with e affine in x up to noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(pixels, features, generator=generator, dtype=torch.float64) + 3
    weight = torch.randn(channels, features, generator=generator, dtype=torch.float64)
    e = x @ weight.T + 2 + noise * torch.randn(pixels, channels, generator=generator, dtype=torch.float64)
    return x, e, e + 1


def folds_of(x: Tensor, e: Tensor, wanted: Tensor, count: int = 4) -> list[Moments]:
    return [moments_of(x[k::count], e[k::count], wanted[k::count]) for k in range(count)]


def total(folds: list[Moments]) -> Moments:
    first, *others = folds
    for other in others:
        first = first + other
    return first


def test_the_error_from_sums_is_the_error() -> None:
    x, e, wanted = drawn(50, noise=0.5)
    change = Correction(torch.randn(5, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64), 1.0)
    left = e - x @ change.weight.T - change.bias
    found = total(folds_of(x, e, wanted)).error_with(change)
    assert found == pytest.approx(float(left.square().sum() / wanted.square().sum()), rel=1e-9)


def test_a_linear_change_is_found_and_least_squares_otherwise() -> None:
    exact = fit(folds_of(*drawn(40)), "linear-shift")
    assert total(folds_of(*drawn(40))).error_with(exact) < 1e-12
    x, e, wanted = drawn(4000, noise=0.3)
    found = fit(folds_of(x, e, wanted), "linear-shift")
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    solved = torch.linalg.lstsq(torch.cat([x, ones], dim=1), e).solution
    torch.testing.assert_close(found.weight, solved[:-1].T, rtol=1e-2, atol=1e-2)
    through = fit(folds_of(x, e, wanted), "linear")
    assert not through.bias.any()
    torch.testing.assert_close(through.weight, torch.linalg.lstsq(x, e).solution.T, rtol=1e-2, atol=1e-2)


def test_a_scale_looks_at_each_channel_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(60, 4, generator=generator, dtype=torch.float64) + 1
    slope, start = torch.tensor([0.5, -1.0, 0.0, 2.0]).double(), torch.tensor([1.0, 0.0, -3.0, 2.0]).double()
    e = x * slope + start
    found = fit(folds_of(x, e, x + e), "scale-shift")
    torch.testing.assert_close(found.weight, torch.diag(slope), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.bias, start, rtol=1e-6, atol=1e-6)
    shift = fit(folds_of(x, e, x + e), "shift")
    assert not shift.weight.any()
    torch.testing.assert_close(shift.bias, e.mean(dim=0))


def test_noise_and_few_samples_get_a_strong_ridge() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 10, generator=generator, dtype=torch.float64)
    e = torch.randn(12, 10, generator=generator, dtype=torch.float64)
    found = fit(folds_of(x, e, x + e), "linear-shift")
    assert found.strength >= 1
    assert float(found.weight.norm()) < 1
    assert fit(folds_of(*drawn(400)), "linear-shift").strength <= 1e-6


# Folds --------------------------------------------------------------------------------------------------------------


def small_change(channels: int, kind: str, bias: bool = True) -> Correction:
    generator = torch.Generator().manual_seed(channels)
    weight = 0.3 * torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    if kind == "shift":
        weight = torch.zeros_like(weight)
    elif kind == "scale-shift":
        weight = torch.diag(weight.diagonal())
    shift = torch.randn(channels, generator=generator, dtype=torch.float64)
    return Correction(weight, shift if bias else torch.zeros_like(shift), 0.0)


def channels_of(unit: Any, side: str) -> int:
    layer = known_ending(unit).last
    return int(layer.weight.shape[0 if side == "before" else 1])


def calls_of(unet: Any) -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(module, arguments, keywords) of every unit in one pass, by name."""
    calls: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}
    paths = {"conv_in": "conv_in"} | {unit.name: unit.path for unit in architecture_of(unet).units}
    handles = []
    for name, path in paths.items():

        def note(module: Any, args: Any, kwargs: Any, name: str = name) -> None:
            calls[name] = (module, args, kwargs)

        handles.append(unet.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True))
    predict(unet, probe_of(unet, 2))
    for handle in handles:
        handle.remove()
    return calls


@torch.no_grad()
def output_of(call: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> Tensor:
    module, args, kwargs = call
    found = module(*args, **kwargs)
    return found if isinstance(found, Tensor) else found[0]


@pytest.mark.parametrize("name", MODELS)
def test_every_fold_equals_the_map_as_a_module(name: str) -> None:
    unet = build_unet(MODELS[name]).double()
    folded: dict[tuple[str, str], set[str]] = {}
    sides: tuple[Any, ...] = ("before", "after")
    kinds: tuple[Any, ...] = ("shift", "scale-shift", "linear")
    for (unit, call), side, kind in itertools.product(calls_of(unet).items(), sides, kinds):
        module = call[0]
        if why_not(kind, side, module, unit):
            continue
        change = small_change(channels_of(module, side), kind, bias=side == "before")
        plain = output_of(call)
        with corrected(module, side, change):
            wanted = output_of(call)
        before = weights(module)
        fold(module, kind, side, change)
        found = output_of(call)
        module.load_state_dict(before)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        assert float((wanted - plain).abs().max()) > 1e-3, unit  # there was something to fold
        folded.setdefault((side, kind), set()).add(unit)
    architecture = architecture_of(unet)
    samplers = {sampler.name for sampler in architecture.samplers}
    blocks = {block.name for block in architecture.blocks}
    widened = {block.name for block in architecture.blocks if block.in_channels != block.out_channels}
    assert folded == {
        ("before", "shift"): {"conv_in"} | samplers | blocks,
        ("before", "scale-shift"): {"conv_in"} | samplers | widened,
        ("before", "linear"): {"conv_in"} | samplers | widened,
        ("after", "scale-shift"): samplers,
        ("after", "linear"): samplers,
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_refit_changes_the_unit_by_what_it_says(name: str) -> None:
    unet = build_unet(MODELS[name]).double()
    for call in calls_of(unet).values():
        module = call[0]
        layer = known_ending(module).last
        change = Correction(
            0.1 * torch.randn(layer.weight.shape[0], layer.weight[0].numel(), dtype=torch.float64),
            torch.randn(layer.weight.shape[0], dtype=torch.float64),
            0.0,
        )
        entering: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _module, args, to=entering: to.append(args[0]))
        before = output_of(call)
        fold(module, "refit", "before", change)
        found = output_of(call)
        handle.remove()
        added = layer_features(layer, entering[0]) @ change.weight.T + change.bias
        wanted = before + added.transpose(1, 2).reshape(before.shape)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("positions", ["sincos", None])
def test_what_folds_into_an_embedding_of_patches(positions: str | None) -> None:
    torch.manual_seed(0)
    module = PatchEmbed(8, 8, patch_size=2, in_channels=4, embed_dim=12, pos_embed_type=positions).double()
    latents = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    kinds: tuple[Any, ...] = ("shift", "scale-shift", "linear")
    folding = kinds if positions is None else ("shift",)
    assert [kind for kind in kinds if not why_not(kind, "before", module, "pos_embed")] == list(folding)
    untouched = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        plain = module(latents)  # (3, 16, 12)
        for kind in folding:
            change = small_change(12, kind)
            fold(module, kind, "before", change)
            torch.testing.assert_close(module(latents), plain @ change.map.T + change.bias)
            module.load_state_dict(untouched)
        change = Correction(torch.randn(12, 16).double(), torch.randn(12).double(), 0.0)
        fold(module, "refit", "before", change)
        patches = latents.unfold(2, 2, 2).unfold(3, 2, 2)  # (3, 4, 4, 4, 2, 2): by row and column of patches
        features = patches.permute(0, 2, 3, 1, 4, 5).reshape(3, 16, 16)
        torch.testing.assert_close(module(latents), plain + features @ change.weight.T + change.bias)


def shift_of_tokens(teacher: Any) -> Tensor:
    """(C,) a number for each channel of the tokens of a tiny transformer."""
    config = teacher.config
    return torch.linspace(-1, 1, config.num_attention_heads * config.attention_head_dim).double()


def test_the_cut_of_the_first_block_of_a_transformer_is_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_model("PixArtTransformer2DModel").double()
    architecture = architecture_of(teacher)
    plan = parse_plan("-B1", architecture)
    student = materialise(teacher, plan)
    shift = shift_of_tokens(teacher)
    first = teacher.get_submodule(architecture.block("B1").path)
    monkeypatch.setattr(first, "forward", lambda hidden_states, *_, **__: hidden_states + shift)
    report = repair(student, teacher, plan, random_probe(teacher.config, samples=6, seed=0), kind="best")
    assert [(one.unit, one.kind) for one in report.applied] in (
        [("pos_embed", "shift")],
        [("pos_embed", "refit")],
    )
    assert report.impact_before > 1e-5
    assert report.impact_after < 1e-9 * report.impact_before


# the tiny ZImage has no places for as many words as a probe has
REPAIRED = sorted(TINY_TRANSFORMERS.keys() - {"ZImageTransformer2DModel"})
FIRST = ("SD3Transformer2DModel", "FluxTransformer2DModel", "Lumina2Transformer2DModel")


@pytest.mark.parametrize(
    "name",
    [name if name in FIRST else pytest.param(name, marks=pytest.mark.long) for name in REPAIRED],
)
def test_without_its_first_block_a_transformer_is_repaired_or_says_why_not(name: str) -> None:
    teacher = tiny_model(name)
    architecture = architecture_of(teacher)
    plan = plan_of(architecture, [architecture.blocks[0].name])
    try:
        student = materialise(teacher, plan)
    except FormError:
        pytest.skip("no plain config without its first block")
    rows, heldout = (random_probe(teacher.config, samples=6, seed=seed) for seed in (0, 1))
    report = repair(student, teacher, plan, rows, heldout=heldout)
    assert report.impact_after == pytest.approx(impact(student, teacher, heldout), rel=1e-4)
    assert all(one.applied or one.reason for one in report.repairs)


def test_behind_text_and_picture_the_picture_is_aimed_at(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_model("SD3Transformer2DModel").double()
    architecture = architecture_of(teacher)
    plan = parse_plan("-B1", architecture)
    student = materialise(teacher, plan)
    shift = shift_of_tokens(teacher)

    def shifted(hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return encoder_hidden_states, hidden_states + shift

    monkeypatch.setattr(teacher.get_submodule(architecture.block("B1").path), "forward", shifted)
    report = repair(student, teacher, plan, random_probe(teacher.config, samples=6, seed=0), kind="shift")
    assert [one.unit for one in report.applied] == ["pos_embed"]
    assert report.impact_before > 1e-5
    assert report.impact_after < 1e-9 * report.impact_before


def test_what_does_not_fold_says_who_is_in_the_way(tiny_unet: Any) -> None:
    unit = tiny_unet.get_submodule
    reason = why_not("linear", "before", unit("down_blocks.0.attentions.0"), "Dn1.A1")
    assert reason == "Dn1.A1 adds its own input, which its norm reads as well: only a shift folds into it"
    assert "which its norm1 reads" in why_not(
        "scale-shift", "before", unit("down_blocks.0.resnets.0"), "Dn1.R1"
    )
    assert "norm1 of Md.R1 reads it" in why_not("linear", "after", unit("mid_block.resnets.0"), "Md.R1")
    assert "the norm ahead of conv_out reads it" in why_not("linear", "after", None, "conv_out")
    assert "Dn1.down's padding" in why_not("shift", "after", unit("down_blocks.0.downsamplers.0"), "Dn1.down")
    wide = torch.nn.Conv2d(1000, 8, 3)
    assert "has 9,000 inputs" in why_not("refit", "before", wide, "Dn9.down")


# Repairs ------------------------------------------------------------------------------------------------------------


def patch(monkeypatch: pytest.MonkeyPatch, teacher: Any, name: str, forward: Any) -> None:
    """Let a block of the teacher compute ``forward`` of its main path."""
    block = architecture_of(teacher).block(name)
    module = teacher.get_submodule(block.path)

    def instead(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        found = forward(hidden_states[:, : block.out_channels])
        return found if block.kind == "resnet" else (found,)

    monkeypatch.setattr(module, "forward", instead)


def affine(channels: int, kind: str) -> Any:
    change = small_change(channels, kind)

    def forward(hidden: Tensor) -> Tensor:
        return (
            torch.einsum("oc,bchw->bohw", change.map.to(hidden), hidden)
            + change.bias.to(hidden)[:, None, None]
        )

    return forward


ATTENTION = "-Up4.A1 -Up4.A2 -Up4.A3"  # three cuts behind shortcut convolutions
PAIRS = "-Dn1.R2 -Dn1.A2 -Up4.R2 -Up4.A2"  # two cuts behind attention, a sampler behind the first
INNER = "-Dn4.R2 -Up1.R2"  # a cut behind an identity, one behind a shortcut convolution


@pytest.mark.parametrize(
    ("text", "block", "kind", "asked"),
    [
        (ATTENTION, "Up4.A1", "linear", "linear"),
        (ATTENTION, "Up4.A2", "scale-shift", "scale-shift"),
        (ATTENTION, "Up4.A3", "linear", "best"),
        (INNER, "Dn4.R2", "shift", "shift"),
        (INNER, "Dn4.R2", "shift", "best"),
        (PAIRS, "Up4.A2", "shift", "linear"),  # behind attention a linear map does not fold: a shift is left
    ],
)
def test_an_affine_block_is_repaired_to_nothing(
    tiny_unet: Any,
    probe: Probe,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    block: str,
    kind: str,
    asked: RepairKind,
) -> None:
    teacher = tiny_unet.double()
    plan = parse_plan(text, architecture_of(teacher))
    student = materialise(teacher, plan)
    for name in plan.removed:
        channels = architecture_of(teacher).block(name).out_channels
        patch(monkeypatch, teacher, name, affine(channels, kind) if name == block else lambda hidden: hidden)
    report = repair(student, teacher, plan, probe, kind=asked)
    assert report.impact_before > 1e-5
    assert report.impact_after < 1e-9 * report.impact_before
    assert impact(student, teacher, probe) < 1e-9 * report.impact_before
    (done,) = (one for one in report.applied if block in one.cut.removed)
    assert done.side == "before"
    assert done.cut_error_before > 1e-3
    assert done.cut_error_after < 1e-9 * done.cut_error_before


def test_a_linear_map_goes_through_the_sampler_behind_the_cut(
    tiny_unet: Any, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_unet.double()
    plan = parse_plan(PAIRS, architecture_of(teacher))
    student = materialise(teacher, plan)
    for name in plan.removed:
        patch(monkeypatch, teacher, name, lambda hidden: hidden)
    patch(monkeypatch, teacher, "Dn1.A2", affine(8, "linear"))
    before = weights(student)
    report = repair(student, teacher, plan, probe, kind="linear")
    shift, done = (one for one in report.repairs if one.folds and one.cut is report.cuts[0])
    assert (shift.side, shift.kind, shift.unit) == ("before", "shift", "Dn1.A1")
    assert (done.side, done.kind, done.unit, done.applied) == ("after", "linear", "Dn1.down", True)
    assert done.cut_error_after < 0.2 * done.cut_error_before
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert "down_blocks.0.downsamplers.0.conv.weight" in changed
    assert "down_blocks.0.downsamplers.0.conv.bias" not in changed


@pytest.mark.parametrize("kind", FEW)
def test_where_nothing_is_missing_nothing_changes(
    tiny_unet: Any, probe: Probe, monkeypatch: pytest.MonkeyPatch, kind: RepairKind
) -> None:
    plan = parse_plan(f"{INNER} -Up4.A1 -Up4.A2 -Up4.A3", architecture_of(tiny_unet))
    student = materialise(tiny_unet, plan)
    before = weights(student)
    for name in plan.removed:
        patch(monkeypatch, tiny_unet, name, lambda hidden: hidden)
    report = repair(student, tiny_unet, plan, probe, kind=kind)
    assert not report.applied
    assert same(before, student)
    assert report.impact_after == report.impact_before < 1e-12
    assert all(one.reason for one in report.repairs)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name == "sd-v2" else name for name in MODELS]
)
def test_every_family_is_repaired_and_stays_plain(name: str, tmp_path: Path) -> None:
    teacher = build_unet(MODELS[name]).train()
    plan = some_plan(teacher, 1, levels=slice(-1, None))
    student, rows = materialise(teacher, plan), probe_of(teacher, 12)
    mine, theirs = weights(student), weights(teacher)
    report = repair(student, teacher, plan, rows)
    assert report.applied
    assert not same(mine, student)
    assert same(theirs, teacher)
    assert teacher.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())
    student.save_pretrained(tmp_path / "unet")
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert torch.equal(predict(loaded, rows), predict(student, rows))


@pytest.mark.parametrize("kind", FEW)
def test_no_step_makes_it_worse_and_the_figures_are_true(
    tiny_unet: Any, probe: Probe, kind: RepairKind
) -> None:
    plan = parse_plan("bk-tiny", architecture_of(tiny_unet))
    student = materialise(tiny_unet, plan)
    rows = random_probe(TINY_UNET, samples=4, seed=5, timesteps=4)
    before = impact(student, tiny_unet, rows)
    report = repair(student, tiny_unet, plan, probe, kind=kind, heldout=rows)
    assert (report.fitted_rows, report.heldout_rows) == (12, 4)
    assert report.impact_before == pytest.approx(before, rel=1e-9)
    assert report.impact_after == pytest.approx(impact(student, tiny_unet, rows), rel=1e-9)
    impacts = [report.impact_before, *(one.impact_after for one in report.applied)]
    assert impacts == sorted(impacts, reverse=True)
    assert impacts[-1] == report.impact_after
    for one in report.repairs:
        assert one.applied is not bool(one.reason)
        assert one.folds or not one.applied
        assert not one.applied or one.impact_after < one.impact_before


def test_a_repair_that_hurts_is_not_kept(
    tiny_unet: Any, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = parse_plan(INNER, architecture_of(tiny_unet))
    student = materialise(tiny_unet, plan)
    before = weights(student)

    def overshooting(folds: Any, form: Any) -> Correction:
        channels, features = folds[0].xe.T.shape
        return Correction(torch.zeros(channels, features).double(), 1e3 * torch.ones(channels).double(), 0.0)

    monkeypatch.setattr("prune_lab.repair.bench.fit", overshooting)
    report = repair(student, tiny_unet, plan, probe)
    assert not report.applied
    assert same(before, student)
    assert {one.reason for one in report.repairs if one.folds} == {
        "the prediction on held-out rows does not come nearer to the teacher's"
    }


def test_equal_arguments_give_equal_weights(tiny_unet: Any, probe: Probe) -> None:
    plan = parse_plan(PAIRS, architecture_of(tiny_unet))
    one, other = materialise(tiny_unet, plan), materialise(tiny_unet, plan)
    reports = [repair(student, tiny_unet, plan, probe) for student in (one, other)]
    assert reports[0].frame().equals(reports[1].frame())
    assert same(weights(one), other)


def test_what_does_not_fold_is_measured_and_gives_way_to_a_shift(tiny_unet: Any, probe: Probe) -> None:
    plan = parse_plan(PAIRS, architecture_of(tiny_unet))
    report = repair(materialise(tiny_unet, plan), tiny_unet, plan, probe, kind="linear")
    assert [(one.unit, one.kind, one.folds) for one in report.repairs] == [
        ("Dn1.A1", "linear", False),
        ("Dn1.A1", "shift", True),
        ("Dn1.down", "linear", True),
        ("Up4.A1", "linear", False),
        ("Up4.A1", "shift", True),
    ]
    frame = report.frame()
    assert tuple(frame.columns) == REPAIR_COLUMNS
    assert " ".join(REPAIR_COLUMNS) == (
        "cut also_read_by kind side unit folds applied reason strength "
        "cut_error_before cut_error_after impact_before impact_after"
    )
    assert frame.iloc[2][["cut", "kind", "unit"]].tolist() == [report.cuts[0].label, "linear", "Dn1.down"]
    found = frame.iloc[-2]
    assert found["reason"] == (
        "Up4.A1 adds its own input, which its norm reads as well: only a shift folds into it; "
        "norm1 of Up4.R3 reads it: no map goes through a group norm"
    )
    assert found["impact_after"] != found["impact_before"]
    assert found["cut_error_after"] < found["cut_error_before"]


def test_a_later_cut_is_fitted_behind_the_earlier_repairs(
    tiny_unet: Any, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = parse_plan(PAIRS, architecture_of(tiny_unet))
    first, second = repair(materialise(tiny_unet, plan), tiny_unet, plan, probe, kind="refit").repairs
    assert first.applied
    monkeypatch.setattr("prune_lab.repair.repairing.find_cuts", lambda *_: (second.cut,))
    (alone,) = repair(materialise(tiny_unet, plan), tiny_unet, plan, probe, kind="refit").repairs
    assert second.impact_before == first.impact_after
    assert alone.impact_before == first.impact_before
    assert alone.cut_error_before != second.cut_error_before


def test_readers_that_want_different_tensors_share_the_mean(
    tiny_unet: Any, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_unet.double()
    architecture = architecture_of(teacher)
    plan = parse_plan("-Dn4.R2 -Md.R1 -Md.A1 -Md.R2 -Up1.R2", architecture)
    student = materialise(teacher, plan)
    shifts = {"Dn4.R2": 1.0, "Md.R1": 0.5}  # the skip wants 1 more, the main path 1.5
    for name in plan.removed:
        by = shifts.get(name, 0.0)
        patch(monkeypatch, teacher, name, lambda hidden, by=by: hidden + by)
    before = student.down_blocks[3].resnets[0].conv2.bias.clone()
    report = repair(student, teacher, plan, probe, kind="shift")
    done = report.applied[0]
    assert report.frame()["also_read_by"][0] == "Up1.R1 (skip, Dn4.R2)"
    assert done.cut is report.cuts[0]
    added = student.down_blocks[3].resnets[0].conv2.bias - before
    torch.testing.assert_close(added, torch.full_like(added, 1.25))
    assert done.cut_error_after < 1e-9 * done.cut_error_before  # at the cut the mean is what is wanted
    assert done.impact_after > 1e-6  # and yet neither of the two has it


def test_rows_of_one_picture_stay_together(tiny_unet: Any) -> None:
    rows = random_probe(TINY_UNET, samples=12, seed=0, timesteps=6)
    rows = replace(rows, pictures=100 + torch.arange(12) // 2)
    plan = parse_plan(INNER, architecture_of(tiny_unet))
    report = repair(materialise(tiny_unet, plan), tiny_unet, plan, rows, kind="shift")
    assert (report.fitted_rows, report.heldout_rows) == (8, 4)


def test_three_rows_do_not_explode(tiny_unet: Any) -> None:
    plan = parse_plan("bk-tiny", architecture_of(tiny_unet))
    student = materialise(tiny_unet, plan)
    rows = random_probe(TINY_UNET, samples=3, seed=2, timesteps=3)
    report = repair(student, tiny_unet, plan, rows)
    assert report.impact_after <= report.impact_before
    fresh = random_probe(TINY_UNET, samples=8, seed=9, timesteps=8)
    assert impact(student, tiny_unet, fresh) < 1.5 * report.impact_before


def test_mistakes_are_named(tiny_unet: Any, probe: Probe) -> None:
    architecture = architecture_of(tiny_unet)
    plan = parse_plan("bk-base", architecture)
    student = materialise(tiny_unet, plan)
    with pytest.raises(ConfigError, match="kind 'magic'; known kinds are shift"):
        repair(student, tiny_unet, plan, probe, kind="magic")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="student of another architecture"):
        repair(student, tiny_unet, parse_plan("bk-small", architecture), probe)
    with pytest.raises(NonNativePlanError):
        repair(student, tiny_unet, plan_of(architecture, ["Dn1.R2"]), probe)
    with pytest.raises(DataError, match="2 pictures"):
        repair(student, tiny_unet, plan, probe.rows([0, 1]))
    broken = materialise(tiny_unet, plan)
    with torch.no_grad():
        broken.conv_in.bias.fill_(float("nan"))
    with pytest.raises(
        DataError, match=r"repair at down_blocks\.0\.attentions\.0, found activations that are not finite"
    ):
        repair(broken, tiny_unet, plan, probe)
    with torch.no_grad():
        tiny_unet.conv_out.weight.zero_()
        tiny_unet.conv_out.bias.zero_()
    with pytest.raises(DataError, match="prediction is 0"):
        repair(student, tiny_unet, plan, probe)
    assert not find_cuts(architecture, plan_of(architecture, []))
