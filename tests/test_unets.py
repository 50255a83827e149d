"""U-Nets of every kind: what is read, what a native plan builds, and what is refused by name.

A native student is compared bit for bit with its teacher while blocks hand on what they get, which is done by hand.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from families_seen import Seen
from torch import Tensor
from torch_counter import count_module
from unet_kinds import KINDS, Config, built, path_of, without

import prune_lab
from prune_lab.blocks import Architecture, architecture_of, blocks_frame
from prune_lab.counting import ANALYTIC_EXTRAS, count_macs
from prune_lab.errors import NonNativePlanError, PlanError, UnsupportedModelError
from prune_lab.families import (
    FAMILIES,
    Form,
    check_forward,
    example_inputs,
    family_of,
    meta_model,
    plain_config,
)
from prune_lab.families.controlnet import cut_controlnet
from prune_lab.forms import layout_of, why_not
from prune_lab.plans import (
    PruningPlan,
    is_native,
    native_choices,
    native_layout,
    parse_plan,
    plan_of,
    removed_samplers,
)
from prune_lab.profiling import cost_table, profile
from prune_lab.search import Constraints, parse_budget, search_plans
from prune_lab.search.effects import Effects
from prune_lab.surgery import bypassed, materialise

PRESETS = Path(prune_lab.__file__).parent / "presets"
XL: Config = json.loads((PRESETS / "sdxl-base.json").read_text())


def inputs_of(config: Config, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: filled(inner) for name, inner in value.items()}
        if isinstance(value, Tensor) and value.is_floating_point():
            return torch.randn(value.shape, generator=generator)
        return value

    inputs = filled(example_inputs(config, batch=2, tokens=5))
    return inputs | {"timestep": torch.tensor([7, 420])}


def answer(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs, return_dict=False)[0]
    assert found.isfinite().all()
    return found


def drawn(architecture: Architecture, chance: random.Random) -> PruningPlan:
    """A native plan, by one option of each level; half of the levels stay whole."""
    options = [
        chance.choice(sorted(level, key=sorted)) if chance.random() < 0.5 else frozenset[str]()
        for level in native_choices(architecture)
    ]
    return plan_of(architecture, frozenset[str]().union(*options))


def drawn_sets(architecture: Architecture, chance: random.Random, count: int) -> Iterator[PruningPlan]:
    """Any plans: blocks and layers at random."""
    names = [block.name for block in architecture.named if block.removable]
    for _ in range(count):
        yield plan_of(architecture, chance.sample(names, chance.randint(1, min(6, len(names)))))


def parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def promised(architecture: Architecture, plan: PruningPlan) -> int:
    gone = {*plan.removed, *removed_samplers(architecture, plan)}
    units = (*architecture.units, *architecture.layers)
    return architecture.total_params - sum(unit.params for unit in units if unit.name in gone)


def check_native(kind: str, configs: int, plans: int, tmp_path: Path) -> int:
    """Draw configs of a kind and native plans of each; how many plans removed something."""
    chance, removing = random.Random(zlib.crc32(kind.encode())), 0
    for number in range(configs):
        config = KINDS[kind](chance)
        teacher, inputs = built(config, number), inputs_of(config, number)
        architecture = architecture_of(teacher)
        found = [drawn(architecture, chance) for _ in range(plans)]
        found += [
            plan for plan in drawn_sets(architecture, chance, 4 * plans) if is_native(architecture, plan)
        ]
        for place, plan in enumerate(dict.fromkeys(found)):
            student = materialise(teacher, plan)
            with without(teacher, plan.removed):
                wanted = answer(teacher, inputs)
            assert torch.equal(answer(student, inputs), wanted), (config, plan.text)
            assert parameters(student) == promised(architecture, plan), (config, plan.text)
            removing += bool(plan.removed)
            if place == 0:  # plain diffusers reads what it is, from its folder alone
                student.save_pretrained(tmp_path / f"{number}")
                again = type(student).from_pretrained(tmp_path / f"{number}")
                assert torch.equal(answer(again, inputs), wanted)
    return removing


@pytest.mark.parametrize("kind", KINDS)
def test_a_native_student_is_its_teacher_without_the_blocks(kind: str, tmp_path: Path, seen: Seen) -> None:
    assert check_native(kind, 2 if kind == "unet2d" else 1, 2, tmp_path) >= 1
    seen(KINDS[kind](random.Random(0)), "prune")


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_many_native_students_are_their_teachers_without_the_blocks(kind: str, tmp_path: Path) -> None:
    """Some forty of each kind, three hundred in all."""
    # stages of a UNet2DModel lose equally many layers: of each config there are few plans
    assert check_native(kind, 20 if kind == "unet2d" else 10, 4, tmp_path) >= 30


@pytest.mark.parametrize("kind", KINDS)
def test_any_blocks_are_bypassed_as_by_hand(kind: str) -> None:
    chance = random.Random(1 + zlib.crc32(kind.encode()))
    config = KINDS[kind](chance)
    teacher, inputs = built(config), inputs_of(config)
    for plan in drawn_sets(architecture_of(teacher), chance, 3):
        with without(teacher, plan.removed):
            wanted = answer(teacher, inputs)
        with bypassed(teacher, plan):
            assert torch.equal(answer(teacher, inputs), wanted), (config, plan.text)


def begun(ran: list[str], name: str, *_: object) -> None:
    ran.append(name)


@pytest.mark.parametrize("seed", [2, *(pytest.param(seed, marks=pytest.mark.long) for seed in (3, 4))])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_and_named(kind: str, seed: int, seen: Seen) -> None:
    """Names lead to the modules by the same rule for all, in the order in which they run."""
    config = KINDS[kind](random.Random(seed + zlib.crc32(kind.encode())))
    model = built(config)
    check_forward(meta_model(config))
    architecture = architecture_of(model)
    assert [block.path for block in architecture.named] == [path_of(b.name) for b in architecture.named]
    ran: list[str] = []
    for block in architecture.named:  # a block has begun before the layers inside it
        hook = functools.partial(begun, ran, block.name)
        model.get_submodule(block.path).register_forward_pre_hook(hook)
    answer(model, inputs_of(config))
    assert ran == [block.name for block in architecture.named]
    inside = {layer.inside for layer in architecture.layers}
    assert inside <= {block.name for block in architecture.blocks}
    assert sum(b.params for b in architecture.units) < architecture.total_params == parameters(model)
    seen(model, "blocks")


QUICKLY_COUNTED = ("upscaler", "unet2d")


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in QUICKLY_COUNTED else pytest.mark.long) for k in KINDS]
)
def test_every_kind_is_counted_as_torch_counts(kind: str, seen: Seen) -> None:
    config = KINDS[kind](random.Random(zlib.crc32(kind.encode())))
    model = built(config)
    ours = profile(model, runs=2, warmup=0)
    theirs = count_module(meta_model(config).requires_grad_(False), example_inputs(config, device="meta"))
    by_operator = count_macs(config).by_operator
    assert ours.macs - sum(by_operator.get(name, 0) for name in ANALYTIC_EXTRAS) == theirs.total
    assert (ours.params, ours.latency is not None) == (parameters(model), True)
    seen(config, "profile")


# The class of a config decides ---------------------------------------------------------------------------------------

PLAIN: Config = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def test_the_class_decides_the_family(tmp_path: Path) -> None:
    model = built(PLAIN)
    architecture = architecture_of(plain_config(model))
    assert architecture.family is FAMILIES["UNet2DModel"]
    assert architecture.total_params == parameters(model)
    assert isinstance(
        materialise(model, plan_of(architecture, ["Md.R1", "Md.A1", "Md.R2"])), diffusers.UNet2DModel
    )
    # Settings of one class under the name of another: diffusers would leave out what it does not know.
    with pytest.raises(UnsupportedModelError, match=r"UNet2DConditionModel.*settings of a UNet2DModel"):
        architecture_of({**plain_config(model), "_class_name": "UNet2DConditionModel"})


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("UNet3DConditionModel", "frames of a film"),
        ("UNetSpatioTemporalConditionModel", "frames of a film"),
        ("UNetMotionModel", "frames of a film"),
        ("ControlNetModel", "branch beside a U-Net"),
        ("Kandinsky3UNet", "pools its text"),
    ],
)
def test_other_classes_are_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{name}, which .*{reason}.*UNet2DModel"):
        family_of({"_class_name": name})


@pytest.mark.parametrize(
    ("down", "up", "reason"),
    [
        ("SkipDownBlock2D", "SkipUpBlock2D", "SkipDownBlock2D, which hands the picture itself"),
        ("DownEncoderBlock2D", "UpDecoderBlock2D", "DownEncoderBlock2D, which belongs to an autoencoder"),
    ],
)
def test_stages_that_are_not_read_are_named(down: str, up: str, reason: str) -> None:
    config = {**PLAIN, "down_block_types": [down] * 2, "up_block_types": [up] * 2}
    with pytest.raises(UnsupportedModelError, match=reason):
        architecture_of(config)


# Traps ---------------------------------------------------------------------------------------------------------------


def refusal(config: Config, text: str) -> str:
    architecture = architecture_of(config)
    with pytest.raises(NonNativePlanError) as caught:
        native_layout(architecture, parse_plan(text, architecture))
    return str(caught.value)


def test_stages_of_a_unet2d_lose_equally_many_layers(seen: Seen) -> None:
    config = {**PLAIN, "block_out_channels": [8, 8], "layers_per_block": 2}
    assert "one number of layers" in refusal(config, "-Dn1.R2 -Up2.R2")
    architecture = architecture_of(config)
    plan = parse_plan("-Dn1.R2 -Up2.R2 -Dn2.R2 -Up1.R2", architecture)
    assert native_layout(architecture, plan).config["layers_per_block"] == 1
    assert any(plan.removed and set(plan.removed) == option for option in native_choices(architecture)[0])
    seen(PLAIN, "prune", exception="native: all stages lose equally many layers")


def test_every_combination_of_choices_of_a_unet2d_is_native() -> None:
    chance = random.Random(5)
    for middle in (None, "UNetMidBlock2D"):
        config = {**KINDS["unet2d"](chance), "block_out_channels": [8, 8], "mid_block_type": middle}
        config |= {key: config[key][:2] for key in ("down_block_types", "up_block_types")}
        architecture = architecture_of(config)
        levels = native_choices(architecture)
        assert len(levels) == (2 if middle else 1)
        for options in itertools.product(*levels):
            assert is_native(architecture, plan_of(architecture, frozenset[str]().union(*options)))


def test_heads_that_diffusers_does_not_turn_round() -> None:
    """``attention_head_dim`` of up stages is read outermost first: without the innermost stage all others move."""
    config = {
        **KINDS["simple"](random.Random(0)),
        "block_out_channels": [8, 8, 8],
        "layers_per_block": 1,
        "down_block_types": ["SimpleCrossAttnDownBlock2D"] * 3,
        "up_block_types": ["SimpleCrossAttnUpBlock2D"] * 3,
        "mid_block_type": None,
        "attention_head_dim": [1, 2, 4],
    }
    assert "heads of 2 channels" in refusal(config, "-Dn3 -Up1")
    architecture = architecture_of({**config, "attention_head_dim": 2})
    assert is_native(architecture, parse_plan("-Dn3 -Up1", architecture))


PLAIN_FORMS: tuple[Form, ...] = ("native", "neutral")


@pytest.mark.parametrize("kind", ["simple", "attention_only", "unet2d"])
def test_stages_further_in_leave_in_both_plain_forms(kind: str) -> None:
    """Whole stages from the middle on, alone and with other blocks: built, or refused with the reason."""
    chance, built_ones = random.Random(11), 0
    for _ in range(4):
        config = KINDS[kind](chance)
        depth = len(config["block_out_channels"])
        architecture = architecture_of(config | {"block_out_channels": [16] * depth, "attention_head_dim": 4})
        for left in range(1, depth):
            inner = {"Md", *(f"Dn{i}" for i in range(left + 1, depth + 1))}
            inner |= {f"Up{i}" for i in range(1, depth - left + 1)}
            removable = [block for block in architecture.blocks if block.removable]
            gone = frozenset(block.name for block in removable if block.stage in inner)
            others = [block.name for block in removable if block.name not in gone]
            for more, form in itertools.product(([], chance.sample(others, 1)), PLAIN_FORMS):
                plan = plan_of(architecture, gone.union(more)).built(form)
                if why_not(architecture, plan):
                    continue
                built_ones += 1
                meta_model(layout_of(architecture, plan).config)
    assert built_ones


def test_a_mid_stage_that_activates_the_embedding_later() -> None:
    config = {
        **KINDS["simple"](random.Random(0)),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "resnet_skip_time_act": True,
    }
    assert "resnet_skip_time_act" in refusal(config, "-Md.A1 -Md.R2")
    architecture = architecture_of({**config, "resnet_skip_time_act": False})
    assert is_native(architecture, parse_plan("-Md.A1 -Md.R2", architecture))


def test_a_k_stage_without_attention_is_another_one() -> None:
    config = KINDS["upscaler"](random.Random(0))
    layers = config["layers_per_block"]
    attentions = " ".join(f"-Up1.A{i + 1}" for i in range(layers))
    assert "KCrossAttnUpBlock2D computes something else" in refusal(config, attentions)


def test_several_text_widths_that_no_text_has() -> None:
    config = {**KINDS["without_text"](random.Random(0)), "cross_attention_dim": [8, 12, 32]}
    with pytest.raises(UnsupportedModelError, match="one is needed"):
        example_inputs(config)
    assert example_inputs({**config, "cross_attention_dim": [8, 16, 32]})["encoder_hidden_states"] is None


# Layers inside attention blocks --------------------------------------------------------------------------------------


PUBLISHED = {"koala-1b": 1_161_184_324, "koala-700m": 782_822_724, "ssd-1b": 1_331_334_404}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_students_of_sdxl_are_named_plans(name: str) -> None:
    architecture = architecture_of(XL)
    plan = parse_plan(name, architecture)
    student = meta_model(native_layout(architecture, plan).config)
    assert parameters(student) == promised(architecture, plan) == PUBLISHED[name]
    for other in ("sd-v1.4", "sd-v2.1-base"):
        with pytest.raises(PlanError, match=f"{name} is defined for Stable Diffusion XL"):
            parse_plan(name, architecture_of(json.loads((PRESETS / f"{other}.json").read_text())))


def test_layers_of_sdxl_are_listed_and_not_counted_twice() -> None:
    architecture = architecture_of(XL)
    assert (len(architecture.blocks), len(architecture.layers)) == (28, 70)
    layer = architecture.block("Up1.A2.T7")
    assert layer.path == "up_blocks.0.attentions.1.transformer_blocks.6"
    assert (layer.kind, layer.inside) == ("transformer", "Up1.A2")
    params = sum(one.params for one in architecture.layers_in("Up1.A2"))
    assert 0 < params < architecture.block("Up1.A2").params
    assert sum(block.params for block in architecture.blocks) < architecture.total_params == 2_567_463_684


@pytest.mark.long
def test_the_costs_of_sdxl_count_no_layer_twice() -> None:
    architecture = architecture_of(XL)
    frame = blocks_frame(architecture).set_index("name")
    assert frame.loc["Up1.A2.T7", "path"] == "up_blocks.0.attentions.1.transformer_blocks.6"
    assert frame.loc["Up1.A2.T7", "kind"] == "transformer"
    for column in ("params", "macs"):
        inside = frame[frame.index.str.startswith("Up1.A2.")]
        assert 0 < inside[column].sum() < frame.loc["Up1.A2", column]
    costs = cost_table(architecture)
    assert (costs.total.params, costs.total.macs) == (architecture.total_params, architecture.total_macs)
    for name, params in PUBLISHED.items():
        assert costs.of(parse_plan(name, architecture)).params == params


def test_a_layer_goes_and_comes_with_its_block() -> None:
    architecture = architecture_of(XL)
    whole = parse_plan("-Up1.A2", architecture)
    assert parse_plan("-Up1.A2.T3 -Up1.A2", architecture) == whole
    assert parse_plan("-Up1.A2 -Up1.A2.T3", architecture) == whole
    assert parse_plan("-Up1.A2.T3 +Up1.A2", architecture).removed == ()
    alone = parse_plan("-Up1.A2 +Up1.A2.T7", architecture)
    assert alone.removed == tuple(f"Up1.A2.T{i}" for i in range(1, 11) if i != 7)
    assert "koala-700m" in parse_plan("koala-700m", architecture).names
    back = parse_plan("koala-700m +Dn3.A1 +Up1.A1 +Up1.A3", architecture)
    assert not [name for name in back.removed if ".T" in name]


def test_layers_of_the_mid_stage_leave_with_those_of_the_last_down_stage() -> None:
    assert "plain diffusers gives both the same number" in refusal(XL, "-Md.A1.T10")
    architecture = architecture_of(XL)
    for text in ("-Md.A1.T10 -Dn3.A1.T2", "-Md.A1 -Md.R2 -Dn3.A1.T2", "-Up1.A2.T1"):
        assert is_native(architecture, parse_plan(text, architecture)), text


def test_choices_of_layers_grow_with_their_number_alone() -> None:
    """Every layer that leaves alone is a level of two options; those of the mid stage leave side by side."""
    levels = native_choices(architecture_of(XL))
    alone = [level for level in levels if len(level) == 2]
    assert sum(map(len, levels)) < 1000
    assert {next(iter(level[1])).split(".")[0] for level in alone} == {"Dn2", "Up1", "Up2"}
    assert len(alone) == 40
    innermost = max(levels, key=len)
    assert frozenset({"Dn3.A1.T10", "Dn3.A2.T10", "Md.A1.T10"}) in innermost


@pytest.mark.long
def test_a_search_takes_layers_and_prices_them_once(seen: Seen) -> None:
    """Against a search by hand of all plans of a small model, where blocks cost their layers' impact and more."""
    config = {
        **KINDS["xl"](random.Random(0)),
        "layers_per_block": 1,
        "transformer_layers_per_block": [1, 2, 2],
        "mid_block_type": None,
    }
    architecture = architecture_of(config)
    chance = random.Random(0)
    impacts = {block.name: chance.random() for block in architecture.blocks}
    impacts |= {layer.name: 0.6 * chance.random() for layer in architecture.layers}
    costs = cost_table(architecture)
    levels = native_choices(architecture)
    plans = {plan_of(architecture, frozenset[str]().union(*one)) for one in itertools.product(*levels)}
    for share in (90, 75, 60):
        budget = parse_budget(f"params<={share}%", architecture, costs)
        (found,) = search_plans(architecture, Effects(impacts), costs, [budget])
        fitting = [plan for plan in plans if costs.of(plan).params <= budget.limit]
        best = min(sum(impacts[name] for name in plan.removed) for plan in fitting)
        assert sum(impacts[name] for name in found.removed) == pytest.approx(best, abs=1e-9)
        assert parameters(meta_model(native_layout(architecture, found).config)) == costs.of(found).params
    assert any(".T" in name for plan in plans for name in plan.removed)
    loose = search_plans(architecture, Effects(impacts), costs, [budget], constraints=Constraints(form="own"))
    assert costs.of(loose[0]).params <= budget.limit
    seen(config, "search")


def test_a_controlnet_keeps_layers_that_its_unet_lost() -> None:
    """It has as many outputs as the student has skips; what is inside its own attention blocks is its own."""
    config = KINDS["xl"](random.Random(0))
    shared = set(inspect.signature(diffusers.ControlNetModel.__init__).parameters) & config.keys()
    settings = {name: config[name] for name in shared} | {"_class_name": "ControlNetModel"}
    architecture = architecture_of(config)
    last = config["transformer_layers_per_block"][-1]
    text = f"-Dn3.A1.T1 -Dn3.A2.T{last} -Md.A1.T2 -Dn1.R2 -Up3.R2"
    layout = native_layout(architecture, parse_plan(text, architecture))
    # one number of layers for all stages is what a ControlNet can have: no stage may lose a layer alone
    with pytest.raises(NonNativePlanError, match="same number in each"):
        cut_controlnet(settings, architecture.outline, layout)
    layout = native_layout(architecture, parse_plan(text.replace(" -Dn1.R2 -Up3.R2", ""), architecture))
    cut = cut_controlnet(settings, architecture.outline, layout)
    assert cut.layout.config["transformer_layers_per_block"] == config["transformer_layers_per_block"]
    path = "down_blocks.2.attentions.0.transformer_blocks.0.norm1.weight"
    assert cut.layout.renamed(path) == path
