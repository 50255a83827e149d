"""The report as a browser shows it: nothing is fetched, nothing complained about, and no word of a run can act."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Scheme, browser_on, requests_of, show_as
from conftest import BuiltOnce, figures_left_blank
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.by import By
from synthetic_run import write_run

from prune_lab.plans import PruningPlan
from prune_lab.report import write_report
from prune_lab.runs import Run

BACKGROUND = {"light": "rgb(251, 251, 250)", "dark": "rgb(16, 19, 22)"}


@pytest.fixture(scope="module")
def whole(built_once: BuiltOnce) -> Run:
    """A complete run with its report written, that of test_report; read only."""
    return Run(built_once("reported", lambda folder: write_report(Run(write_run(folder)))))


def shown(page: WebDriver) -> list[str]:
    """Where the pictures are from, each of which is whole."""
    pictures = page.execute_script(
        "return [...document.images].map(one => [one.currentSrc, one.complete && one.naturalWidth, one.clientWidth])"
    )
    assert all(natural > 0 and width > 0 for _, natural, width in pictures)
    return [str(source) for source, _, _ in pictures]


@pytest.fixture(scope="module")
def shared(whole: Run) -> Iterator[WebDriver]:
    with browser_on(whole.report) as browser:
        yield browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_shown_whole_and_asks_for_nothing(shared: WebDriver, whole: Run, scheme: Scheme) -> None:
    page = shared
    requests_of(page)
    show_as(page, scheme)
    page.get(whole.report.as_uri())
    pictures = shown(page)
    assert len(pictures) == 9
    assert all(source.startswith("data:image/svg+xml") for source in pictures)
    both = re.findall(r'(?:src|srcset)="(data:[^"]+)"', whole.report.read_text())
    assert pictures == both[scheme == "light" :: 2]  # the dark one stands first
    assert page.get_log("browser") == []
    asked = {address for address in requests_of(page) if not address.startswith("data:")}
    assert asked == {whole.report.as_uri()}
    body = page.find_element(By.TAG_NAME, "body")
    assert (
        body.value_of_css_property("background-color")
        .replace("rgba", "rgb")
        .startswith(BACKGROUND[scheme][:-1])
    )
    # the cells have their places and colours without style attributes
    cells = page.find_elements(By.CLASS_NAME, "live-cell")
    assert len({(cell.rect["x"], cell.rect["y"]) for cell in cells}) == len(cells) == 38
    assert not page.find_elements(By.CSS_SELECTOR, "[style]")


EVIL = (
    "<script>document.title = 'taken'</script>",
    '"><img src=x onerror="document.title = \'taken\'">',
    "</style><style>body { display: none }</style>",
    "<svg onload=\"document.title = 'taken'\"><a href='javascript:alert(1)'>",
    "</select></script><script>document.title='taken'</script><iframe src='https://example.org'></iframe>",
)


@pytest.fixture(scope="module")
def evil(built_once: BuiltOnce) -> Iterator[WebDriver]:
    """The page of a run whose plans, model, captions, reasons and environment hold markup."""

    def build(folder: Path) -> None:
        run = Run(write_run(folder, upto="costs"))
        run.importance.unlink()  # fewer figures
        run.plans_dir.mkdir()
        for number, name in enumerate(EVIL):
            plan = PruningPlan(("Md.A1", *[f"Up{number + 1}.R2"][: number < 4]), "made-up")
            value = {"id": plan.id, "names": [name], "origin": "control", "architecture": "made-up"}
            run.plan(plan.id).write_text(json.dumps(value | {"removed": list(plan.removed)}))
        texts = run.config.read_text().replace('model = "reference"', f"model = {json.dumps(EVIL[0])}")
        run.config.write_text(
            texts.replace('title = "Made-up run <for> tests & typography"', f"title = {json.dumps(EVIL[1])}")
        )
        run.environment.write_text(json.dumps({"format": 2, "cpu": EVIL[2], "torch": EVIL[3]}))
        with figures_left_blank():
            write_report(run)

    with browser_on(Run(built_once("evil", build)).report) as browser:
        yield browser


def test_no_word_of_a_run_becomes_markup(evil: WebDriver) -> None:
    words = evil.find_element(By.TAG_NAME, "body").text
    options = [option.text for option in evil.find_elements(By.CSS_SELECTOR, "#live-plan option")]
    assert "not known: the run is from an older version" in words
    assert set(EVIL) <= set(options)
    for name in (EVIL[0], EVIL[1], EVIL[2], EVIL[3]):
        assert name in words
    assert evil.title == EVIL[1]
    assert not evil.find_elements(By.CSS_SELECTOR, "iframe, svg, img[src='x']")
    assert evil.get_log("browser") == []


def test_what_came_in_all_the_same_could_not_act(evil: WebDriver) -> None:
    """Were some word not escaped: the policy forbids what it could do."""
    title = evil.title
    requests_of(evil)
    evil.execute_script(
        """
        document.body.insertAdjacentHTML("beforeend", `
            <img src="https://example.org/a.png" onerror="document.title = 1">
            <iframe src="https://example.org/"></iframe><p id="styled" style="display: none">here</p>
            <form action="https://example.org/"><button id="send">send</button></form>`);
        const script = document.createElement("script");
        script.textContent = "document.title = 'taken'";
        document.body.append(script);
        """
    )
    fetched = evil.execute_async_script(
        "const done = arguments[0]; fetch('https://example.org/').then(() => done(true), () => done(false))"
    )
    evil.find_element(By.ID, "send").click()
    assert not fetched
    assert evil.title == title
    assert evil.find_element(By.ID, "styled").is_displayed()
    refused = [entry["message"] for entry in evil.get_log("browser")]
    for kind in ("img-src", "script-src", "style-src", "default-src", "form-action"):
        assert any(kind in message and "Content Security Policy" in message for message in refused), kind
    assert not {address for address in requests_of(evil) if address.startswith("http")}
