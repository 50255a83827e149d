"""Kind ``kill``: a command is killed at a random moment, and the same command again ends as if nothing had been."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

from tests.faults import comparing
from tests.faults.forking import answer, finish, start, verb
from tests.faults.stage import Stage
from tests.faults.verdicts import Fault, Verdict, faults_of, left_behind, mistake_line, tail
from tests.faults.works import WORKS, Work, undisturbed, work

_SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
_CODES = {signal.SIGTERM: (143, -15), signal.SIGINT: (130, -2)}


def _killed(
    one: Work, rng: random.Random, longest: float, place: Path, number: int, *, beside: bool = False
) -> tuple[str, list[Fault]]:
    """The command, killed at a random moment; SIGTERM and SIGINT end it in one line."""
    which, moment = rng.choice(_SIGNALS), rng.uniform(0, longest)
    begun = start(verb(one.command), place / f"killed-{number}")
    end, ended = time.monotonic() + moment, os.WEXITED | os.WNOHANG | os.WNOWAIT
    while time.monotonic() < end and os.waitid(os.P_PID, begun.pid, ended) is None:
        time.sleep(min(0.01, moment))
    with contextlib.suppress(ProcessLookupError):
        if which == signal.SIGKILL:
            os.killpg(begun.pid, which)
        else:
            os.kill(begun.pid, which)
    found = finish(begun)
    what = f"{which.name} after {moment:.2f} s"
    faults: list[Fault] = []
    refused = beside and found.code == 2 and bool(mistake_line(found))  # the other one writes
    if which != signal.SIGKILL and found.code != 0 and not refused:
        code = found.code if found.code is not None else -found.signal
        if "Traceback" in found.err:
            faults.append(Fault("traceback", f"{one.name} at {which.name}", f"{what}: {tail(found.err)}"))
        elif code not in _CODES[which] or (code < 0 and which == signal.SIGTERM):
            faults.append(
                Fault("exit code", f"{one.name} at {which.name}: {code}", f"{what}: {tail(found.err)}")
            )
        elif found.ended != "exit":
            faults.append(Fault("hangs", f"{one.name} at {which.name}", what))
    return what, faults


def after_all(one: Work, stage: Stage, what: str, place: Path) -> tuple[int, list[Fault]]:
    """How the same command ends when nothing disturbs it any more: as one that was never disturbed."""
    expected = undisturbed(stage, one.name)
    found = answer(one.command, place)
    faults = [
        Fault(f.kind, f"again: {f.signature}", f"{what}: {f.detail}") for f in faults_of(found, one.command)
    ]
    differs = comparing.difference(comparing.contents(one.folder), expected.contents, expected.unsteady)
    if not faults and found.code == 2 and differs:
        faults.append(Fault("no way back", one.name, f"{what}: {mistake_line(found)}; {differs}"))
    elif not faults and differs:
        faults.append(Fault("ends differently", one.name, f"{what}: {differs}"))
    left = left_behind(one.folder)
    if left:
        faults.append(Fault("left behind", one.name, f"{what}: {', '.join(left[:3])} and {len(left)} in all"))
    if "doctor" in stage.known() and "RUN" in WORKS[one.name] and one.name.startswith("run"):
        looked = answer(("doctor", str(one.folder / "run")), place)
        if looked.code != 0:
            faults.append(
                Fault("doctor is not content", one.name, f"{what}: {looked.out[-400:]}{looked.err[-200:]}")
            )
    return 1, faults


def killed_command(stage: Stage, seed: int, place: Path) -> Verdict:
    """A command killed up to three times, or beside another that writes the same, and then done to its end."""
    rng = random.Random(seed)
    name = rng.choice(["run", "run", "run-unfinished", *sorted(WORKS)])
    seconds = undisturbed(stage, name).seconds
    one = work(stage, name, place / "in")
    faults: list[Fault] = []
    done: list[str] = []
    if rng.random() < 0.25:  # another writer waits, or is told to go
        beside = start(verb(one.command), place / "beside")
        time.sleep(rng.uniform(0, 0.5 * seconds))
        what, seen = _killed(one, rng, 1.5 * seconds, place, 0, beside=True)
        found = finish(beside)
        refused = found.code == 2 and mistake_line(found)
        if not refused:
            seen += [Fault(f.kind, f"beside: {f.signature}", f.detail) for f in faults_of(found, one.command)]
        done.append(f"beside another, {what}")
        faults += seen
    else:
        for number in range(rng.choice([1, 1, 2, 3])):
            what, seen = _killed(one, rng, 1.1 * seconds, place, number)
            done.append(what)
            faults += seen
    what = f"{name}, {', '.join(done)}"
    count, seen = after_all(one, stage, what, place)
    return Verdict(what, count + len(done), tuple(faults + seen))
