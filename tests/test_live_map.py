"""The live block map of the report, used as a reader does: clicks and keys in a headless browser."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from browser import browser_on, show_as
from conftest import BuiltOnce, figures_left_blank
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select
from synthetic_run import PLANS, write_run
from test_maps import tables_of
from unet_kinds import KINDS

from prune_lab.blocks import Architecture, architecture_of, blocks_frame
from prune_lab.models import resolve_model
from prune_lab.plans import (
    PruningPlan,
    choices_to_json,
    gone_with,
    is_native,
    native_choices,
    parse_plan,
    plan_of,
)
from prune_lab.profiling import cost_table, savings_in
from prune_lab.report import write_report
from prune_lab.report.format import amount, count, milliseconds, percent_change
from prune_lab.runs import Run


@pytest.fixture(scope="module")
def architecture() -> Architecture:
    return resolve_model("reference").architecture


def latency_json(architecture: Architecture) -> dict[str, object]:
    """A made-up table of latency: the whole takes 40 ms, block number n saves n hundredths of one, before scaling."""
    blocks = [block.name for block in architecture.blocks if block.removable]
    savings = [
        {"name": name, "kind": "block", "measured_ms": place / 100} for place, name in enumerate(blocks)
    ]
    savings.append({"name": "Dn3.down+Up1.up", "kind": "samplers", "measured_ms": 1.5})
    savings[0]["measured_ms"] = -0.2  # noise: predicted as nothing
    return {"whole": {"median_ms": 40.0}, "savings": savings, "scale": 1.25}


@pytest.fixture(scope="module")
def run(built_once: BuiltOnce, architecture: Architecture) -> Run:
    """A run with the real blocks, costs and choices of the shipped model; impacts and times are made up."""

    def build(folder: Path) -> None:
        run = Run(write_run(folder, upto="costs"))
        blocks_frame(architecture).to_csv(run.blocks, index=False)
        cost_table(architecture).frame().to_csv(run.costs, index=False)
        choices = choices_to_json(architecture) | {"neutral": savings_in(cost_table(architecture), "neutral")}
        run.choices.write_text(json.dumps(choices))
        run.latency.write_text(json.dumps(latency_json(architecture)))
        run.plans_dir.mkdir(exist_ok=True)
        for name in ("bk-base", "bk-small", "bk-tiny"):
            plan = parse_plan(name, architecture)
            run.plan(plan.id).write_text(json.dumps(plan.to_json() | {"origin": "control"}))
        silent = parse_plan("-Dn1.R2 -Md.A1", architecture).named("silent").built("neutral")
        run.plan(silent.id).write_text(json.dumps(silent.to_json() | {"origin": "search"}))
        with figures_left_blank():
            write_report(run)

    return Run(built_once("live", build))


@pytest.fixture(scope="module")
def shared(run: Run) -> Iterator[WebDriver]:
    with browser_on(run.report) as browser:
        yield browser


@pytest.fixture
def page(shared: WebDriver) -> WebDriver:
    """The page with nothing removed."""
    Select(part(shared, "plan")).select_by_visible_text("teacher")
    return shared


def part(page: WebDriver, name: str) -> WebElement:
    return page.find_element(By.ID, f"live-{name}")


def cell(page: WebDriver, block: str) -> WebElement:
    return page.find_element(By.CSS_SELECTOR, f'[data-block="{block}"]')


def removed(page: WebDriver) -> set[str]:
    pressed = page.find_elements(By.CSS_SELECTOR, '[data-block][aria-pressed="true"]')
    return {str(one.get_attribute("data-block")) for one in pressed}


def costs(page: WebDriver, metric: str) -> tuple[str, str]:
    """What the page says the plan leaves of ``metric``, and the change."""
    row = page.find_element(By.CSS_SELECTOR, f'[data-metric="{metric}"]')
    left, change = row.find_elements(By.TAG_NAME, "td")[2:]
    return left.text, change.text


def plain(text: str) -> str:
    return text.replace("\u202f", " ")


@pytest.mark.long
def test_every_number_is_that_of_the_cost_table(
    page: WebDriver, run: Run, architecture: Architecture
) -> None:
    table, impacts = cost_table(architecture), pd.read_csv(run.importance).set_index("group")["impact"]
    saved = {str(one["name"]): one["measured_ms"] for one in latency_json(architecture)["savings"]}  # type: ignore[attr-defined]
    draw = random.Random(0)
    options = native_choices(architecture)
    natives = [frozenset().union(*map(draw.choice, options)) for _ in range(6)]
    removable = [block.name for block in architecture.blocks if block.removable]
    others = [frozenset(draw.sample(removable, draw.randint(1, 20))) for _ in range(6)]
    for wanted in (*natives, *others, frozenset(parse_plan("bk-tiny", architecture).removed)):
        for name in wanted ^ removed(page):
            cell(page, name).click()
        plan = plan_of(architecture, wanted)
        left, whole = table.of(plan), table.total
        assert costs(page, "params") == (
            count(left.params),
            plain(percent_change(left.params / whole.params - 1)),
        )
        for metric in ("macs", "paper_macs"):
            share = getattr(left, metric) / getattr(whole, metric) - 1
            assert costs(page, metric) == (plain(amount(getattr(left, metric))), plain(percent_change(share)))
        gone = {"Dn3.down+Up1.up" if name == "Dn3.down" else name for name in gone_with(architecture, wanted)}
        time = 40 - 1.25 * sum(max(0.0, float(saved.get(name, 0.0))) for name in gone)  # type: ignore[arg-type]
        assert costs(page, "ms") == (plain(milliseconds(time)), plain(percent_change(time / 40 - 1)))
        assert float(part(page, "impact").text) == pytest.approx(impacts[list(wanted)].sum(), rel=0.06)
        assert ("Native:" in part(page, "verdict").text) == (is_native(architecture, plan) and bool(wanted))
        assert f'--plan "{plan.text}"' in part(page, "text").text


@pytest.mark.long
def test_blocks_and_stages_leave_and_come_back(page: WebDriver) -> None:
    cell(page, "Md.A1").click()
    assert removed(page) == {"Md.A1"}
    cell(page, "Md.A1").click()
    assert removed(page) == set()
    stage = page.find_element(By.CSS_SELECTOR, '[data-stage-button="Dn3"]')
    cell(page, "Dn3.A2").click()
    stage.click()
    assert removed(page) == {"Dn3.A1", "Dn3.R2", "Dn3.A2"}  # R1 cannot be removed
    stage.click()
    assert removed(page) == set()
    assert "teacher" in part(page, "verdict").text
    cell(page, "Dn3.R1").click()
    assert removed(page) == set()


def test_named_plans_and_the_budget(page: WebDriver, architecture: Architecture) -> None:
    Select(part(page, "plan")).select_by_visible_text("bk-small")
    assert removed(page) == set(parse_plan("bk-small", architecture).removed)
    table = cost_table(architecture)
    share = 100 * table.of(parse_plan("bk-small", architecture)).macs / table.total.macs
    part(page, "most").clear()
    part(page, "most").send_keys(str(int(share)))
    assert part(page, "within").text == f"Over the budget: {share:.1f} % of {int(share)} %."
    part(page, "most").clear()
    part(page, "most").send_keys(str(int(share) + 1))
    assert part(page, "within").text.startswith(f"Within the budget: {share:.1f} %")
    Select(part(page, "metric")).select_by_value("params")
    share = 100 * table.of(parse_plan("bk-small", architecture)).params / table.total.params
    assert f"{share:.1f} %" in part(page, "within").text
    part(page, "most").clear()
    assert part(page, "within").text == "Give a budget above zero."
    cell(page, "Md.A1").click()
    assert Select(part(page, "plan")).first_selected_option.text == "one of your own"


@pytest.mark.long
def test_costs_are_those_of_the_form(page: WebDriver, architecture: Architecture) -> None:
    """In the neutral form a residual block stays and saves nothing; inner levels that are gone are gone in all."""
    table = cost_table(architecture)
    Select(part(page, "plan")).select_by_visible_text("silent")
    plan = parse_plan("-Dn1.R2 -Md.A1", architecture)
    neutral, other = (table.of(plan.built(form)) for form in ("neutral", "own"))
    assert neutral.params > other.params
    assert Select(part(page, "form")).first_selected_option.text == "neutral"
    assert costs(page, "params")[0] == count(neutral.params)
    assert "Neutral:" in part(page, "verdict").text
    assert '--plan "-Dn1.R2 -Md.A1" --form neutral --out' in part(page, "text").text
    Select(part(page, "form")).select_by_visible_text("native, else own code")
    assert costs(page, "params")[0] == count(other.params)
    assert "--form" not in part(page, "text").text
    Select(part(page, "form")).select_by_visible_text("neutral")
    cell(page, "Md.A1").click()
    assert costs(page, "params") == (count(architecture.total_params), "±0.0 %")
    assert costs(page, "ms")[1] == "±0.0 %"
    draw = random.Random(1)
    removable = [block.name for block in architecture.blocks if block.removable]
    drawn = [frozenset(draw.sample(removable, draw.randint(1, 20))) for _ in range(3)]
    for wanted in (*drawn, frozenset(parse_plan("bk-tiny", architecture).removed)):
        for name in wanted ^ removed(page):
            cell(page, name).click()
        left = table.of(plan_of(architecture, wanted).built("neutral"))
        assert costs(page, "params")[0] == count(left.params)
        for metric in ("macs", "paper_macs"):
            assert costs(page, metric)[0] == plain(amount(getattr(left, metric)))
    assert not part(page, "snap").is_displayed()


def test_a_plan_that_cannot_be_built_is_brought_to_one_that_can(
    page: WebDriver, architecture: Architecture
) -> None:
    for name in ("Dn1.R2", "Dn1.A2", "Md.R1"):
        cell(page, name).click()
    assert "Dn1 and Up4. " in part(page, "verdict").text.replace("; ", ". ")
    part(page, "snap").click()
    plan = plan_of(architecture, removed(page))
    assert is_native(architecture, plan)
    assert "Native:" in part(page, "verdict").text
    assert not part(page, "snap").is_displayed()
    nearest = min(len(frozenset(["Dn1.R2", "Dn1.A2"]) ^ option) for option in native_choices(architecture)[0])
    assert (
        len({"Dn1.R2", "Dn1.A2"} ^ {name for name in removed(page) if name[:3] in ("Dn1", "Up4")}) == nearest
    )


def test_the_keyboard_is_enough(page: WebDriver) -> None:
    first = cell(page, "Dn1.A1")
    page.execute_script("arguments[0].focus()", first)
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert page.switch_to.active_element.get_attribute("data-block") == "Dn1.R2"
    page.switch_to.active_element.send_keys(Keys.SPACE)
    page.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    page.switch_to.active_element.send_keys(Keys.ENTER)
    assert removed(page) == {"Dn1.R2", "Dn1.A1"}
    page.switch_to.active_element.send_keys(Keys.TAB)
    assert page.switch_to.active_element.get_attribute("data-block") == "Dn1.R2"


def test_a_screen_reader_is_told_what_each_block_is(page: WebDriver, architecture: Architecture) -> None:
    for block in architecture.blocks:
        button = cell(page, block.name)
        kind = "attention block" if block.kind == "attention" else "residual block"
        assert re.fullmatch(
            rf"{block.name}, {kind}, impact \S+(, cannot be removed)?", button.accessible_name
        )
        assert button.aria_role == "button"
        assert (button.get_attribute("aria-disabled") == "true") == (not block.removable)
    assert part(page, "verdict").find_element(By.XPATH, "..").get_attribute("aria-live") == "polite"
    for name in ("plan", "metric", "most"):
        assert part(page, name).accessible_name


def test_the_command_is_copied(page: WebDriver) -> None:
    cell(page, "Md.A1").click()
    part(page, "copy").click()
    assert part(page, "copied").text in ("Copied.", "Selected: copy it with the keyboard.")
    assert page.execute_script("return getSelection().toString()") == part(page, "text").text
    assert part(page, "text").text == 'prune-lab prune reference --plan "-Md.A1" --out student'


def test_nothing_is_complained_about_and_nothing_fetched(page: WebDriver) -> None:
    assert page.get_log("browser") == []
    fetched = page.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
    assert all(name.startswith("data:") for name in fetched)


def test_it_prints_as_a_plain_figure(page: WebDriver) -> None:
    show_as(page, printed=True)
    try:
        assert not part(page, "plan").is_displayed()
        assert not part(page, "copy").is_displayed()
        shown = cell(page, "Dn1.R1")
        assert shown.is_displayed()
        assert shown.value_of_css_property("print-color-adjust") == "exact"
    finally:
        show_as(page)


@pytest.mark.long
def test_words_of_a_run_cannot_become_code(tmp_path: Path, run: Run) -> None:
    evil = Run(write_run(tmp_path / "run", upto="costs"))
    name = "</script><script>document.title='taken'</script>"
    evil.plans_dir.mkdir(exist_ok=True)
    plan = PruningPlan(tuple(PLANS["bk-base"]), "made-up")
    value = {"id": plan.id, "names": [name], "origin": "control", "architecture": "made-up"}
    evil.plan(plan.id).write_text(json.dumps({**value, "removed": list(plan.removed)}))
    with browser_on(write_report(evil)) as page:
        assert page.title != "taken"
        assert name in [option.text for option in Select(part(page, "plan")).options]
        assert "not known: the run is from an older version" in part(page, "verdict").text


@pytest.mark.long
def test_layers_inside_blocks_leave_and_come_back(tmp_path: Path) -> None:
    xl = architecture_of({**KINDS["xl"](random.Random(0)), "layers_per_block": 1})
    tables_of(xl, tmp_path / "run")
    table, total = cost_table(xl), cost_table(xl).total
    with browser_on(write_report(Run(tmp_path / "run"))) as page:
        page.find_element(By.CSS_SELECTOR, ".live-layers summary").click()

        def params() -> str:
            return costs(page, "params")[0]

        Select(part(page, "plan")).select_by_visible_text("mine")
        assert removed(page) == {"Up1.A2.T1"}
        assert params() == count(table.of(parse_plan("-Up1.A2.T1", xl)).params)
        cell(page, "Up1.A2").click()  # a block takes its layers with it
        inside = {layer.name for layer in xl.layers_in("Up1.A2")}
        assert removed(page) == {"Up1.A2", *inside}
        assert '--plan "-Up1.A2"' in part(page, "text").text
        assert params() == count(table.of(parse_plan("-Up1.A2", xl)).params)
        cell(page, "Up1.A2.T3").click()  # a layer comes back with its block, without the others
        assert removed(page) == inside - {"Up1.A2.T3"}
        plan = parse_plan("-Up1.A2 +Up1.A2.T3", xl)
        assert params() == count(table.of(plan).params)
        assert f'--plan "{plan.text}"' in part(page, "text").text
        cell(page, "Md.A1.T2").click()  # the mid stage has as many layers as the last down stage
        assert not is_native(xl, plan_of(xl, removed(page)))
        assert "Md" in part(page, "verdict").text
        part(page, "snap").click()
        assert is_native(xl, plan_of(xl, removed(page)))
        Select(part(page, "plan")).select_by_visible_text("teacher")
        assert (removed(page), params()) == (set(), count(total.params))
        assert page.get_log("browser") == []
