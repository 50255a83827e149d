"""What a case came to, and how an answer of the command line is judged."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from tests.faults.forking import Answer

# Lines that a library prints on its own: nothing that a user asked for or can act on.
_LIBRARY = re.compile(
    r"^\S+\.py:\d+: \w*Warning|^\[?(transformers|diffusers|torch|datasets)\]? |^Exception ignored"
)
_FRAME = re.compile(r'^  File "[^"]*/((?:prune_lab|tests)/[^"]+)", line (\d+), in (\S+)', re.MULTILINE)


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """A promise that was not kept: its kind, a signature by which equal ones are grouped, and what was seen."""

    kind: str
    signature: str
    detail: str


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What one case came to."""

    what: str  # that was done, in words
    commands: int
    faults: tuple[Fault, ...] = ()
    refused: int = 0  # commands that ended with exit code 2 and one line


def words(arguments: Sequence[object]) -> str:
    """The command line, without folders of this machine."""
    return shlex.join(["prune-lab", *(re.sub(r"^/\S*/", "", str(one)) for one in arguments)])


def innermost(text: str) -> str:
    """Class of the last exception in ``text``, and where in the package it came from."""
    frames = [found for found in _FRAME.findall(text) if found[0].startswith("prune_lab")]
    place = f"{frames[-1][0]}:{frames[-1][2]}" if frames else "outside of the package"
    lines = [
        line
        for line in text.splitlines()
        if re.match(r"^[\w.]*(Error|Exception|Interrupt|Warning|Exit)\b", line)
    ]
    return f"{lines[-1].split(':')[0] if lines else 'no exception'} in {place}"


def tail(text: str, count: int = 400) -> str:
    """The end of ``text``, where the reason stands."""
    return text.strip()[-count:]


def mistake_line(answer: Answer) -> str:
    """The one line that a refused command ends with; empty where it did not end so."""
    lines = answer.err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return errors[0] if answer.code == 2 and len(errors) == 1 and lines[-1] == errors[0] else ""


def faults_of(answer: Answer, arguments: Sequence[object], *, codes: Sequence[int] = (0, 2)) -> list[Fault]:
    """How ``answer`` breaks what every command promises, whatever it was asked."""
    command, verb = words(arguments), str(arguments[0])
    if answer.ended == "waits":
        return [Fault("hangs", f"{verb} waits for ever", command)]
    if answer.ended == "time":
        return [Fault("takes too long", verb, f"{command}: {answer.seconds:.0f} s")]
    if "MemoryError" in answer.err or "can't allocate memory" in answer.err or "bad_alloc" in answer.err:
        return [Fault("memory", f"{verb}: {innermost(answer.err)}", f"{command}: {tail(answer.err)}")]
    if answer.signal:
        return [Fault("dies by a signal", f"{verb} signal {answer.signal}", f"{command}: {tail(answer.err)}")]
    if "Traceback (most recent call last)" in answer.err:
        return [Fault("traceback", innermost(answer.err), f"{command}: {tail(answer.err)}")]
    if answer.code not in codes:
        return [Fault("exit code", f"{verb} {answer.code}", f"{command}: {tail(answer.err)}")]
    found = []
    if answer.code == 2 and not mistake_line(answer):
        found.append(Fault("not one line", verb, f"{command}: {tail(answer.err)}"))
    noise = [line for line in answer.err.splitlines() if _LIBRARY.match(line)]
    if noise:
        found.append(
            Fault(
                "a library speaks", re.sub(r"^\S*/|\d+", "", noise[0])[:100], f"{command}: {noise[0][:300]}"
            )
        )
    return found


def left_behind(folder: Path) -> list[str]:
    """Temporary files and folders below ``folder``, and locks that nobody holds any more."""
    names = (path.name for path in folder.rglob("*"))
    return sorted(
        name
        for name in names
        if (name.startswith(".") and ".tmp" in name) or name.endswith((".old", ".lock"))
    )
