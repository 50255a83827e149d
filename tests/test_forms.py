"""The three forms of a student: each the same network, at its own cost, in a folder that plain diffusers loads."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from conftest import SHAPES, TINY_UNET, build_unet
from families_seen import Seen
from safetensors import safe_open
from tiny_models import (
    TINY_TRANSFORMERS,
    drawn_config,
    others_long,
    random_inputs,
    tiny_model,
    with_random_weights,
)
from tiny_pipelines import drawn as picture_of
from torch import Tensor
from typer.testing import CliRunner

import prune_lab.families.own_code as own_code
from prune_lab.api.model import Model
from prune_lab.blocks import Architecture, architecture_of
from prune_lab.candidates import build_candidate, load_candidate, load_student
from prune_lab.cli import app
from prune_lab.config import DistillConfig, RunConfig, SearchConfig
from prune_lab.counting import count_macs
from prune_lab.distill.features import feature_pairs
from prune_lab.distill.setup import Student, StudentRun
from prune_lab.errors import (
    BudgetError,
    ConfigError,
    FormError,
    PlanError,
    ProofError,
    PruneLabError,
    UnsupportedModelError,
)
from prune_lab.export.hub import uploads_of
from prune_lab.families import FAMILIES, Form, empty_model, family_of, meta_model, plain_config
from prune_lab.forms import exists_in, form_named, in_form, layout_of, why_not, within_form
from prune_lab.models import load_model, load_pipeline, resolve_model
from prune_lab.models.hub import files_to_fetch
from prune_lab.models.streamed import load_streamed
from prune_lab.plans import PruningPlan, is_native, parse_plan, plan_from_json, plan_of
from prune_lab.prefix_sharing import predict_without
from prune_lab.probes import predict, random_probe
from prune_lab.profiling import as_matrix, cost_table
from prune_lab.ranking import ranking_from_frame
from prune_lab.runs import Run, read_records
from prune_lab.schemas import RANKING
from prune_lab.search import Constraints, Effects, parse_budget, search_plans
from prune_lab.search.program import Program
from prune_lab.search.space import space_of
from prune_lab.surgery import bypassed, materialise, original_of, prune_pipeline, save_model
from prune_lab.workflow import ensure_plans, run_all

pytestmark = pytest.mark.usefixtures("blank_figures")


def answer(model: Any, inputs: Any) -> Tensor:
    with torch.no_grad():
        found = model(**inputs, return_dict=False)[0]
    return found if isinstance(found, Tensor) else torch.stack(list(found))


def size(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def drawn(architecture: Architecture, chance: random.Random) -> PruningPlan:
    names = [block.name for block in architecture.named if block.removable]
    return plan_of(architecture, chance.sample(names, chance.randint(1, len(names))))


def unet_of(shape: str) -> Any:
    return with_random_weights(build_unet(SHAPES[shape]), 1)


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return str(result.output)


# The same network -----------------------------------------------------------------------------------------------------


def left_by_hand(model: Any, architecture: Architecture, plan: PruningPlan) -> int:
    """Parameters of the model without the modules of the plan's blocks, and of samplers that nothing is left for."""
    gone = set(plan.removed)
    left = [sampler for sampler in architecture.samplers if sampler.leaves_with]
    left = [sampler for sampler in left if gone >= set(sampler.leaves_with)]
    units = [*(architecture.block(name) for name in plan.removed), *left]
    return size(model) - sum(size(model.get_submodule(unit.path)) for unit in units)


def neutral_by_hand(model: Any, architecture: Architecture, plan: PruningPlan) -> int:
    """Parameters where whole inner levels that are removed are gone, and of other blocks only transformer layers."""
    gone = set(plan.removed)
    samplers = [one for one in architecture.samplers if one.leaves_with and gone >= set(one.leaves_with)]
    vanished = set().union(*(one.leaves_with for one in samplers)) if samplers else set()
    paths = {sampler.path for sampler in samplers} | {architecture.block(name).path for name in vanished}
    left: dict[str, int] = {}  # layers that compute something, by block
    for block in architecture.blocks:
        if block.transformer_layers and block.name not in vanished:
            names = {layer.name for layer in architecture.layers_in(block.name)}
            left[block.name] = 0 if block.name in gone else block.transformer_layers - len(names & gone)
    tied = [name for name in ("Dn3.A1", "Md.A1") if name in left]
    if len(tied) == 2 and len(architecture.stages) == 7:  # of the XL shape: its last down stage has attention
        left |= dict.fromkeys(tied, max(left[name] for name in tied))
    total = size(model) - sum(size(model.get_submodule(path)) for path in paths)
    for name, layers in left.items():
        block = architecture.block(name)
        inside = model.get_submodule(block.path).transformer_blocks
        total -= (block.transformer_layers - layers) * size(inside[0])
    return total


def check_forms(shape: str, plans: int, seed: int) -> None:
    model, chance = unet_of(shape), random.Random(f"{shape} {seed}")
    architecture = architecture_of(model)
    inputs = random_inputs(model, seed)
    for number in range(plans):
        plan = drawn(architecture, chance)
        with bypassed(model, plan):
            wanted = answer(model, inputs)
        for form, counted in (("own", left_by_hand), ("neutral", neutral_by_hand)):
            made = plan.built(form)  # type: ignore[arg-type]
            student = materialise(model, made)
            assert torch.equal(answer(student, inputs), wanted), (number, form, plan.text)
            assert size(student) == counted(model, architecture, plan), (form, plan.text)
            assert cost_table(architecture).of(made).params == size(student)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_student_is_the_bypassed_teacher_in_every_form(shape: str, seen: Seen) -> None:
    check_forms(shape, 2, 0)
    for form in ("own", "neutral"):
        seen(unet_of(shape), "prune", form=form)


@pytest.mark.long
@pytest.mark.parametrize("shape", SHAPES)
def test_a_hundred_plans_in_every_form(shape: str) -> None:
    check_forms(shape, 100, 1)


def check_own(name: str, seed: int) -> None:
    chance = random.Random(f"{name} {seed}")
    config = drawn_config(name, chance)
    model = empty_model(config)
    model = with_random_weights(
        model._apply(lambda one: torch.empty_like(one, device="cpu") if one.is_meta else one), seed
    )
    architecture, inputs = architecture_of(model), random_inputs(model, seed)
    plan = drawn(architecture, chance).built("own")
    with bypassed(model, plan):
        wanted = answer(model, inputs)
    student = materialise(model, plan)
    assert torch.equal(answer(student, inputs), wanted), plan.text
    kept = [
        f"{architecture.block(block).path}.{path}"
        for block in plan.removed
        for path in architecture.block(block).keeps
    ]
    assert size(student) == left_by_hand(model, architecture, plan) + sum(
        size(model.get_submodule(path)) for path in kept
    )
    assert architecture_of(student).total_params == size(student)


@pytest.mark.parametrize(
    "name",
    ["ChromaTransformer2DModel", "DiTTransformer2DModel", "HunyuanDiT2DModel", "SD3Transformer2DModel"],
)
def test_transformers_that_are_not_native_bring_code(name: str, seen: Seen) -> None:
    for seed in range(2):
        check_own(name, seed)
    seen(name, "prune", form="own")


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(TINY_TRANSFORMERS))
def test_every_transformer_brings_code(name: str, seen: Seen) -> None:
    for seed in range(10):
        check_own(name, seed)
    seen(name, "prune", form="own")


def test_the_first_block_of_dit_leaves_with_code_and_not_natively() -> None:
    model = tiny_model("DiTTransformer2DModel")
    architecture = architecture_of(model)
    plan = parse_plan("-B1", architecture)
    assert not is_native(architecture, plan)
    assert in_form(architecture, plan).form == "own"
    assert in_form(architecture, parse_plan("-B2", architecture)).form == "native"
    assert within_form(architecture, parse_plan("-B2", architecture), "own").form == "native"


def test_what_has_no_neutral_form() -> None:
    transformer = architecture_of(tiny_model("PixArtTransformer2DModel"))
    plan = parse_plan("-B2", transformer)
    assert "cannot stay and do nothing" in why_not(transformer, plan.built("neutral"))
    scaled = architecture_of({**TINY_UNET, "mid_block_scale_factor": 2.0})
    assert "divided by 2" in why_not(scaled, parse_plan("-Md.R1", scaled).built("neutral"))
    assert not why_not(scaled, parse_plan("-Dn1.R1", scaled).built("neutral"))
    assert exists_in(scaled, parse_plan("-Md.R1", scaled), "own")
    with pytest.raises(ConfigError, match="native, neutral, own"):
        form_named("plaster")


def test_a_layer_that_stays_silent_is_silent_about_boxes_too() -> None:
    """As in GLIGEN: a fuser in each transformer layer adds what it reads of boxes, where some are given."""
    model = with_random_weights(build_unet({**SHAPES["sdxl"], "attention_type": "gated"}), 1)
    architecture, inputs = architecture_of(model), random_inputs(model, 0)
    # it stays, since diffusers gives Dn3.A1 and Md.A1 one number of layers
    plan = parse_plan("-Md.A1.T2", architecture).built("neutral")
    student = materialise(model, plan)
    assert len(student.mid_block.attentions[0].transformer_blocks) == 3
    generator = torch.Generator().manual_seed(0)
    boxes = {
        "boxes": torch.rand(1, 2, 4, generator=generator),
        "masks": torch.ones(1, 2),
        "positive_embeddings": torch.randn(1, 2, model.config.cross_attention_dim, generator=generator),
    }
    found = []
    for given in ({}, {"cross_attention_kwargs": {"gligen": boxes}}):
        with bypassed(model, plan):
            found.append(answer(model, inputs | given))
        assert torch.equal(answer(student, inputs | given), found[-1])
    assert not torch.equal(*found)


def test_a_plan_says_its_form() -> None:
    architecture = architecture_of(TINY_UNET)
    plan = parse_plan("-Dn1.A1", architecture).built("own")
    assert plan == plan.built("native"), "the form is no part of what a plan removes"
    written = plan.to_json()
    assert plan_from_json(written, architecture).form == "own"
    del written["form"]  # as plans were written before there were forms
    assert plan_from_json(written, architecture).form == "native"
    with pytest.raises(PlanError, match="native, neutral, own"):
        plan_from_json({**written, "form": "plaster"}, architecture)


# Costs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "forms", "drawings"),
    [
        ("sdxl", ["neutral"], 1),
        *(pytest.param(shape, ["neutral", "own"], 10, marks=pytest.mark.long) for shape in SHAPES),
    ],
)
def test_costs_are_those_of_the_model_that_is_built(shape: str, forms: list[Form], drawings: int) -> None:
    architecture, chance = architecture_of(SHAPES[shape]), random.Random(shape)
    costs = cost_table(architecture)
    everything = [block.name for block in architecture.blocks if block.removable]
    for form in forms:
        table = costs.in_form(form)
        assert sum(part.params for part in table.parts) == architecture.total_params
        plans = [drawn(architecture, chance).built(form) for _ in range(drawings)]
        plans.append(plan_of(architecture, everything).built(form))
        many = table.of_many(as_matrix(plans, architecture))
        for number, plan in enumerate(plans):
            config, found = layout_of(architecture, plan).config, costs.of(plan)
            counted = count_macs(config, tokens=architecture.tokens)
            assert found.params == size(meta_model(config))
            assert (found.macs, found.attention_macs) == (counted.total, counted.attention)
            # what is searched with is never less than what is built
            assert many.params[number] >= found.params
            if not any(architecture.block(name).inside for name in plan.removed):
                assert (many.params[number], many.macs[number]) == (found.params, found.macs)


@pytest.mark.parametrize(
    "name",
    [
        "DiTTransformer2DModel",
        "MochiTransformer3DModel",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in TINY_TRANSFORMERS
            if name[:5] not in ("DiTTr", "Mochi")
        ),
    ],
)
def test_costs_of_transformers_with_code_are_those_that_are_built(name: str) -> None:
    """Also where a block keeps what others read (DiT's first), and where nothing is left to read something (Mochi)."""
    architecture, chance = architecture_of(drawn_config(name, random.Random(name))), random.Random(name)
    costs = cost_table(architecture)
    everything = [block.name for block in architecture.blocks if block.removable]
    plans = [drawn(architecture, chance) for _ in range(3)]
    plans += [plan_of(architecture, names) for names in (everything[:1], everything[-1:], everything)]
    for asked in plans:
        plan = asked.built("own")
        config, found = layout_of(architecture, plan).config, costs.of(plan)
        if not is_native(architecture, asked):  # without a form it is built so
            assert costs.of(asked) == found
        counted = count_macs(config, tokens=architecture.tokens)
        assert found.params == size(meta_model(config))
        assert (found.macs, found.attention_macs) == (counted.total, counted.attention), plan.text


def test_a_neutral_residual_block_saves_nothing_and_is_not_chosen_for_it() -> None:
    architecture = architecture_of(TINY_UNET)
    costs = cost_table(architecture)
    residual = parse_plan("-Dn1.R2", architecture)
    assert costs.of(residual.built("neutral")).params == architecture.total_params
    assert costs.of(residual.built("own")).params < architecture.total_params
    # residual blocks would be the best choice where they saved anything
    effects = Effects({block.name: 0.0 if block.kind == "resnet" else 1.0 for block in architecture.blocks})
    budget = [parse_budget("params<=90%", architecture, costs)]
    for form, kind in (("own", "resnet"), ("neutral", "attention")):
        rules = Constraints(form=form, keep=("Dn4",))  # type: ignore[arg-type]
        program = Program(space_of(architecture, costs, budget, rules), effects)
        alone = program.least(program.objective, budget)
        assert alone is not None
        assert {architecture.block(name).kind for name in alone} == {kind}
        (plan,) = search_plans(architecture, effects, costs, budget, constraints=rules)
        # a residual block leaves natively, where that is a plan, and then saves what it is
        residuals = {name for name in plan.removed if architecture.block(name).kind == "resnet"}
        assert plan.form == ("native" if form == "neutral" and residuals else form)
        assert effects.of(plan.removed) <= effects.of(alone)
        assert size(meta_model(layout_of(architecture, plan).config)) <= budget[0].limit
    few = [parse_budget("params<=12%", architecture, costs)]
    with pytest.raises(BudgetError, match="form neutral binds"):
        search_plans(
            architecture, effects, costs, few, constraints=Constraints(form="neutral", keep=("Dn4",))
        )


# Folders --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where diffusers copies the code that it is told to trust."""
    folder = tmp_path / "modules"
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if name.startswith("diffusers_modules"):
            del sys.modules[name]


@pytest.fixture(scope="session")
def own_folder(built_once: Any, tiny_pipeline_folder: Path) -> Path:
    """A pipeline whose U-Net has code of its own; copy it to change it."""

    def build(folder: Path) -> None:
        run("prune", tiny_pipeline_folder, "--plan", "-Dn1.A1 -Up2.R2", "--out", folder, "--force")

    return built_once("own", build)  # type: ignore[no-any-return]


def code_in(folder: Path) -> Path:
    (found,) = folder.glob("modeling_*.py")
    return found


@pytest.mark.long
def test_prune_writes_code_where_no_plain_config_will_do(
    own_folder: Path, tiny_pipeline_folder: Path
) -> None:
    unet = own_folder / "unet"
    config = json.loads((unet / "config.json").read_text())
    file = code_in(unet)
    assert file.stem.endswith(hashlib.sha256(file.read_bytes()).hexdigest()[:12])
    index = json.loads((own_folder / "model_index.json").read_text())
    assert index["unet"] == [file.stem, "PrunedUNet2DConditionModel"]
    assert config["auto_map"] == {"AutoModel": f"{file.stem}.PrunedUNet2DConditionModel"}
    provenance = json.loads((unet / "provenance.json").read_text())
    assert (provenance["form"], provenance["proof"]["largest_difference"]) == ("own", 0.0)
    assert json.loads((unet / "plan.json").read_text())["form"] == "own"
    assert "trust_remote_code=True" in (unet / "README.md").read_text()
    assert "trust_remote_code=True" in (own_folder / "README.md").read_text()
    # here it loads without being told to trust it, and the copy in the folder is not what runs
    model = load_model(resolve_model(str(own_folder)))
    assert sys.modules[type(model).__module__].__file__ == str(own_code.FOLDER / file.name)
    teacher = load_model(resolve_model(str(tiny_pipeline_folder)))
    inputs = random_inputs(teacher, 0)
    assert torch.equal(answer(load_streamed(unet), inputs), answer(model, inputs))
    for parameter in (*model.parameters(), *teacher.parameters()):  # numbers in a file lie as they do there
        parameter.data = parameter.data.clone()
    with bypassed(teacher, plan_of(architecture_of(teacher), ("Dn1.A1", "Up2.R2"))):
        assert torch.equal(answer(model, inputs), answer(teacher, inputs))
    pipeline = load_pipeline(resolve_model(str(own_folder)))
    pipeline("a cat", num_inference_steps=1, output_type="latent")
    assert "native" in run(
        "prune", tiny_pipeline_folder, "--plan", "bk-base", "--out", "x", "--dry-run", "--json"
    )


PIXELS: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "sample_size": 16,
    "block_out_channels": [8, 16, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}


def tiny(name: str) -> Any:
    if name in TINY_TRANSFORMERS:
        return tiny_model(name)
    config = {"UNet2DConditionModel": TINY_UNET, "UNet2DModel": PIXELS}[name]
    return with_random_weights(family_of(config).model_class().from_config(config))


@pytest.mark.parametrize("name", others_long(sorted(FAMILIES)))
def test_a_student_of_every_family_is_proved(name: str, tmp_path: Path, seen: Seen) -> None:
    tiny(name).save_pretrained(tmp_path / "teacher")
    source = resolve_model(str(tmp_path / "teacher"))
    architecture = source.architecture
    forms: list[Form] = ["own", "neutral"] if family_of(source.config).neutral else ["own"]
    removable = [block.name for block in architecture.blocks if block.removable]
    for form in forms:
        plan = plan_of(architecture, removable[-2:-1] or removable).built(form)
        out = prune_pipeline(source, plan, tmp_path / form)
        proof = json.loads((out / "provenance.json").read_text())["proof"]
        assert (proof["kind"], proof["largest_difference"]) == ("bypassed teacher", 0.0)
        student = load_model(resolve_model(str(out)))
        assert size(student) == proof["parameters"] == cost_table(architecture).of(plan).params
        seen(name, "prune", form=form)


def test_a_silent_block_is_proved_where_it_lays_states_out_otherwise(tmp_path: Path) -> None:
    """Plain attention hands on its state with the channels last, also where it adds nothing: what follows rounds so."""
    attending = {"down_block_types": ["AttnDownBlock2D"] * 3, "up_block_types": ["AttnUpBlock2D"] * 3}
    model = diffusers.UNet2DModel.from_config({**PIXELS, **attending})
    with_random_weights(model).save_pretrained(tmp_path / "teacher")
    source = resolve_model(str(tmp_path / "teacher"))
    plan = plan_of(source.architecture, ["Md.A1"]).built("neutral")
    out = prune_pipeline(source, plan, tmp_path / "out")
    proof = json.loads((out / "provenance.json").read_text())["proof"]
    assert 0 < proof["largest_difference"] < 1e-5
    # and nothing else passes for it: a student without another block, of the same shapes
    student, other = load_model(resolve_model(str(out))), plan_of(source.architecture, ["Dn3.A1"])
    with pytest.raises(ProofError, match="its answer differs"):
        save_model(
            student, tmp_path / "other", plan, {}, original=original_of(source, other.built("neutral"))
        )


def test_code_that_is_not_known_is_never_run(own_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(own_folder, folder)
    file = code_in(folder / "unet")
    file.write_text("raise SystemExit('this must not run')\n" + file.read_text())
    for place in (folder, folder / "unet"):
        with pytest.raises(UnsupportedModelError, match="never runs"):
            resolve_model(str(place))
    file.unlink()  # as fetched from a hub, of which no code is read: the name says which code it is
    load_model(resolve_model(str(folder)))
    config = json.loads((folder / "unet" / "config.json").read_text())
    name = config["_class_name"]
    config["auto_map"] = {"AutoModel": f"modeling_pruned_0123456789ab.{name}"}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    (folder / "unet" / "modeling_pruned_0123456789ab.py").write_text("raise SystemExit")
    with pytest.raises(UnsupportedModelError, match="never runs"):
        resolve_model(str(folder / "unet"))
    for wrong in ({}, {"AutoModel": "../x.y"}, {"AutoModel": f"os.{name}"}, {"AutoModel": 3}, "text"):
        with pytest.raises(UnsupportedModelError):
            family_of({**config, "auto_map": wrong}).model_class()


def test_the_plain_class_refuses_the_folder(own_folder: Path, tmp_path: Path) -> None:
    plain = diffusers.UNet2DConditionModel
    without = tmp_path / "without"  # as it was before its config said so itself: the weights do not fit
    shutil.copytree(own_folder / "unet", without)
    config = json.loads((without / "config.json").read_text())
    del config["quantization_config"]
    (without / "config.json").write_text(json.dumps(config))
    for low in (True, False):
        for ignored in (True, False):
            with pytest.raises(ValueError, match="trust_remote_code=True"):
                plain.from_pretrained(
                    own_folder / "unet", low_cpu_mem_usage=low, ignore_mismatched_sizes=ignored
                )
        with pytest.raises((ValueError, RuntimeError), match=r"expected shape|size mismatch"):
            plain.from_pretrained(without, low_cpu_mem_usage=low)
    with safe_open(own_folder / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        empty = [name for name in file.keys() if not file.get_tensor(name).numel()]  # noqa: SIM118
    assert sorted(empty) == ["down_blocks.0.attentions.0.norm.weight", "up_blocks.1.resnets.1.norm1.weight"]


def refuses(load: Callable[[], Any], *errors: type[Exception]) -> bool:
    try:
        load()
    except errors:
        return True
    return False


def _changed_lists(removed: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Other lists of what is gone, each with what was done to it."""
    first, second = removed
    whole = {**removed[first], "mark": ""}
    yield "one more", {**removed, "down_blocks.1.attentions.0": whole}
    yield "one more of those that others have", {**removed, "down_blocks.1.resnets.1": removed[second]}
    yield "one less", {first: removed[first]}
    yield "none", {}
    yield "another input", {**removed, first: {**removed[first], "hands_on": ["encoder_hidden_states"]}}
    yield "another width", {**removed, second: {**removed[second], "channels": None}}
    yield "one mark less", {**removed, first: whole}
    yield "no mark", {path: {**how, "mark": ""} for path, how in removed.items()}


@pytest.mark.usefixtures("modules")
def test_a_list_of_what_is_gone_that_was_changed_is_refused(own_folder: Path, tmp_path: Path) -> None:
    """By plain diffusers, which would leave out weights of a block that is said to be gone, and by prune-lab."""
    folder = tmp_path / "changed"
    shutil.copytree(own_folder / "unet", folder)
    config = json.loads((folder / "config.json").read_text())
    kinds = dict(_changed_lists(config["removed"])) | {"another main path": config["removed"]}
    for said, removed in kinds.items():
        changed = {**config, "removed": removed}
        if said == "another main path":
            changed["main_path"] = config["main_path"][:-1]
        (folder / "config.json").write_text(json.dumps(changed))
        for low in (True, False):
            how = {"trust_remote_code": True, "low_cpu_mem_usage": low}
            load = partial(diffusers.AutoModel.from_pretrained, str(folder), **how)
            assert refuses(load, ValueError, RuntimeError), (said, low)
        assert refuses(lambda: load_model(resolve_model(str(folder))), PruneLabError), said


@pytest.mark.usefixtures("modules")
def test_how_diffusers_loads_it(own_folder: Path, tmp_path: Path) -> None:
    unet = str(own_folder / "unet")
    model = diffusers.AutoModel.from_pretrained(unet, trust_remote_code=True)
    assert type(model).__name__ == "PrunedUNet2DConditionModel"
    with pytest.raises(TypeError):
        diffusers.AutoModel.from_pretrained(Path(unet), trust_remote_code=True)
    with pytest.raises(ValueError, match="custom code"):  # it looks beside the index
        diffusers.AutoModel.from_pretrained(str(own_folder), subfolder="unet", trust_remote_code=True)
    with pytest.raises(ValueError, match="trust_remote_code"):
        diffusers.DiffusionPipeline.from_pretrained(str(own_folder))
    # without the entry of the index a plain U-Net would come back without a word: its weights do not fit
    wrong = tmp_path / "wrong"
    shutil.copytree(own_folder, wrong)
    index = json.loads((wrong / "model_index.json").read_text())
    index["unet"] = ["diffusers", "UNet2DConditionModel"]
    (wrong / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="load it with trust_remote_code=True"):
        diffusers.DiffusionPipeline.from_pretrained(str(wrong), trust_remote_code=True)
    # what is saved again has its code, also twice, and from what prune-lab loaded
    loaded = diffusers.DiffusionPipeline.from_pretrained(str(own_folder), trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "again")
    ours = load_pipeline(resolve_model(str(tmp_path / "again")))
    ours.save_pretrained(tmp_path / "third")
    assert code_in(tmp_path / "third" / "unet").read_bytes() == code_in(own_folder / "unet").read_bytes()
    third = diffusers.DiffusionPipeline.from_pretrained(str(tmp_path / "third"), trust_remote_code=True)
    inputs = random_inputs(model, 0)
    assert torch.equal(answer(third.unet, inputs), answer(model, inputs))
    # it is a model like others: its numbers change their format, and nothing of it counts as quantised
    assert third.to(torch.float16).unet.dtype == torch.float16
    assert "quantization_config" not in model.config
    half = diffusers.AutoModel.from_pretrained(unet, trust_remote_code=True, dtype=torch.float16)
    assert {parameter.dtype for parameter in half.to("cpu").parameters()} == {torch.float16}
    rebuilt = type(model).from_config(model.config)
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(answer(rebuilt.eval(), inputs), answer(model, inputs))


@pytest.mark.usefixtures("modules")
def test_what_is_pushed_to_a_hub_has_its_code(
    own_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ways to a hub that diffusers has; what lies in the folder when it goes up is what arrives."""
    model = load_model(resolve_model(str(own_folder)))
    sent: list[set[str]] = []

    def upload(folder_path: Any, **_: Any) -> None:
        sent.append({path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*")})

    created = SimpleNamespace(repo_id="us/it")
    card = SimpleNamespace(save=lambda path: None)
    for module in ("modeling_utils", "pipeline_utils"):
        place = "diffusers.models." if module == "modeling_utils" else "diffusers.pipelines."
        monkeypatch.setattr(f"{place}{module}.create_repo", lambda *_, **__: created)
        monkeypatch.setattr(f"{place}{module}.load_or_create_model_card", lambda *_, **__: card)
        monkeypatch.setattr(f"{place}{module}.populate_model_card", lambda *_, **__: card)
    monkeypatch.setattr("diffusers.utils.hub_utils.create_repo", lambda *_, **__: created)
    monkeypatch.setattr("diffusers.utils.hub_utils.load_or_create_model_card", lambda *_, **__: card)
    monkeypatch.setattr("diffusers.utils.hub_utils.populate_model_card", lambda *_, **__: card)
    monkeypatch.setattr("diffusers.utils.hub_utils.upload_folder", upload)
    model.save_pretrained(str(tmp_path / "saved"), push_to_hub=True, repo_id="us/it")
    model.push_to_hub("us/it")
    load_pipeline(resolve_model(str(own_folder)), model=model).save_pretrained(
        str(tmp_path / "pipeline"), push_to_hub=True, repo_id="us/it"
    )
    code = code_in(own_folder / "unet").name
    assert [code in names or f"unet/{code}" in names for names in sent] == [True] * 3


@pytest.mark.long
@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_a_transformer_with_code_draws_in_plain_diffusers(
    kind: str, pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, out = pipeline_folder(kind), tmp_path / "out"
    teacher = load_pipeline(resolve_model(str(folder)))
    architecture = architecture_of(teacher.transformer)
    plan = plan_of(architecture, [architecture.blocks[0].name, architecture.blocks[-1].name])
    run("prune", folder, "--plan", plan.text, "--form", "own", "--out", out)
    with pytest.raises(ValueError, match="load it with trust_remote_code=True"):
        type(teacher.transformer).from_pretrained(out / "transformer")
    plain = diffusers.DiffusionPipeline.from_pretrained(str(out), trust_remote_code=True)
    with pytest.raises(TypeError):  # one of the traps in the folder's README
        diffusers.DiffusionPipeline.from_pretrained(
            str(out), trust_remote_code=True, transformer=plain.transformer
        )
    plain.save_pretrained(tmp_path / "again")
    again = diffusers.DiffusionPipeline.from_pretrained(str(tmp_path / "again"), trust_remote_code=True)
    assert type(again.transformer).__name__ == f"Pruned{type(teacher.transformer).__name__}"
    with bypassed(teacher.transformer, plan):
        wanted = picture_of(teacher, kind)
    for pipeline in (plain, again, load_pipeline(resolve_model(str(out)))):
        assert torch.equal(picture_of(pipeline, kind), wanted)


def _files_of_releases() -> list[str]:
    return sorted(path.stem for path in own_code.known_files().values())


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("file", _files_of_releases())
def test_students_of_every_file_that_was_shipped_load(file: str, tiny_unet: Any, tmp_path: Path) -> None:
    architecture = architecture_of(tiny_unet)
    plan = parse_plan("-Dn1.A1 -Up2.R2", architecture).built("own")
    folder = tmp_path / "student"
    save_model(materialise(tiny_unet, plan), folder, plan, {})
    code = own_code.FOLDER / f"{file}.py"
    code_in(folder).unlink()
    shutil.copy(code, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": f"{file}.{config['_class_name']}"}
    if "quantization_config" not in code.read_text():  # as folders were before a config said who may load it
        del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    source = resolve_model(str(tmp_path / "student"))
    student = load_model(source)
    assert type(student).__module__ == file
    inputs = random_inputs(tiny_unet, 0)
    with bypassed(tiny_unet, plan):
        wanted = answer(tiny_unet, inputs)
    assert torch.equal(answer(student, inputs), wanted)
    plain = diffusers.AutoModel.from_pretrained(str(tmp_path / "student"), trust_remote_code=True)
    assert torch.equal(answer(plain.eval(), inputs), wanted)
    # what is pruned further is of the newest file
    again = materialise(student, in_form(source.architecture, parse_plan("-Dn1.R1", source.architecture)))
    assert type(again).__module__ == own_code.NEWEST
    assert plain_config(again)["removed"].keys() > plain_config(student)["removed"].keys()


@pytest.mark.usefixtures("modules")
def test_two_versions_of_the_file_in_one_process(
    own_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, old = tmp_path / "new", own_folder / "unet"
    shutil.copytree(old, new)
    text = code_in(old).read_text() + "\nVERSION = 2\n"
    name = f"modeling_pruned_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    code_in(new).unlink()
    (new / f"{name}.py").write_text(text)
    config = (new / "config.json").read_text().replace(code_in(old).stem, name)
    (new / "config.json").write_text(config)
    models = [
        diffusers.AutoModel.from_pretrained(str(one), trust_remote_code=True) for one in (old, new, old)
    ]
    files = [type(model).__module__ for model in models]
    assert files == [code_in(old).stem, name, code_in(old).stem]
    inputs = random_inputs(load_model(resolve_model(str(old))), 0)
    assert torch.equal(answer(models[0], inputs), answer(models[1], inputs))
    # here: a version that the package knows beside the newest one
    with pytest.raises(UnsupportedModelError, match="never runs"):
        resolve_model(str(new))
    package = tmp_path / "package"
    package.mkdir()
    for path in (code_in(old), new / f"{name}.py"):
        shutil.copy(path, package)
    monkeypatch.setattr(own_code, "FOLDER", package)
    own_code.known_files.cache_clear()
    try:
        assert type(load_model(resolve_model(str(new)))).__module__ == name
        assert type(load_model(resolve_model(str(old)))).__module__ == code_in(old).stem
    finally:
        monkeypatch.undo()
        own_code.known_files.cache_clear()
        own_code._module.cache_clear()


def test_the_names_of_the_package_s_files_are_their_hashes() -> None:
    assert own_code.NEWEST in {path.stem for path in own_code.known_files().values()}
    for digest, path in own_code.known_files().items():
        assert path.stem == f"modeling_pruned_{digest[:12]}", (
            "a file that was shipped must not be changed: add another"
        )
        assert "prune_lab" not in path.read_text(), "it needs torch and diffusers alone"


def test_its_code_goes_to_a_hub_and_is_not_fetched_from_one(own_folder: Path) -> None:
    names = [one.name for one in uploads_of(own_folder)]
    code = f"unet/{code_in(own_folder / 'unet').name}"
    assert code in names
    fetched = files_to_fetch(names, json.loads((own_folder / "model_index.json").read_text()))
    assert code not in fetched
    assert "unet/config.json" in fetched


def test_a_single_file_has_no_place_for_code(own_folder: Path, tmp_path: Path) -> None:
    said = run("export", own_folder, "--to", "single-file", "--out", tmp_path / "x.safetensors", code=2)
    assert "code of its own" in said
    assert not (tmp_path / "x.safetensors").exists()


def test_neutral_students_are_plain_ones(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "neutral"
    run("prune", tiny_pipeline_folder, "--plan", "-Dn1.A1 -Dn1.R2", "--form", "neutral", "--out", out)
    unet = diffusers.UNet2DConditionModel.from_pretrained(out / "unet")
    assert len(unet.down_blocks[0].attentions[0].transformer_blocks) == 0
    assert (
        "comes back to life" in (out / "README.md").read_text()
        or "back to life" in (out / "README.md").read_text()
    )
    said = run(
        "prune",
        tiny_pipeline_folder,
        "--plan",
        "-Dn1.A1",
        "--form",
        "native",
        "--out",
        tmp_path / "x",
        code=2,
    )
    assert "an attention block for each residual block" in said
    said = run(
        "prune", tiny_pipeline_folder, "--plan", "-Dn1.A1", "--form", "plain", "--out", tmp_path / "x", code=2
    )
    assert "native, neutral, own" in said


FRESH = """
import sys


class NoPruneLab:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "prune_lab":
            raise ImportError("prune_lab is not there")


sys.meta_path.insert(0, NoPruneLab())
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
picture = pipeline("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
assert "prune_lab" not in sys.modules
print(sum(one.numel() for one in pipeline.unet.parameters()), picture.shape, float(picture.mean()))
"""


@pytest.mark.long
def test_plain_diffusers_draws_with_it_where_prune_lab_is_not(own_folder: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    code = [sys.executable, "-P", "-c", FRESH, str(own_folder)]
    done = subprocess.run(code, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pipeline = load_pipeline(resolve_model(str(own_folder)))
    generator = torch.Generator().manual_seed(0)
    picture = pipeline("a cat", num_inference_steps=2, generator=generator, output_type="np").images
    assert done.stdout.split() == f"{size(pipeline.unet)} {picture.shape} {float(picture.mean())}".split()


# In a run -------------------------------------------------------------------------------------------------------------


def test_a_candidate_keeps_its_form(tiny_unet: Any, tmp_path: Path) -> None:
    architecture = architecture_of(tiny_unet)
    plan = parse_plan("-Dn1.A1 -Up3.R2", architecture).built("own")
    candidate = build_candidate(tiny_unet, plan, tmp_path / plan.id, runs=2)
    assert load_candidate(candidate.folder, architecture).plan.form == "own"
    student = load_student(candidate)
    assert candidate.profile.params == size(student) == cost_table(architecture).of(plan).params
    paths = {name for name, _ in student.named_modules()}
    for points in ("stages", "blocks", "self-attention"):
        for form in ("own", "neutral"):
            pairs = feature_pairs(architecture, plan.built(form), points)  # type: ignore[arg-type]
            assert pairs
            if form == "own":
                assert {pair.student_path for pair in pairs} <= paths
            assert not {pair.teacher_path for pair in pairs} & {
                architecture.block(name).path for name in plan.removed if points == "blocks"
            }


def test_training_leaves_neutral_blocks_alone(tiny_unet: Any, tmp_path: Path) -> None:
    architecture = architecture_of(tiny_unet)
    plan = parse_plan("-Dn2.A1 -Dn1.R2 -Up2.R2", architecture)
    neutral, own = (materialise(tiny_unet, plan.built(form)) for form in ("neutral", "own"))  # type: ignore[arg-type]
    frozen = layout_of(architecture, plan.built("neutral")).frozen
    setup: Any = SimpleNamespace(settings=DistillConfig(learning_rate=1e-2), device="cpu")
    inputs = random_inputs(tiny_unet, 0)
    for unet, paths in ((neutral, frozen), (own, ())):
        student = Student(lambda: unet, (), tmp_path, paths)  # noqa: B023
        made = StudentRun.of(setup, student, unet, {})
        before = copy.deepcopy(unet.state_dict())
        for _ in range(2):
            unet(**inputs)[0].square().mean().backward()
            made.state.optimizer.step()
            made.state.optimizer.zero_grad()
            made.state.ema.step(list(unet.parameters()))
        same = {name for name, tensor in unet.state_dict().items() if torch.equal(tensor, before[name])}
        kept = (
            {name for name in before if name.startswith(tuple(f"{path}." for path in paths))}
            if paths
            else set()
        )
        assert kept <= same
        assert len(same) < len(before) / 2
        unet.eval()
    # trained alike, as both are the same network: what is silent has stayed silent
    torch.testing.assert_close(answer(neutral, inputs), answer(own, inputs), rtol=1e-4, atol=1e-4)


def test_a_student_with_code_is_scored_and_pruned_again(tiny_unet: Any) -> None:
    architecture = architecture_of(tiny_unet)
    student = materialise(tiny_unet, parse_plan("-Dn1.A2 -Up2.R2", architecture).built("own"))
    found = architecture_of(student)
    names = ({block.name for block in one.blocks} for one in (architecture, found))
    assert next(names) - next(names) == {"Dn1.A2", "Up2.R2"}
    inputs = random_inputs(tiny_unet, 0)
    sets = [frozenset({"Dn2.A1"}), frozenset({"Up2.A2", "Md.R2"}), frozenset[str]()]
    probe = random_probe(plain_config(tiny_unet), samples=2, seed=0, timesteps=2)
    ((_, answers),) = predict_without(student, probe, sets, batch=2, width=1)
    for removed, answered in zip(sets, answers, strict=True):
        both = plan_of(architecture, {"Dn1.A2", "Up2.R2"} | removed)
        with bypassed(tiny_unet, both):
            wanted = predict(tiny_unet, probe)
            torch.testing.assert_close(answered, wanted, rtol=0, atol=5e-5)
            exact = answer(tiny_unet, inputs)
        if removed:
            again = in_form(found, plan_of(found, removed))
            assert again.form == "own"
            smaller = materialise(student, again)
            assert torch.equal(answer(smaller, inputs), exact)
            assert size(smaller) == left_by_hand(tiny_unet, architecture, both)


def test_distill_builds_a_plan_as_prune_does(
    pipeline_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where settings say the form: the plan that was asked for is the one that is distilled."""
    found: list[list[tuple[tuple[str, ...], str]]] = []

    def stop(session: Any, only: Any) -> None:
        found.append([(plan.removed, plan.form) for plan in ensure_plans(session) if plan.id in only])
        raise PlanError("that is all")

    monkeypatch.setattr("prune_lab.api.model.ensure_distilled", stop)
    folder = pipeline_folder("dit")
    for number, (plan, more) in enumerate(
        [
            ("-B1 -B3", {}),
            ("-B2", {}),
            ("-B1", {"search": {"form": "own"}}),
            ("-B2", {"search": {"form": "own"}}),
        ]
    ):
        settings = RunConfig(model=str(folder), search=SearchConfig(**more.get("search", {})))
        with pytest.raises(PlanError, match="that is all"):
            Model(settings, tmp_path / str(number)).distill(plan)
    forms = [[(("B1", "B3"), "own")], [(("B2",), "native")], [(("B1",), "own")], [(("B2",), "native")]]
    assert found == forms
    settings = RunConfig(model=str(folder), search=SearchConfig(form="neutral"))
    with pytest.raises(FormError, match="neutral form"):
        Model(settings, tmp_path / "neutral").distill("-B1")
    assert len(found) == len(forms)


def form_of_all(run_folder: Path) -> dict[str, str]:
    found = {}
    for path in run_folder.glob("candidates/*/plan.json"):
        plan = json.loads(path.read_text())
        found[plan["id"]] = plan["form"]
    return found


@pytest.mark.long
@pytest.mark.parametrize("form", ["own", "neutral"])
def test_a_whole_run_in_another_form(
    form: str, small_run_config: Any, tmp_path: Path, quick_report: None
) -> None:
    config = small_run_config(
        search={
            "budgets": ("params<=85%",),
            "controls": ("bk-base",),
            "form": form,
            "keep": ("Dn4", "Md", "Dn1.A2"),
            "remove": ("Dn1.A1",),  # without its neighbour: no plan of these is native
        },
        repair={"kind": "shift"},
    )
    root = tmp_path / "run"
    run_all(config, root)
    forms = form_of_all(root)
    assert sorted(forms.values()) == sorted(["native", form])
    for plan_id, found in forms.items():
        distilled = root / "candidates" / plan_id / "distilled"
        folders = [path.parent for path in distilled.rglob("config.json")] or [distilled]
        config_of = json.loads((folders[0] / "config.json").read_text())
        assert config_of["_class_name"].startswith("Pruned") == (found == "own")
    ranking = ranking_from_frame(read_records(Run(root).ranking, RANKING))
    made = {entry.result.plan_id: entry.result.form for entry in ranking.entries}
    assert {plan_id: made[plan_id] for plan_id in forms} == forms
    # it is still what it was cut to be: of the cost that is said, and what is silent has stayed silent
    architecture = resolve_model(config.model).architecture
    for plan_id, found in forms.items():
        candidate = load_candidate(root / "candidates" / plan_id, architecture)
        silent = tuple(f"{path}." for path in layout_of(architecture, candidate.plan).frozen)
        assert bool(silent) == (found == "neutral")
        states = [
            load_student(candidate, state).state_dict() for state in ("pruned", "repaired", "distilled")
        ]
        same = {
            name
            for name, tensor in states[0].items()
            if all(torch.equal(tensor, state[name]) for state in states)
        }
        assert {name for name in states[0] if name.startswith(silent)} <= same if silent else True
        assert len(same) < len(states[0]) / 2
        student = load_student(candidate, "distilled")
        stated, counted = (
            cost_table(architecture).of(candidate.plan),
            count_macs(student, tokens=architecture.tokens),
        )
        assert (size(student), counted.total) == (stated.params, stated.macs)
