"""The command line: ``prune-lab VERB``, one thin function per verb; torch is imported inside the verb that needs it."""

from __future__ import annotations

from prune_lab.cli import data_verbs, inspect_verbs, make_verbs, run_verbs, search_verbs
from prune_lab.cli.application import app

__all__ = [
    "app",
    "data_verbs",
    "inspect_verbs",
    "main",
    "make_verbs",
    "run_verbs",
    "search_verbs",
]


def main() -> None:
    """Answer the command in ``sys.argv``: exit code 0, 2 for a user's mistake, 130 for an interrupt."""
    app(prog_name="prune-lab")
