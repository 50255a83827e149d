"""Files from outside: regular ones of a bounded size, JSON of a bounded depth, and one line for everything else."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import prune_lab
from prune_lab.distill.cache import read_cache_file
from prune_lab.distill.data import LatentData
from prune_lab.errors import DataError, PruneLabError, StorageError
from prune_lab.families.own_code import NEWEST
from prune_lab.probes.probe import load_probe
from prune_lab.runtime import open_regular, parse_json, path_text, read_bytes, read_json, read_text
from prune_lab.runtime.reading import DEEPEST

READERS: tuple[Callable[[Any], object], ...] = (open_regular, read_bytes, read_text, read_json)


def complaint(reader: Callable[[Any], object], path: object) -> str:
    """The one line with which ``reader`` refuses ``path``; it must come within seconds."""
    found: list[BaseException | None] = []

    def read() -> None:
        try:
            reader(path)
        except BaseException as error:
            found.append(error)
        else:
            found.append(None)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(5)
    assert found, f"{reader.__name__} waits for {path}"
    assert isinstance(found[0], PruneLabError), found[0]
    (line,) = str(found[0]).splitlines()
    return line


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def link_to_pipe(path: Path) -> Path:
    path.symlink_to(pipe(path.with_name("target")))
    return path


def listening(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))
    return path


def circle(path: Path) -> Path:
    path.symlink_to(path)
    return path


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path, "No such file"),
    "folder": (folder, "a folder"),
    "pipe": (pipe, "a pipe"),
    "link to a pipe": (link_to_pipe, "a pipe"),
    "socket": (listening, "a socket"),
    "endless device": (lambda _: Path("/dev/zero"), "a device"),
    "empty device": (lambda _: Path("/dev/null"), "a device"),
    "circle of links": (circle, "symbolic links"),
    "too long": (lambda path: path / ("x" * 5000), "too long"),
    "too deep": (lambda path: f"{path}/{'x/' * 5000}", "too long"),
    "NUL": (lambda path: f"{path}\0.json", "no name of a file"),
    "half a character": (lambda path: f"{path}\ud800", "no name of a file"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ODD)
def test_only_regular_files_are_read(
    name: str, reader: Callable[[Any], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    make, said = ODD[name]
    line = complaint(reader, make(Path("odd")))
    assert said in line
    assert len(line) < 600


@given(st.text(max_size=50) | st.text(min_size=1000, max_size=2000))
def test_any_path_is_shown_in_one_short_line(text: str) -> None:
    assert path_text(text).isprintable()
    assert len(path_text(text)) < 320


def test_what_is_too_large_is_refused_and_what_just_fits_is_read(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_bytes(b"x" * 100)
    assert read_bytes(path, most=100) == b"x" * 100
    assert read_text(path, most=100) == "x" * 100
    line = complaint(lambda one: read_bytes(one, most=99), path)
    assert "100 bytes" in line
    assert "at most 99" in line
    sparse = tmp_path / "sparse.json"
    with sparse.open("wb") as file:
        file.truncate(2**40)
    for reader in (read_bytes, read_text, read_json):
        assert "1,099,511,627,776 bytes" in complaint(reader, sparse)


@given(text=st.text(max_size=40).filter(lambda text: not text.startswith(("\ufeff", "\0"))))
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_is_what_was_written(encoding: str, text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("text") / "some.txt"
    content = text.encode(encoding, errors="replace")
    path.write_bytes(content)
    assert read_text(path) == content.decode(encoding)


# JSON ------------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=30,
)


@given(VALUES, st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
def test_json_is_read_back_in_any_encoding(value: object, encoding: str) -> None:
    assert parse_json(json.dumps(value).encode(encoding)) == value


@settings(max_examples=200)
@given(st.binary(max_size=60) | st.text(alphabet='[]{}",:0123456789eE+-.nul\\ \ud800', max_size=60))
def test_any_bytes_are_json_or_a_value_error(content: bytes | str) -> None:
    with contextlib.suppress(ValueError):
        parse_json(content)


def nested(depth: int, opening: str, closing: str) -> str:
    return opening * depth + "1" + closing * depth


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
@pytest.mark.parametrize("depth", [DEEPEST + 1, 900, 5000, 200_000])
def test_json_that_is_too_deep_is_refused(depth: int, opening: str, closing: str, tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text(nested(depth, opening, closing))
    assert "levels" in complaint(read_json, path)
    path.write_text(opening * depth)  # never closed
    complaint(read_json, path)


def test_json_of_the_greatest_depth_and_wide_json_are_read(tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text(nested(DEEPEST, "[", "]"))
    read_json(path)
    wide = [[{"a": [1]}]] * 1000
    path.write_text(json.dumps(wide))
    assert read_json(path) == wide


@pytest.mark.parametrize(
    "content", ["", "{", "nul", "9" * 5000, '{"a": 1,}', "[1] 2", "\x00", '"\\ud800', "NaN1"]
)
def test_what_is_not_json_is_told_in_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"broken\.json as JSON"):
        read_json(path)
    complaint(read_json, path)


def test_of_a_key_that_is_there_twice_the_last_counts() -> None:
    assert parse_json('{"a": 1, "a": 2}') == {"a": 2}


def test_a_missing_file_is_a_matter_of_storage(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        read_json(tmp_path / "none.json")


# JSON in the metadata of safetensors -----------------------------------------------------------------------------

IN_METADATA: dict[str, tuple[Callable[[Path], object], dict[str, str], tuple[str, ...]]] = {
    "captions": (LatentData.load, {"format": "prune_lab latents 1"}, ()),
    "groups": (
        load_probe,
        {"format": "prune_lab probe 1", "captions": "[]"},
        ("noisy", "noise", "timesteps", "embeddings", "target", "pictures"),
    ),
    "prune_lab": (read_cache_file, {}, ()),
}


@settings(max_examples=10)
@given(
    text=VALUES.filter(lambda value: not isinstance(value, (list, dict))).map(json.dumps)
    | st.sampled_from(["", "[", nested(DEEPEST + 1, "[", "]"), nested(200_000, "[", "]")])
)
@pytest.mark.parametrize("name", IN_METADATA)
def test_metadata_that_are_something_else_are_told_in_one_line(
    name: str, text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    reader, metadata, names = IN_METADATA[name]
    path = tmp_path_factory.getbasetemp() / f"{name}.safetensors"
    save_file({one: torch.zeros(1) for one in (*names, "more")}, path, metadata | {name: text})
    assert str(path) in complaint(reader, path)


# The package -----------------------------------------------------------------------------------------------------

_OWN = "text that this process made, or that one of its own wrote into a pipe"
_PACKAGED = "a file of the package or of the kernel"
EXCEPTIONS = {
    "assets/assembling.py": _PACKAGED,
    "blocks.py": _OWN,
    "counting.py": _OWN,
    "distill/memory.py": _OWN,
    "families/meta_device.py": _OWN,
    "models/components.py": _OWN,
    "models/folders.py": _OWN,
    "profiling/activations.py": _OWN,
    "profiling/form_costs.py": _OWN,
    "export/edge/proof.py": _OWN,
    "profiling/own_process.py": _OWN,
    "profiling/runtime_process.py": _OWN,
    "runtimes/serving.py": _OWN,
    "surgery/proof.py": _OWN,
    "surgery/prover.py": _OWN,
    "engines/ray_driver.py": "the digest of files of its own run, of any size",
    "config/recipes.py": _PACKAGED,
    "profiling/live_memory.py": _PACKAGED,
    "report/page.py": _PACKAGED,
    "runtime/devices.py": _PACKAGED,
    "runtime/holders.py": "its own temporary file, and what the kernel says of a process",
    "runtime/reading.py": "the bounded reader itself",
    f"families/own_code/{NEWEST}.py": "travels alone; parses the text that it has just made",
}


def reads_without_bounds(source: str) -> bool:
    """Whether a module parses JSON, or reads a whole file, by itself."""
    found = (
        node.func
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    )
    return any(
        call.attr in ("read_text", "read_bytes")
        or (call.attr in ("load", "loads") and ast.unparse(call.value) == "json")
        for call in found
    )


def test_every_module_reads_through_the_bounded_reader() -> None:
    root = Path(prune_lab.__file__).parent
    found = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if reads_without_bounds(path.read_text(encoding="utf-8"))
    }
    assert found == set(EXCEPTIONS)
