"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from prune_lab.errors import ProofError, StorageError

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
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())  # mkstemp makes private files; these are ordinary results
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``path`` that becomes ``path`` only when the body succeeds.

    Raises StorageError when ``path`` holds something already and ``force`` is not given, or when writing fails.
    With ``force`` the old folder is removed after the new one is complete.
    """
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not force):
        what = "a file" if path.is_file() else "a folder that is not empty"
        raise StorageError(
            f"asked to write the folder {path}, found {what} there; give another path or --force"
        )
    with _storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            if path.exists():
                old = temporary.with_suffix(".old")
                path.replace(old)
                temporary.replace(path)
                shutil.rmtree(old)
            else:
                temporary.replace(path)
        except (StorageError, ProofError) as error:
            # Of something written inside: name the folder that was asked for, not our temporary one.
            raise type(error)(str(error).replace(str(temporary), str(path))) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Write ``frame`` as CSV without its index, whole or not at all; floats keep every digit."""
    with atomic_write(path) as temporary:
        frame.to_csv(temporary, index=False)


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError) and "I/O error" not in str(error):
            raise  # about the tensors, not about the disk
        reason = getattr(error, "strerror", None) or str(error)
        raise StorageError(
            f"asked to write {path}: {reason}; free some space or give a path that can be written; "
            "nothing was left half-written"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
