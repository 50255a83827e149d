"""One writer at a time in a run folder; readers neither lock nor clean.

The lock is a file in the folder that names host, process and start of the writer. One process joins its own lock. The
processes of an ``accelerate launch`` write under the lock of their main process, the workers of a Ray cluster under
that of the driver.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from prune_lab.errors import RunError, StorageError
from prune_lab.processes import is_main
from prune_lab.runs.paths import Run
from prune_lab.runtime import note
from prune_lab.runtime.holders import (
    Holder,
    lock_holder,
    release_lock,
    remove_leftovers,
    state_of,
    take_lock,
    this_process,
)

_held: dict[Path, int] = {}  # by run folder, how often this process has opened it for writing
_changing = threading.Lock()


@contextlib.contextmanager
def writing(run: Run) -> Iterator[None]:
    """Hold the lock of ``run``; its folder is made where it is not there, and freed of what killed writers left.

    The lock of a process that is gone is taken over with a note. Raises RunError that names the process which writes
    there now, or the file to remove where that is one of another host; StorageError when nothing can be written.
    """
    if not is_main():
        yield
        return
    place = run.folder.resolve()
    with _changing:
        _held[place] = _held.get(place, 0) + 1
        first = _held[place] == 1
    made: list[Path] = []
    try:
        if first:
            made = _made(place, run)
            _take(run)
            remove_leftovers(place, deep=True)
        yield
    finally:
        with _changing:
            _held[place] -= 1
            last = not _held[place]
            if last:
                del _held[place]
        if last:
            release_lock(run.lock)
            with contextlib.suppress(OSError):
                for folder in made:
                    folder.rmdir()  # where nothing came of it


def _made(place: Path, run: Run) -> list[Path]:
    """The folders that had to be made for ``place``, itself first."""
    missing = [folder for folder in (place, *place.parents) if not folder.exists()]
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"asked to write the run {run.folder}: {error.strerror}; give a path that can be written"
        ) from None
    return missing


def _refusal(run: Run, holder: Holder) -> RunError:
    if state_of(holder) == "live":
        return RunError(
            f"asked to write the run {run.folder}, which {holder.text} writes now; wait for its end, or end it"
        )
    return RunError(
        f"asked to write the run {run.folder}, which {holder.text} holds, and from here nobody can tell whether it "
        f"still works; once you are sure that it does not, remove {run.lock}"
    )


def check_free(run: Run) -> None:
    """Raise the RunError of ``writing`` where another process holds ``run``; nothing is taken."""
    holder = lock_holder(run.lock) if is_main() else None
    if holder is not None and state_of(holder) != "gone" and not holder.same_process(this_process()):
        raise _refusal(run, holder)


def _take(run: Run) -> None:
    try:
        holder, gone = take_lock(run.lock)
    except OSError as error:
        raise StorageError(
            f"asked to write the run {run.folder}: {error.strerror}; give a path that can be written"
        ) from None
    if holder is None:
        if gone is not None:
            note(f"{gone.text} did not come to its end in {run.folder}; this one goes on")
        return
    raise _refusal(run, holder)
