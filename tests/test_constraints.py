"""The pinned versions: plain lines that fit the declared ones, and an audit that never calls sound what it missed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LINES = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
DEVICE_LINES = (ROOT / ".ci" / "constraints_devices.txt").read_text(encoding="utf-8").splitlines()
DEVICES = ("executorch", "coreml")  # extras with an environment of their own
PINNED = dict(line.split("==") for line in (*DEVICE_LINES, *LINES))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
DECLARED = [
    requirement
    for text in (*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines))
    if (requirement := Requirement(text)).name != PROJECT["name"]
    and (requirement.marker is None or requirement.marker.evaluate())
]


OF_DEVICES = {Requirement(text).name for extra in DEVICES for text in EXTRAS[extra]}


def _script(name: str) -> ModuleType:
    found = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_every_line_is_a_plain_name_and_version() -> None:
    # no hash, no address, no local build such as +cpu: the file says the same wherever it is used
    for lines in (LINES, DEVICE_LINES):
        assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line)] == []
        assert sorted(lines, key=lambda line: line.split("==")[0]) == lines
    assert not {line.split("==")[0] for line in LINES} & {line.split("==")[0] for line in DEVICE_LINES}
    assert PINNED["torch"] == "2.13.0"


@pytest.mark.parametrize("requirement", DECLARED, ids=lambda requirement: requirement.name)
def test_a_declared_dependency_is_pinned_to_a_version_that_fits(requirement: Requirement) -> None:
    pinned = PINNED[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pinned, prereleases=True)


@pytest.mark.skipif("CI" not in os.environ, reason="a development environment may be ahead")
@pytest.mark.parametrize("requirement", DECLARED, ids=lambda requirement: requirement.name)
def test_what_is_installed_is_what_is_pinned(requirement: Requirement) -> None:
    if requirement.name in OF_DEVICES:
        pytest.skip("lies in the environment of make test-devices")
    installed = version(requirement.name).partition("+")[0]
    assert installed == PINNED[canonicalize_name(requirement.name)]


def test_pinned_lines_are_written_as_they_are_read() -> None:
    lines = _script("constraints").lines()
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines)
    assert not [line for line in lines if line.startswith(("prune-lab", "pip=="))]
    assert f"torch=={PINNED['torch']}" in lines


def test_an_audit_tells_what_it_could_not_check() -> None:
    hole = {"id": "CVE-1", "fix_versions": ["2.0"]}
    answer = {
        "dependencies": [
            {"name": "seen", "version": "1.0", "vulns": []},
            {"name": "holed", "version": "1.1", "vulns": [hole]},
            {"name": "private", "skip_reason": "Dependency not found on PyPI and could not be audited"},
        ]
    }
    vulnerable, unknown, checked = _script("audit").findings(json.dumps(answer))
    assert vulnerable == ["holed 1.1: CVE-1, mended in 2.0"]
    assert unknown == ["private"]
    assert checked == 2


@pytest.mark.parametrize("said", ["", "no JSON", "{}"])
def test_an_audit_without_an_answer_is_not_checked(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = _script("audit")
    file = tmp_path / "constraints.txt"
    file.write_text("torch==2.13.0\n", encoding="utf-8")
    answer = module.subprocess.CompletedProcess([], 1, stdout=said, stderr="cannot connect")
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: answer)
    assert module.audit(file) == 0
    assert capsys.readouterr().out.startswith("not checked: ")
