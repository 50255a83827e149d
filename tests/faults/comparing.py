"""What a run holds, number by number, so that two runs can be compared."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

# Not a result: how long things took, which machine it was, what is done, who writes.
_NOT_RESULTS = re.compile(
    r"(^|/)(steps\.csv|environment\.json|prune_lab_files\.json|writer\.lock|(scores|report|manifests?|curves)/.*)$"
)
_TIMES = re.compile(
    r"second|_ms$|latency|milliseconds|median|share|p10|p90|interval|verdict|peak|written|created|date"
)


def _of_json(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _of_json(inner, f"{path}.{key}")
    elif isinstance(value, list):
        yield path, f"{len(value)} items"
        for number, inner in enumerate(value):
            yield from _of_json(inner, f"{path}[{number}]")
    else:
        yield path, repr(value)


def _of_table(text: str) -> Iterator[tuple[str, str]]:
    rows = list(csv.reader(io.StringIO(text)))
    for number, name in enumerate(rows[0] if rows else []):
        yield name, "|".join(row[number] if number < len(row) else "" for row in rows[1:])


def _of_tensors(content: bytes) -> Iterator[tuple[str, str]]:
    """A digest for each tensor; the metadata, whose order safetensors changes from run to run, by key."""
    length = int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8 : 8 + length]).items():
        if name == "__metadata__":
            yield from _of_json(entry, name)
        else:
            begin, end = entry["data_offsets"]
            digest = hashlib.sha256(content[8 + length + begin : 8 + length + end]).hexdigest()[:16]
            yield name, f"{entry['dtype']} {entry['shape']} {digest}"


def _of_file(path: Path) -> Iterator[tuple[str, str]]:
    """Names and values of what ``path`` holds; a file that is no such file is one value."""
    content = path.read_bytes()
    try:
        if path.suffix == ".csv":
            yield from _of_table(content.decode())
        elif path.suffix == ".json":
            yield from _of_json(json.loads(content))
        elif path.suffix == ".safetensors":
            yield from _of_tensors(content)
        else:
            yield "content", hashlib.sha256(content).hexdigest()[:16]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        yield "content", hashlib.sha256(content).hexdigest()[:16]


def contents(folder: Path) -> dict[str, str]:
    """Every value of every result below ``folder``, by file and name, without times of any kind."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not _NOT_RESULTS.search(name):
            for leaf, value in _of_file(path):
                if not _TIMES.search(leaf):
                    found[f"{name}::{leaf}"] = value
    return found


def _same(found: str | None, expected: str | None) -> bool:
    """Whether both hold the same; numbers that are measured anew in other batches may differ in their last digits."""
    if found == expected or found is None or expected is None:
        return found == expected
    try:
        ours, theirs = ([float(one) for one in text.split("|")] for text in (found, expected))
    except ValueError:
        return False
    return len(ours) == len(theirs) and all(map(partial(math.isclose, rel_tol=1e-6), ours, theirs))


def difference(
    found: Mapping[str, str], expected: Mapping[str, str], unsteady: frozenset[str] = frozenset()
) -> str:
    """The first value that is not as expected, and how many more; empty where all are."""
    wrong = [
        f"{name} is {found.get(name, 'missing')[:60]} instead of {expected.get(name, 'nothing')[:60]}"
        for name in sorted({*found, *expected})
        if name not in unsteady and not _same(found.get(name), expected.get(name))
    ]
    return f"{wrong[0]}" + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else "") if wrong else ""


def first_change(now: object, before: object) -> str:
    """Where two answers differ first, in words."""
    if isinstance(now, list) and isinstance(before, list) and len(now) == len(before):
        for one, other in zip(now, before, strict=True):
            if one != other and isinstance(one, dict) and isinstance(other, dict):
                return difference(
                    {k: repr(v) for k, v in one.items()}, {k: repr(v) for k, v in other.items()}
                )
    if isinstance(now, dict) and isinstance(before, dict):
        return difference({k: repr(v) for k, v in now.items()}, {k: repr(v) for k, v in before.items()})
    return f"{str(now)[:100]} instead of {str(before)[:100]}"


def plain_answer(text: str, *, times: bool) -> object:
    """What a verb printed as JSON; without ``times`` of any kind. Text that is not JSON stays text."""
    try:
        rows = json.loads(text)
    except ValueError:
        return re.sub(r"/\S+/", "", text)
    if times or not isinstance(rows, list):
        return rows
    return [
        {key: value for key, value in row.items() if not _TIMES.search(key)} if isinstance(row, dict) else row
        for row in rows
    ]
