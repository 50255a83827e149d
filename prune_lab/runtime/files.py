"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from prune_lab.errors import DataError, ProofError, StorageError
from prune_lab.runtime.holders import is_temporary, remove_folder, remove_leftovers, temporary_beside
from prune_lab.runtime.reading import printable, read_json

if TYPE_CHECKING:  # pandas takes a second to import
    import pandas as pd


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; it takes the place of ``path`` only when the body succeeds.

    Raises StorageError when the disk is full, read-only or the folder cannot be made.
    """
    path = Path(path)
    with _storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(path)
        try:
            temporary.touch(exist_ok=False)
            usual = temporary.stat().st_mode
            yield temporary
            temporary.chmod(usual)  # safetensors writes for the user alone
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``path`` that becomes ``path`` only when the body succeeds.

    Raises StorageError when ``path`` holds something already and ``force`` is not given, or when writing fails.
    With ``force`` the old folder is removed after the new one is complete: for folders that belong to a run, while
    ``output_folder`` is for those that a person names.
    """
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not force):
        what = "a file" if path.is_file() else "a folder that is not empty"
        raise StorageError(
            f"asked to write the folder {path}, found {what} there; give another path or --force"
        )
    with _storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, of=path.name)
        mounted = path.is_mount()  # it cannot be replaced, only filled
        temporary = temporary_beside(path / path.name if mounted else path)
        temporary.mkdir()
        try:
            yield temporary
            _open_as_usual(temporary)
            if mounted:
                _fill(path, temporary)
            elif path.exists():
                old = temporary_beside(path, "old")
                path.replace(old)
                temporary.replace(path)
                shutil.rmtree(old)
            else:
                temporary.replace(path)
        except (StorageError, ProofError) as error:
            # Of something written inside: name the folder that was asked for, not our temporary one.
            raise type(error)(str(error).replace(str(temporary), str(path))) from error
        finally:
            remove_folder(temporary)


def _open_as_usual(folder: Path) -> None:
    """Let tensors below ``folder`` be read by whom the folder may be read by: safetensors writes for the user alone."""
    usual = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in folder.rglob("*.safetensors"):
        if not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) == 0o600:
            path.chmod(usual)


def _fill(folder: Path, temporary: Path) -> None:
    """Put what lies in ``temporary``, a folder inside of ``folder``, in the place of all else there."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            if entry != temporary:
                shutil.rmtree(entry)
        else:
            entry.unlink()
    for entry in temporary.iterdir():
        entry.replace(folder / entry.name)


# Folders that a person names ---------------------------------------------------------------------------------------

FILE_LIST = ".prune_lab_files.json"  # in such a folder: the files that prune-lab wrote there
_NAMED = 3  # files that an error names
_COUNTED = 10_000  # files that are looked at for it
_LONGEST_PATH = 4096  # characters of a name in the list
_IN_NO_NAME = re.compile("[\0\ud800-\udfff]")  # halves of a character among them


@contextlib.contextmanager
def output_folder(path: Path, *, force: bool = False) -> Iterator[Path]:
    """``atomic_folder`` for a folder that a person named: the files in it are listed, and ``force`` replaces only such.

    A link is followed. Raises StorageError as ``check_replaceable`` does, also for files that came in the meantime.
    """
    place = Path(os.path.realpath(path))
    check_replaceable(path, force=force)
    with atomic_folder(place, force=force) as temporary:
        yield temporary
        write_file_list(temporary, (str(file.relative_to(temporary)) for file in _files_in(temporary)))
        check_replaceable(path, force=force)


def check_replaceable(folder: Path, *, force: bool) -> None:
    """Raise StorageError unless ``folder`` is not there, is empty, or holds files of ours alone and ``force`` is given.

    Ours are those of the list that we wrote there.
    """
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"asked to write the folder {folder}, found a file there; give another path")
    others = other_files(folder)
    if others:
        raise StorageError(
            f"asked to write the folder {folder}, found a folder that is not empty, with files that prune-lab did not "
            f"write and --force does not remove: {some_of(others)}; give another path"
        )
    if not force and folder.is_dir() and any(folder.iterdir()):
        raise StorageError(
            f"asked to write the folder {folder}, found a folder that is not empty there; "
            "give another path or --force"
        )


def write_file_list(folder: Path, names: Iterable[str], *, about: Mapping[str, object] | None = None) -> None:
    """Write which files in ``folder`` are ours, by their ``names`` relative to it, whether or not they are there yet.

    ``about`` says what they are made of, where that is needed before they are.
    """
    more = {} if about is None else {"about": dict(about)}
    write_json(folder / FILE_LIST, {"format": 1, **more, "files": sorted(names)})


def is_name_inside(name: object) -> bool:
    """Whether ``name`` is one that a file below a folder may have, relative to the folder."""
    if not isinstance(name, str) or len(name) > _LONGEST_PATH or _IN_NO_NAME.search(name):
        return False
    path = Path(name)
    return bool(path.parts) and not path.anchor and ".." not in path.parts


def _file_list(folder: Path) -> dict[str, Any]:
    """The list in ``folder``; empty where there is none, or one that we cannot have written."""
    try:
        value = read_json(folder / FILE_LIST)
    except (StorageError, DataError):
        return {}
    names = value.get("files") if isinstance(value, dict) else None
    return value if isinstance(names, list) and all(map(is_name_inside, names)) else {}  # type: ignore[return-value]


def listed_files(folder: Path) -> frozenset[str] | None:
    """The files that we wrote, or began to write, into ``folder``; None where nothing says so.

    A list that names anything outside of ``folder`` says nothing. A name may still lead through a link.
    """
    found = _file_list(folder)
    return frozenset(str(Path(name)) for name in found["files"]) if found else None


def list_about(folder: Path) -> dict[str, Any]:
    """What the files that are listed in ``folder`` are made of; empty where that is not written there."""
    about = _file_list(folder).get("about")
    return about if isinstance(about, dict) else {}


def other_files(folder: Path) -> list[str]:
    """Files and links in ``folder``, relative to it, that we did not list; without a list all that lies in it."""
    if not folder.is_dir():
        return []
    ours = listed_files(folder)
    if ours is None:
        found = (path.name for path in folder.iterdir())
    else:
        names = (str(path.relative_to(folder)) for path in _files_in(folder))
        found = (name for name in names if name not in ours and name != FILE_LIST)
    return sorted(islice((name for name in found if not is_temporary(Path(name).parts[0])), _COUNTED))


def some_of(names: Sequence[str]) -> str:
    """The first few ``names``, and how many more there are."""
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return f"{', '.join(map(printable, names[:_NAMED]))}{more}"


def _files_in(folder: Path) -> Iterator[Path]:
    """Everything below ``folder`` that is no folder; links are not followed."""
    for place, folders, files in os.walk(folder):
        links = (name for name in folders if (Path(place) / name).is_symlink())
        yield from (Path(place) / name for name in (*files, *links))


# The user's cache --------------------------------------------------------------------------------------------------


def cache_folder(name: str) -> Path:
    """The folder ``name`` of prune-lab in the user's cache, ``$XDG_CACHE_HOME`` (``~/.cache`` without it); not made."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return root / "prune_lab" / name


# Files of a kind ---------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Write ``frame`` as CSV without its index, whole or not at all; floats keep every digit."""
    text = frame.to_csv(index=False, lineterminator="\n")
    if "\r" in text:  # which begins a row for every reader, and is quoted only where all texts are
        text = frame.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    with atomic_write(path) as temporary:
        temporary.write_bytes(text.encode())


_REMEDIES = {
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.EFBIG: "allow larger files (ulimit -f)",
}


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError) and "I/O error" not in str(error):
            raise  # about the tensors, not about the disk
        reason = getattr(error, "strerror", None) or str(error)
        remedy = _REMEDIES.get(
            getattr(error, "errno", None) or 0, "free some space or give a path that can be written"
        )
        raise StorageError(
            f"asked to write {path}: {reason}; {remedy}; nothing was left half-written"
        ) from error
