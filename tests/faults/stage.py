"""What the cases start from: a small pipeline, a scorer, pictures, three finished runs and what verbs say of one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.faults import comparing
from tests.faults.forking import Answer, answer, finish, start

# What reads a run, with RUN for its folder; the second is whether it may redo a step, and so measure times again.
READERS: dict[str, tuple[tuple[str, ...], bool]] = {
    "report": (("report", "RUN"), False),
    "compare": (("compare", "RUN", "--json"), False),
    "rank": (("rank", "RUN", "--json"), True),
    "evaluate": (("evaluate", "--run", "RUN", "--json"), True),
    "distill": (("distill", "RUN", "--json"), True),
    "search": (("search", "RUN", "--params", "70%", "--json"), True),
    "score": (("score", "RUN", "--json"), True),
    "compare-candidate": (("compare", "CANDIDATE", "--model", "PIPELINE", "--json"), False),
    "profile": (("profile", "STUDENT", "--no-latency", "--json"), False),
    "dry-run": (("run", "--config", "JOB", "--run", "RUN", "--dry-run", "--json"), False),
    "doctor": (("doctor", "RUN", "--json"), False),
}


NAME = "the-run"  # of the folder of every copy: some verbs print it


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """Folders that no case changes: each works on copies."""

    folder: Path

    def __getattr__(self, name: str) -> Path:
        return self.folder / name  # pipeline, scorer, pictures, run, twin, other

    @property
    def job(self) -> Path:
        """The settings of ``run``, a TOML."""
        return self.folder / "job.toml"

    def candidate(self, run: Path) -> Path:
        """The first student of ``run``."""
        return min((run / "candidates").iterdir())

    def reader(self, name: str, run: Path) -> list[str]:
        """The command line that reads ``run``."""
        candidate = self.candidate(self.run).name
        places = {
            "RUN": run,
            "PIPELINE": self.pipeline,
            "JOB": self.job,
            "CANDIDATE": run / "candidates" / candidate,
        }
        places["STUDENT"] = places["CANDIDATE"] / "pruned"
        return [str(places.get(word, word)) for word in READERS[name][0]]

    def known(self) -> dict[str, object]:
        """What each verb says of an undamaged ``run``."""
        return dict(json.loads((self.folder / "known.json").read_text()))

    def contents(self) -> tuple[dict[str, str], frozenset[str]]:
        """What ``run`` holds, and the names of what differs between two runs of the same settings."""
        found = json.loads((self.folder / "contents.json").read_text())
        return found["contents"], frozenset(found["unsteady"])


def said(name: str, found: Answer, run: Path) -> object:
    """What a reader found, in a form that compares: what it printed, and of a report its tables and words."""
    if name == "report":
        pages = {f"report/{leaf}": value for leaf, value in comparing.contents(run / "report").items()}
        kept = {leaf: value for leaf, value in pages.items() if not leaf.startswith("report/steps.csv")}
        return {leaf: value for leaf, value in kept.items() if "index.html" not in leaf}
    return comparing.plain_answer(found.out.replace(str(run.parent), ""), times=not READERS[name][1])


def copied(source: Path, target: Path) -> Path:
    """A copy of a run folder, with the times of its files."""
    return Path(shutil.copytree(source, target, symlinks=True))


def _write_models(folder: Path) -> None:
    import conftest
    from training_images import write_images

    from prune_lab.config import to_toml

    conftest.save_tiny_pipeline(folder / "pipeline", conftest.build_unet(conftest.TINY_UNET))
    conftest.save_tiny_scorer(folder / "scorer")
    write_images(folder / "pictures")
    for name, seed in (("job", 0), ("other-job", 1)):
        (folder / f"{name}.toml").write_text(to_toml(small_config(folder, seed=seed)), encoding="utf-8")


def small_config(folder: Path, **changes: object) -> object:
    """The settings of a whole job in seconds on the models in ``folder``."""
    import conftest

    from prune_lab.config import RunConfig

    config = RunConfig()
    layers = (
        conftest.SMALL,
        {"model": str(folder / "pipeline"), "evaluate": {"scorer": str(folder / "scorer")}},
        {"search": {"budgets": ("params<=60%",), "controls": ("bk-tiny",)}, "score": {"groups": ("block",)}},
        changes,
    )
    for layer in layers:
        merged = {
            name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
            for name, value in layer.items()
        }
        config = dataclasses.replace(config, **merged)
    return config


def _must(found: Answer, what: Sequence[object]) -> Answer:
    if found.code != 0:
        raise RuntimeError(
            f"cannot build what the cases start from: {what} ended with {found.code}: {found.err[-2000:]}"
        )
    return found


def build(folder: Path, say: Callable[[str], object], *, runs: bool) -> Stage:
    """The stage in ``folder``, with or without finished ``runs``: built there once, and used again."""
    stage = Stage(folder)
    if (folder / "built").is_file():
        return stage
    words = folder / "words"
    words.mkdir(parents=True, exist_ok=True)
    if not (folder / "other-job.toml").is_file():
        say("building a small pipeline")
        _must(finish(start(lambda: _write_models(folder), words / "models")), ["models"])
    if not runs:
        return stage
    say("doing three runs of it")
    for name, job in (("run", "job"), ("twin", "job"), ("other", "other-job")):
        command = ["run", "--config", folder / f"{job}.toml", "--run", folder / name]
        say(f"{name}: {_must(answer(command, words), command).seconds:.1f} s")
    found, twin = comparing.contents(stage.run), comparing.contents(stage.twin)
    unsteady = sorted(name for name in {*found, *twin} if found.get(name) != twin.get(name))
    (folder / "contents.json").write_text(json.dumps({"contents": found, "unsteady": unsteady}, indent=1))
    known = {}
    for name in READERS:
        shutil.rmtree(folder / "read", ignore_errors=True)
        run = copied(stage.run, folder / "read" / NAME)
        reply = answer(stage.reader(name, run), words)
        say(f"{name}: {reply.seconds:.1f} s")
        if reply.code in (0, 1) and "Traceback" not in reply.err:
            known[name] = said(name, reply, run)
        elif not (name == "doctor" and "No such command" in reply.err):
            raise RuntimeError(f"{name} of an undamaged run ended with {reply.code}: {reply.err[-2000:]}")
        shutil.rmtree(folder / "read")
    (folder / "known.json").write_text(json.dumps(known))
    (folder / "built").touch()
    return stage
