"""Distils many plans in many small jobs side by side, on one GPU or on a few cores, and writes a line per student.

    python -m benchmarks.outcomes jobs.json --work DIR --out outcomes.jsonl --device cuda --workers 14 --seconds 500

``jobs.json`` is a list of jobs, done in this order: study, model, plans (by name the text of a plan, or what
``PruningPlan.to_json`` gives), seed, steps, looks (steps between held-out losses) and settings (more settings of a
run). A job whose lines are in ``outcomes.jsonl`` is left out, so that the same command goes on with what is missing.
When the seconds are over, what the students have reached is written with the status stopped and the steps that they
came to; those jobs are done again the next time. A line holds the job, the plan, the held-out losses of all rows at
each look, and where it was made.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from prune_lab import exit_codes
from prune_lab.config import RunConfig, with_settings
from prune_lab.distill import load_recovery
from prune_lab.errors import PruneLabError
from prune_lab.evaluation import heldout_loss
from prune_lab.plans import read_plans
from prune_lab.runs import Run, open_run
from prune_lab.runtime import write_json
from prune_lab.session import Session, training_and_validation
from prune_lab.workflow import ensure_distilled, start_run

ROWS = 96  # held-out rows, as in the demo
BASE = {
    "probe.samples": ROWS,
    "score.groups": ("block",),
    "search.budgets": (),
    "search.form": "own",  # any plan
    "repair.kind": "none",  # as in all rows that are there; a study that repairs says so in its jobs
    "distill.batch": 8,
    "distill.pictures": 2048,
    "distill.learning_rate": 2e-4,
    "distill.warmup": 20,
    "distill.ema_decay": 0.98,
    "distill.checkpoint_every": 10**9,
    "distill.trackers": (),
    "profile.runs": 3,
    "profile.warmup": 1,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """Plans of one model that are distilled together, with one seed and the same settings."""

    study: str
    model: str
    plans: Mapping[str, Any]
    seed: int
    steps: int
    looks: int = 100  # steps between held-out losses
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> str:
        """Tells it from all others."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def named(self, folder: Path) -> dict[str, str]:
        """What each plan is given by: its text, or the file in ``folder`` that it is written into."""
        found = {}
        for name, plan in self.plans.items():
            found[name] = plan if isinstance(plan, str) else str(folder / f"{name}.json")
            if not isinstance(plan, str):
                write_json(folder / f"{name}.json", plan)
        return found

    def config(self, folder: Path, device: str) -> RunConfig:
        """The settings of its run; the files of its plans are written into ``folder``."""
        more = {
            name: tuple(value) if isinstance(value, list) else value for name, value in self.settings.items()
        }
        given = {
            "search.controls": tuple(self.named(folder).values()),
            "distill.steps": self.steps,
            "distill.seed": self.seed,
            "distill.validate_every": self.looks,
        }
        return with_settings(RunConfig(model=self.model, device=device, dtype="float32"), BASE | given | more)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What is in ``path``; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def append_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """At the end of ``path``, by one process at a time."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def _told(job: Job, device: str) -> dict[str, Any]:
    return {
        "key": job.key,
        "study": job.study,
        "model": job.model,
        "seed": job.seed,
        "settings": dict(job.settings),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "diffusers": importlib.metadata.version("diffusers"),
    }


def lines_of(job: Job, run: Run, device: str, teacher: float | None) -> list[dict[str, Any]]:
    """A line per plan, as far as each came: losses of all rows by step, from 0 on."""
    session = Session(run)
    found = []
    for name, text in job.named(run.folder.parent / "plans").items():
        (plan,) = read_plans(text, session.architecture)
        paths = run.candidate(plan.id)
        if not paths.heldout.is_file():
            continue
        losses: dict[int, list[float]] = {}
        for line in paths.heldout.read_text().splitlines()[1:]:
            step, _, loss = line.split(",")
            losses.setdefault(int(step), []).append(round(float(loss), 6))
        recovery = load_recovery(paths.folder)
        found.append(
            _told(job, device)
            | {
                "plan": name,
                "plan_id": plan.id,
                "wanted": job.steps,
                "steps": max(losses),
                "status": recovery.status if recovery else "stopped",
                "seconds": round(recovery.seconds, 1) if recovery else None,
                "teacher": teacher,
                "losses": losses,
            }
        )
    return found


def _folder(work: Path, job: Job) -> Path:
    return work / job.key


def do(job: Job, work: Path, out: Path, device: str) -> None:
    """Distil the plans of ``job`` and write their lines."""
    folder = _folder(work, job)
    session = Session(start_run(job.config(folder / "plans", device), folder / "run"))
    ensure_distilled(session)
    teacher = float(heldout_loss(session.model, training_and_validation(session)[1]).double().mean())
    append_lines(out, lines_of(job, session.run, device, teacher))


def _claimed(jobs: list[Job], work: Path) -> Iterator[Job]:
    """One job after the other that no other worker has taken."""
    for job in jobs:
        try:
            (work / f"{job.key}.taken").touch(exist_ok=False)
        except FileExistsError:
            continue
        yield job


def _worker(jobs: list[Job], work: Path, out: Path, device: str, first: bool) -> None:
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # float32 is meant
    if not first:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 (one process tells enough)
    for job in _claimed(jobs, work):
        start = time.monotonic()
        try:
            do(job, work, out, device)
            print(
                f"{job.study} {' '.join(job.plans)} seed {job.seed}: {time.monotonic() - start:.0f} s",
                flush=True,
            )
        except PruneLabError as error:
            print(f"{job.study} {' '.join(job.plans)}: {error}", flush=True)
        except Exception:
            print(f"{job.study} {' '.join(job.plans)}: {traceback.format_exc()}", flush=True)


def run_jobs(jobs: list[Job], work: Path, out: Path, device: str, workers: int, seconds: float) -> None:
    """All of them that have no lines in ``out``, by so many processes; after ``seconds`` what is there is written."""
    done = {line["key"] for line in read_lines(out) if line["status"] != "stopped"}
    waiting = [job for job in jobs if job.key not in done]
    work.mkdir(parents=True, exist_ok=True)
    for path in work.glob("*.taken"):
        path.unlink()
    until = time.monotonic() + seconds
    spawn = multiprocessing.get_context("spawn")
    processes = [
        spawn.Process(target=_worker, args=(waiting, work, out, device, place == 0), daemon=True)
        for place in range(min(workers, len(waiting)))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0, until - time.monotonic()))
    if not any(process.is_alive() for process in processes):
        return
    for process in processes:
        process.kill()
        process.join()
    told = {line["key"] for line in read_lines(out)}
    for job in waiting:
        run = _folder(work, job) / "run"
        if job.key not in told and run.is_dir():
            with contextlib.suppress(PruneLabError):
                append_lines(out, lines_of(job, open_run(run, must_exist=True), device, None))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("jobs", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=864e3)
    arguments = parser.parse_args()
    jobs = [Job(**given) for given in json.loads(arguments.jobs.read_text())]
    # killed by the signal itself it would leave its processes behind, which go on distilling
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(exit_codes.TERMINATED))
    run_jobs(jobs, arguments.work, arguments.out, arguments.device, arguments.workers, arguments.seconds)


if __name__ == "__main__":
    main()
