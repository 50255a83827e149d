"""Who holds a file: host, process and its start, in the names of temporary files and in locks.

So a later writer can tell what is being written now from what a killed process has left behind.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import secrets
import socket
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import psutil

from prune_lab.errors import DataError, StorageError
from prune_lab.runtime.reading import read_json

LONGEST_NAME = 200  # bytes of a name that leave room for the mark of its temporary file: most disks allow 255

_MOST_OF_LOCK = 4096  # bytes
_LONGEST_WORD = 300  # characters of the host and the time in a lock
_PROCESSES = range(1, 2**31)
_STARTS = range(2**63)

State = Literal["live", "gone", "elsewhere"]


# Processes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Holder:
    """A process on some host; another one with its number has started at another time."""

    host: str
    process: int
    started: int  # as its host counts, see ``_started``
    since: str = ""  # when it took what it holds, for a person

    @property
    def mark(self) -> str:
        """Host, process and start as a part of a file's name."""
        return f"{_digest(self.host)}-{self.process}-{self.started}"

    @property
    def text(self) -> str:
        """The process in words."""
        if not self.process:
            return "a process that its lock file does not name"
        return f"process {self.process} on {self.host}" + (f" since {self.since}" if self.since else "")

    def same_process(self, other: Holder) -> bool:
        """Whether both are one process, whatever it took when."""
        return self.mark == other.mark


_UNKNOWN = Holder("", 0, 0)


def _digest(host: str) -> str:
    return hashlib.sha256(host.encode()).hexdigest()[:8]


def _started(process: int) -> int | None:
    """When ``process`` started; None where it is gone, or has ended and only waits to be noticed."""
    try:
        # ticks since the machine started: psutil's seconds since 1970 move when the clock is set
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        state, *numbers = fields.rpartition(")")[2].split()
        return None if state in ("Z", "X") else int(numbers[18])
    except (OSError, ValueError, IndexError):
        pass
    try:
        found = psutil.Process(process)
        return None if found.status() == psutil.STATUS_ZOMBIE else int(found.create_time())
    except psutil.NoSuchProcess:
        return None
    except (psutil.Error, OSError):
        return 0  # it is there, and says no more


@functools.lru_cache(maxsize=1)
def _own_start(process: int) -> int:
    return _started(process) or 0  # once: under a limit of open files it might be another one each time


def this_process() -> Holder:
    """This process, and the time."""
    process = os.getpid()
    now = datetime.now(UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    return Holder(socket.gethostname(), process, _own_start(process), now)


def _state(host: bool, process: int, started: int) -> State:
    if not host or process not in _PROCESSES:  # no number of a process: nothing of ours
        return "elsewhere"
    now = _started(process) if psutil.pid_exists(process) else None
    return "gone" if now is None or (now and started and now != started) else "live"


def state_of(holder: Holder) -> State:
    """Whether ``holder`` is still there; of a process on another host nothing is known."""
    return _state(holder.host == socket.gethostname(), holder.process, holder.started)


# Temporary files ---------------------------------------------------------------------------------------------------

_TEMPORARY = re.compile(
    r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{8})-(?P<process>\d+)-(?P<started>\d+)-[0-9a-f]{6}\.(?P<kind>tmp|old)"
)


def temporary_beside(path: Path, kind: Literal["tmp", "old"] = "tmp") -> Path:
    """A name beside ``path`` that says which process uses it and for what; nothing is made.

    ``tmp`` is what will take the place of ``path``, ``old`` what was there until then.
    """
    return path.with_name(f".{path.name}.{this_process().mark}-{secrets.token_hex(3)}.{kind}")


def is_temporary(name: str) -> bool:
    """Whether a file of this ``name`` is one that a writer of ours has not finished."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_leftovers(folder: Path, *, of: str = "", deep: bool = False) -> None:
    """Remove the temporary files in ``folder`` whose process on this host is gone; ``of`` names the one file they are
    for.

    A folder that was about to be replaced goes back to its place where the new one never came. ``deep`` looks into
    folders too. Files of live processes and of other hosts stay.
    """
    with contextlib.suppress(OSError):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            found = _TEMPORARY.fullmatch(entry.name)
            if found is None:
                if deep and entry.is_dir(follow_symlinks=False):
                    remove_leftovers(Path(entry.path), deep=True)
            elif not of or found["name"] == of:
                here = found["host"] == _digest(socket.gethostname())
                if _state(here, int(found["process"]), int(found["started"])) == "gone":
                    _remove(Path(entry.path), found["name"], found["kind"])


def remove_folder(folder: Path) -> None:
    """Remove ``folder``, as far as that can be done; it needs one open file, and none where the folder is empty."""
    found = [(str(folder), list[str](), list[str]()), *os.walk(str(folder))]
    for place, folders, files in reversed(found):
        for name in (*files, *folders):
            with contextlib.suppress(OSError):
                Path(place, name).unlink()  # of a folder it fails: it is removed as a place
        with contextlib.suppress(OSError):
            Path(place).rmdir()


def _remove(path: Path, name: str, kind: str) -> None:
    target = path.with_name(name)
    with contextlib.suppress(OSError):
        if kind == "old" and not os.path.lexists(target):
            path.rename(target)
        elif path.is_dir() and not path.is_symlink():
            remove_folder(path)
        else:
            path.unlink(missing_ok=True)


# Locks -------------------------------------------------------------------------------------------------------------


def take_lock(path: Path) -> tuple[Holder | None, Holder | None]:
    """(who holds the lock file ``path`` already, whose it was when it was taken over).

    The first is None when this process holds it now; the second where nobody held it. It is taken over from a process
    that is gone from this host, and only from such. Raises OSError when the file cannot be written.
    """
    taken_from: Holder | None = None
    while True:
        mine = this_process()
        if _made(path, mine):
            return None, taken_from
        found = lock_holder(path)
        if found is None:
            continue  # it was given back just now
        if found.same_process(mine):
            return None, None
        if state_of(found) != "gone":
            return found, None
        _put_aside(path, found)
        taken_from = found


def release_lock(path: Path) -> None:
    """Give the lock file ``path`` back, where this process holds it."""
    found = lock_holder(path)
    if found is not None and found.same_process(this_process()):
        with contextlib.suppress(OSError):
            path.unlink()


def lock_holder(path: Path) -> Holder | None:
    """Who holds the lock file ``path``; None where there is none.

    What cannot be read, and a link, a pipe or a folder, is of a process that nobody knows.
    """
    while True:
        try:
            before = path.lstat()
            if not stat.S_ISREG(before.st_mode):  # a link too: no lock of ours is one
                return _UNKNOWN
            return _holder_in(read_json(path, most=_MOST_OF_LOCK))
        except FileNotFoundError:
            return None
        except OSError:
            return _UNKNOWN
        except (StorageError, DataError):
            with contextlib.suppress(OSError):
                now = path.lstat()
                if (now.st_ino, now.st_mtime_ns) == (before.st_ino, before.st_mtime_ns):
                    return _UNKNOWN
            # it was given back, or taken by another process, just now


def _holder_in(value: object) -> Holder:
    """The holder that the ``value`` of a lock file names; ``_UNKNOWN`` unless it is one that we may have written."""
    match value:
        case {"host": str(host), "process": int(process), "started": int(started), "since": str(since)}:
            words = all(text.isprintable() and len(text) <= _LONGEST_WORD for text in (host, since))
            numbers = process in _PROCESSES and started in _STARTS
            if words and numbers and not isinstance(process, bool) and not isinstance(started, bool):
                return Holder(host, process, started, since)
    return _UNKNOWN


def _made(path: Path, mine: Holder) -> bool:
    """Whether the lock file could be made: whole from its first moment on, and by one process only."""
    temporary = temporary_beside(path)
    temporary.write_text(json.dumps(asdict(mine)), encoding="utf-8")
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    except OSError:  # a disk without hard links
        with contextlib.suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
            file.write(temporary.read_text(encoding="utf-8"))
            return True
        return False
    finally:
        temporary.unlink(missing_ok=True)


def _put_aside(path: Path, gone: Holder) -> None:
    """Remove the lock file of a process that is ``gone``, and no other that came in between."""
    aside = temporary_beside(path)
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        if (found := lock_holder(aside)) is not None and not found.same_process(gone):
            with contextlib.suppress(OSError):
                os.link(aside, path)  # another process was faster: its lock goes back
        aside.unlink(missing_ok=True)


def _lock_in(folder: Path, verb: str) -> Path:
    return folder / f".{verb}.lock"


def check_ours(folder: Path, verb: str, asked: str, *, ours: bool) -> None:
    """Raise StorageError, which begins with ``asked``, unless ``folder`` is not there, is empty, or is ``ours``.

    The lock of a process that was killed before it wrote anything is nobody else's.
    """
    others = [one for one in folder.iterdir() if one != _lock_in(folder, verb)] if folder.is_dir() else []
    if folder.is_file() or (others and not ours):
        raise StorageError(
            f"{asked}, found something there that prune-lab did not write; give another folder with --out"
        )


@contextlib.contextmanager
def alone_in(folder: Path, verb: str, asked: str) -> Iterator[None]:
    """Hold the lock file of ``verb`` in ``folder`` for the block; the folder is made, and goes if it stays empty.

    Raises StorageError, which begins with ``asked``, where another process holds it or it cannot be written.
    """
    there, path = folder.is_dir(), _lock_in(folder, verb)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        holder, _ = take_lock(path)
    except OSError as error:
        raise StorageError(
            f"{asked}, cannot write the lock file {path.name} in {folder} ({error.strerror or error}); give a folder "
            "that can be written"
        ) from None
    if holder is not None:
        raise StorageError(
            f"{asked}, which {holder.text} is doing now; wait for its end (once you are sure that it has ended, remove "
            f"{path.name} there)"
        )
    try:
        yield
    finally:
        release_lock(path)
        if not there:
            with contextlib.suppress(OSError):
                folder.rmdir()
