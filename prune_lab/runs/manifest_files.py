"""The file of one manifest: how files are known again, and what is written down about a part of a step."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

from prune_lab.errors import DataError, StorageError
from prune_lab.runs.records import read_typed
from prune_lab.runtime import open_regular, parse_json

FORMAT = "prune_lab manifest 2"
FOLDER = "manifests"  # in the folder of a run or of a candidate
ORIGINS = "origins"  # the manifest of what lies outside of the run folder: teacher, scorer, the user's data
_LIBRARIES = ("prune-lab", "torch", "diffusers", "transformers")
_HEADER = 100_000_000  # bytes: the longest header that safetensors reads


# Digests of files --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Stamp:
    """By what a file is known again: size in bytes, time of change in nanoseconds, and its digest."""

    size: int
    modified_ns: int
    sha256: str

    def at(self, found: os.stat_result) -> bool:
        """Whether the file has this size and time, so that it need not be read."""
        return (self.size, self.modified_ns) == (found.st_size, found.st_mtime_ns)


def file_digest(path: Path) -> str:
    """The sha256 of a file; of safetensors with the entries of the header in order, which a writer does not keep."""
    with open_regular(path) as file:
        digest = hashlib.sha256()
        if path.suffix == ".safetensors":
            length = file.read(8)
            header = file.read(min(int.from_bytes(length, "little"), _HEADER))
            try:
                digest.update(json.dumps(parse_json(header), sort_keys=True).encode())
            except ValueError:
                digest.update(length + header)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def files_in(folder: Path) -> Iterator[Path]:
    """The files below ``folder`` in order, without hidden ones, which the system and our own writers leave there."""
    for at, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        yield from (Path(at, name) for name in sorted(names) if name[0] != ".")


def files_of(path: Path) -> tuple[Path, ...]:
    """``path``, or the files below it where it is a folder; none where nothing is there."""
    if path.is_dir():
        return tuple(files_in(path))
    return (path,) if path.exists() else ()


@functools.cache
def versions() -> Mapping[str, str]:
    """The versions of the libraries that results depend on, by name; without those that are not installed."""

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return ""

    return {name: found for name in _LIBRARIES if (found := version(name))}


# One manifest ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What is made, and made again, at once: a step of a run, a part of one, or such a part for one candidate."""

    step: str
    name: str  # of its manifest
    folder: Path  # of the run or of the candidate
    outputs: tuple[Path, ...]  # files and folders that it writes, those that are optional too
    reads: tuple[Path, ...] = ()  # what it reads of the run, there or not
    inputs: Mapping[str, str] = dataclasses.field(
        default_factory=dict
    )  # other digests; empty: cannot be seen now
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    label: str = ""  # of the candidate's plan
    resumes: bool = False  # its maker goes on from what is there without a manifest

    @property
    def manifest(self) -> Path:
        """Where its manifest lies."""
        return self.folder / FOLDER / f"{self.name}.json"


class _File(TypedDict):
    """A manifest as it stands in its file, with the digest of all the rest."""

    format: Literal["prune_lab manifest 2"]
    step: str
    outputs: dict[str, Stamp]
    inputs: dict[str, str]
    settings: dict[str, Any]
    versions: dict[str, str]
    place: str
    run: str
    digest: str


def _digest_of(fields: Mapping[str, Any]) -> str:
    """The digest of what a manifest says: a changed word of it could call anything done."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """What is written down about a part; paths are relative to the run folder."""

    step: str
    outputs: Mapping[str, Stamp]
    inputs: Mapping[str, str]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    place: str = ""  # where it was written: one of another part, or another run, says nothing about this one
    run: str = ""  # a random word, the same in all manifests of a run, also in a copy of it

    def as_dict(self) -> dict[str, Any]:
        """The manifest as JSON values."""
        fields = dataclasses.asdict(self)
        return {"format": FORMAT, **fields, "digest": _digest_of(fields)}


def _is_name(name: str) -> bool:
    """Whether ``name`` is a path that stays inside of the run folder, as every one that a part writes down."""
    path = Path(name)
    plain = "\0" not in name and not any("\ud800" <= letter <= "\udfff" for letter in name)
    return plain and not path.is_absolute() and name == path.as_posix() != "." and ".." not in path.parts


def read_manifest(path: Path) -> Manifest | None:
    """The manifest in ``path``; None where it is missing or damaged: its part is made again then."""
    try:
        found = read_typed(path, _File)
    except (DataError, StorageError):
        return None
    digest = found["digest"]
    manifest = Manifest(**{name: value for name, value in found.items() if name not in ("format", "digest")})  # type: ignore[arg-type]
    names = [*(found["outputs"] if path.stem != ORIGINS else ()), *found["inputs"]]
    if not all(map(_is_name, names)):
        return None
    return manifest if _digest_of(dataclasses.asdict(manifest)) == digest else None
