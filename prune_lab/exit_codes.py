"""What a command ends with, by number: for scripts and CI, which read no text."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from types import MappingProxyType

DONE = 0
NO = 1  # the command did its work, and the answer is no; also what Python gives for an exception
MISTAKE = 2  # as of any program for a wrong option
UNDECIDED = 3
INTERRUPTED = 128 + signal.SIGINT  # as shells report signals
TERMINATED = 128 + signal.SIGTERM

EXIT_CODES: Mapping[int, str] = MappingProxyType(
    {
        DONE: "done; every gate of evaluate passed; doctor found nothing left to do",
        NO: "a gate of evaluate failed; doctor found work or damage; or a bug, with a traceback",
        MISTAKE: "a mistake, in one line: nothing was done, or what was finished before is kept",
        UNDECIDED: "a gate of evaluate is undecided: more prompts would tell, or what it needs is not given",
        INTERRUPTED: "interrupted (Ctrl-C); a line says what is kept",
        TERMINATED: "terminated (SIGTERM); a line says what is kept",
    }
)


def exit_codes_text() -> str:
    """All of them in one paragraph, as ``--help`` ends."""
    return "Exit codes: " + ". ".join(f"{code}: {meaning}" for code, meaning in EXIT_CODES.items()) + "."
