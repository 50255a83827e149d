"""Width: sites, plans with widths, cuts, costs, scores and forms, each against something independent."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch_pruning
from conftest import TINY_UNET
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TINY_TRANSFORMERS, random_inputs, tiny_model, with_random_weights
from torch import nn
from typer.testing import CliRunner
from unet_kinds import KINDS

from prune_lab.blocks import Architecture, architecture_of
from prune_lab.cli import app
from prune_lab.counting import count_macs
from prune_lab.errors import (
    BudgetError,
    DataError,
    FormError,
    ModelFormatError,
    PlanError,
    ProofError,
    UnknownCriterionError,
)
from prune_lab.families import FAMILIES, Site, meta_model, own_code
from prune_lab.families import widths as families_widths
from prune_lab.forms import in_form, layout_of, why_not
from prune_lab.importance import UNIT_CRITERIA, ScoringContext, score_units
from prune_lab.importance.unit_scores import _derivatives, units_gated
from prune_lab.models import load_model, resolve_model
from prune_lab.plans import PruningPlan, parse_plan, plan_from_json, plan_of, refuse_widths
from prune_lab.probes import predict, random_probe
from prune_lab.profiling import cost_table
from prune_lab.repair import repair
from prune_lab.runs import plan_id_of, read_plan_file
from prune_lab.search import Budget, Constraints, depth_and_width, narrowed_to, predicted_loss
from prune_lab.search.widths import unit_savings
from prune_lab.surgery import (
    bypassed,
    materialise,
    prune_pipeline,
    unit_magnitudes,
    with_first_units,
    with_units_chosen,
)
from prune_lab.width import Width, keeping_largest, parse_width, width_of
from prune_lab.width.graph import (
    cut_in_memory,
    dependency_graph,
    group_of,
    magnitude_estimator,
    taylor_estimator,
    unit_importance,
)

EXACT = 1e-5  # that shorter sums may change an answer


def answer(model: Any, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(**inputs, return_dict=False)[0]
    return found if isinstance(found, torch.Tensor) else torch.stack(list(found))


def drawn(architecture: Architecture, chance: random.Random, *, removing: bool = True) -> PruningPlan:
    """A plan that narrows a third of the sites, and may remove a block or two."""
    names = [block.name for block in architecture.blocks if block.removable]
    removed = plan_of(architecture, chance.sample(names, max(0, min(2, len(names) - 1))) if removing else ())
    gone = {*removed.removed}
    widths = []
    for site in architecture.sites:
        if (
            site.block not in gone
            and architecture.block(site.block).inside not in gone
            and chance.random() < 0.34
        ):
            units = sorted(chance.sample(range(site.count), chance.randint(1, site.count)))
            widths.append(width_of(site, units))
    return plan_of(architecture, removed.removed, widths=widths)


def emptied_by_hand(model: Any, architecture: Architecture, plan: PruningPlan) -> Any:
    """A copy of ``model`` whose last layers read none of the channels that leave: weights set to 0 one by one."""
    copied = copy.deepcopy(model)
    sites = {site.name: site for site in architecture.sites}
    for width in plan.widths:
        site = sites[width.site]
        for path in site.narrow:
            weight = copied.get_submodule(path).weight.data
            size = weight.shape[1] // width.of
            for unit in range(width.of):
                if unit not in width.kept:
                    weight[:, unit * size : (unit + 1) * size] = 0
    return copied


# Sites -------------------------------------------------------------------------------------------------------------


def test_the_sites_of_a_small_unet(tiny_config: dict[str, Any]) -> None:
    architecture = architecture_of(tiny_config)
    sites = {site.name: site for site in architecture.sites}
    groups = TINY_UNET["norm_num_groups"]
    assert [name for name in sites if name.startswith("Dn1.")][:4] == [
        "Dn1.R1.hidden",
        "Dn1.A1.heads",
        "Dn1.A1.cross",
        "Dn1.A1.ff",
    ]
    assert sites["Dn1.R1.hidden"].count == groups
    assert sum(site.kind == "hidden" for site in sites.values()) == 22
    model = meta_model(tiny_config)
    layer = model.down_blocks[0].attentions[0].transformer_blocks[0]
    assert sites["Dn1.A1.heads"].count == layer.attn1.heads
    assert sites["Dn1.A1.ff"].channels == layer.ff.net[2].in_features
    assert all(site.block in {block.name for block in architecture.blocks} for site in sites.values())


@pytest.mark.parametrize("name", [name for name in TINY_TRANSFORMERS if name in FAMILIES])
def test_no_tensor_is_of_two_sites_and_none_reaches_beyond_its_block(name: str) -> None:
    architecture = architecture_of(tiny_model(name))
    members = [(member.path, member.side) for site in architecture.sites for member in site.members]
    assert len(members) == len(set(members))
    for site in architecture.sites:
        block = architecture.block(site.block).path
        assert all(member.path.startswith(f"{block}.") for member in site.members)


def test_a_layer_inside_a_block_has_its_own_sites() -> None:
    config = {**TINY_UNET, "transformer_layers_per_block": [1, 2, 1, 1]}
    names = {site.name for site in architecture_of(config).sites}
    assert {"Dn2.A1.T1.ff", "Dn2.A1.T2.cross", "Dn1.A1.heads"} <= names
    assert "Dn2.A1.ff" not in names


# Plans -------------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_a_plan_is_the_same_after_its_text_and_its_json(seed: int) -> None:
    architecture = architecture_of(TINY_UNET)
    plan = drawn(architecture, random.Random(seed))
    assert parse_plan(plan.text, architecture) == plan
    assert parse_plan(plan.text, architecture).id == plan.id
    assert plan_from_json(json.loads(json.dumps(plan.to_json())), architecture) == plan


def test_old_plans_keep_their_ids_and_widths_change_them(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    architecture = architecture_of(tiny_config)
    base = parse_plan("bk-base", architecture)
    assert base.id == plan_id_of(architecture.signature, base.removed)
    assert "widths" not in base.to_json()
    texts = ["bk-base ~Dn3.R1.hidden=2@0,1", "bk-base ~Dn3.R1.hidden=2@0,2", "bk-base ~Dn3.R1.hidden=2"]
    plans = [parse_plan(text, architecture) for text in texts]
    assert len({base.id, *(plan.id for plan in plans)}) == 4
    path = tmp_path / f"{plans[0].id}.json"
    path.write_text(json.dumps(plans[0].to_json()))
    assert read_plan_file(path)["id"] == plans[0].id
    path.write_text(json.dumps({**plans[0].to_json(), "widths": {"Dn3.R1.hidden": [1, 2]}}))
    with pytest.raises(DataError, match="the id"):
        read_plan_file(path)
    by_hand = tmp_path / "mine.json"  # one that a person wrote lacks id, names, origin and widths
    by_hand.write_text(json.dumps({"architecture": architecture.signature, "removed": ["Dn1.A1"]}))
    assert read_plan_file(by_hand)["removed"] == ["Dn1.A1"]
    named = {**plans[0].to_json(), "names": ["bk-base"], "id": None}
    with pytest.raises(PlanError, match="name bk-base"):
        plan_from_json(named, architecture)


def test_a_person_writes_what_is_counted_there(tiny_config: dict[str, Any]) -> None:
    architecture = architecture_of(tiny_config)
    ff = next(site for site in architecture.sites if site.name == "Dn1.A1.ff")
    plan = parse_plan(f"bk-base ~Dn1.A1.ff={ff.channels - 8}/{ff.channels} ~Dn3.R1.hidden=1/4", architecture)
    assert [(width.site, width.count, width.of) for width in plan.widths] == [
        ("Dn1.A1.ff", ff.count - 1, ff.count),
        ("Dn3.R1.hidden", 1, 4),
    ]
    assert plan.removed == parse_plan("bk-base", architecture).removed
    assert parse_plan("~Dn3.R1.hidden=4/4", architecture) == plan_of(architecture, ())  # all of it stays


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("~Dn3.R1.hidden", "write ~SITE=COUNT/OF"),
        ("~Dn3.R1.hiden=2", "Dn3.R1 has hidden=4"),
        ("~Dn3.A1.head=2/4", "Dn3.A1 has heads=2 cross=2 ff=128"),
        ("~Dn3.R9.hidden=2", "nearest: Dn3.R"),
        ("~Dn3.R1.hidden=2/16", "has 4 groups of its norm, not 16"),
        ("~Dn3.R1.hidden=0", "keep 1 to 4"),
        ("~Dn3.R1.hidden=5", "keep 1 to 4"),
        ("~Dn1.A1.ff=12", "come in 8s"),
        ("~Dn3.R1.hidden=2@0,4", "from 0 to 3"),
        ("~Dn3.R1.hidden=2@1,1", "from 0 to 3"),
        ("~Dn3.R1.hidden=2@0", "which 2 units"),
        ("~Dn3.R1.hidden=2@0-999999999", "which 2 units"),
        ("~Dn3.A1.heads=2@0,1,3", "such as @0-1"),
        ("~Dn3.A1.ff=24@0", "(a unit is 8 channels), such as @0-2"),
        ("~Dn3.A1.ff=24@0,1,99", "(a unit is 8 channels)"),
        ("~Dn3.R1.hidden=2@-", "which 2 units"),
        ("-Dn1.R2 ~Dn1.R2.hidden=2", "removed by the same plan"),
        ("bk-base ~Dn1.A2.heads=1", "removed by the same plan"),
        ("~Dn3.R1.hidden=٣", "write ~SITE=COUNT/OF"),
    ],
)
def test_what_cannot_be_is_one_line(tiny_config: dict[str, Any], text: str, said: str) -> None:
    with pytest.raises(PlanError) as error:
        parse_plan(text, architecture_of(tiny_config))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "widths", [[], "x", {"Dn3.R1.hidden": []}, {"Dn3.R1.hidden": "2"}, {"Dn3.R1.hidden": [True]}]
)
def test_a_damaged_width_in_a_file_is_refused(tiny_config: dict[str, Any], widths: Any) -> None:
    architecture = architecture_of(tiny_config)
    value = {"architecture": architecture.signature, "removed": [], "widths": widths}
    with pytest.raises(PlanError):
        plan_from_json(value, architecture)


def test_units_that_are_not_chosen_are_said_and_never_guessed(tiny_unet: Any) -> None:
    architecture = architecture_of(tiny_unet)
    plan = parse_plan("~Dn3.R1.hidden=2", architecture)
    with pytest.raises(PlanError, match="not which"):
        materialise(tiny_unet, plan.built("own"))
    with pytest.raises(PlanError, match="not which"), bypassed(tiny_unet, plan):
        pass
    assert keeping_largest(plan.widths[0], [1, 3, 3, 3]).kept == (1, 2)
    with pytest.raises(PlanError, match="makes blocks narrower"):
        refuse_widths([plan], "rank")


# Cuts --------------------------------------------------------------------------------------------------------------


def cut_is_masked(model: Any, plan: PruningPlan, inputs: Any, form: str = "own") -> float:
    """The largest difference of the compact model from ``model`` with weights emptied by hand, checked against 1e-5."""
    architecture = architecture_of(model)
    by_hand = emptied_by_hand(model, architecture, plan)
    with bypassed(by_hand, plan.without_widths()):
        wanted = answer(by_hand, inputs)
    with bypassed(model, plan):
        masked = answer(model, inputs)
    student = materialise(model, in_form(architecture, plan, form))  # type: ignore[arg-type]
    found = answer(student, inputs)
    scale = max(1.0, float(wanted.abs().max()))
    assert float((masked - wanted).abs().max()) <= EXACT * scale
    assert float((found - wanted).abs().max()) <= EXACT * scale
    return float((found - wanted).abs().max())


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_compact_unet_of_any_kind_is_its_teacher_masked(kind: str) -> None:
    chance = random.Random(kind)
    config = KINDS[kind](chance)
    model = with_random_weights(load_plain(config), 1)
    cut_is_masked(
        model, drawn(architecture_of(model), chance), random_inputs(model, latent=config["sample_size"])
    )


def load_plain(config: dict[str, Any]) -> Any:
    return getattr(diffusers, config["_class_name"]).from_config(config).eval()


@pytest.mark.parametrize("name", [name for name in TINY_TRANSFORMERS if name in FAMILIES])
def test_a_compact_transformer_is_its_teacher_masked(name: str) -> None:
    model = tiny_model(name)
    architecture = architecture_of(model)
    if not architecture.sites:
        pytest.skip("no width is known there")
    plan = drawn(architecture, random.Random(name), removing=False)
    if plan.widths:
        cut_is_masked(model, plan, random_inputs(model))


def test_padded_is_plain_and_computes_the_same_and_stays_narrow(tiny_unet: Any) -> None:
    with_random_weights(tiny_unet)  # no number is 0 by itself
    architecture = architecture_of(tiny_unet)
    plan = parse_plan(
        "bk-small ~Dn1.R1.hidden=2@1,3 ~Dn1.A1.heads=1@0 ~Dn1.A1.cross=1@1 ~Dn1.A1.ff=16@0,3", architecture
    )
    inputs = random_inputs(tiny_unet)
    cut_is_masked(tiny_unet, plan, inputs, "padded")
    student: Any = materialise(tiny_unet, in_form(architecture, plan, "padded"))
    assert type(student) is diffusers.UNet2DConditionModel
    zeros = {name: tensor == 0 for name, tensor in student.state_dict().items()}
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        student(**inputs, return_dict=False)[0].square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    after = student.state_dict()
    emptied = [name for name in zeros if zeros[name].any()]
    assert len(emptied) == 7 + 4 + 4 + 3  # tensors of the members: hidden, heads, cross, ff
    assert all((after[name][zeros[name]] == 0).all() for name in emptied)


def test_a_width_has_the_forms_own_and_padded(tiny_config: dict[str, Any]) -> None:
    architecture = architecture_of(tiny_config)
    plan = parse_plan("-Dn1.A2 ~Dn3.R1.hidden=2@0,1", architecture)  # its depth part is no plain model
    assert in_form(architecture, plan).form == "own"
    assert "no plain diffusers config" in why_not(architecture, plan)
    assert "forms own and padded" in why_not(architecture, plan.built("neutral"))
    with pytest.raises(FormError):
        layout_of(architecture, plan.built("padded"))
    assert "leaves all widths" in why_not(architecture, parse_plan("bk-base", architecture).built("padded"))


def test_a_student_with_widths_is_a_model_that_can_be_pruned_again(tiny_unet: Any) -> None:
    architecture = architecture_of(tiny_unet)
    first = parse_plan("-Dn2.A1 ~Dn3.R1.hidden=3@0,2,3 ~Dn1.A1.heads=1@1", architecture)
    student = materialise(tiny_unet, in_form(architecture, first))
    again = architecture_of(student)
    assert {site.name: site.count for site in again.sites}["Dn3.R1.hidden"] == 3
    assert "Dn2.A1.ff" not in {site.name for site in again.sites}
    second = parse_plan("-Dn2.R2 ~Dn3.R1.hidden=2@0,1 ~Dn1.A1.ff=8@1", again)
    inputs = random_inputs(tiny_unet)
    twice = materialise(student, in_form(again, second))
    at_once = parse_plan(
        "-Dn2.A1 -Dn2.R2 ~Dn3.R1.hidden=2@0,2 ~Dn1.A1.heads=1@1 ~Dn1.A1.ff=8@1", architecture
    )
    assert torch.equal(
        answer(twice, inputs), answer(materialise(tiny_unet, in_form(architecture, at_once)), inputs)
    )


# torch-pruning -----------------------------------------------------------------------------------------------------


def test_torch_pruning_cuts_the_same_tensors(tiny_unet: Any) -> None:
    architecture = architecture_of(tiny_unet)
    plan = drawn(architecture, random.Random(5), removing=False)
    kinds = {width.site.rsplit(".", 1)[1] for width in plan.widths}
    assert kinds == {"hidden", "heads", "cross", "ff"}
    ours = materialise(tiny_unet, in_form(architecture, plan)).state_dict()
    theirs = copy.deepcopy(tiny_unet)
    theirs.conv_in.weight.requires_grad_(False)
    theirs.down_blocks[0].resnets[0].conv1.weight.requires_grad_(False)
    theirs.train()
    kept = {
        site: width.kept for width in plan.widths for site in architecture.sites if site.name == width.site
    }
    cut_in_memory(theirs, kept)
    assert theirs.training
    assert [name for name, one in theirs.named_parameters() if not one.requires_grad] == [
        "conv_in.weight",
        "down_blocks.0.resnets.0.conv1.weight",
    ]
    found = theirs.state_dict()
    assert ours.keys() - found.keys() == {
        "widths_mark"
    }  # an empty tensor, which says by which widths it was cut
    assert all(torch.equal(found[name], ours[name]) for name in found)
    inputs = random_inputs(tiny_unet)
    assert torch.equal(
        answer(theirs.eval(), inputs), answer(materialise(tiny_unet, in_form(architecture, plan)), inputs)
    )


@pytest.mark.parametrize("kind", ["hidden", "heads", "cross", "ff"])
def test_a_group_that_is_not_the_site_is_found(tiny_unet: Any, kind: str, graph_of: Any) -> None:
    graph, model, sites = graph_of
    site: Site = next(site for site in sites if site.kind == kind)
    group_of(graph, model, site, [0])
    fewer = dataclasses.replace(site, members=site.members[1:])
    with pytest.raises(AssertionError, match="the site has"):
        group_of(graph, model, fewer, [0])


@pytest.fixture(scope="module")
def graph_of(tiny_unet_shared: Any) -> Any:
    model = copy.deepcopy(tiny_unet_shared)
    return dependency_graph(model), model, architecture_of(model).sites


def test_magnitudes_from_files_are_torch_prunings(graph_of: Any) -> None:
    graph, model, sites = graph_of
    architecture, tensors = architecture_of(model), model.state_dict()
    for site in (
        next(site for site in sites if site.kind == kind) for kind in ("hidden", "heads", "cross", "ff")
    ):
        theirs = unit_importance(graph, model, site, magnitude_estimator())
        ours = unit_magnitudes(architecture, site, tensors.__getitem__)
        assert ours == pytest.approx(theirs.tolist(), rel=1e-5)


def test_estimators_share_nothing() -> None:
    first, second = magnitude_estimator(), magnitude_estimator()
    first.target_types.append(nn.Embedding)  # type: ignore[attr-defined]
    assert nn.Embedding not in second.target_types  # type: ignore[attr-defined]
    plain = torch_pruning.importance.GroupMagnitudeImportance()
    assert nn.Embedding not in plain.target_types
    assert second.normalizer is None  # type: ignore[attr-defined]
    assert taylor_estimator().group_reduction == "sum"  # type: ignore[attr-defined]


def test_the_same_offset_in_every_norm_group_is_another_function(tiny_unet: Any) -> None:
    """What torch-pruning's loop does, and why units are whole groups: statistics of a group are of all its channels."""
    block = tiny_unet.down_blocks[2].resnets[0]
    groups, width = block.norm2.num_groups, block.norm2.num_channels // block.norm2.num_groups
    assert width > 1
    state = (
        torch.randn(2, block.norm2.num_channels, 4, 4)
        * torch.linspace(1, 5, block.norm2.num_channels)[:, None, None]
    )
    whole = block.norm2(state)

    def cut(channels: list[int], left: int) -> torch.Tensor:
        norm = nn.GroupNorm(left, len(channels), eps=block.norm2.eps)
        norm.weight.data, norm.bias.data = block.norm2.weight.data[channels], block.norm2.bias.data[channels]
        return norm(state[:, channels])

    offsets = [channel for channel in range(groups * width) if channel % width < width - 1]
    in_groups = list(range(width * (groups - 1)))
    assert (cut(offsets, groups) - whole[:, offsets]).abs().max() > 1e-2
    assert (cut(in_groups, groups - 1) - whole[:, in_groups]).abs().max() < 1e-6
    assert (
        (cut(in_groups, groups) - whole[:, in_groups]).abs().max() > 1e-2
        if len(in_groups) % groups == 0
        else True
    )


# Costs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd1", "simple", "unet2d"])
def test_the_table_is_the_count_of_the_compact_model(kind: str) -> None:
    chance = random.Random(kind)
    config = KINDS[kind](chance)
    architecture = architecture_of(config)
    plan = in_form(architecture, drawn(architecture, chance))
    costs = cost_table(architecture)
    cost, layout = costs.of(plan), layout_of(architecture, plan)
    counted = count_macs(layout.config, tokens=architecture.tokens)
    assert (cost.macs, cost.attention_macs) == (counted.total, counted.attention)
    assert cost.params == sum(parameter.numel() for parameter in meta_model(layout.config).parameters())
    assert cost.latency_ms is None
    assert cost.activation_bytes is None


def test_a_padded_student_costs_what_its_depth_part_costs(tiny_config: dict[str, Any]) -> None:
    architecture = architecture_of(tiny_config)
    plan = parse_plan("bk-base ~Dn1.R1.hidden=1@0", architecture)
    costs = cost_table(architecture)
    assert costs.of(plan.built("padded")) == costs.of(plan.without_widths())
    assert costs.of(plan.built("own")).macs < costs.of(plan.without_widths()).macs


# Scores ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def context(tiny_unet: Any, tiny_config: dict[str, Any]) -> ScoringContext:
    return ScoringContext(tiny_unet, random_probe(tiny_config, samples=4, seed=0, timesteps=2))


def some(context: ScoringContext) -> tuple[Site, ...]:
    names = ("Dn1.R1.hidden", "Dn1.A1.heads", "Dn1.A1.cross", "Dn1.A1.ff")
    return tuple(site for site in context.architecture.sites if site.name in names)


@pytest.mark.parametrize("criterion", UNIT_CRITERIA)
def test_every_criterion_of_units_conforms(context: ScoringContext, criterion: str) -> None:
    sites, model = some(context), context.model.train()
    site = sites[0]
    unit = slice(
        site.size, 2 * site.size
    )  # the second one is of no use: nothing reads it, and nothing writes it
    with torch.no_grad():
        block = model.get_submodule(site.path)
        block.conv2.weight[:, unit] = 0
        for layer in (block.conv1, block.norm2, block.time_emb_proj):
            layer.weight[unit] = 0
            layer.bias[unit] = 0
    before, state = predict(model, context.probe), copy.deepcopy(model.state_dict())
    grad = [parameter.requires_grad for parameter in model.parameters()]
    first, again = (score_units(context, sites, criterion) for _ in range(2))
    assert model.training
    assert grad == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert torch.equal(predict(model, context.probe), before)
    assert all(np.array_equal(first.impacts[one], again.impacts[one]) for one in sites)
    assert {one: len(values) for one, values in first.impacts.items()} == {one: one.count for one in sites}
    assert all((values >= 0).all() for values in first.impacts.values())
    assert first.samples == (0 if criterion in ("magnitude", "random") else len(context.probe))
    if criterion != "random":
        assert first.impacts[site][1] == pytest.approx(0, abs=1e-12)
        assert first.impacts[site][0] > 1e-12
        with torch.no_grad():
            model.get_submodule(sites[-1].narrow[0]).weight.fill_(float("nan"))
        with pytest.raises(DataError, match="not finite"):
            score_units(context, sites, criterion)


@pytest.mark.parametrize("criterion", ["gate-fisher", "gate-gradient", "taylor"])
def test_every_sample_counts_whatever_the_batch(context: ScoringContext, criterion: str) -> None:
    """torch-pruning's GroupHessianImportance, which is not used, keeps the last one alone."""
    sites = some(context)
    whole, single = (
        score_units(ScoringContext(context.model, context.probe, batch=batch), sites, criterion).impacts
        for batch in (4, 1)
    )
    for site in sites:
        assert single[site] == pytest.approx(whole[site], rel=1e-3, abs=1e-9)


def test_sums_of_weights_compare_between_sites(context: ScoringContext) -> None:
    """torch-pruning divides by the mean of each group where nothing else is said, which makes all sites alike."""
    sites = some(context)
    before = score_units(context, sites, "magnitude").impacts
    with torch.no_grad():
        for member in sites[0].members:
            layer = context.model.get_submodule(member.path)
            if not isinstance(layer, nn.GroupNorm):
                layer.weight.mul_(2)  # type: ignore[operator]
    after = score_units(context, sites, "magnitude").impacts
    assert after[sites[0]] == pytest.approx(4 * before[sites[0]], rel=1e-5)
    assert all(after[site] == pytest.approx(before[site]) for site in sites[1:])


def test_heads_that_a_processor_lays_out_by_the_width_of_the_block_are_no_site() -> None:
    config = KINDS["simple"](random.Random(0))
    model = load_plain(config)
    added = {
        path
        for path, module in model.named_modules()
        if "AddedKV" in type(getattr(module, "processor", None)).__name__
    }
    assert added
    assert not any(site.path in added for site in architecture_of(model).sites)


def test_there_is_no_criterion_of_another_name(context: ScoringContext) -> None:
    with pytest.raises(UnknownCriterionError, match="gate-fisher"):
        score_units(context, some(context), "l2")


def test_gates_of_0_are_the_mask(context: ScoringContext) -> None:
    sites, model = some(context), context.model
    plan = plan_of(context.architecture, (), widths=[width_of(site, [0]) for site in sites])
    _, inputs = next(iter(context.probe.batches(4, model)))
    gates = {site: torch.zeros(4, site.count).index_fill(1, torch.tensor([0]), 1.0) for site in sites}
    with units_gated(model, gates):
        gated = answer(model, inputs)
    with bypassed(model, plan):
        assert torch.equal(answer(model, inputs), gated)


def test_derivatives_by_gates_are_differences(context: ScoringContext) -> None:
    """Against a small step of each gate by itself, in double precision."""
    sites = some(context)[:2]
    model = context.model.double()
    probe = context.probe

    def objective(prediction: torch.Tensor, rows: slice) -> torch.Tensor:
        return prediction.double().square().flatten(1).sum(1)

    found, _ = _derivatives(ScoringContext(model, probe, batch=4), sites, objective)
    rows, inputs = next(iter(probe.batches(4, model)))
    step, place = 1e-4, 0
    for site in sites:
        for unit in range(site.count):
            ends = []
            for sign in (1, -1):
                gate = torch.ones(4, site.count, dtype=torch.float64)
                gate[:, unit] += sign * step
                with units_gated(model, {site: gate}):
                    ends.append(objective(probe.predicted(rows, model, inputs), rows))
            numeric = ((ends[0] - ends[1]) / (2 * step)).detach().numpy()
            assert found[place] == pytest.approx(numeric, rel=1e-2, abs=1e-4)
            place += 1


def test_under_a_budget_units_leave_by_what_they_lose_for_what_they_save(tiny_config: dict[str, Any]) -> None:
    architecture = architecture_of(tiny_config)
    costs = cost_table(architecture)
    chance = np.random.default_rng(0)
    impacts = {site: chance.random(site.count) for site in architecture.sites}
    base = parse_plan("bk-base", architecture)
    for share in (0.6, 0.5):
        most = share * costs.total.macs
        plan = narrowed_to(costs, base, impacts, "macs", most)
        # torch-pruning's own loop, asked for 0.7 of the channels, left 0.57 of the multiply-adds instead of 0.75
        assert most - max(unit_savings(costs, "macs").values()) <= costs.of(plan).macs <= most
        assert plan.removed == base.removed
        assert all(1 <= width.count < width.of for width in plan.widths)
        gone = sum(
            float(impacts[site][unit])
            for width in plan.widths
            for site in architecture.sites
            if site.name == width.site
            for unit in range(site.count)
            if unit not in width.kept
        )
        assert predicted_loss(plan, impacts) == pytest.approx(gone)
    with pytest.raises(BudgetError, match="remove blocks as well"):
        narrowed_to(costs, base, impacts, "macs", 0.01 * costs.total.macs)
    even = narrowed_to(costs, base, impacts, "params", 0.6 * costs.total.params, channels=16)
    sizes = {site.name: site.size for site in architecture.sites}
    assert all(width.count * sizes[width.site] % 16 == 0 for width in even.widths)


def macs(most: float) -> Budget:
    return Budget("macs", int(most), f"macs<={most:,.0f}")


@pytest.mark.long
def test_blocks_and_widths_are_searched_together(tiny_config: dict[str, Any]) -> None:
    """Against every combination, where few sites have scores."""
    architecture = architecture_of(tiny_config)
    costs = cost_table(architecture)
    chance = np.random.default_rng(1)
    names = ("Dn3.R2.hidden", "Up2.R2.hidden")
    impacts = {site: 0.1 * chance.random(site.count) for site in architecture.sites if site.name in names}
    blocks = {"Dn3.R2": 0.25, "Up2.R2": 0.3, "Dn3.A2": 0.2, "Dn1.A1": 0.4}
    plans = []
    for size in range(len(blocks) + 1):
        for removed in itertools.combinations(blocks, size):
            left = {site: values for site, values in impacts.items() if site.block not in removed}
            for kept in itertools.product(*(range(1, site.count + 1) for site in left)):
                widths = []
                for (site, values), count in zip(left.items(), kept, strict=True):
                    units = sorted(int(unit) for unit in np.argsort(-values)[:count])
                    widths.append(width_of(site, units))
                plan = plan_of(architecture, removed, widths=widths)
                loss = sum(blocks[name] for name in removed) + predicted_loss(plan, impacts)
                plans.append((loss, costs.of(plan.built("own")), removed))
    for share in (0.97, 0.93, 0.9):
        most = share * costs.total.macs
        best = min(loss for loss, cost, _ in plans if cost.macs <= most)
        plan = depth_and_width(costs, blocks, impacts, [macs(most)])
        found = sum(blocks[name] for name in plan.removed) + predicted_loss(plan, impacts)
        assert costs.of(plan).macs <= most
        assert found == pytest.approx(best, rel=1e-5)
    with pytest.raises(BudgetError, match="the smallest plan of blocks and widths has"):
        depth_and_width(costs, blocks, impacts, [macs(0.1 * costs.total.macs)])
    with pytest.raises(BudgetError, match="measure the width savings"):
        depth_and_width(costs, blocks, impacts, [Budget("latency_ms", 1.0, "latency<=1ms")])
    rules = Constraints(keep=("Up2.R2",), remove=("Dn1.A1",), form="own")
    both = [macs(0.95 * costs.total.macs), Budget("params", int(0.97 * costs.total.params), "params<=97%")]
    plan = depth_and_width(costs, blocks, impacts, both, rules)
    kept_to = [
        loss
        for loss, cost, removed in plans
        if all(budget.allows(cost) for budget in both) and "Dn1.A1" in removed and "Up2.R2" not in removed
    ]
    assert "Dn1.A1" in plan.removed
    assert "Up2.R2" not in plan.removed
    found = sum(blocks[name] for name in plan.removed) + predicted_loss(plan, impacts)
    assert found == pytest.approx(min(kept_to), rel=1e-5)


# Repair ------------------------------------------------------------------------------------------------------------


def read_and_written(model: Any, path: str, probe: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(P, F) what the layer reads at each place, and (P, C) what it writes, over all rows of the probe."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    layer = model.get_submodule(path)
    with layer.register_forward_hook(lambda _module, args, out: found.append((args[0], out))):
        predict(model, probe)
    ((inputs, output),) = found
    if inputs.ndim == 4:
        inputs = nn.functional.unfold(inputs, 3, padding=1).transpose(1, 2)
        output = output.flatten(2).transpose(1, 2)
    return inputs.flatten(0, 1).double(), output.flatten(0, 1).double()


@pytest.mark.parametrize("text", ["~Dn1.R2.hidden=2@0,3", "~Dn1.A1.heads=1@1", "~Dn1.A1.ff=16@0,2"])
def test_a_width_is_repaired_by_least_squares(
    tiny_unet: Any, tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr("prune_lab.repair.fitting.STRENGTHS", (1e-10,))
    architecture = architecture_of(tiny_unet)
    plan = in_form(architecture, parse_plan(text, architecture))
    student: Any = materialise(tiny_unet, plan)
    probe = random_probe(tiny_config, samples=6, seed=0, timesteps=2)
    (path,) = next(site.narrow for site in architecture.sites if site.name == plan.widths[0].site)
    state, before = student.state_dict(), copy.deepcopy(student)
    report = repair(student, tiny_unet, plan, probe, kind="refit", heldout=probe)
    (found,) = report.repairs
    assert found.applied
    assert report.impact_after < report.impact_before
    _, wanted = read_and_written(tiny_unet, path, probe)
    inputs, _ = read_and_written(before, path, probe)
    with_one = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
    best = with_one @ torch.linalg.lstsq(with_one, wanted, driver="gelsd").solution
    _, now = read_and_written(student, path, probe)
    left = [float((one - wanted).square().sum() / wanted.square().sum()) for one in (best, now)]
    assert left[1] == pytest.approx(left[0], rel=1e-2, abs=1e-6)
    assert found.cut_error_after == pytest.approx(left[1], rel=1e-2, abs=1e-6)
    changed = [name for name, one in before.state_dict().items() if not torch.equal(state[name], one)]
    assert changed == [f"{path}.weight", f"{path}.bias"]  # the next layer's own numbers alone


# Folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_pipeline_with_widths_is_written_proved_and_refused_by_others(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    text = "bk-base ~Dn3.R1.hidden=2/4 ~Dn3.A1.heads=1 ~Dn3.A1.ff=24"
    out = tmp_path / "small"
    found = CliRunner().invoke(
        app, ["prune", str(tiny_pipeline_folder), "--plan", text, "--out", str(out), "--json"]
    )
    assert found.exit_code == 0, found.output
    row = json.loads(found.stdout)[0]  # a line of Python goes to stderr
    assert row["form"] == "own"
    source = resolve_model(str(tiny_pipeline_folder))
    teacher: Any = load_model(source)
    architecture = source.architecture
    proof = json.loads((out / "unet" / "provenance.json").read_text())["proof"]
    assert 0 <= proof["largest_difference"] <= EXACT * 100
    plan = with_units_chosen(parse_plan(text, architecture), architecture, teacher.state_dict().__getitem__)
    written = json.loads((out / "unet" / "plan.json").read_text())
    assert written["id"] == plan.id
    for how in ({}, {"ignore_mismatched_sizes": True}):
        for low in (True, False):
            with pytest.raises(ValueError, match="trust_remote_code=True"):
                diffusers.UNet2DConditionModel.from_pretrained(out / "unet", low_cpu_mem_usage=low, **how)
    inputs = random_inputs(teacher)
    mine = load_model(resolve_model(str(out)))
    with bypassed(teacher, plan):
        assert (answer(mine, inputs) - answer(teacher, inputs)).abs().max() <= EXACT
    mine.save_pretrained(tmp_path / "again")
    again: Any = diffusers.AutoModel.from_pretrained(str(tmp_path / "again"), trust_remote_code=True)
    assert torch.equal(answer(again.eval(), inputs), answer(mine, inputs))


@pytest.mark.parametrize("text", ["~Dn1.A1.heads=1@0", "-Dn1.A2 ~Dn1.A1.heads=1@0 ~Dn3.R1.hidden=2@0,1"])
def test_widths_that_somebody_changed_do_not_fit_the_weights(
    tiny_unet: Any, tmp_path: Path, text: str
) -> None:
    """The number of heads is in no shape of a tensor with numbers."""
    architecture = architecture_of(tiny_unet)
    student: Any = materialise(tiny_unet, in_form(architecture, parse_plan(text, architecture)))
    student.save_pretrained(tmp_path)
    inputs, path = random_inputs(tiny_unet), tmp_path / "config.json"
    loaded = load_model(resolve_model(str(tmp_path)))
    assert (answer(loaded, inputs) - answer(student, inputs)).abs().max() <= EXACT
    assert own_code.WIDTHS_MARK in student.state_dict()
    config = json.loads(path.read_text())
    attention = next(name for name, numbers in config["widths"].items() if "heads" in numbers)
    config["widths"][attention]["heads"] = 2
    path.write_text(json.dumps(config))
    with pytest.raises(ModelFormatError, match="widths_mark"):
        load_model(resolve_model(str(tmp_path)))
    for low in (True, False):
        with pytest.raises((ValueError, RuntimeError), match=r"shape|size mismatch"):
            diffusers.AutoModel.from_pretrained(str(tmp_path), trust_remote_code=True, low_cpu_mem_usage=low)


def test_students_of_the_model_file_before_go_on_loading(tiny_unet: Any, tmp_path: Path) -> None:
    architecture = architecture_of(tiny_unet)
    student: Any = materialise(tiny_unet, in_form(architecture, parse_plan("-Dn1.A1 -Up2.R2", architecture)))
    student.save_pretrained(tmp_path)
    before, path = "modeling_pruned_813815f10162", tmp_path / "config.json"
    config = json.loads(path.read_text().replace(own_code.NEWEST, before))
    del config["quantization_config"]  # as folders were before a config said who may load it
    path.write_text(json.dumps(config))
    (tmp_path / f"{own_code.NEWEST}.py").unlink()
    shutil.copy(own_code.FOLDER / f"{before}.py", tmp_path)
    inputs = random_inputs(tiny_unet)
    loaded: Any = load_model(resolve_model(str(tmp_path)))
    assert type(loaded).__module__ == before
    assert torch.equal(answer(loaded, inputs), answer(student, inputs))
    plan = parse_plan("~Dn1.A2.heads=1@1", architecture_of(loaded))  # and can be cut on, by the newest one
    again: Any = materialise(loaded, in_form(architecture_of(loaded), plan))
    assert type(again).__module__ == own_code.NEWEST
    with bypassed(loaded, plan):
        assert (answer(again, inputs) - answer(loaded, inputs)).abs().max() <= EXACT


@pytest.mark.long
def test_widths_are_profiled_and_compared(tiny_pipeline_folder: Path) -> None:
    """By the command line, also where it is still open which units stay."""
    plans = ["bk-base ~Dn3.A1.heads=1", "~Dn3.R1.hidden=2@0,3"]
    shown = [["profile", str(tiny_pipeline_folder), "--rounds", "2", "--latency"], ["compare"]]
    shown[0] += [word for plan in plans for word in ("--plan", plan)]
    shown[1] += [str(tiny_pipeline_folder), *plans]
    found = [CliRunner().invoke(app, [*words, "--json"]) for words in shown]
    assert all(one.exit_code == 0 for one in found), [one.output for one in found]
    profiled, compared = (json.loads(one.stdout) for one in found)
    assert [row["form"] for row in profiled] == ["", "own", "own"]
    assert all(row["median_ms"] > 0 for row in profiled)
    architecture = resolve_model(str(tiny_pipeline_folder)).architecture
    for row, other, text in zip(profiled[1:], compared[1:], plans, strict=True):
        plan = with_first_units(parse_plan(text, architecture))
        layout = layout_of(architecture, in_form(architecture, plan))
        sizes = [one.numel() for one in meta_model(layout.config).parameters()]
        assert row["params"] == other["params"] == sum(sizes)
        assert row["macs"] == other["macs"] == count_macs(layout.config, tokens=architecture.tokens).total
        assert not other["native"]


def test_a_wrong_cut_is_not_written(
    tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student whose norm keeps other groups than its convolution: shapes fit, the function does not."""
    source = resolve_model(str(tiny_pipeline_folder))
    plan = parse_plan("~Dn3.R1.hidden=2@0,3", source.architecture)
    taken = families_widths._taken
    monkeypatch.setattr(
        families_widths, "_taken", lambda tensor, side, places: taken(tensor, side, tuple(range(len(places))))
    )
    with pytest.raises(ProofError, match="differs"):
        prune_pipeline(source, in_form(source.architecture, plan), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_of_a_width(tiny_config: dict[str, Any]) -> None:
    sites = architecture_of(tiny_config).sites
    width = parse_width("~Dn1.A1.ff=24@0-1,3", sites)
    assert width.kept == (0, 1, 3)
    assert width.text.endswith("@0-1,3")
    assert width.chosen
    assert Width("a", 1, 2).short == "~a=1/2"
