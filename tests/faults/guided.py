"""Kind ``guided``: bytes for the readers of headers, JSON and TOML, found by atheris, which follows what they reach.

``python -m tests.faults.guided READER RUNS SEED FOLDER`` is one such search in a process of its own: what atheris
follows must be imported by it. Where atheris is not installed a case says so and tries nothing.
"""

from __future__ import annotations

import importlib.util
import json
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.stage import Stage
from tests.faults.verdicts import Fault, Verdict, innermost, tail

RUNS = 20_000
_SECONDS = 120
READERS = ("header", "json_object", "read_json", "toml", "budget", "plan", "shards")


def _reader(name: str) -> Callable[[bytes, Path], object]:
    """The reader called ``name``, of bytes and a folder to lay them in."""
    from prune_lab.config.toml import load_config
    from prune_lab.models.files import json_object, read_header, weights_in
    from prune_lab.runtime import read_json

    def of_file(file: str, read: Callable[[Path], object]) -> Callable[[bytes, Path], object]:
        def one(data: bytes, folder: Path) -> object:
            path = folder / file
            path.write_bytes(data)
            return read(path)

        return one

    def of_text(read: Callable[[str, Any], object]) -> Callable[[bytes, Path], object]:
        from prune_lab.models import resolve_model

        architecture = resolve_model("sd-v1.4").architecture
        return lambda data, _: read(data.decode("utf-8", "surrogateescape"), architecture)

    match name:
        case "header":
            return of_file("model.safetensors", read_header)
        case "json_object":
            return of_file("config.json", json_object)
        case "read_json":
            return of_file("any.json", read_json)
        case "toml":
            return of_file("job.toml", load_config)
        case "shards":
            index = "diffusion_pytorch_model.safetensors.index.json"
            return of_file(index, lambda path: weights_in(path.parent))
        case "budget":
            from prune_lab.search.budgets import check_budget_text

            return of_text(check_budget_text)
        case _:
            from prune_lab.plans import parse_plan

            return of_text(parse_plan)


def _begin_with(name: str) -> bytes:
    """Something that the reader understands, from which the search starts."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return {
        "header": struct.pack("<Q", len(header)) + header + bytes(4),
        "toml": b'model = "reference"\n[distill]\nsteps = 3\n',
        "shards": b'{"weight_map": {"a": "diffusion_pytorch_model-00001-of-00001.safetensors"}}',
        "budget": b"params<=66%",
        "plan": b"bk-base -Md",
    }.get(name, b'{"a": [1, 2.5, null, "x"]}')


def search(name: str, runs: int, seed: int, folder: Path) -> None:
    """Let atheris look for bytes at which the reader fails otherwise than by one of our errors; does not return."""
    import atheris

    with atheris.instrument_imports(
        include=["prune_lab.models.files", "prune_lab.runtime.reading", "prune_lab.config"]
    ):
        from prune_lab.errors import PruneLabError

        read = _reader(name)
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    (corpus / "first").write_bytes(_begin_with(name))

    def one(data: bytes) -> None:
        try:
            read(data, folder)
        except PruneLabError:
            return

    limits = [
        f"-runs={runs}",
        f"-seed={seed % 2**31 or 1}",
        "-max_len=600",
        "-timeout=20",
        f"-artifact_prefix={folder}/",
    ]
    atheris.Setup(["guided", *limits, str(corpus)], one)
    atheris.Fuzz()


def guided_search(stage: Stage, seed: int, place: Path) -> Verdict:
    """One reader, and 20,000 times bytes that reach further into it."""
    name = random.Random(seed).choice(READERS)
    if importlib.util.find_spec("atheris") is None:
        return Verdict(f"{name}: atheris is not installed", 0)
    command = [sys.executable, "-m", "tests.faults.guided", name, str(RUNS), str(seed), str(place)]
    root = Path(__file__).resolve().parents[2]
    try:
        found = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False, cwd=root)
    except subprocess.TimeoutExpired:
        return Verdict(f"{name}, as many bytes as fit in {_SECONDS} s", RUNS)
    words = (found.stdout + found.stderr).decode("utf-8", "replace")
    faults: tuple[Fault, ...] = ()
    if found.returncode != 0:
        crash = sorted(
            path for path in place.iterdir() if path.name.startswith(("crash-", "timeout-", "oom-"))
        )
        given = crash[0].read_bytes()[:300] if crash else b""
        kind = "traceback" if "Traceback" in words or "Uncaught" in words else "the search failed"
        faults = (
            Fault(
                kind, f"{name}: {innermost(words)}", f"given {given!r}: {tail(words.split('====')[0], 300)}"
            ),
        )
    return Verdict(f"{RUNS} times bytes for {name}", RUNS, faults)


if __name__ == "__main__":
    search(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
