"""What is written for others names things without the folders that they lie in, here or on another machine.

A path says who uses a machine and how it is kept. Of each the last part is left, which is what a thing is called.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import struct
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from prune_lab.runtime.reading import MOST_BYTES, open_regular, parse_json

# Entries in which the libraries note where a model was read from; nothing reads them.
NOTES_OF_PLACES = ("_name_or_path", "name_or_path", "special_tokens_map_file")
# Where paths begin on machines of others; those of this one are looked for.
_ROOTS = frozenset(
    (
        *(
            "Users",
            "Volumes",
            "cluster",
            "content",
            "data",
            "datasets",
            "export",
            "gpfs",
            "home",
            "kaggle",
            "lustre",
        ),
        *(
            "media",
            "mnt",
            "net",
            "nfs",
            "opt",
            "private",
            "project",
            "projects",
            "root",
            "scratch",
            "srv",
            "storage",
        ),
        *("tmp", "users", "usr", "var", "work", "workspace"),
    )
)
_KNOWN = "\0"  # stands for a place that is known, so that what lies in it is found after it
_PART = r"[^\s/\\\"'`<>|:;,\0]+"
_PATH = re.compile(
    rf"(?P<known>{_KNOWN})(?:/{_PART})+/?"
    rf"|(?:file://|(?<![\w./~]))(?P<home>~[\w.-]*)(?:/{_PART})+/?"
    rf"|(?:file://|(?<![\w./~]))/(?P<root>{_PART})(?:/{_PART})+/?"
    rf"|(?:file:///)?(?<![A-Za-z0-9_])(?P<drive>[A-Za-z]:)(?:[\\/]+{_PART})+[\\/]*"
)


@functools.lru_cache(maxsize=256)
def _is_root(name: str) -> bool:
    return name in _ROOTS or Path(f"/{name}").is_dir()


def _last_part(match: re.Match[str]) -> str:
    if match["root"] and not _is_root(match["root"]):
        return match[0]
    return re.split(r"[\\/]", match[0].rstrip("\\/"))[-1]


def _usual() -> tuple[str, str, str]:
    """The home, working and temporary folders; the working folder may be gone."""
    try:
        here = str(Path.cwd())
    except OSError:
        here = ""
    return str(Path("~").expanduser()), here, tempfile.gettempdir()


@functools.lru_cache(maxsize=64)
def _named(places: tuple[str, ...], home: str) -> tuple[tuple[re.Pattern[str], re.Pattern[str], str], ...]:
    """For each of ``places`` and what it lies in: what lies in it, itself, and its name; the longest first."""
    texts = dict.fromkeys(places)
    for text in [text for text in texts if text.startswith(("/", "~", "."))]:
        parents = PurePosixPath(text).parents
        texts |= dict.fromkeys(str(parent) for parent in parents if len(parent.parts) > 2)
    names = {
        text.rstrip("/"): "~" if text.rstrip("/") == home else PurePosixPath(text).name for text in texts
    }
    names |= {json.dumps(text)[1:-1]: name for text, name in names.items()}  # as it stands in JSON
    found = []
    for text, name in sorted(names.items(), key=lambda one: -len(one[0])):
        if name and text not in (".", ".."):
            itself = rf"(?:file://|(?<![\w./~])){re.escape(text)}"
            found.append((re.compile(rf"{itself}(?=/{_PART})"), re.compile(rf"{itself}/?"), name))
    return tuple(found)


def without_folders(text: str, places: Iterable[str] = ()) -> str:
    """``text`` with the last part alone of each path in it; addresses, names on a hub and fractions stay.

    A path ends at a space or quotation mark, but where it is one of ``places``, which may be relative too: those are
    known. So are the home, working and temporary folders.
    """
    if not ("/" in text or "\\" in text or "~" in text):
        return text
    usual = _usual()
    for inside, itself, name in _named((*places, *usual), usual[0]):
        text = itself.sub(lambda _, name=name: name, inside.sub(_KNOWN, text))  # type: ignore[misc]
    return _PATH.sub(_last_part, text).replace(_KNOWN, "")


def _is_path(text: str) -> bool:
    whole = PureWindowsPath(text) if re.match(r"[A-Za-z]:[\\/]", text) else PurePosixPath(text)
    return whole.is_absolute() and len(whole.parts) > 2 and "\n" not in text


def names_alone(value: Any, places: Sequence[str] = ()) -> Any:
    """The JSON ``value`` with names in place of paths, at any depth; without notes of where a model was read from."""
    if isinstance(value, Mapping):
        return {key: names_alone(one, places) for key, one in value.items() if key not in NOTES_OF_PLACES}
    if isinstance(value, (list, tuple)):
        return [names_alone(one, places) for one in value]
    if not isinstance(value, str):
        return value
    path = value.removeprefix("file://")
    if not _is_path(path):
        return without_folders(value, places)
    # the spaces in it belong to it
    return PureWindowsPath(path).name if path[1] == ":" else without_folders(path, (path, *places))


def copied_without_folders(source: Path, target: Path) -> None:
    """Copy the safetensors file ``source``; where its notes name paths, names are left of them."""
    with open_regular(source) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: Any = parse_json(file.read(min(length, MOST_BYTES)))
        notes = header.get("__metadata__") or {}
        told = {name: without_folders(text) for name, text in notes.items()}
        if told == notes:
            shutil.copyfile(source, target)
            return
        text = json.dumps(header | {"__metadata__": told}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the tensors are aligned
        with target.open("wb") as copy:
            copy.write(struct.pack("<Q", len(text)) + text)
            shutil.copyfileobj(file, copy, 1 << 20)
