"""Drawing cases, doing each in a fork, writing down what they came to, and the tables of it."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import prune_lab
from tests.faults import forking
from tests.faults.forking import Limits, finish, start
from tests.faults.kinds import KINDS, NEED_NO_RUN
from tests.faults.stage import Stage, build
from tests.faults.verdicts import Fault, Verdict

_CASE = Limits(seconds=900.0, still=900.0, memory=None)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


@functools.cache
def package_digest() -> str:
    """Digits that change with the source of the package: what it wrote before may be of another format."""
    digest = hashlib.sha256()
    for path in sorted(Path(prune_lab.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


# One case ------------------------------------------------------------------------------------------------------------


def done_case(stage: Stage, kind: str, seed: int, room: Path) -> dict[str, Any]:
    """What the case ``seed`` of ``kind`` came to, as it is written down; done in a fork, in a folder below ``room``."""
    place = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=room))
    result = place.with_suffix(".json")

    def body() -> None:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        verdict = KINDS[kind](stage, seed, place)
        result.write_text(json.dumps(dataclasses.asdict(verdict)))

    begin = time.monotonic()
    found = finish(start(body, place.with_suffix(".words"), limits=_CASE))
    try:
        verdict = json.loads(result.read_text())
    except (OSError, ValueError):
        trouble = Fault("the case itself failed", f"{kind} {found.ended}", found.err[-2000:])
        verdict = dataclasses.asdict(Verdict("", 0, (trouble,)))
    shutil.rmtree(place, ignore_errors=True)
    for left in room.glob(f"{place.name}.*"):
        left.unlink()
    return {
        "kind": kind,
        "seed": seed,
        "version": package_digest(),
        "seconds": round(time.monotonic() - begin, 3),
        **verdict,
        "repeat": f"python -m tests.faults --case {kind}:{seed}",
    }


# A campaign ----------------------------------------------------------------------------------------------------------


def drawn(kinds: Sequence[str], seed: int) -> Iterator[tuple[str, int]]:
    """Cases without end: the kinds in turn, each with a number drawn from ``seed``."""
    rng = random.Random(seed)
    while True:
        for kind in kinds:
            yield kind, rng.randrange(10**9)


def journal_rows(journal: Path) -> list[dict[str, Any]]:
    """What was written down so far; a last line that was cut short is left out."""
    rows = []
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per kind: cases, commands, those refused in one line, cases with a fault, seconds."""
    found = []
    for kind in [*KINDS, "all"]:
        mine = [row for row in rows if kind in (row["kind"], "all")]
        if mine:
            found.append(
                {
                    "kind": kind,
                    "cases": len(mine),
                    "commands": sum(row["commands"] for row in mine),
                    "refused": sum(row["refused"] for row in mine),
                    "cases_with_a_fault": sum(bool(row["faults"]) for row in mine),
                    "seconds": round(sum(row["seconds"] for row in mine), 1),
                }
            )
    return found


def grouped(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per kind of fault, most frequent first: what was broken, how often, and how to repeat an example."""
    groups: dict[tuple[str, str, str], list[tuple[dict[str, Any], dict[str, Any]]]] = collections.defaultdict(
        list
    )
    for row in rows:
        for fault in row["faults"]:
            groups[row["kind"], fault["kind"], fault["signature"]].append((row, fault))
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return [
        {
            "case": kind,
            "fault": fault,
            "signature": signature,
            "times": len(found),
            "example": f"{found[0][0]['what']}: {found[0][1]['detail']}".replace("\n", " ")[:400],
            "repeat": found[0][0]["repeat"],
        }
        for (kind, fault, signature), found in ordered
    ]


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "none\n"
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    lines += [
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row.values()) + " |" for row in rows
    ]
    return "\n".join(lines) + "\n"


def write_tables(out: Path) -> list[dict[str, Any]]:
    """The summary of a journal, also written beside it as CSV and Markdown with the faults in groups."""
    import pandas as pd

    rows = journal_rows(out / "journal.jsonl")
    counts, faults = summary(rows), grouped(rows)
    pd.DataFrame(counts).to_csv(out / "summary.csv", index=False)
    pd.DataFrame(faults).to_csv(out / "faults.csv", index=False)
    (out / "summary.md").write_text(f"{_markdown(counts)}\n{_markdown(faults)}", encoding="utf-8")
    return counts


def campaign(
    stage: Stage, kinds: Sequence[str], seed: int, count: int, out: Path, *, hours: float | None = None
) -> list[dict[str, Any]]:
    """The rows of ``count`` cases, or of as many as ``hours`` hold; those that the journal has are not done again."""
    journal = out / "journal.jsonl"
    known = {(row["kind"], row["seed"]) for row in journal_rows(journal)}
    room = Path(tempfile.mkdtemp(prefix="faults-", dir=os.environ.get("FAULTS_ROOM")))
    begin, rows = time.monotonic(), []
    try:
        for number, (kind, case) in enumerate(drawn(kinds, seed)):
            spent = (time.monotonic() - begin) / 3600
            if number >= count or (hours is not None and spent > hours) or (out / "stop").exists():
                break
            if (kind, case) in known:
                continue
            row = done_case(stage, kind, case, room)
            rows.append(row)
            with journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            for fault in row["faults"]:
                _say(f"{fault['kind']}: {fault['signature']}: {fault['detail'][:300]}\n    {row['repeat']}")
            if len(rows) % 100 == 0:
                _say(f"{number + 1} cases, {sum(bool(one['faults']) for one in rows)} with a fault")
                write_tables(out)
    finally:
        shutil.rmtree(room, ignore_errors=True)
        if journal.is_file():
            write_tables(out)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks; 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--n", type=int, default=200, help="cases; all kinds in turn")
    parser.add_argument(
        "--seed", type=int, default=None, help="from which cases are drawn; default: a new one"
    )
    parser.add_argument(
        "--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), help="which; default: all"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/faults"), help="folder of journal, tables and stage"
    )
    parser.add_argument("--hours", type=float, default=None, help="end after so many hours")
    parser.add_argument(
        "--case", action="append", default=[], help="KIND:NUMBER, repeats one; may be repeated"
    )
    asked = parser.parse_args(arguments)
    seed = asked.seed if asked.seed is not None else random.SystemRandom().randrange(10**6)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    asked.out.mkdir(parents=True, exist_ok=True)
    out = asked.out.resolve()
    forking.import_everything()
    kinds = {case.split(":")[0] for case in asked.case} or {*asked.kinds}
    stage = build(out / f"stage-{package_digest()}", _say, runs=not kinds <= NEED_NO_RUN)
    model = str(stage.pipeline)
    forking.warm([("profile", model, "--no-latency"), ("compare", "bk-base", "--model", model)])
    if asked.case:
        with tempfile.TemporaryDirectory(prefix="faults-") as room:
            pairs = [case.split(":") for case in asked.case]
            rows = [done_case(stage, kind, int(number), Path(room)) for kind, number in pairs]
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
    else:
        _say(f"seed {seed}: the same cases again with --seed {seed}; journal in {asked.out}")
        rows = campaign(stage, asked.kinds, seed, asked.n, out, hours=asked.hours)
        sys.stdout.write(_markdown(summary(journal_rows(out / "journal.jsonl"))))
    return int(any(row["faults"] for row in rows))
