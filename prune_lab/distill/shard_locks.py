"""Who builds which shard of a cache: several builders share one folder, and none removes what another is making.

The list of files is written before the first shard, with the provenance of what is being built; each shard has a lock
file while it is made.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prune_lab.distill.cache import EMPTY, FORMAT, INDEX
from prune_lab.errors import DataError, StorageError
from prune_lab.runtime import FILE_LIST, note_once, read_json
from prune_lab.runtime.files import (
    check_replaceable,
    is_name_inside,
    list_about,
    listed_files,
    some_of,
    write_file_list,
)
from prune_lab.runtime.holders import (
    Holder,
    is_temporary,
    lock_holder,
    release_lock,
    remove_leftovers,
    state_of,
    take_lock,
)
from prune_lab.runtime.reading import what_is

PREVIEW = "pictures"  # the folder in that of a cache with the first of its rows as PNG
_PAUSE = 0.5  # seconds between two looks at what other builders have finished


# What lies in the folder -------------------------------------------------------------------------------------------


def _indexed(folder: Path) -> frozenset[str] | None:
    """The shards that the index of ``folder`` names; None where there is none, or one that we cannot have written."""
    try:
        index = read_json(folder / INDEX)
    except (StorageError, DataError):
        return None
    shards = index.get("shards") if isinstance(index, dict) and index.get("format") == FORMAT else None
    if not isinstance(shards, list):
        return None
    names = [one.get("file") if isinstance(one, dict) else None for one in shards]
    return frozenset(map(str, names)) if all(map(is_name_inside, names)) else None


def _ours(folder: Path) -> set[str] | None:
    """The names that belong to the cache in ``folder``, finished or not; None where there is none."""
    listed, indexed = listed_files(folder), _indexed(folder)
    if listed is None and indexed is None:
        return None
    names = {*(listed or ()), *(indexed or ()), EMPTY, INDEX}
    return names if listed is None else {*names, FILE_LIST}


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_passing(name: str) -> bool:
    return is_temporary(name) or (name.startswith(".shard-") and name.endswith(".lock"))


def _is_preview(path: Path) -> bool:
    return (
        path.name == PREVIEW and _is_folder(path) and all(one.suffix == ".png" for one in path.glob("[!.]*"))
    )


def check_cache_folder(folder: Path, *, force: bool) -> None:
    """Raise StorageError unless a cache may be built in ``folder``: it is not there, is empty, or holds a cache.

    With ``force`` it may hold nothing else, because then what is there is removed.
    """
    if folder.exists() and not folder.is_dir():
        raise StorageError(
            f"asked to build a cache in {folder}, found {what_is(folder)} there; give a folder"
        )
    if not folder.is_dir():
        return
    ours = _ours(folder)
    others = [
        path.name
        for path in sorted(folder.iterdir())
        if (path.name not in (ours or ()) or _is_folder(path))
        and not _is_passing(path.name)
        and not (ours and _is_preview(path))
    ]
    if others and (force or ours is None):
        raise StorageError(
            f"asked to build a cache in {folder}, found a folder that is not empty, with files that prune-lab did not "
            f"write and --force does not remove: {some_of(others)}; give another path"
        )


def clear(folder: Path) -> None:
    """Remove the cache in ``folder``. Raises StorageError that names the process which is building it."""
    for path in sorted(folder.glob(".shard-*.lock")):
        holder = lock_holder(path)
        if holder is not None and state_of(holder) != "gone":
            raise StorageError(
                f"asked to build the cache {folder} anew, which {holder.text} is building now; wait for its end, or "
                f"end it (once you are sure that it has ended, remove {path})"
            )
        path.unlink(missing_ok=True)
    preview = folder / PREVIEW
    has_preview = _is_folder(preview) and listed_files(preview) is not None
    if has_preview:
        check_replaceable(preview, force=True)
    ours = _ours(folder) or ()
    for path in sorted(folder.iterdir()):  # what lies in the folder itself: a name may lead anywhere
        if path.name in ours and not _is_folder(path):
            path.unlink(missing_ok=True)
    if has_preview:
        shutil.rmtree(preview)


def being_built(folder: Path) -> Mapping[str, Any]:
    """The provenance of what another process is building in ``folder`` now; empty where nobody is."""
    holders = [lock_holder(path) for path in folder.glob(".shard-*.lock")]
    working = any(holder is not None and state_of(holder) != "gone" for holder in holders)
    return list_about(folder) if working else {}


def begin(folder: Path, names: Sequence[str], provenance: Mapping[str, Any]) -> None:
    """Free ``folder`` of what killed builders left, and list the files of the cache that is built in it."""
    remove_leftovers(folder)
    if list_about(folder) != dict(provenance):
        write_file_list(folder, (*names, EMPTY, INDEX), about=provenance)


# Shard by shard ----------------------------------------------------------------------------------------------------


def _lock_of(shard: Path) -> Path:
    return shard.with_name(f".{shard.name}.lock")


@contextlib.contextmanager
def claimed(shard: Path, provenance: Mapping[str, Any]) -> Iterator[Holder | None]:
    """Who else is making ``shard``; None where this process may, and nobody else does until the end of the block.

    Raises DataError where another cache is being built in the folder meanwhile.
    """
    lock = _lock_of(shard)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)  # on a machine of a launch with a disk of its own
        holder, _ = take_lock(lock)
    except OSError as error:
        raise StorageError(
            f"asked to write {shard}: {error.strerror}; free some space or give a path that can be written"
        ) from None
    try:
        if holder is None and list_about(shard.parent) not in ({}, dict(provenance)):
            raise DataError(
                f"asked to build a cache in {shard.parent}, found that another one is built there now; "
                "give another folder"
            )
        yield holder
    finally:
        if holder is None:
            release_lock(lock)


def make_all(
    shards: Sequence[Path],
    is_made: Callable[[Path], bool],
    make: Callable[[Path], Holder | None],
    *,
    what: str = "shards",
) -> None:
    """Wait for the ``shards`` that other builders are making, and ``make`` those that they leave; ``what`` they hold.

    Raises StorageError that names the builder where only those of other hosts are left: nothing tells whether they
    still work.
    """
    left = [path for path in shards if not is_made(path)]
    while left:
        found = [(path, holder) for path in left if (holder := make(path)) is not None]
        left = [path for path, _ in found]
        if not left:
            return
        if all(state_of(holder) == "elsewhere" for _, holder in found):
            path, holder = found[0]
            raise StorageError(
                f"asked to build the cache {path.parent}, of which {holder.text} is making {path.name}; give the same "
                "command again when it is done, or, once you are sure that it does not work any more, remove "
                f"{_lock_of(path)}"
            )
        note_once(f"waiting for {what} that another builder makes: {found[0][1].text}")
        time.sleep(_PAUSE)
