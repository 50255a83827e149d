"""A tournament, scores and pictures on a Ray cluster of two nodes, started here: the numbers of the local engine."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from safetensors.torch import load_file

from prune_lab.blocks import BlockGroup
from prune_lab.cluster import ArtifactStore, Cluster, connected, in_tasks
from prune_lab.config import EngineConfig, RankConfig, RunConfig
from prune_lab.distill import load_heldout, load_recovery
from prune_lab.engines import PictureJob, ray_driver, rungs_of
from prune_lab.engines.pictures import draw_set
from prune_lab.engines.training import train_to
from prune_lab.errors import ClusterError, ConfigError, StorageError
from prune_lab.importance import score
from prune_lab.ranking import Tournament, run_tournament
from prune_lab.runs import Run
from prune_lab.runtime import read_json, write_json
from prune_lab.session import Session, ensure_data, ensure_probe, run_scoring_context
from prune_lab.session.parts import plans_part, record
from prune_lab.workflow import (
    ensure_candidates,
    ensure_distilled,
    ensure_plans,
    ensure_ranking,
    start_run,
)
from prune_lab.workflow.distilling import ensure_tournament

pytestmark = pytest.mark.long

STEPS, FIRST = 8, 2  # rungs at 2, 4 and 8 steps
OBJECTS = 100_000_000  # bytes of each node's object store


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Ray, connected to a head and a second node of one core each; nothing of it is left afterwards."""
    before = {
        name: os.environ.get(name) for name in ("RAY_USAGE_STATS_ENABLED", "RAY_DISABLE_IMPORT_WARNING")
    }
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster as Nodes

    head = {"num_cpus": 1, "object_store_memory": OBJECTS, "include_dashboard": False}
    started = set(psutil.Process().children(recursive=True))
    nodes = Nodes(initialize_head=True, head_node_args=head)
    try:
        nodes.add_node(num_cpus=1, object_store_memory=OBJECTS)
        with connected(Cluster(address=nodes.address)):
            yield ray
    finally:
        ray.shutdown()
        nodes.shutdown()
        left = [one for one in psutil.Process().children(recursive=True) if one not in started]
        _, alive = psutil.wait_procs(left, timeout=10)
        for one in alive:
            one.kill()
        _, alive = psutil.wait_procs(alive, timeout=10)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    # One that was killed stays listed for a moment, such as a prover of this process.
    assert not alive


@pytest.fixture(scope="module")
def config(small_run_config: Callable[..., RunConfig]) -> RunConfig:
    return small_run_config(
        score={"batch": 2, "bootstrap": 5},
        search={"controls": ("bk-base", "bk-small", "bk-tiny", "-Md")},
        distill={"steps": STEPS, "validate_every": 100},
        rank={"eta": 2, "first": FIRST},
        engine={"kind": "ray"},
        evaluate={"prompts": ("a red cat", "a dog"), "steps": 2, "guidance": 2.0},
    )


@pytest.fixture(scope="module")
def built(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with four candidates that nobody has trained; copy it to go on."""
    run = start_run(config, tmp_path_factory.mktemp("runs") / "built")
    session = Session(run)
    ensure_probe(session)
    ensure_candidates(session)
    ensure_data(session)
    return run


@pytest.fixture
def copied(built: Run, tmp_path: Path) -> Run:
    return Run(Path(shutil.copytree(built.folder, tmp_path / "run")))


def weights_of(run: Run, plan_id: str) -> dict[str, torch.Tensor]:
    (path,) = run.candidate(plan_id).distilled_model.glob("*.safetensors")
    return load_file(path)


@pytest.fixture(scope="module")
def alone(built: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Every candidate of ``built`` trained by itself, in this process and without rungs."""
    run = Run(Path(shutil.copytree(built.folder, tmp_path_factory.mktemp("alone") / "run")))
    session = Session(run)
    for candidate in ensure_candidates(session):
        train_to(session, [candidate], STEPS)
    return run


def check(run: Run, tournament: Tournament, alone: Run) -> None:
    """Everyone has a fate, somebody came through, and who did has the weights of ``alone``."""
    plan_ids = [plan.id for plan in ensure_plans(Session(run))]
    assert set(tournament.names) == set(tournament.fates) == set(plan_ids)
    assert tournament.survivors
    for plan_id in tournament.survivors:
        ours, theirs = weights_of(run, plan_id), weights_of(alone, plan_id)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for plan_id, verdict in tournament.fates.items():
        recovery = load_recovery(run.candidate(plan_id).folder)
        assert recovery is not None
        assert recovery.steps == verdict.steps
        if not verdict.kept:
            assert f"rung {verdict.rung} of 3, {verdict.steps} steps: stopped by ASHA" in verdict.reason
            assert verdict.difference is not None
            assert str(verdict.difference) in verdict.reason


# On the cluster --------------------------------------------------------------------------------------------------


def test_without_a_tournament_everyone_is_trained_on_the_cluster_to_the_end(
    cluster: Any, copied: Run, alone: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = EngineConfig(kind="ray")
    config = dataclasses.replace(Session(copied).config, rank=RankConfig(), engine=engine)
    run = start_run(config, copied.folder)
    with monkeypatch.context() as patch:
        patch.setattr(
            "prune_lab.engines.training.distill_together", None
        )  # nothing is trained in this process
        recoveries = ensure_distilled(Session(run))
    assert [one.steps for one in recoveries] == [STEPS] * 4
    assert not run.tournament.exists()
    assert not (run.folder / "ray").exists()
    for plan in ensure_plans(Session(run)):
        ours, theirs = weights_of(run, plan.id), weights_of(alone, plan.id)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert not run.candidate(plan.id).checkpoint.exists()


def trial_workers() -> list[psutil.Process]:
    """The processes, of those that were started from here, in which candidates are trained."""
    found = []
    for one in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            command = " ".join(one.cmdline())
            if command.startswith("ray::") and "ImplicitFunc" in command:
                found.append(one)
    return found


def test_a_tournament_with_a_killed_worker_has_the_weights_of_local_training(
    cluster: Any, copied: Run, alone: Run
) -> None:
    """Of one without a kill the others tell: this one loses nothing, and makes a ranking."""
    session = Session(copied)
    candidates = ensure_candidates(session)
    killed: list[int] = []

    def kill_in_mid_run() -> None:
        while not killed:
            for one in candidates:
                found = load_recovery(one.folder) if one.paths.recovery.exists() else None
                # in training between the first rung and the last, with a state that no rung has asked for
                if found and found.steps < STEPS and len(pd.read_csv(one.paths.recovery)) > 1:
                    for worker in trial_workers():
                        with contextlib.suppress(psutil.Error):
                            worker.kill()
                            killed.append(worker.pid)
                    return
            time.sleep(0.02)

    killer = threading.Thread(target=kill_in_mid_run, daemon=True)
    killer.start()
    tournament = ensure_tournament(session, candidates)
    assert killed
    assert tournament.rungs == (2, 4, 8)
    check(copied, tournament, alone)
    assert not (copied.folder / "ray").exists()
    frame = ensure_ranking(session).frame()  # pictures and impacts come from the cluster too
    assert set(frame["plan_id"]) == {"teacher", *tournament.names}
    # the last rung is what the local tournament makes of the same losses
    last = {name: load_heldout(copied.candidate(name).folder).loc[STEPS] for name in tournament.survivors}
    local = run_tournament(tournament.survivors, (STEPS,), 2, lambda _names, _steps: last)
    wanted = [dataclasses.replace(one, rung=3) for one in local.verdicts]
    assert [one for one in tournament.verdicts if one.rung == 3] == wanted


def test_machines_may_share_nothing_but_storage(
    cluster: Any, copied: Run, alone: Run, tmp_path: Path
) -> None:
    plans = ensure_plans(Session(copied))
    for plan in plans:
        if plan.name in ("bk-base", "-Md"):
            write_json(copied.plan(plan.id), plan.named(*plan.names, origin="search").to_json())
    changed = Session(copied)
    record(changed, plans_part(changed))  # as a search would have it
    storage = tmp_path / "storage"
    rank = RankConfig(eta=2, first=FIRST, keep_controls=True)
    engine = EngineConfig(kind="ray", storage=f"file://{storage}")
    config = dataclasses.replace(Session(copied).config, rank=rank, engine=engine)
    run = start_run(config, copied.folder)
    session = Session(run)
    tournament = ray_driver.train(session, ensure_candidates(session), rungs_of(session))
    check(run, tournament, alone)
    controls = {one.name for one in tournament.verdicts if one.place is None}
    assert controls == {plan.id for plan in plans if plan.name not in ("bk-base", "-Md")}
    assert controls <= set(tournament.survivors)
    (store,) = storage.iterdir()
    kept = {path.relative_to(store).as_posix() for path in store.rglob("*") if path.is_file()}
    assert {f"candidates/{name}/distilled/recovery.json" for name in tournament.names} <= kept
    assert not [name for name in kept if Path(name).name.startswith(".")]
    assert not ArtifactStore("", store.name, ()).scratch.exists()


def test_scores_and_pictures_equal_the_local_ones(cluster: Any, alone: Run, tmp_path: Path) -> None:
    session = Session(alone)
    groups = [BlockGroup(plan.id, "plan", plan.removed) for plan in ensure_plans(session)]
    ours = ray_driver.score_groups(session, groups, bootstrap=5)
    theirs = score(run_scoring_context(session), groups, bootstrap=5)
    assert np.array_equal(ours.values, theirs.values)
    assert np.array_equal(ours.scales, theirs.scales)
    assert ours.entries == theirs.entries
    pd.testing.assert_frame_equal(ours.parts(), theirs.parts())
    pd.testing.assert_frame_equal(ours.frame(), theirs.frame())
    candidate = ensure_candidates(session)[0]
    jobs = [PictureJob(tmp_path / "a"), PictureJob(tmp_path / "b", candidate, "distilled")]
    shared = Cluster(storage=str(tmp_path / "storage"))
    for where in (None, shared):
        for job, pixels in zip(jobs, ray_driver.draw(session, jobs, cluster=where), strict=True):
            assert torch.equal(pixels, draw_set(session, job.candidate, job.state))
    stores = [store.name for store in (tmp_path / "storage").iterdir()]
    assert stores
    assert not any(
        ArtifactStore("", name, ()).scratch.exists() for name in stores
    )  # others may be at work beside it


def test_what_goes_wrong_on_a_worker_is_said_in_one_line(cluster: Any, copied: Run, tmp_path: Path) -> None:
    session = Session(copied)
    candidates = ensure_candidates(session)[:1]
    with pytest.raises(ClusterError, match=r"lower engine\.cpus"):
        ray_driver.train(session, candidates, (STEPS,), cluster=Cluster(cpus=64))
    shutil.rmtree(candidates[0].paths.pruned)
    with pytest.raises(ClusterError, match="found none that came to an end: asked for the candidate in"):
        ray_driver.train(session, candidates, (STEPS,), cluster=Cluster(retries=0))
    with pytest.raises(StorageError, match=r"^asked to read .*missing\.json: No such file"):
        in_tasks(cluster, Cluster(), read_json, [tmp_path / "missing.json"])


# Settings --------------------------------------------------------------------------------------------------------


def test_ray_hands_out_gpus_itself(built: Run, config: RunConfig, cluster: Any) -> None:
    session = Session(built, config=dataclasses.replace(config, device="cuda:1"))
    with pytest.raises(ConfigError, match="use cuda"):
        ray_driver.score_groups(session, [])


def test_the_settings_name_the_cluster(built: Run, config: RunConfig, tmp_path: Path) -> None:
    engine = EngineConfig(kind="ray", address="head:6379", storage="store", cpus=3)
    session = Session(built, config=dataclasses.replace(config, engine=engine))
    wanted = Cluster(address="head:6379", storage=str(Path.cwd() / "store"), cpus=3)
    assert ray_driver.cluster_of(session) == wanted
    engine = dataclasses.replace(engine, storage="s3://bucket/store")
    session = Session(built, config=dataclasses.replace(config, engine=engine))
    assert ray_driver.cluster_of(session).storage == "s3://bucket/store"
