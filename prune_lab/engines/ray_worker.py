"""The engine of a Ray cluster, the worker's side: training, scoring and drawing with the functions of the local engine.

So weights, scores and pictures equal those of the local engine, on a CPU bit for bit with as many threads. A worker
sees the run folder itself, or fetches files from an artifact store and puts its results there after every rung.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from prune_lab.blocks import BlockGroup
from prune_lab.candidates import Candidate, State, load_candidate
from prune_lab.cluster import ArtifactStore, Report
from prune_lab.distill import load_recovery
from prune_lab.engines.pictures import draw_set
from prune_lab.engines.training import heldout_losses_after, train_to
from prune_lab.errors import ClusterError
from prune_lab.importance import ImportanceTable, ScoreCache, score
from prune_lab.probes import load_probe
from prune_lab.runs import Run
from prune_lab.session import Session, run_scoring_context

RAY = "ray"  # folder in a run for what only the cluster needs; removed after training
VALIDATION = f"{RAY}/validation.safetensors"
BUILT = ("plan.json", "profile.json", "pruned", "repaired")  # of a candidate, before any training
DECISIONS = "distilled/decisions.json"  # in a candidate's folder, and gone with its distillation
_VERDICT = "distilled/recovery.json"


# Messages -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class RunRef:
    """A run as a worker finds it; hashable, so that a worker keeps its session from task to task."""

    folder: str  # of the run, as the driver sees it
    directory: str  # the driver's working directory, which relative paths in the settings are of
    cpus: int
    store: ArtifactStore | None
    digest: str  # of settings and validation: a folder may hold another run by now


@dataclasses.dataclass(frozen=True, slots=True)
class ScoreShard:
    """A share of the scoring: these groups, on these rows of the probe; None: on all samples of the criterion."""

    groups: tuple[BlockGroup, ...]
    rows: tuple[int, ...] | None = None


def files_in(folder: Path, names: Sequence[str]) -> list[str]:
    """The files called ``names``, or in folders called so, that are there; relative to ``folder``."""
    found: list[Path] = []
    for name in names:
        path = folder / name
        inside = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else []
        found += [path] if path.is_file() else inside
    return [path.relative_to(folder).as_posix() for path in found if not path.name.startswith(".")]


def of_candidate(plan_id: str, *names: str) -> list[str]:
    """These names as seen from the run folder."""
    return [f"candidates/{plan_id}/{name}" for name in names]


# The session of a worker ---------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)  # the next candidate finds the teacher loaded
def _session_of(ref: RunRef) -> Session:
    run = Run(Path(ref.folder))
    if ref.store is not None:
        run = Run(ref.store.scratch)
    elif not run.config.is_file():
        raise ClusterError(
            f"asked a worker for the run {ref.folder}, which it does not see; put the run on a path that all machines "
            "share, or set engine.storage"
        )
    path = run.folder / VALIDATION
    # Encoded on another kind of machine it would differ in its last digits, and checkpoints would not match.
    return Session(run, validation=load_probe(path) if path.is_file() else None, trusting=True)


@contextlib.contextmanager
def _opened(ref: RunRef) -> Iterator[Session]:
    """The session of the run, with the threads and the working directory that ``ref`` asks for."""
    threads = torch.get_num_threads()
    there = Path(ref.directory).is_dir()
    torch.set_num_threads(ref.cpus)
    try:
        if ref.store is not None:
            ref.store.fetch(ref.store.scratch, lambda name: not name.startswith("candidates/"))
        with contextlib.chdir(ref.directory) if there else contextlib.nullcontext():
            yield _session_of(ref)
    finally:
        torch.set_num_threads(threads)


def _candidate(ref: RunRef, session: Session, plan_id: str) -> Candidate:
    run = session.run
    if ref.store is not None:
        ref.store.fetch(run.folder, lambda name: name.startswith(f"candidates/{plan_id}/"))
    return load_candidate(run.candidate(plan_id).folder, session.architecture)


def _put_state(store: ArtifactStore, run: Run, plan_id: str) -> None:
    """Write the state of a candidate's distillation to ``store``, its verdict last."""
    names = files_in(run.folder, of_candidate(plan_id, "recovery.csv", "heldout.csv", "grids", "distilled"))
    (decisions,), (verdict,) = of_candidate(plan_id, DECISIONS), of_candidate(plan_id, _VERDICT)
    store.put(run.folder, [name for name in names if name not in (decisions, verdict)])
    store.put(run.folder, [verdict])


def get_state(store: ArtifactStore, run: Run, plan_id: str) -> None:
    """Write the state of a candidate's distillation from ``store`` to ``run``, its verdict last."""
    published, (verdict,) = set(store.names), of_candidate(plan_id, _VERDICT)
    names = [name for name in store.listed(f"candidates/{plan_id}") if name not in published]
    if verdict in names:  # without a verdict it came to no rung
        store.get(run.folder, [*(name for name in names if name != verdict), verdict])


# Work -----------------------------------------------------------------------------------------------------------


def train_candidate(ref: RunRef, rungs: Sequence[int], plan_id: str, report: Report) -> None:
    """Train a candidate from its state, from rung to rung, until it is stopped, fails or comes to the last."""
    with _opened(ref) as session:
        candidate = _candidate(ref, session, plan_id)
        if ref.store is not None:
            # an earlier attempt may have left an older state on this machine
            for path in (candidate.paths.distilled, candidate.paths.grids):
                shutil.rmtree(path, ignore_errors=True)
            get_state(ref.store, session.run, plan_id)
        for steps in rungs:
            before = load_recovery(candidate.folder)
            train_to(session, [candidate], steps, keep_checkpoint=len(rungs) > 1)
            after = load_recovery(candidate.folder)
            if ref.store is not None and (before is None or after is None or before.steps != after.steps):
                _put_state(ref.store, session.run, plan_id)
            losses = heldout_losses_after([candidate], steps)[plan_id]
            if isinstance(losses, str):
                return  # its verdict says why
            report(steps, float(losses.mean()))


def score_shard(ref: RunRef, criterion: str, shard: ScoreShard) -> ImportanceTable:
    """The scores of the groups of ``shard``, without intervals."""
    with _opened(ref) as session:
        # in memory: workers that write one file would lose each other's values
        context = dataclasses.replace(run_scoring_context(session), cache=ScoreCache())
        if shard.rows is not None:
            unconditional = None if context.unconditional is None else context.unconditional.rows(shard.rows)
            context = dataclasses.replace(
                context, probe=context.probe.rows(shard.rows), unconditional=unconditional
            )
        return score(context, shard.groups, criterion, bootstrap=0)


def draw_pictures(ref: RunRef, asked: tuple[str, State]) -> NDArray[np.uint8]:
    """The pictures of ``asked``, a plan's id and a state; of the teacher for an empty id."""
    plan_id, state = asked
    with _opened(ref) as session:
        candidate = _candidate(ref, session, plan_id) if plan_id else None
        return cast("NDArray[np.uint8]", draw_set(session, candidate, state).numpy())
