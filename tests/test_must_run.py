"""The option ``--must-run``: what counts as run, alone and under pytest-xdist."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from must_run import named_in

TESTS = """
import pytest

def test_runs(): pass

@pytest.mark.parametrize("case", [1, 2])
def test_cases(case):
    if case == 2: pytest.skip("no browser here")

@pytest.mark.long
def test_long(): pass

@pytest.mark.xfail(strict=True)
def test_expected_to_fail(): assert False
"""


@pytest.fixture
def asked(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder with ``TESTS``, without the settings of this project."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv(
        "PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep
    )  # where workers look for it
    pytester.makeconftest("pytest_plugins = ('must_run',)")
    pytester.makeini("[pytest]\nmarkers =\n    long: takes long\n")
    pytester.makepyfile(test_it=TESTS)
    return pytester


def outcome(asked: pytest.Pytester, names: str, *options: str) -> tuple[int, str]:
    """The exit status, and what is said of the tests in ``names``."""
    (asked.path / "names.txt").write_text(names)
    run = asked.runpytest_subprocess if "-n" in options else asked.runpytest_inprocess
    result = run("-p", "no:cacheprovider", "--must-run", "names.txt", *options)
    said = [line for line in result.outlines if line.startswith("test_") and ": " in line]
    return int(result.ret), "\n".join(said)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("test_it.py::test_runs  # with a comment", ""),
        ("test_it.py::test_cases[1]", ""),
        ("test_it.py::test_expected_to_fail", ""),
        ("test_it.py::test_cases[2]", "test_it.py::test_cases[2]: skipped (Skipped: no browser here)"),
        ("test_it.py::test_cases", "test_it.py::test_cases: skipped (Skipped: no browser here)"),
        ("test_it.py::test_renamed", "test_it.py::test_renamed: did not run"),
    ],
)
def test_a_named_test_must_run(asked: pytest.Pytester, name: str, said: str) -> None:
    assert outcome(asked, f"# names\n\n{name}\n") == (int(bool(said)), said)


def test_what_is_deselected_is_left_to_the_other_session(asked: pytest.Pytester) -> None:
    assert outcome(asked, "test_it.py::test_long", "-m", "not long") == (0, "")
    assert outcome(asked, "test_it.py::test_long\ntest_it.py::test_runs", "-m", "long") == (0, "")


def test_workers_tell_the_one_that_judges(asked: pytest.Pytester) -> None:
    names = "test_it.py::test_runs\ntest_it.py::test_cases\ntest_it.py::test_long\ntest_it.py::test_gone\n"
    status, said = outcome(asked, names, "-p", "xdist", "-n", "2", "-m", "not long")
    assert status == 1
    assert said.splitlines() == [
        "test_it.py::test_cases: skipped (Skipped: no browser here)",
        "test_it.py::test_gone: did not run",
    ]


def test_a_file_that_is_not_there_is_said(asked: pytest.Pytester) -> None:
    result = asked.runpytest("--must-run", "nowhere.txt")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*asked for the tests named in nowhere.txt, found no such file"])


def test_comments_and_empty_lines_name_nothing() -> None:
    assert named_in("# a\n\n a::b  # c\n") == ("a::b",)
