"""Kind ``disk``: a command with too little of something: room on the disk, size of files, open files, memory.

It ends in one line, or clearly; nothing is left half-written; and with what it needs it ends as one that always had it.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.faults.forking import Answer, Limits, answer
from tests.faults.kills import after_all
from tests.faults.stage import Stage
from tests.faults.verdicts import Fault, Verdict, faults_of, left_behind, tail
from tests.faults.works import WORKS, undisturbed, work

_ROOMY = 2**30


def _mount(*options: str) -> bool:
    return subprocess.run(["mount", *options], capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def _small_disk(folder: Path, size: int) -> Iterator[bool]:
    """``folder`` as a disk of ``size`` bytes; False where this machine does not allow it."""
    folder.mkdir()
    mounted = os.geteuid() == 0 and _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def _clear_end(found: Answer, command: tuple[str, ...], lack: str) -> list[Fault]:
    """Faults of a command that lacked something; without memory or files any message will do, if there is one."""
    faults = faults_of(found, command)
    if lack == "memory":
        faults = (
            [] if found.ended == "exit" and (found.err.strip() or found.signal or found.code == 0) else faults
        )
    return [Fault(one.kind, f"{lack}: {one.signature}", one.detail) for one in faults]


def starved_command(stage: Stage, seed: int, place: Path) -> Verdict:
    """A command that lacks something, and then the same command with all that it needs."""
    rng = random.Random(seed)
    name = rng.choice(["run", "run-unfinished", *sorted(WORKS)])
    size = undisturbed(stage, name).size
    lack = rng.choice(["disk", "disk", "disk", "read-only", "size", "files", "memory"])
    begun = 6_000_000 if "unfinished" in name or name in ("distill-run", "rank", "report") else 0
    room = int(begun + rng.choice([rng.uniform(4096, 1.2 * size), 4096 * rng.randint(1, 40)]))
    disk = place / "disk"
    with _small_disk(disk, max(room, begun + 65536)) as mounted:
        one = work(stage, name, disk / "in")
        limits, what = Limits(), ""
        if lack == "read-only" and mounted:
            _mount("-o", "remount,ro", str(disk))
            what = "a disk that is read-only"
        elif lack == "size" or (lack in ("disk", "read-only") and not mounted):
            most = int(rng.choice([rng.uniform(0, 4096), rng.uniform(0, 1_000_000)]))
            limits, what = Limits(size=most), f"no file over {most:,} bytes"
        elif lack == "files":
            most = rng.randint(8, 48)
            limits, what = Limits(files=most), f"{most} open files"
        elif lack == "memory":
            most = int(rng.uniform(1, 200)) * 2**20
            limits, what = Limits(memory=most), f"{most >> 20} MiB more"
        else:
            what = f"a disk of {room:,} bytes"
        if not what.startswith("a disk") and mounted:
            _mount("-o", f"remount,rw,size={_ROOMY}", str(disk))
        found = answer(one.command, place, limits=limits)
        what = f"{name} with {what}"
        faults = [
            Fault(f.kind, f.signature, f"{what}: {f.detail}") for f in _clear_end(found, one.command, lack)
        ]
        if lack != "read-only" and found.ended == "exit" and not found.signal:
            left = left_behind(disk)
            if left:
                faults.append(
                    Fault("left behind", f"{lack}: {name}", f"{what}: {left[:3]}: {tail(found.err, 200)}")
                )
        if mounted:
            _mount("-o", f"remount,rw,size={_ROOMY}", str(disk))
        count, seen = after_all(one, stage, what, place)
    return Verdict(what, 1 + count, tuple(faults + seen), int(found.code == 2))
