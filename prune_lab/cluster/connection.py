"""A connection to a Ray cluster, and work sent to it as tasks."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from prune_lab.errors import ClusterError, PruneLabError

Item = TypeVar("Item")
Found = TypeVar("Found")

_PATIENCE = 5.0  # seconds for a head node to answer; Ray waits two minutes and then ends the process
_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # no tables on standard output, which belongs to our own
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # every loss is in the run folder already
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends everything and returns no half of a tournament
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A Ray cluster, the resources of each task or candidate, and the storage that its machines share."""

    address: str = ""  # host:port, ray://host:port, auto for one here; empty: started here, and ended
    storage: str = ""  # folder or fsspec URL; empty: every machine sees the run folder itself
    cpus: int = 1  # cores, and threads
    gpus: float | None = None  # None: as the device of the run asks
    retries: int = 3  # after a worker died


def _check_answers(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE):
            return
    except (OSError, ValueError, OverflowError) as error:
        raise ClusterError(
            f"asked for the Ray cluster at {address!r}, found none that answers ({error}); give host:port of a head "
            "node, auto for a cluster of this machine, or leave engine.address empty to start one here"
        ) from None


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    added = _ENVIRONMENT.keys() - os.environ.keys()
    os.environ.update({name: _ENVIRONMENT[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def connected(cluster: Cluster) -> Iterator[Any]:
    """Ray, connected to the cluster; an existing connection is used and left open.

    Without an address a cluster is started on this machine and ended on exit. Raises ClusterError when Ray is not
    installed or nothing answers.
    """
    try:
        import ray
    except ImportError:
        raise ClusterError(
            "asked for engine.kind = 'ray', found no ray; pip install 'prune-lab[ray]'"
        ) from None
    with _environment():
        if ray.is_initialized():
            yield ray
            return
        own = cluster.address in ("", "local")
        if not own and cluster.address != "auto":
            _check_answers(cluster.address)
        asked = {"include_dashboard": False} if own else {}
        try:
            ray.init(address=cluster.address or "local", log_to_driver=False, logging_level="ERROR", **asked)
        except (OSError, RuntimeError, ValueError) as error:
            found = next(iter(_lines(error)), type(error).__name__).rstrip(".")
            raise ClusterError(
                f"asked for the Ray cluster at {cluster.address or 'this machine'!r}, found {found}; "
                "start one with: ray start --head, or leave engine.address empty to start one here"
            ) from None
        try:
            yield ray
        finally:
            ray.shutdown()


def _lines(error: BaseException) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()]


def last_word(error: BaseException) -> str:
    """The reason why a task or trial failed, in one line: our own message, or else the end of the traceback."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, PruneLabError):
        return str(cause)
    lines = _lines(error)
    ours = [line for line in lines if re.match(r"(\w+\.)*\w+(Error|Exception)\b", line)]
    return (ours or lines or [type(error).__name__])[-1]


def slots(ray: Any, cluster: Cluster) -> int:
    """How many tasks run at once, 1 at least."""
    there = ray.cluster_resources()
    fits = [int(there.get("CPU", 0) // cluster.cpus)]
    if cluster.gpus:
        fits.append(int(there.get("GPU", 0) // cluster.gpus))
    return max(1, min(fits))


def check_room(ray: Any, cluster: Cluster) -> None:
    """Raise ClusterError when no machine has what one task asks for: Ray would wait for ever."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = cluster.gpus or 0
    if not any(one.get("CPU", 0) >= cluster.cpus and one.get("GPU", 0) >= gpus for one in machines):
        cores, cards = (max((one.get(kind, 0) for one in machines), default=0) for kind in ("CPU", "GPU"))
        raise ClusterError(
            f"asked for {cluster.cpus} cores and {gpus:g} GPUs for each candidate, found {len(machines)} machines of "
            f"at most {cores:g} cores and {cards:g} GPUs; lower engine.cpus, or set device = 'cpu'"
        )


def _done(work: Callable[..., Found], *item: Any) -> Found:
    """``work(*item)``: Ray accepts plain functions alone, and ``work`` may be a partial."""
    return work(*item)


def in_tasks(ray: Any, cluster: Cluster, work: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
    """``work(item)`` for each of ``items``, in order, each in a task of its own; a task whose worker died is repeated.

    Raises the error of ``work``, and ClusterError when its worker died more often than ``cluster.retries`` times.
    """
    check_room(ray, cluster)
    task = ray.remote(num_cpus=cluster.cpus, num_gpus=cluster.gpus or 0, max_retries=cluster.retries)(_done)
    try:
        found: list[Found] = ray.get([task.remote(work, item) for item in items])
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PruneLabError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise ClusterError(
            f"asked {len(items)} tasks of the Ray cluster, found {last_word(error)}; see the logs of Ray"
        ) from None
    return found


def everywhere(ray: Any, work: Callable[[], None]) -> None:
    """Call ``work`` once on every machine of the cluster; machines that do not answer are left out."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked = [
        ray.remote(num_cpus=0)(_done)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(work)
        for node in ray.nodes()
        if node["Alive"]
    ]
    ray.wait(asked, num_returns=len(asked), timeout=120)
