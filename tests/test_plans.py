"""Plans: reading, checking, identity, and the walk that decides whether plain diffusers can express them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_config

import prune_lab
from prune_lab.blocks import architecture_of
from prune_lab.errors import (
    NonNativePlanError,
    PlanError,
    PruneLabError,
    UnknownBlockError,
    UnremovableBlockError,
)
from prune_lab.families import FAMILIES
from prune_lab.plans import (
    PruningPlan,
    is_native,
    native_choices,
    native_layout,
    parse_plan,
    plan_from_json,
    plan_of,
    read_one_plan,
    read_plans,
    removed_samplers,
)
from prune_lab.runs import plan_file

PRESETS = Path(prune_lab.__file__).parent / "presets"


def preset(name):
    return architecture_of(json.loads((PRESETS / f"{name}.json").read_text()))


SD = preset("sd-v1.4")
PIXELS = {"sample_size": 16, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4} | {
    f"{way}_block_types": [f"{way.title()}Block2D"] * 2 for way in ("down", "up")
}
REMOVABLE = [block.name for block in SD.blocks if block.removable]
plans = st.sets(st.sampled_from(REMOVABLE)).map(lambda names: plan_of(SD, names))

BASE = (
    "-Dn1.R2 -Dn1.A2 -Dn2.R2 -Dn2.A2 -Dn3.R2 -Dn3.A2 -Dn4.R2 "
    "-Up1.R2 -Up2.R2 -Up2.A2 -Up3.R2 -Up3.A2 -Up4.R2 -Up4.A2"
)
SMALL = BASE + " -Md.R1 -Md.A1 -Md.R2"
TINY = SMALL + " -Dn4.R1 -Up1.R1 -Up1.R3"


@pytest.mark.parametrize(
    ("name", "removed", "v14", "v21"),
    [
        ("bk-base", BASE, 579_384_964, 583_480_964),
        ("bk-small", SMALL, 482_346_884, 485_787_524),
        ("bk-tiny", TINY, 323_384_964, 326_825_604),
    ],
)
def test_presets_leave_the_published_models(name, removed, v14, v21):
    plan = parse_plan(name, SD)
    assert set(plan.removed) == {item[1:] for item in removed.split()}
    assert plan.name == name
    for architecture, params in ((SD, v14), (preset("sd-v2.1-base"), v21)):
        layout = native_layout(architecture, parse_plan(name, architecture))
        assert architecture_of(layout.config).total_params == params


def test_preset_configs_are_the_official_ones():
    """The fields that BK-SDM's released configs change."""
    small = native_layout(SD, parse_plan("bk-small", SD)).config
    assert small["layers_per_block"] == 1
    assert small["mid_block_type"] is None
    assert list(small["block_out_channels"]) == [320, 640, 1280, 1280]
    v2 = preset("sd-v2.1-base")
    tiny = native_layout(v2, parse_plan("bk-tiny", v2)).config
    assert list(tiny["block_out_channels"]) == [320, 640, 1280]
    assert list(tiny["down_block_types"]) == ["CrossAttnDownBlock2D"] * 3
    assert list(tiny["up_block_types"]) == ["CrossAttnUpBlock2D"] * 3
    assert list(tiny["attention_head_dim"]) == [5, 10, 20]
    assert tiny["mid_block_type"] is None


def test_sources_are_the_official_weight_mapping():
    """BK-SDM's ``copy_weight_from_teacher``, module by module (student <- teacher)."""

    def moved(name):
        layout = native_layout(SD, parse_plan(name, SD))
        pairs = {layout.renamed(unit.path): unit.path for unit in SD.units}
        return {ours: theirs for ours, theirs in pairs.items() if ours not in (None, theirs)}

    official = {"up_blocks.0.resnets.1": "up_blocks.0.resnets.2"}
    for i in (1, 2, 3):
        official[f"up_blocks.{i}.resnets.1"] = f"up_blocks.{i}.resnets.2"
        official[f"up_blocks.{i}.attentions.1"] = f"up_blocks.{i}.attentions.2"
    for name in ("bk-base", "bk-small"):
        assert moved(name) == official
    official = {}
    for i in (0, 1, 2):
        for part in ("resnets", "attentions"):
            official[f"up_blocks.{i}.{part}.0"] = f"up_blocks.{i + 1}.{part}.0"
            official[f"up_blocks.{i}.{part}.1"] = f"up_blocks.{i + 1}.{part}.2"
    for i in (0, 1):
        official[f"up_blocks.{i}.upsamplers.0"] = f"up_blocks.{i + 1}.upsamplers.0"
    assert moved("bk-tiny") == official


def test_samplers_leave_only_with_everything_further_in():
    assert removed_samplers(SD, parse_plan("bk-tiny", SD)) == ("Dn3.down", "Up1.up")
    assert removed_samplers(SD, parse_plan("bk-tiny +Md.R1", SD)) == ()
    assert removed_samplers(SD, parse_plan("bk-small", SD)) == ()


def test_text_grammar():
    assert parse_plan("bk-base -Md", SD) == parse_plan("bk-small", SD)
    assert parse_plan("bk-small +Md", SD) == parse_plan("bk-base", SD)
    assert parse_plan("-Dn1.R2+A2", SD) == parse_plan("-Dn1.R2 -Dn1.A2", SD)
    assert parse_plan("teacher", SD) == parse_plan("", SD) == plan_of(SD, [])


@given(plans)
def test_text_and_json_read_back(plan):
    assert parse_plan(plan.text, SD) == plan
    assert plan_from_json(json.loads(json.dumps(plan.to_json())), SD) == plan


@given(plans, plans)
def test_the_id_is_the_content(one, other):
    assert (one.id == other.id) == (set(one.removed) == set(other.removed))
    assert one.named("another name").id == one.id


def test_names_and_origin_are_data():
    plan = parse_plan("bk-base", SD).named("bk-base", "", "search-1", origin="search")
    assert (plan.name, plan.label, plan.names) == ("bk-base", "bk-base", ("bk-base", "search-1"))
    again = plan_from_json(json.loads(json.dumps(plan.to_json())), SD)
    assert (again.names, again.origin, again.id) == (plan.names, "search", plan.id)
    assert again.named("mine").origin == "search"
    assert plan_of(SD, ["Md.R1"]).label == plan_of(SD, ["Md.R1"]).id
    old = {**plan.to_json(), "name": "bk-base"}
    with pytest.raises(PlanError, match='write "names"'):
        plan_from_json(old, SD)


@given(plans, plans, st.sampled_from(["bk-base", "bk-small", "bk-tiny"]), st.booleans())
def test_a_file_whose_id_or_name_is_of_another_plan_is_refused(plan, other, name, by_name):
    preset = parse_plan(name, SD)
    edited = {**plan.to_json(), "removed": list(other.removed)}
    fits = other == plan
    if by_name:
        edited = {**preset.to_json(), "removed": list(other.removed)}
        del edited["id"]
        fits = other == preset
    if fits:
        assert plan_from_json(edited, SD) == other
        return
    with pytest.raises(PlanError, match="remove its id and names, or restore its blocks"):
        plan_from_json(edited, SD)
    unnamed = {"architecture": SD.signature, "removed": edited["removed"]}
    assert plan_from_json(unnamed, SD) == other


def test_names_of_a_megabyte_are_shortened():
    long = "Dn1" + "x" * 10**6
    good = parse_plan("-Md", SD).to_json()
    for changed in ({"removed": [long]}, {"architecture": [long]}, {"id": long}):
        with pytest.raises(PruneLabError) as caught:
            plan_from_json({**good, **changed}, SD)
        assert len(str(caught.value)) < 500
    for changed in ({"removed": [1]}, {"names": [{}]}, {"origin": []}):
        with pytest.raises(PlanError, match="other things than text"):
            plan_from_json({**good, **changed}, SD)


def test_removed_is_in_order_of_execution():
    plan = plan_of(SD, reversed(REMOVABLE))
    assert list(plan.removed) == REMOVABLE


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("-Dn2.R1", UnremovableBlockError, r"Dn2\.R1.*from 320 to 640"),
        ("-Dn1.R7", UnknownBlockError, r"'Dn1\.R7'"),
        ("bk-huge", PlanError, "bk-huge.*bk-base"),
        ("Dn1.R2", PlanError, "-BLOCK and"),
    ],
)
def test_errors_name_the_block_and_the_reason(text, error, message):
    with pytest.raises(error, match=message):
        parse_plan(text, SD)


def refusal(text, architecture):
    try:
        parse_plan(text, architecture)
    except PlanError as error:
        return str(error)
    return ""


def test_presets_are_refused_where_they_have_no_meaning():
    with pytest.raises(
        PlanError, match=r"four stages.*defined for this model: koala-1b, koala-700m, ssd-1b\)"
    ):
        parse_plan("bk-base", preset("sdxl-base"))
    names = sorted({name for family in FAMILIES.values() for name in family.plans})
    others = {name: family for name, family in FAMILIES.items() if not family.plans}
    assert names
    assert others
    pixels = architecture_of({"_class_name": "UNet2DModel", **PIXELS})
    for architecture in (SD, pixels, architecture_of(tiny_config("PixArtTransformer2DModel"))):
        found = []
        for name in names:
            said = refusal(f"{name} -{architecture.blocks[-1].name}", architecture)
            if not said:
                found.append(name)
                continue
            assert name in said or "BK-SDM" in said
            assert f"-{architecture.blocks[-1].name}'" in said or "-Dn1.R2 -Dn1.A2" in said
            defined = re.search(r"defined for this model: (.*)\)$", said)
            assert defined is not None
            assert name not in defined[1].split(", ")
        assert found == (names[:3] if architecture is SD else [])
    # what has no preset of that name at all is told the ones that there are
    with pytest.raises(PlanError, match=r"cannot read 'bk-huge' .* use -BLOCK and \+BLOCK"):
        parse_plan("bk-huge", pixels)


def test_a_plan_of_another_architecture_is_refused():
    other = preset("sd-v2.1-base")
    plan = parse_plan("bk-base", SD)
    with pytest.raises(PlanError, match="made for architecture"):
        native_layout(other, plan)
    with pytest.raises(PlanError, match=other.signature):
        plan_from_json(plan.to_json(), other)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("-Dn2.R2 -Dn2.A2", r"Dn2 would keep 1 .* and Up3 3"),
        ("-Dn1.A1", r"Dn1 would keep 2 residual and 1 attention"),
        ("-Md.A1", "Md would keep 2 residual and 0 attention"),
        # Both stages keep the right numbers, but Up4.R3 would read a skip it was not trained with.
        ("-Dn1.R2 -Dn1.A2 -Up4.R3 -Up4.A3", r"Up4\.R2 would read another skip"),
    ],
)
def test_plans_that_no_config_describes(text, reason):
    plan = parse_plan(text, SD)
    assert not is_native(SD, plan)
    with pytest.raises(NonNativePlanError, match=reason):
        native_layout(SD, plan)


def test_every_combination_of_native_choices_is_native():
    levels = native_choices(SD)
    assert [len(level) for level in levels] == [29, 13, 17, 33]
    assert all(level[0] == frozenset() for level in levels)

    @given(st.tuples(*(st.sampled_from(level) for level in levels)))
    def check(options):
        assert is_native(SD, plan_of(SD, frozenset().union(*options)))

    check()


@given(plans)
def test_no_native_plan_is_missing_from_the_choices(plan):
    options = [set(option) for option in native_choices(SD)]
    levels = [({"Dn1", "Up4"}), ({"Dn2", "Up3"}), ({"Dn3", "Up2"}), ({"Dn4", "Md", "Up1"})]
    listed = all(
        frozenset(name for name in plan.removed if name.split(".")[0] in stages) in option
        for stages, option in zip(levels, options, strict=True)
    )
    assert listed == is_native(SD, plan)


def test_choices_agree_with_brute_force_on_the_mid_stage():
    """All eight subsets of Md, decided by hand: whole, one residual block, or nothing."""
    by_hand = {
        "": True,
        "-Md.R1": False,
        "-Md.A1": False,
        "-Md.R2": False,
        "-Md.R1 -Md.A1": True,
        "-Md.A1 -Md.R2": True,
        "-Md.R1 -Md.R2": False,
        "-Md.R1 -Md.A1 -Md.R2": True,
    }
    assert {text: is_native(SD, parse_plan(text, SD)) for text in by_hand} == by_hand


def test_plans_are_read_from_files(tmp_path):
    lines = tmp_path / "plans.txt"
    lines.write_text("bk-base  # the paper's\n\n-Md\n")
    assert read_plans(str(lines), SD) == (parse_plan("bk-base", SD), parse_plan("-Md", SD))
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(parse_plan("bk-tiny", SD).to_json()))
    assert read_plans(str(file), SD) == (parse_plan("bk-tiny", SD),)
    file.write_text("[3]")
    with pytest.raises(PlanError, match=r"plan\.json, found no list of removed blocks in it as number 1: "):
        read_plans(str(file), SD)
    file.write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))  # a config is no plan
    with pytest.raises(
        PlanError, match=r"asked to read .*plan\.json, found no list of removed blocks in it: "
    ):
        read_plans(f"{file}#1", SD)
    file.write_text(json.dumps([parse_plan("bk-tiny", SD).to_json() | {"architecture": "other"}]))
    with pytest.raises(PlanError, match=r"asked to read .*plan\.json: the plan was made for"):
        read_plans(f"{file}#1", SD)
    file.write_text("[]")
    with pytest.raises(PlanError, match=r"the plan '1' of .*plan\.json, .*; there is no plan in it$"):
        read_plans(f"{file}#1", SD)


def test_the_folder_of_a_student_stands_for_its_plan(tmp_path, monkeypatch):
    plan = parse_plan("bk-tiny", SD).built("neutral")
    for folder, inner in (("pipeline", "unet"), ("model", ""), ("candidate", "pruned")):
        (tmp_path / folder / inner).mkdir(parents=True)
        (tmp_path / folder / inner / "plan.json").write_text(json.dumps(plan.to_json()))
        (read,) = read_plans(str(tmp_path / folder), SD)
        assert (read, read.form) == (plan, "neutral")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PlanError, match=r"in the folder .*empty, found no plan\.json .*plans\.json#1$"):
        read_plans(str(tmp_path / "empty"), SD)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bk-base").mkdir()  # as a person calls a student; the word is the preset's
    assert read_plans("bk-base", SD) == (parse_plan("bk-base", SD),)


def test_one_of_the_plans_of_a_file_is_chosen_by_number_name_or_id(tmp_path):
    plans = [parse_plan(text, SD) for text in ("bk-base", "-Md")]
    file = tmp_path / "plans.json"
    file.write_text(json.dumps([plan.named(f"search-{at}").to_json() for at, plan in enumerate(plans)]))
    lines = tmp_path / "plans.txt"
    lines.write_text("bk-base  # the paper's\n\n-Md\n")
    for text in (f"{file}#2", f"{file}#search-1", f"{file}#{plans[1].id}", f"{lines}#2"):
        assert read_one_plan(text, SD) == plans[1]
        assert read_plans(text, SD) == (plans[1],)
        assert plan_file(text)[0] in (str(file), str(lines))
    assert plan_file("-Md") == ("-Md", "")
    for text in (f"{file}#3", f"{file}#0", f"{file}#nothing"):
        with pytest.raises(PlanError, match=r"has none such; it has #1 search-0, #2 search-1$"):
            read_plans(text, SD)
    with pytest.raises(PlanError, match=r"found 2 in .*choose by number or name, as in '.*plans\.json#1'"):
        read_one_plan(str(file), SD)


def test_the_name_is_not_part_of_a_plan():
    assert PruningPlan(("Md.R1",), "x", ("one",)) == PruningPlan(("Md.R1",), "x", ("two",), "search")
