"""A student with code of its own whose config.json somebody changed: one line that says what, never Python's words."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from prune_lab.blocks import architecture_of
from prune_lab.errors import FormError, ModelFormatError, UnsupportedModelError
from prune_lab.families import plain_config
from prune_lab.forms import in_form
from prune_lab.models import resolve_model
from prune_lab.plans import parse_plan
from prune_lab.surgery import materialise

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
_PLAN = "-Dn1.A2 -Up2.R2 ~Dn1.A1.heads=1@0 ~Dn3.R1.hidden=2@0,1"


@pytest.fixture(scope="module")
def narrow(tiny_unet_shared: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a student without some blocks, of which others are narrower, as diffusers saves it."""
    folder = tmp_path_factory.mktemp("narrow")
    architecture = architecture_of(tiny_unet_shared)
    plan = in_form(architecture, parse_plan(_PLAN, architecture))
    student: Any = materialise(copy.deepcopy(tiny_unet_shared), plan)
    student.save_pretrained(folder)
    return folder


@pytest.fixture
def student(narrow: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(narrow, tmp_path / "student"))


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def write(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def line_of(folder: Path, kind: type[Exception]) -> str:
    with pytest.raises(kind) as error:
        resolve_model(str(folder))
    line = str(error.value)
    assert "\n" not in line
    assert len(line) < 700
    for word in ("Error", "object has no", "not supported", "unhashable", "int()"):
        assert word not in line, line
    return line


@pytest.mark.parametrize(
    "value", ["two", [1, 2], -1, 0, 1.5, None, {"heads": 1}, True, 9, 3, float("nan")], ids=repr
)
def test_a_width_of_the_wrong_kind(student: Path, value: object) -> None:
    config = config_of(student)
    config["widths"][ATTENTION]["heads"] = value
    write(student, config)
    line = line_of(student, UnsupportedModelError)
    assert f"widths.{ATTENTION}.heads" in line
    assert "from 1 to 2" in line


@pytest.mark.parametrize(
    ("widths", "named"),
    [
        ("all", "widths"),
        ([1], "widths"),
        (7, "widths"),
        ({ATTENTION: 4}, ATTENTION),
        ({ATTENTION: None}, ATTENTION),
        ({"no.such.module": {"heads": 1}}, "no.such.module"),
        ({"": {"heads": 1}}, "widths"),
        ({ATTENTION: {"no_such_number": 1}}, "no_such_number"),
        ({ATTENTION: {"training": 1}}, "training"),
        ({ATTENTION: {"to_q": 1}}, "to_q"),
    ],
)
def test_widths_of_the_wrong_kind(student: Path, widths: object, named: str) -> None:
    write(student, config_of(student) | {"widths": widths})
    assert named in line_of(student, UnsupportedModelError)


GONE = "down_blocks.0.attentions.1"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"removed": "all"}, "removed"),
        ({"removed": [GONE]}, "removed"),
        ({"removed": {GONE: None}}, GONE),
        ({"removed": {GONE: {"hands_on": "hidden_states"}}}, "hands_on"),
        ({"removed": {GONE: {"hands_on": ["hidden_states"], "channels": "8"}}}, "channels"),
        ({"removed": {GONE: {"hands_on": ["hidden_states"], "keeps": 3}}}, "keeps"),
        ({"removed": {GONE: {"hands_on": ["hidden_states"], "mark": 3}}}, "mark"),
        ({"removed": {GONE: {"hands_on": ["no_such_input"], "mark": "norm.weight"}}}, "no_such_input"),
        ({"removed": {GONE: {"hands_on": ["hidden_states"], "keeps": ["no.such"]}}}, "no.such"),
        ({"removed": {GONE: {"hands_on": ["hidden_states"], "surprise": 1}}}, "surprise"),
        ({"removed": {"no.such": {"hands_on": ["hidden_states"]}}}, "no.such"),
        ({"removed": {GONE: {"hands_on": ["hidden_states"], "in_tuple": True}}}, "mark"),
        ({"main_path": "conv_in"}, "main_path"),
        ({"main_path": [3]}, "main_path"),
        ({"main_path": ["no.such"]}, "no.such"),
    ],
)
def test_what_is_gone_of_the_wrong_kind(student: Path, change: dict[str, Any], named: str) -> None:
    write(student, config_of(student) | change)
    assert named in line_of(student, UnsupportedModelError)


def test_widths_that_fit_and_are_others_are_said_to_be(student: Path) -> None:
    """No shape but that of the mark shows the number of heads."""
    config = config_of(student)
    config["widths"][ATTENTION]["heads"] = 2
    write(student, config)
    assert "widths in its config.json were changed after it was written" in line_of(student, ModelFormatError)
    del config["widths"]
    write(student, config)
    assert "widths in its config.json were changed after it was written" in line_of(student, ModelFormatError)


def test_what_is_gone_that_is_another_is_said_to_be(student: Path) -> None:
    config = config_of(student)
    config["removed"][GONE]["in_tuple"] = not config["removed"][GONE]["in_tuple"]
    write(student, config)
    line = line_of(student, ModelFormatError)
    assert "what is removed by its config.json was changed after it was written" in line


def test_students_as_they_are_written_are_taken(student: Path) -> None:
    assert plain_config(resolve_model(str(student)).config)["widths"]


def test_a_padded_plan_whose_blocks_no_plain_model_holds_names_the_own_form(tiny_unet_shared: Any) -> None:
    architecture = architecture_of(tiny_unet_shared)
    plan = parse_plan("-Dn1.R2 ~Dn3.A1.heads=1@0", architecture)
    with pytest.raises(FormError, match="--form own") as error:
        in_form(architecture, plan, "padded")
    assert "padded" in str(error.value)
    assert "Up4" in str(error.value)  # and says why
