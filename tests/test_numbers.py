"""Every number from outside: taken for what it says, or refused in one line. Texts are drawn; none is guessed at."""

from __future__ import annotations

import math
import time
import typing
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_UNET
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_bad_input import refused
from typer.testing import CliRunner

from prune_lab.blocks import Architecture, architecture_of
from prune_lab.cli import app
from prune_lab.config import NUMBERS, SETTINGS, RunConfig, check_numbers, load_config, parse_assignment
from prune_lab.config.toml import MOST_TOML, config_from_toml, setting_values, with_settings
from prune_lab.errors import BudgetError, ConfigError, PruneLabError
from prune_lab.plans import read_plans
from prune_lab.profiling import cost_table
from prune_lab.search import parse_budget, split_budgets

ODD = [
    *(
        "NaN",
        "nan",
        "inf",
        "-inf",
        "-1",
        "0",
        "-0",
        "1e400",
        "-1e400",
        str(10**30),
        "9" * 5000,
        "",
        " 5",
        "5 ",
    ),
    *(
        "1,2",
        "1,2,3",
        "٣",
        "५",
        "0x10",
        "0b1",
        "True",
        "true",
        "None",
        "null",
        "5.0",
        "5.5",
        "1_000",
        "+5",
        "1e3",
    ),
    *(
        "5\n[x]\ny=1",
        "5 # five",
        "[5]",
        "'5'",
        '"5"',
        "5%",
        "½",
        "- 5",
        "--5",
        "5;",
        "\x00",
        "5\x00",
        "a.b." * 9000,
    ),
]
TEXTS = st.sampled_from(ODD) | st.integers().map(str) | st.floats().map(repr) | st.text(max_size=8)


def meant(text: str) -> float | None:
    """The number that ``text`` is in TOML or Python, both of which people write; None where it is none."""
    try:
        return float(text.replace("_", "").split("#")[0])
    except ValueError:
        return None


# Settings --------------------------------------------------------------------------------------------------------

NUMERIC = [name for name, setting in SETTINGS.items() if setting.hint in (int, float)]


@settings(max_examples=300)
@given(name=st.sampled_from(NUMERIC), text=TEXTS)
@example(name="distill.steps", text="5\n[x]\ny=1")
@example(name="evaluate.guidance", text="1e400")
def test_any_text_for_a_number_is_that_number_or_refused(name: str, text: str) -> None:
    try:
        key, value = parse_assignment(f"{name}={text}")
        found = setting_values(with_settings(RunConfig(), {key: value}))[name]
    except ConfigError as error:
        assert len(str(error)) < 1000  # noqa: PT017
        return
    number = float(int(text, 0)) if text[:2] in ("0x", "0b", "0o") else meant(text)
    assert type(found) is SETTINGS[name].hint
    assert found == number
    assert math.isfinite(found)


@pytest.mark.parametrize("name", NUMERIC)
def test_no_setting_takes_more_than_can_be_done(name: str) -> None:
    for value in ("1e400", "nan", "-1", str(2**63), "1e300"):
        with pytest.raises(ConfigError, match=name):
            with_settings(RunConfig(), dict([parse_assignment(f"{name}={value}")]))


@given(seed=st.integers(-(10**30), 10**30))
@example(seed=2**63 - 1)
@example(seed=2**63)
def test_seeds_of_any_size_work_or_are_refused(seed: int) -> None:
    usable = 0 <= seed < 2**63
    for check in (
        lambda: check_numbers(seed=seed),
        lambda: config_from_toml(f"seed = {seed}"),
        lambda: config_from_toml(f"[evaluate]\nseeds = [0, {seed}]"),
    ):
        if usable:
            check()
        else:
            with pytest.raises(ConfigError, match="seed"):
                check()


# Verbs -----------------------------------------------------------------------------------------------------------


def options_of(verb: str) -> dict[str, Any]:
    """The options of ``verb`` that take a number, by their names in Python, with the type of each."""
    found: dict[str, Any] = {
        one.name or one.callback.__name__: one.callback for one in app.registered_commands if one.callback
    }
    callback = found[verb]
    hints = typing.get_type_hints(callback)
    return {
        name: hint
        for name, hint in hints.items()
        if {int, float} & {hint, *typing.get_args(hint)} and hint is not bool
    }


VERBS = {
    "generate": ["sd-v1.4", "--prompt", "a", "--out", "x.png"],
    "profile": ["sd-v1.4", "--no-latency"],
    "data": ["sd-v1.4", "--prompts", "default", "--out", "x"],
    "score": ["sd-v1.4"],
    "distill": ["sd-v1.4", "--plan", "bk-base", "--out", "x"],
}
CASES = [(verb, name) for verb in VERBS for name in options_of(verb)]


def test_the_verbs_have_options_that_take_numbers() -> None:
    assert {("generate", "seed"), ("generate", "guidance"), ("profile", "batch"), ("data", "count")} <= set(
        CASES
    )


@settings(max_examples=40)
@given(
    case=st.sampled_from(CASES),
    text=st.sampled_from(["NaN", "inf", "-1", "1e400", str(10**30), "", "1,2", "0x10", "True", "٣", "x"]),
)
def test_any_text_for_a_number_of_a_verb_is_one_line(
    case: tuple[str, str], text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    verb, name = case
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("verb"))
        refused(Path(), verb, *VERBS[verb], f"--{name.replace('_', '-')}={text}")


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [None, -1, 10**30, True, 1.0, "1", math.nan])
def test_numbers_of_python_are_checked_as_those_of_verbs(name: str, value: Any) -> None:
    if value is None:
        check_numbers(**{name: value})
        return
    with pytest.raises(ConfigError, match=f"asked for {name} = "):
        check_numbers(**{name: value})
    for guidance in (math.nan, math.inf, -1.0, 1e300, "7", True):
        with pytest.raises(ConfigError, match="guidance"):
            check_numbers(guidance=guidance)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nosuch"], "No such command 'nosuch'; prune-lab --help"),
        (["--nosuch"], "--nosuch"),
        (["generate"], "Missing argument 'MODEL'; prune-lab generate --help"),
        (["profile", "sd-v1.4", "--steps"], "--steps"),
        (["profile", "sd-v1.4", "--steps", "x"], "--steps"),
        (["profile", "sd-v1.4", "more"], "more"),
        (["blocks", "x/" * 3000], "too long"),
        (["blocks", "x" * 300], "too long"),
        (["search", "x" * 300, "--macs", "60%"], "too long"),
        (["report", "x" * 300], "too long"),
    ],
)
def test_a_mistake_in_calling_a_verb_is_one_line(arguments: list[str], named: str, tmp_path: Path) -> None:
    assert named in refused(tmp_path, *arguments)


def test_no_arguments_show_the_help() -> None:
    assert "Commands" in CliRunner().invoke(app, []).output


@pytest.mark.long
def test_a_run_that_is_shown_only_asks_the_scheduler_too(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    line = refused(
        tmp_path, "run", tiny_pipeline_folder, "--macs", "70%", "--dry-run", "--set", "evaluate.steps=1001"
    )
    assert "evaluate.steps = 1,001" in line
    assert "1,000 timesteps" in line


# Budgets ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def architecture() -> Architecture:
    return architecture_of(TINY_UNET, tokens=8)


UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@settings(max_examples=150)
@given(
    digits=st.from_regex(r"[0-9]{0,5}([,._ ]?[0-9]{1,4}){0,3}", fullmatch=True) | TEXTS,
    unit=st.sampled_from(["%", "x", "", "M", "k", "mm", " %"]),
)
@example(digits="1,2,3", unit="%")
@example(digits="1,000", unit="%")
@example(digits="9" * 5000, unit="%")
def test_any_budget_means_its_number_or_is_refused(
    digits: str, unit: str, architecture: Architecture
) -> None:
    text = f"params<={digits}{unit}"
    costs = cost_table(architecture)
    try:
        budgets = [parse_budget(one, architecture, costs) for one in split_budgets(text)]
    except PruneLabError as error:
        assert len(str(error)) < 2000  # noqa: PT017
        return
    written = f"{digits}{unit}".strip()
    plain = written.rstrip("%xkKMGT ")
    number, unit = Decimal(plain.replace(",", "").replace("_", "")), written.removeprefix(plain).strip()
    (budget,) = budgets
    if unit in ("%", "x"):
        share = number / 100 if unit == "%" else number
        assert share <= 1
        assert "," not in plain
        assert budget.limit == math.floor(share * costs.total.params)
    else:
        assert budget.limit == math.floor(number * UNITS[unit])


@pytest.mark.parametrize("text", ["params<=1,2,3%", "params<=123%", "macs<=1.01x", "params<=1,000%"])
def test_a_share_is_at_most_the_whole(text: str, architecture: Architecture) -> None:
    with pytest.raises(BudgetError):
        parse_budget(text, architecture, cost_table(architecture))


# Large files -----------------------------------------------------------------------------------------------------


def test_a_plan_file_of_many_lines_is_read_in_seconds(architecture: Architecture, tmp_path: Path) -> None:
    names = [block.name for block in architecture.blocks if block.removable]
    lines = [
        " ".join(f"-{name}" for place, name in enumerate(names[:12]) if number >> place & 1)
        for number in range(1, 4096)
    ] * 25
    path = tmp_path / "plans.txt"
    path.write_text("\n".join(lines))
    before = time.process_time()
    plans = read_plans(str(path), architecture)
    assert time.process_time() - before < 20
    assert [plan.text for plan in plans[:4095]] == lines[:4095]
    assert len(plans) == len(lines) == 102_375


@pytest.mark.parametrize(
    "text",
    [
        "#" + "x" * MOST_TOML,
        "\n".join(f"k{number} = 1" for number in range(900_000)),
        "a." * 100_000 + "b = 1",
        "x = " + "[" * 100_000,
        "x = " + "{a=" * 10_000,
        "x = " + "9" * 5000,
        "x = " + "1" * 500_000,
    ],
)
def test_settings_of_any_size_are_refused_at_once(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    before = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert time.process_time() - before < 10
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_texts_of_settings_may_hold_dots(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f'[evaluate]\nprompts = ["{"a.b " * 200}"]  # {"." * 200}\n')
    assert load_config(path).evaluate.prompts == ("a.b " * 200,)
