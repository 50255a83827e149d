"""A headless Chromium, for tests of pages that answer to clicks; without one they are skipped with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.chrome.webdriver import WebDriver

Scheme = Literal["light", "dark"]

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def show_as(browser: WebDriver, scheme: Scheme = "light", *, printed: bool = False) -> None:
    """The page as it is in the colour ``scheme``, on a screen or ``printed``."""
    wanted = [{"name": "prefers-color-scheme", "value": scheme}]
    media = {"media": "print" if printed else "", "features": wanted}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


@contextmanager
def browser_on(page: Path) -> Iterator[WebDriver]:
    """A browser that shows ``page`` in light colours, without a network; ends with the test."""
    found = next(filter(None, map(shutil.which, _BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if found is None or driver is None:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = found
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument("--window-size=1300,1400")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        show_as(browser)
        browser.execute_cdp_cmd("Network.enable", {})
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
        browser.get(page.as_uri())
        yield browser
    finally:
        browser.quit()


def requests_of(browser: WebDriver) -> set[str]:
    """The addresses that the page asked for since the last call, without those that its own policy refused."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [one["params"] for one in messages if one["method"] == "Network.requestWillBeSent"]
    failed = [one["params"] for one in messages if one["method"] == "Network.loadingFailed"]
    refused = {one["requestId"] for one in failed if one.get("blockedReason") == "csp"}
    return {str(one["request"]["url"]) for one in sent if one["requestId"] not in refused}
