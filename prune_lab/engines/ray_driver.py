"""The engine of a Ray cluster, the driver's side: training, scores and pictures sent to its machines.

``ray_worker`` is the other side. Where the machines do not see the run folder, the driver publishes on
``engine.storage`` the files that they read, and fetches from there the files that they wrote.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from prune_lab.blocks import BlockGroup
from prune_lab.candidates import Candidate
from prune_lab.cluster import (
    Cluster,
    compete,
    connected,
    everywhere,
    in_tasks,
    publish,
    slots,
    tournament_from_asha,
)
from prune_lab.distill import load_recovery
from prune_lab.engines.pictures import PictureJob
from prune_lab.engines.ray_worker import (
    BUILT,
    DECISIONS,
    RAY,
    VALIDATION,
    RunRef,
    ScoreShard,
    draw_pictures,
    files_in,
    get_state,
    of_candidate,
    score_shard,
    train_candidate,
)
from prune_lab.engines.training import controls_among, heldout_losses_after
from prune_lab.errors import ClusterError, ConfigError
from prune_lab.importance import ONE_STEP, ImportanceTable, Samples
from prune_lab.importance.intervals import impacts_of, intervals
from prune_lab.ranking import HeldoutLosses, Tournament
from prune_lab.runs import Run, read_typed
from prune_lab.runtime import note, write_json
from prune_lab.session import Session, ensure_data, ensure_probe

Item = TypeVar("Item")
Found = TypeVar("Found")

_SHARED = (
    "config.toml",
    "probe.safetensors",
    "importance.csv",
    "data.safetensors",
    "data",
    "plans",
    VALIDATION,
)


# Set-up -------------------------------------------------------------------------------------------------------


def _ref(run: Run, cluster: Cluster, names: Sequence[str]) -> RunRef:
    folder = run.folder.resolve()
    store = publish(folder, files_in(folder, names), cluster.storage) if cluster.storage else None
    read = [path for path in (run.config, run.folder / VALIDATION) if path.is_file()]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in read)).hexdigest()[:16]
    return RunRef(str(folder), str(Path.cwd()), cluster.cpus, store, digest)


def cluster_of(session: Session) -> Cluster:
    """The cluster that the run's settings name."""
    settings = session.config.engine
    storage = settings.storage
    if storage and "://" not in storage:
        storage = str(Path(storage).expanduser().resolve())
    return Cluster(address=settings.address, storage=storage, cpus=settings.cpus)


def _device_of(session: Session) -> str:
    """The device that the settings of the run name. Raises ConfigError where it is a certain card."""
    device = session.config.device
    if ":" in device:
        raise ConfigError(
            f"asked for device {device!r} with engine.kind = 'ray', which hands out GPUs itself; use cuda"
        )
    return device


@contextlib.contextmanager
def _reached(session: Session, cluster: Cluster | None) -> Iterator[tuple[Any, Cluster]]:
    """Ray, and ``cluster`` (None: that of the settings) with the GPUs per task that the device of the run asks for."""
    cluster, device = cluster or cluster_of(session), _device_of(session)
    with connected(cluster) as ray:
        if cluster.gpus is None:
            wanted = device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1)
            cluster = dataclasses.replace(cluster, gpus=1.0 if wanted else 0.0)
        yield ray, cluster


# Training --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Decisions:
    """The decisions of ASHA about the candidates of a run, each in a file beside the candidate's state."""

    run: Run

    def _path(self, name: str) -> Path:
        return self.run.candidate(name).folder / DECISIONS

    def recall(self, name: str) -> Mapping[int, bool]:
        path = self._path(name)
        found = read_typed(path, dict[str, bool]) if path.is_file() else {}
        return {int(steps): goes_on for steps, goes_on in found.items()}

    def keep(self, name: str, steps: int, goes_on: bool) -> None:
        known = {**self.recall(name), steps: goes_on}
        write_json(self._path(name), {str(at): known[at] for at in sorted(known)})

    def stopped(self, name: str) -> int | None:
        """The steps after which ``name`` was stopped; None when it was not."""
        return next((steps for steps, goes_on in self.recall(name).items() if not goes_on), None)


def _check_ended(
    run: Run, names: Sequence[str], last: int, stopped: Mapping[str, int], errors: Mapping[str, str]
) -> None:
    """Raise ClusterError unless every candidate came to the ``last`` step, failed, was stopped or has an error."""
    if names and len(errors) == len(names):
        raise ClusterError(
            f"asked to distil {len(names)} candidates on the Ray cluster, found none that came to an end: "
            f"{errors[names[0]]}"
        )
    for name in names:
        recovery = load_recovery(run.candidate(name).folder)
        through = recovery is not None and (recovery.status == "failed" or recovery.steps >= last)
        if not through and name not in errors and name not in stopped:
            steps = recovery.steps if recovery else 0
            raise ClusterError(
                f"asked to distil on the Ray cluster, found {name} after {steps} of {last} steps when it ended; "
                "the same command again goes on"
            )


def train(
    session: Session,
    candidates: Sequence[Candidate],
    rungs: Sequence[int],
    *,
    cluster: Cluster | None = None,
) -> Tournament:
    """The tournament of ``candidates`` over ``rungs``, decided by ASHA; on ``cluster``, None: that of the settings.

    Each candidate is a trial of Ray Tune that distils it from rung to rung. A trial whose worker died resumes from the
    candidate's checkpoint, and so do all of them when the same command is given again. Survivors are ranked by the
    paired differences of ``run_tournament``. With one rung no candidate is dropped. The CLIP score breaks no ties at
    rungs. Raises ClusterError, StorageError.
    """
    run = session.run
    named = {one.plan.id: one for one in candidates}
    names, controls = list(named), controls_among(session, candidates)
    decisions, own = _Decisions(run), run.folder.resolve() / RAY
    with _reached(session, cluster) as (ray, cluster):
        ensure_data(session)
        session.validation.save(run.folder / VALIDATION)
        built = [path for name in names for path in of_candidate(name, *BUILT)]
        ref = _ref(run, cluster, [*_SHARED, *built])
        note(f"distilling {len(names)} candidates on Ray, {slots(ray, cluster)} at once")
        place: Any = str(own)
        if ref.store is not None:
            filesystem, root = ref.store.opened()
            place = filesystem, f"{root}/{RAY}"
        errors = compete(
            ray,
            cluster,
            names,
            rungs,
            max(2, session.config.rank.eta),  # of no account where there is one rung
            partial(train_candidate, ref, rungs),
            decisions,
            controls=controls,
            storage=place,
        )
        if ref.store is not None:
            for name in names:
                get_state(ref.store, run, name)
            ref.store.remove(f"{RAY}/tune")
            everywhere(ray, ref.store.sweep)
    stops = {name: decisions.stopped(name) for name in names}
    stopped = {name: steps for name, steps in stops.items() if steps is not None and steps in rungs[:-1]}
    _check_ended(run, names, rungs[-1], stopped, errors)
    shutil.rmtree(own, ignore_errors=True)

    def measure(going: Sequence[str], steps: int) -> dict[str, HeldoutLosses]:
        answers: dict[str, HeldoutLosses] = {}
        for name in going:
            found = load_recovery(named[name].folder)
            came = found is not None and (found.status == "failed" or found.steps >= steps)
            answers |= heldout_losses_after([named[name]], steps) if came else {name: errors[name]}
        return answers

    return tournament_from_asha(names, rungs, measure, stopped, controls)


# Tasks ---------------------------------------------------------------------------------------------------------


def _in_tasks(
    ray: Any, cluster: Cluster, ref: RunRef, work: Callable[[Item], Found], items: Sequence[Item]
) -> list[Found]:
    """``in_tasks``, and afterwards nothing of the run is left on the machines."""
    try:
        return in_tasks(ray, cluster, work, items)
    finally:
        if ref.store is not None:
            everywhere(ray, ref.store.sweep)


def _pieces(count: int, slots: int, unit: int = 1) -> list[range]:
    """``count`` indices in at most ``slots`` ranges; the length of each but the last is a multiple of ``unit``."""
    size = max(1, math.ceil(math.ceil(count / unit) / slots)) * unit
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def score_groups(
    session: Session,
    groups: Sequence[BlockGroup],
    *,
    bootstrap: int = 0,
    cluster: Cluster | None = None,
) -> ImportanceTable:
    """The scores of ``groups`` by the run's criterion on its probe, computed in equal shards.

    By a criterion of one step every worker gets some rows of the probe, in whole batches: which rows share a forward
    pass, and so the rounding, stays as it is on one machine where ``score.batch`` is set. By the others it gets some of
    the groups.
    """
    _device_of(session)  # before any work
    probe, settings, all_groups = ensure_probe(session), session.config.score, tuple(groups)
    one_step = settings.criterion in ONE_STEP
    with _reached(session, cluster) as (ray, cluster):
        ref, room = _ref(session.run, cluster, ("config.toml", "probe.safetensors")), slots(ray, cluster)
        if one_step:
            shards = [
                ScoreShard(all_groups, tuple(rows)) for rows in _pieces(len(probe), room, settings.batch or 1)
            ]
        else:
            shards = [ScoreShard(all_groups[few.start : few.stop]) for few in _pieces(len(all_groups), room)]
        tables = _in_tasks(ray, cluster, ref, partial(score_shard, ref, settings.criterion), shards)
    whole = tables[0]
    values = np.concatenate([table.values for table in tables], axis=1 if one_step else 0)
    if one_step:
        entries, samples = list(whole.entries), Samples.of(probe)
        scales = np.concatenate([table.scales for table in tables if table.scales is not None])
    else:
        entries = [entry for table in tables for entry in table.entries]
        assert whole.samples is not None
        assert whole.scales is not None
        samples, scales = whole.samples, whole.scales
    ends = intervals(values, scales, samples.pictures, draws=bootstrap, seed=session.config.seed)
    scored = [
        dataclasses.replace(
            entry, impact=float(impact), low=float(low), high=float(high), samples=len(scales)
        )
        for entry, impact, low, high in zip(entries, impacts_of(values, scales), *ends, strict=True)
    ]
    return dataclasses.replace(
        whole,
        entries=tuple(scored),
        probe=probe.digest,
        values=values,
        scales=scales,
        samples=samples,
        compute=None,  # that of several shards is not that of one
    )


def draw(session: Session, jobs: Sequence[PictureJob], *, cluster: Cluster | None = None) -> list[Tensor]:
    """The pictures of each of ``jobs``, uint8 (prompts x seeds, 3, H, W), each set drawn by one worker."""
    asked = [(job.candidate.plan.id if job.candidate else "", job.state) for job in jobs]
    ids = dict.fromkeys(plan_id for plan_id, _ in asked if plan_id)
    names = [name for plan_id in ids for name in of_candidate(plan_id, *BUILT, "distilled/model")]
    with _reached(session, cluster) as (ray, cluster):
        ref = _ref(session.run, cluster, ["config.toml", *names])
        sets = _in_tasks(ray, cluster, ref, partial(draw_pictures, ref), asked)
    return [torch.from_numpy(pictures.copy()) for pictures in sets]  # Ray's arrays are read-only
