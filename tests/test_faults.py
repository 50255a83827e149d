"""A short draw of the campaign of faults (``tests/faults``); ``make faults N=...`` draws for hours."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BuiltOnce

from prune_lab.runs import Run
from tests.faults.stage import Stage
from tests.faults.texts import fuzzed, parsers

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def drawn() -> int:
    """The number that cases are drawn from: the same in CI, printed elsewhere."""
    number = 13 if os.environ.get("CI") else random.SystemRandom().randrange(10**6)
    sys.stderr.write(f"\nfaults are drawn from {number}\n")
    return number


@pytest.fixture(scope="module")
def stage(built_once: BuiltOnce, finished: Run, tiny_pipeline_folder: Path) -> Stage:
    """The finished run and the tiny pipeline under the names that cases know."""

    def link(folder: Path) -> None:
        folder.mkdir()
        (folder / "run").symlink_to(finished.folder)
        (folder / "pipeline").symlink_to(tiny_pipeline_folder)

    return Stage(built_once("faults-stage", link))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_texts_are_understood_or_refused(stage: Stage, drawn: int, tmp_path: Path) -> None:
    found: list[tuple[str, object]] = []
    for number, (name, parser) in enumerate(sorted(parsers(stage).items())):
        place = tmp_path / str(number)
        place.mkdir()
        faults = fuzzed(parser, stage, drawn + number, place, examples=4)
        found += [(name, fault) for fault in faults]
    assert found == [], f"drawn from {drawn}"


def campaign(out: Path, seed: int, *asked: str) -> list[dict[str, object]]:
    """The journal of a campaign in a process of its own."""
    command = [sys.executable, "-m", "tests.faults", "--seed", str(seed), "--out", str(out), *asked]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    assert done.returncode in (0, 1), done.stderr
    return rows


def broken(rows: list[dict[str, object]]) -> list[object]:
    return [(row["repeat"], row["what"], row["faults"]) for row in rows if row["faults"]]


@pytest.mark.long
def test_hostile_models_and_data(drawn: int, tmp_path: Path) -> None:
    rows = campaign(tmp_path, drawn, "--kinds", "model", "data", "--n", "8")
    assert len(rows) == 8
    assert broken(rows) == [], f"drawn from {drawn}"


@pytest.mark.long
def test_kills_damages_and_full_disks(drawn: int, tmp_path: Path) -> None:
    rows = campaign(tmp_path, drawn, "--kinds", "kill", "corrupt", "disk", "--n", "9")
    assert len(rows) == 9
    assert broken(rows) == [], f"drawn from {drawn}"


def test_a_case_is_the_same_when_repeated_alone(tmp_path: Path) -> None:
    from tests.faults.campaign import drawn as cases

    first, second = cases(["kill", "text"], 5), cases(["kill", "text"], 5)
    assert [next(first) for _ in range(6)] == [next(second) for _ in range(6)]
