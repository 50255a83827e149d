"""Transformers as chains of blocks: what each family says of a class, against the class itself."""

from __future__ import annotations

import inspect
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from discovery import Site, discover, without
from families_seen import Seen
from safetensors.torch import save_file
from tiny_models import (
    TINY_TRANSFORMERS,
    drawn_config,
    others_long,
    random_inputs,
    tiny_config,
    tiny_model,
    with_random_weights,
)
from torch import Tensor
from torch_counter import count_module

import prune_lab as pl
from prune_lab.blocks import architecture_of, block_groups, blocks_frame
from prune_lab.candidates import build_candidate, load_student
from prune_lab.counting import count_macs
from prune_lab.distill.features import feature_pairs, tapped
from prune_lab.distill.memory import pass_bytes
from prune_lab.errors import NonNativePlanError, UnsupportedModelError
from prune_lab.families import (
    FAMILIES,
    conditions_of,
    empty_model,
    example_inputs,
    family_of,
    film_frames,
    meta_model,
    outline_of,
    runs_on_meta,
)
from prune_lab.families.refused import REFUSED
from prune_lab.plans import (
    PruningPlan,
    choices_to_json,
    is_native,
    native_choices,
    native_layout,
    parse_plan,
    plan_of,
)
from prune_lab.prefix_sharing import state_bytes
from prune_lab.profiling import cost_table, live_peak, profile
from prune_lab.profiling.random_weights import random_model
from prune_lab.surgery import bypassed, materialise, materialise_from_folder
from prune_lab.surgery.building import predicted_shapes
from prune_lab.workflow.comparing import comparison

CLASSES = sorted(TINY_TRANSFORMERS)
NEVER_NATIVE = ("ChromaTransformer2DModel",)


def answer(model: Any, inputs: Any) -> Tensor:
    with torch.no_grad():
        found = model(**inputs, return_dict=False)[0]
    return found if isinstance(found, Tensor) else torch.stack(list(found))


def sites_of(model: Any, inputs: Any) -> list[Site]:
    with torch.no_grad():
        return discover(model, [unit.path for unit in outline_of(model).units], lambda: model(**inputs))


def naively(model: Any, inputs: Any, plan: PruningPlan) -> Tensor:
    """The answer without the blocks of ``plan``, by what the model was seen to do; no family is asked."""
    paths = {architecture_of(model).block(name).path for name in plan.removed}
    with without(model, [site for site in sites_of(model, inputs) if site.path in paths]):
        return answer(model, inputs)


def drawn_model(config: dict[str, Any], seed: int) -> Any:
    return with_random_weights(empty_and_filled(config), seed)


def empty_and_filled(config: dict[str, Any]) -> Any:
    model = empty_model(config)
    return model._apply(lambda tensor: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor)


def drawn_plan(architecture: Any, generator: random.Random) -> PruningPlan:
    """A random plan; every second time one of which the family says that it is native."""
    names = [block.name for block in architecture.blocks]
    if generator.random() < 0.5:
        levels = [generator.choice(options) for options in native_choices(architecture)]
        return plan_of(architecture, frozenset().union(*levels))
    return plan_of(architecture, generator.sample(names, generator.randint(1, len(names))))


def check(name: str, seed: int) -> bool:
    """Whether a drawn plan of a drawn model is native; where it is, the student is the bypassed teacher to the bit."""
    generator = random.Random(f"{name} {seed}")
    config = drawn_config(name, generator)
    model = drawn_model(config, seed)
    architecture = architecture_of(model)
    plan = drawn_plan(architecture, generator)
    inputs = random_inputs(model, seed, batch=generator.randint(1, 2))
    wanted = naively(model, inputs, plan)
    with bypassed(model, plan):
        assert torch.equal(answer(model, inputs), wanted)
    if not is_native(architecture, plan):
        return False
    student = materialise(model, plan)
    assert type(student) is type(model)
    assert torch.equal(answer(student, inputs), wanted)
    tensors = student.state_dict()
    assert predicted_shapes(config, plan) == {key: tuple(value.shape) for key, value in tensors.items()}
    gone = [architecture.block(block) for block in plan.removed]
    params = sum(parameter.numel() for parameter in student.parameters())
    assert architecture.total_params - sum(block.params for block in gone) == params
    return True


# What a family says ---------------------------------------------------------------------------------------------------


def test_every_transformer_has_a_tiny_model() -> None:
    known = {name for name, family in FAMILIES.items() if family.component != "unet"}
    assert known == set(TINY_TRANSFORMERS)


@pytest.mark.parametrize("name", CLASSES)
def test_a_family_says_what_its_class_does(name: str) -> None:
    model = tiny_model(name)
    inputs = random_inputs(model)
    units = outline_of(model).units
    assert [Site(unit.path, unit.hands_on, unit.in_tuple) for unit in units] == sites_of(model, inputs)
    family = family_of(model)
    assert family.latents in inputs
    config = model.config
    for path in (
        family.stem(config),
        family.head(config),
        *(path for unit in units for path in unit.self_attention),
    ):
        model.get_submodule(path)
    assert {type(model.get_submodule(unit.path)).__name__ for unit in units} == set(family.compiled)
    taken = {*inputs, *(inputs.get("added_cond_kwargs") or {})}
    assert {
        condition.name for condition in conditions_of(model) if condition.place not in ("text", "schedule")
    } <= taken


@pytest.mark.parametrize(
    ("sides", "frames"), [([2], [1]), ([4], [1]), ([1, 2], [1, 1]), ([2, 4], [2, 1]), ([1, 2, 2], [1, 2, 1])]
)
def test_stem_and_head_of_z_image_are_those_of_its_patches(sides: list[int], frames: list[int]) -> None:
    """The modules that run are those that the architecture names; of several patches it is the pipeline's own."""
    model = tiny_model("ZImageTransformer2DModel", all_patch_size=sides, all_f_patch_size=frames)
    architecture, ran = architecture_of(model), list[str]()
    for kind in ("all_x_embedder", "all_final_layer"):
        for key, module in model.get_submodule(kind).items():
            module.register_forward_hook(lambda *_, path=f"{kind}.{key}": ran.append(path))
    inputs = random_inputs(model)
    if (frame := inputs["f_patch_size"]) > 1:
        inputs["x"] = [one.repeat(1, frame, 1, 1) for one in inputs["x"]]
    with torch.no_grad():
        model(**inputs)
    assert ran == [architecture.stem, architecture.head]
    asked = inspect.signature(model.forward).parameters
    own = (asked["patch_size"].default, asked["f_patch_size"].default)
    assert ((inputs["patch_size"], frame) == own) == (own in zip(sides, frames, strict=True))


@pytest.mark.parametrize("name", others_long(CLASSES))
def test_the_inventory_of_a_transformer(name: str, seen: Seen) -> None:
    architecture = architecture_of(tiny_config(name))
    frame = blocks_frame(architecture)
    assert len(frame) == len(architecture.blocks)
    assert all(group.blocks for group in block_groups(architecture, "stage"))
    first, last = architecture.blocks[0].name, architecture.blocks[-1].name
    assert parse_plan(f"-{first} -{last} +{first}", architecture).removed == (last,)
    assert choices_to_json(architecture)["levels"]
    stage = architecture.stages[-1]
    assert parse_plan(f"-{stage}", architecture).removed == tuple(
        block.name for block in architecture.stage_blocks(stage)
    )
    seen(name, "blocks")


# Students -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_a_student_is_the_teacher_without_its_blocks(name: str) -> None:
    native = [check(name, seed) for seed in range(2)]
    assert any(native) or name in NEVER_NATIVE


@pytest.mark.long
@pytest.mark.parametrize("name", CLASSES)
def test_a_hundred_students_are_the_teacher_without_their_blocks(name: str) -> None:
    native = [check(name, seed) for seed in range(2, 102)]
    assert sum(native) >= 40 or name in NEVER_NATIVE


def renumbered(model: Any, plan: PruningPlan) -> Any:
    """The same class with fewer blocks, renumbered list by list, whatever the family says; None where it will not."""
    outline = outline_of(model)
    settings = dict(outline.config)
    names: dict[str, str] = {}
    for stage in outline.stages:
        left = [unit for unit in outline.units_in(stage.name) if unit.name not in plan.removed]
        names |= {unit.path: f"{stage.path}.{place}" for place, unit in enumerate(left)}
        settings["num_single_layers" if stage.path.startswith("single") else "num_layers"] = len(left)
    student = empty_and_filled(settings)
    ours = student.state_dict()
    for key, value in model.state_dict().items():
        block = next((unit.path for unit in outline.units if key.startswith(unit.path + ".")), None)
        new = key if block is None else names.get(block) and names[block] + key.removeprefix(block)
        if new in ours:
            if ours[new].shape != value.shape:
                return None
            ours[new] = value
    student.load_state_dict(ours)
    return student


@pytest.mark.parametrize(
    "name",
    ["DiTTransformer2DModel", "HunyuanDiT2DModel", "LatteTransformer3DModel", "ChromaTransformer2DModel"],
)
def test_what_is_refused_would_be_another_model(name: str) -> None:
    model = tiny_model(name)
    architecture, inputs = architecture_of(model), random_inputs(model)
    names = [block.name for block in architecture.blocks]
    refused = 0
    plans = [plan_of(architecture, one) for size in (1, 2) for one in itertools.combinations(names, size)]
    for plan in plans:
        if is_native(architecture, plan):
            continue
        refused += 1
        try:
            student = renumbered(model, plan)
            found = None if student is None else answer(student, inputs)
        except (RuntimeError, IndexError, TypeError, AttributeError):
            continue  # the plain class cannot even run so
        assert found is None or not torch.equal(found, naively(model, inputs, plan)), plan.text
    assert refused


@pytest.mark.parametrize(
    ("name", "plan", "reason", "words"),
    [
        ("DiTTransformer2DModel", "-B1", "keep B1", "native: B1 stays"),
        ("HunyuanDiT2DModel", "-B1", "share a skip connection", "native: blocks leave in pairs"),
        (
            "HunyuanDiT2DModel",
            "-B3 -B4",
            "keep the two blocks in the middle",
            "native: the two in the middle stay",
        ),
        ("LatteTransformer3DModel", "-S1 -T1", "keep S1", "native: S1 stays"),
        ("LatteTransformer3DModel", "-S2", "take turns", "native: blocks leave in pairs"),
        ("ChromaTransformer2DModel", "-S2", "by its place among all blocks", "never native"),
        ("SD3Transformer2DModel", "-B", "keep one block", "native: one block stays"),
        ("MochiTransformer3DModel", "-B", "keep one block", "native: one block stays"),
    ],
)
def test_why_a_plan_is_not_native(name: str, plan: str, reason: str, words: str, seen: Seen) -> None:
    architecture = architecture_of(tiny_config(name))
    with pytest.raises(NonNativePlanError, match=reason):
        native_layout(architecture, parse_plan(plan, architecture))
    seen(name, "prune", exception=words)


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("HunyuanDiT2DModel", "-B1 -B6"),
        ("LatteTransformer3DModel", "-T1 -S2"),
        ("LatteTransformer3DModel", "-S2 -T2"),
        ("SD3Transformer2DModel", "-B4 -B3"),
        ("FluxTransformer2DModel", "-D -S"),
    ],
)
def test_a_plan_that_is_native(name: str, plan: str) -> None:
    model = tiny_model(name)
    architecture, inputs = architecture_of(model), random_inputs(model)
    read = parse_plan(plan, architecture)
    assert torch.equal(answer(materialise(model, read), inputs), naively(model, inputs, read))


@pytest.mark.parametrize(
    "name", ["SD3Transformer2DModel", "MochiTransformer3DModel", "FluxTransformer2DModel"]
)
def test_what_a_block_costs_is_what_the_model_lacks_without_it_and_said(name: str, tmp_path: Path) -> None:
    """The listing shows it, with what the last block holds itself, as plain diffusers counts both."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config(name)))
    listed, model = pl.load(path).blocks(), tiny_model(name)
    units = {unit.name: unit for unit in outline_of(model).units}
    whole = sum(one.numel() for one in model.parameters())
    said = " ".join(listed.notes)
    for row in listed.frame().itertuples():
        layout = native_layout(architecture_of(model), plan_of(architecture_of(model), (row.name,)))
        left = sum(one.numel() for one in meta_model(layout.config).parameters())
        assert row.params == whole - left
        own = sum(one.numel() for one in model.get_submodule(units[row.name].path).parameters())
        assert (row.name in said) == (own != row.params)
        assert own == row.params or f"{row.params:,} parameters, of which {own:,} are its own" in said


def test_what_stays_of_a_block_that_others_read_is_said(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config("DiTTransformer2DModel")))
    model, found = tiny_model("DiTTransformer2DModel"), pl.load(path)
    first = model.transformer_blocks[0]
    own, kept = (sum(one.numel() for one in part.parameters()) for part in (first, first.norm1.emb))
    assert f"of the {own:,} parameters of B1, {kept:,} (norm1.emb) stay" in " ".join(found.blocks().notes)
    # and every table prices the plan as it is built
    rows = comparison(str(path), ["-B1"])
    built = found.prune("-B1", tmp_path / "never", dry_run=True).frame().iloc[0]
    assert (rows["params"].iloc[1], rows["macs"].iloc[1]) == (built["params"], built["macs"])
    assert rows["params"].iloc[0] - rows["params"].iloc[1] == own - kept


def test_the_last_block_of_sd3_becomes_another_one() -> None:
    """Dual attention goes with its blocks; what writes the text is gone from the new last block."""
    model = tiny_model("SD3Transformer2DModel")  # dual attention in blocks 0 and 2 of four
    architecture = architecture_of(model)
    layout = native_layout(architecture, parse_plan("-B1 -B4", architecture))
    assert layout.config["dual_attention_layers"] == [1]
    student = materialise(model, parse_plan("-B1 -B4", architecture))
    assert student.transformer_blocks[-1].context_pre_only
    ours, theirs = student.state_dict(), model.state_dict()
    key = "norm1_context.linear.weight"
    shift, scale = theirs[f"transformer_blocks.2.{key}"][:32].chunk(2)
    assert torch.equal(ours[f"transformer_blocks.1.{key}"], torch.cat([scale, shift]))
    assert layout.renamed("transformer_blocks.2.ff_context.net.2.weight") is None
    # of the last block a plan saves what the new last one loses as well
    assert architecture.block("B4").params > sum(p.numel() for p in model.transformer_blocks[3].parameters())


# Costs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", others_long(CLASSES))
def test_multiply_adds_are_those_of_torch_and_add_up(name: str) -> None:
    config = tiny_config(name)
    ours, model = count_macs(config, latent=8, tokens=6), meta_model(config).requires_grad_(False)
    with runs_on_meta():
        theirs = count_module(model, example_inputs(config, latent=8, tokens=6, device="meta"))
    assert ours.total - ours.by_operator.get("layer_norm", 0) == theirs.total
    assert count_macs(tiny_model(name), latent=8, tokens=6).total == ours.total
    architecture = architecture_of(config)
    generator = random.Random(name)
    for _ in range(3):
        plan = plan_of(architecture, frozenset().union(*map(generator.choice, native_choices(architecture))))
        if not is_native(architecture, plan):
            continue  # no block would be left
        left = architecture_of(dict(native_layout(architecture, plan).config))
        gone = [architecture.block(block) for block in plan.removed]
        assert architecture.total_macs - sum(block.macs for block in gone) == left.total_macs
        assert architecture.total_params - sum(block.params for block in gone) == left.total_params


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "MochiTransformer3DModel"])
def test_what_is_left_without_the_last_block_is_counted_as_it_is_built(name: str) -> None:
    """Of every set of blocks; the block that becomes the last one writes no text any more."""
    config, sizes = tiny_config(name), {"latent": 8, "tokens": 6}
    architecture = architecture_of(config)
    costs, names = cost_table(architecture, **sizes), [block.name for block in architecture.blocks]
    for number in range(2 ** len(names) - 1):
        plan = plan_of(architecture, [one for place, one in enumerate(names) if number >> place & 1])
        built = dict(native_layout(architecture, plan).config)
        found = costs.of(plan)
        assert (found.macs, found.attention_macs) == (
            count_macs(built, **sizes).total,
            count_macs(built, **sizes).attention,
        )
        assert found.params == architecture_of(built).total_params


def test_of_a_film_as_many_frames_are_counted_as_are_asked_for() -> None:
    config = tiny_config("WanTransformer3DModel")
    model, sizes = meta_model(config).requires_grad_(False), {"latent": 8, "tokens": 6}
    for frames in (1, 3, None):
        inputs = example_inputs(config, **sizes, frames=frames, device="meta")
        assert inputs["hidden_states"].shape[2] == (frames or film_frames(config))
        with runs_on_meta():
            theirs = count_module(model, inputs)
        ours = count_macs(config, **sizes, frames=frames)
        assert ours.total - ours.by_operator.get("layer_norm", 0) == theirs.total
        assert cost_table(architecture_of(config), **sizes, frames=frames).total.macs == ours.total


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("CogVideoXTransformer3DModel", {"in_channels": 8, "out_channels": 4}),
        ("FluxTransformer2DModel", {"in_channels": 32, "out_channels": 16}),
        *(
            pytest.param(name, settings, marks=pytest.mark.long)
            for name, settings in (
                ("WanTransformer3DModel", {"in_channels": 8, "out_channels": 4}),
                ("FluxTransformer2DModel", {"patch_size": 2}),
                ("QwenImageTransformer2DModel", {"out_channels": 2}),
                ("ChromaTransformer2DModel", {"patch_size": 4}),
            )
        ),
    ],
)
def test_a_model_that_goes_on_from_a_picture_is_counted_and_pruned_and_refuses_to_be_scored(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model(name, **settings)
    model.save_pretrained(tmp_path / "model")
    found = pl.load(tmp_path / "model")
    assert len(found.blocks().frame()) == len(architecture_of(model).blocks)
    assert found.profile(latency=False).frame()["macs"].iloc[0] == architecture_of(model).total_macs
    plan = f"-{architecture_of(model).blocks[0].name}"
    pruned = found.prune(plan, tmp_path / "student").frame().iloc[0]
    assert pruned["params"] < architecture_of(model).total_params
    with pytest.raises(UnsupportedModelError, match="counted, profiled and pruned without") as caught:
        found.score()
    assert "\n" not in str(caught.value)


def test_a_row_of_a_film_is_one_frame_where_memory_is_foreseen() -> None:
    config = tiny_config("WanTransformer3DModel")
    architecture, whole = architecture_of(config), example_inputs(config, latent=8, frames=1, device="meta")
    with runs_on_meta():
        one = live_peak(meta_model(config), whole)
    assert one <= state_bytes(architecture, latent=8) <= 2 * one
    assert pass_bytes(config, tokens=6, training=False, latent=8) < 3 * one


@pytest.mark.parametrize("name", others_long(CLASSES))
def test_the_profile_of_a_transformer(name: str, seen: Seen) -> None:
    model = random_model(tiny_config(name))
    measured = profile(model, latent=8, tokens=6, runs=2, warmup=0)
    assert measured.params == sum(parameter.numel() for parameter in model.parameters())
    assert measured.latency is not None
    counted = profile(tiny_config(name))
    assert (counted.macs, counted.tokens) == (
        architecture_of(tiny_config(name)).total_macs,
        family_of(model).tokens(model.config),
    )
    seen(name, "profile")


def test_parameters_of_published_transformers() -> None:
    """By hand: FLUX.1 and Wan 2.1 of 1.3 B, whose sizes their model cards give."""
    assert (
        architecture_of({"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}).total_params
        == 11_901_408_320
    )
    wan = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
    assert architecture_of({"_class_name": "WanTransformer3DModel", **wan}).total_params == 1_418_996_800


# Features -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["PixArtTransformer2DModel", "FluxTransformer2DModel", "CogVideoXTransformer3DModel"]
)
def test_features_of_a_student_are_those_of_the_bypassed_teacher(name: str) -> None:
    model = tiny_model(name)
    architecture, inputs = architecture_of(model), random_inputs(model)
    plan = plan_of(architecture, [architecture.blocks[1].name])
    student = materialise(model, plan)
    for points in ("stages", "blocks", "self-attention"):
        pairs = feature_pairs(architecture, plan, points)
        assert pairs
        teacher = [pair.teacher_path for pair in pairs]
        ours = [pair.student_path for pair in pairs]
        with tapped(student, ours) as found, tapped(model, teacher) as whole:
            answer(student, inputs)
            answer(model, inputs)
            assert {whole[one].shape for one in teacher} == {found[one].shape for one in ours}
    (pair, *_) = feature_pairs(architecture, plan, "blocks")
    with tapped(student, [pair.student_path]) as found, tapped(model, [pair.teacher_path]) as wanted:
        answer(student, inputs)
        answer(model, inputs)
        assert torch.equal(found[pair.student_path], wanted[pair.teacher_path])


# Folders --------------------------------------------------------------------------------------------------------------

LOADER = """
import sys, json, warnings, torch, diffusers
from pathlib import Path
from safetensors.torch import load_file
sys.path.insert(0, sys.argv[2])
from tiny_models import random_inputs
torch.set_num_threads(1)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    name = json.loads((folder / "config.json").read_text())["_class_name"]
    model = getattr(diffusers, name).from_pretrained(folder).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        found = model(**random_inputs(model, 7), return_dict=False)[0]
    found = found if isinstance(found, torch.Tensor) else torch.stack(list(found))
    wanted = load_file(folder / "answer.safetensors")["answer"]
    assert torch.equal(found, wanted), (name, float((found - wanted).abs().max()))
    print(name)
"""


@pytest.mark.long
def test_saved_students_are_loaded_by_plain_diffusers(tmp_path: Path) -> None:
    for name in CLASSES:
        if name in NEVER_NATIVE:
            continue
        model = tiny_model(name)
        model.save_pretrained(tmp_path / "teachers" / name)
        architecture, generator = architecture_of(model), random.Random(name)
        options = [generator.choice(options) for options in native_choices(architecture)]
        plan = plan_of(architecture, frozenset().union(*options) or options[0])
        inputs = random_inputs(model, 7)
        student = materialise_from_folder(tmp_path / "teachers" / name, plan)
        wanted = naively(model, inputs, plan)
        for parameter in student.parameters():  # matrix products round by how memory is aligned
            parameter.data = parameter.data.clone()
        assert torch.equal(answer(student, inputs), wanted)
        student.save_pretrained(tmp_path / "students" / name)
        save_file({"answer": wanted.contiguous()}, tmp_path / "students" / name / "answer.safetensors")
    place = [str(tmp_path / "students"), str(Path(__file__).parent)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADER, *place], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == [name for name in CLASSES if name not in NEVER_NATIVE]


@pytest.mark.parametrize("name", others_long([name for name in CLASSES if name not in NEVER_NATIVE]))
def test_a_candidate_of_a_transformer(name: str, tmp_path: Path, seen: Seen) -> None:
    model = tiny_model(name)
    architecture = architecture_of(model)
    # the last block where it leaves alone
    levels = reversed(native_choices(architecture))
    plan = plan_of(architecture, next(option for options in levels for option in options if option))
    candidate = build_candidate(model, plan, tmp_path / "c", profiled=False)
    inputs = random_inputs(model)
    student = load_student(candidate)
    for parameter in student.parameters():  # matrix products round by how memory is aligned, and a map is not
        parameter.data = parameter.data.clone()
    assert torch.equal(answer(student, inputs), naively(model, inputs, plan))
    seen(name, "prune")


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_class_is_refused_by_name_and_reason(name: str) -> None:
    assert name not in FAMILIES
    assert hasattr(diffusers, name) or name == "MultiControlNetModel"
    with pytest.raises(UnsupportedModelError, match=rf"{name}, which "):
        architecture_of({"_class_name": name})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_layers", "4"),
        ("num_layers", 10**9),
        ("num_layers", True),
        ("num_layers", -1),
        ("sample_size", 10**6),
        ("attention_head_dim", 2**40),
        ("attention_bias", 1),
        ("norm_eps", "small"),
        ("norm_eps", float("nan")),
        ("norm_type", 3),
        ("num_attention_heads", 1.5),
    ],
)
def test_a_setting_that_makes_no_sense(setting: str, value: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=setting):
        architecture_of({**tiny_config("PixArtTransformer2DModel"), setting: value})


@pytest.mark.parametrize("name", CLASSES)
def test_the_name_of_the_class_decides(name: str) -> None:
    """The settings of a class under the name of another are never read as the first."""
    config = json.loads(json.dumps(tiny_config(name)))
    assert type(meta_model(config)).__name__ == name
    config.pop("_class_name")
    with pytest.raises(UnsupportedModelError, match="without _class_name"):
        architecture_of(config)


@pytest.mark.parametrize("name", CLASSES)
def test_settings_that_are_left_out_are_those_of_the_class(name: str) -> None:
    """A config of few settings is asked for its sizes, conditions and inputs without being built."""
    needed = ("in_channels", "patch_size", "caption_channels", "cross_attention_dim", "pooled_projection_dim")
    config = {key: value for key, value in tiny_config(name).items() if key in ("_class_name", *needed)}
    conditions_of(config)
    assert example_inputs(config, device="meta")[family_of(config).latents] is not None
