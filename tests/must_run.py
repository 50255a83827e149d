"""A plugin of pytest: ``--must-run FILE`` fails the session when a test that FILE names was skipped or did not run.

FILE has the id of a test on each line, and comments after ``#``; without its ``[...]`` an id stands for all its cases.
A test that this session deselects (``-m``, ``-k``) is left to the session that selects it. Works under pytest-xdist.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--must-run", type=Path, metavar="FILE", help="fail when a test that FILE names does not run"
    )


def pytest_configure(config: pytest.Config) -> None:
    if (file := config.getoption("--must-run")) is not None:
        if not file.is_file():
            raise pytest.UsageError(f"asked for the tests named in {file}, found no such file")
        config.pluginmanager.register(MustRun(named_in(file.read_text(encoding="utf-8"))), "must-run-check")


def named_in(text: str) -> tuple[str, ...]:
    """The ids of tests in ``text``, without comments and empty lines."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return tuple(line for line in lines if line)


class MustRun:
    """Keeps account of the tests ``named``: which of them ran, were skipped or were deselected."""

    def __init__(self, named: Sequence[str]) -> None:
        self.named = named
        self.ran: set[str] = set()
        self.skipped: dict[str, str] = {}
        self.deselected: set[str] = set()

    def names_of(self, node: str) -> Iterable[str]:
        """Which of ``named`` mean the test ``node``."""
        return (name for name in self.named if node == name or node.startswith(f"{name}["))

    def complaints(self) -> list[str]:
        found = [f"{name}: skipped ({reason})" for name, reason in self.skipped.items()]
        missing = set(self.named) - self.ran - self.skipped.keys() - self.deselected
        return found + [f"{name}: did not run" for name in self.named if name in missing]

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        for item in items:
            self.deselected.update(self.names_of(item.nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name in self.names_of(report.nodeid):
            if report.skipped and not hasattr(report, "wasxfail"):
                reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
                self.skipped[name] = reason
            elif report.when == "call":
                self.ran.add(name)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.deselected.update(getattr(node, "workeroutput", {}).get("must_run_deselected", ()))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):  # a worker, which sees a part only; the controller judges
            session.config.workeroutput["must_run_deselected"] = sorted(self.deselected)
        elif self.complaints() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if complaints := self.complaints():
            terminalreporter.section("tests that must run", red=True)
            for line in complaints:
                terminalreporter.write_line(line)
