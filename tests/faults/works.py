"""Commands that write, and what each leaves when nothing disturbs it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

from tests.faults import comparing
from tests.faults.forking import answer
from tests.faults.stage import Stage, copied

# With OUT for what is written, RUN for a run folder that the case made.
WORKS: dict[str, tuple[str, ...]] = {
    "run": ("run", "--config", "JOB", "--run", "RUN"),
    "run-unfinished": ("run", "--config", "JOB", "--run", "RUN"),
    "score": ("score", "--config", "JOB", "--run", "RUN", "--json"),
    "search": ("search", "--config", "JOB", "--run", "RUN", "--json"),
    "distill-run": ("distill", "RUN", "--json"),
    "rank": ("rank", "RUN", "--json"),
    "report": ("report", "RUN"),
    "prune": ("prune", "PIPELINE", "--plan", "bk-small", "--out", "OUT"),
    "distill": (
        "distill",
        "PIPELINE",
        "--plan",
        "bk-tiny",
        "--config",
        "JOB",
        "--set",
        "distill.steps=3",
        "--out",
        "OUT",
    ),
    "data": (
        "data",
        "PIPELINE",
        "--data",
        "PICTURES",
        "--set",
        "data.shard=2",
        "--batch",
        "1",
        "--out",
        "OUT",
    ),
    "draw": (
        "data",
        "PIPELINE",
        "--prompts",
        "PROMPTS",
        "--count",
        "4",
        "--set",
        "data.steps=1",
        "--set",
        "data.shard=2",
        "--out",
        "OUT",
    ),
    "export": ("export", "PIPELINE", "--to", "single-file", "--out", "OUT.safetensors"),
    "generate": ("generate", "PIPELINE", "--prompt", "a cat", "--steps", "2", "--out", "OUT.png"),
}
# Verbs that go on with a run which misses its last steps.
_UNFINISHED = ("run-unfinished", "distill-run", "rank", "report")
_LATE = ("ranking.csv", "tournament.csv", "curves", "report")


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """A command with its folder: nothing else is written there."""

    name: str
    command: tuple[str, ...]
    folder: Path


def work(stage: Stage, name: str, folder: Path) -> Work:
    """The command called ``name`` in ``folder``, which is made with what the command begins with."""
    folder.mkdir(parents=True, exist_ok=True)
    if name in _UNFINISHED:
        run = copied(stage.run, folder / "run")
        for late in _LATE if name != "report" else _LATE[-1:]:  # a report of a run that lost more is refused
            path = run / late
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        if name not in ("report", "rank"):
            for candidate in (run / "candidates").iterdir():
                for part in ("distilled", "recovery.csv", "heldout.csv", "pictures"):
                    path = candidate / part
                    if path.is_dir():
                        shutil.rmtree(path)
                    else:
                        path.unlink(missing_ok=True)
    prompts = stage.folder / "prompts.txt"
    if not prompts.is_file():
        prompts.write_text("a red cat\na dog\ntwo owls\nrain\n")
    places = {
        "JOB": stage.job,
        "RUN": folder / "run",
        "PIPELINE": stage.pipeline,
        "PICTURES": stage.pictures,
        "PROMPTS": prompts,
        "OUT": folder / "out",
        "OUT.safetensors": folder / "out.safetensors",
        "OUT.png": folder / "out.png",
    }
    return Work(name, tuple(str(places.get(word, word)) for word in WORKS[name]), folder)


@dataclasses.dataclass(frozen=True, slots=True)
class Undisturbed:
    """What a command comes to when nothing disturbs it: seconds, what it leaves, and how many bytes."""

    seconds: float
    contents: dict[str, str]
    size: int
    unsteady: frozenset[str]  # names of values that differ when it is done twice


def undisturbed(stage: Stage, name: str) -> Undisturbed:
    """What the command called ``name`` comes to; it is done twice for a stage, and then known."""
    kept = stage.folder / "works" / f"{name}.json"
    if not kept.is_file():
        kept.parent.mkdir(exist_ok=True)
        room = stage.folder / "works" / name
        found = []
        for _ in range(2):
            shutil.rmtree(room, ignore_errors=True)
            one = work(stage, name, room / "in")
            reply = answer(one.command, room)
            if reply.code != 0:
                raise RuntimeError(f"{name}, undisturbed, ended with {reply.code}: {reply.err[-2000:]}")
            found.append(comparing.contents(one.folder))
        size = sum(path.stat().st_size for path in one.folder.rglob("*") if path.is_file())
        unsteady = [leaf for leaf in {**found[0], **found[1]} if found[0].get(leaf) != found[1].get(leaf)]
        kept.write_text(json.dumps([reply.seconds, found[0], size, sorted(unsteady)]))
        shutil.rmtree(room)
    seconds, contents, size, unsteady = json.loads(kept.read_text())
    return Undisturbed(seconds, contents, size, frozenset(unsteady))
