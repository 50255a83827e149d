"""What stands between a run and a Ray cluster, without one: the connection, storage, ASHA's decisions, verdicts."""

from __future__ import annotations

import builtins
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from prune_lab.cluster import ArtifactStore, Cluster, connected, publish, tournament_from_asha
from prune_lab.cluster.asha import scheduler_of
from prune_lab.errors import ClusterError, StorageError
from prune_lab.ranking import HeldoutLosses

# Connection ------------------------------------------------------------------------------------------------------


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".", maxsplit=1)[0] == "ray":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with (
        pytest.raises(ClusterError, match=r"found no ray; pip install 'prune-lab\[ray\]'"),
        connected(Cluster()),
    ):
        pass


@pytest.mark.parametrize("address", ["localhost:1", "nonsense", "host:port", "ray://localhost:1"])
def test_a_cluster_that_does_not_answer_costs_seconds(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_asked: pytest.fail("Ray would wait for two minutes"))
    start = time.monotonic()
    with pytest.raises(ClusterError, match=address), connected(Cluster(address=address)):
        pass
    assert time.monotonic() - start < 10


# Storage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "file", "path"])
def test_a_shelf_gives_back_what_was_published(kind: str, tmp_path: Path) -> None:
    url = {"memory": f"memory://{tmp_path.name}", "file": f"file://{tmp_path}/s", "path": f"{tmp_path}/s"}[
        kind
    ]
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "sub").mkdir(parents=True)
    (here / "a.txt").write_text("a")
    (here / "sub" / "b.txt").write_text("b")
    store = publish(here, ["a.txt", "sub/b.txt"], url)
    store.fetch(there, lambda name: name.startswith("sub/"))
    assert [path.name for path in there.rglob("*.txt")] == ["b.txt"]
    store.fetch(there)
    assert (there / "a.txt").read_text() == "a"
    assert store.listed("") == ("a.txt", "sub/b.txt")
    assert store.listed("sub") == ("sub/b.txt",)
    assert store.listed("nowhere") == ()
    (here / "a.txt").write_text("other")
    assert publish(here, ["a.txt"], url).key != store.key
    store.put(here, ["a.txt"])  # again, over what is there
    store.get(there, ["a.txt"])
    assert (there / "a.txt").read_text() == "other"


def test_nothing_is_sent_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")
    sent: list[Sequence[str]] = []
    put = ArtifactStore.put

    def counted(self: ArtifactStore, folder: Path, names: Sequence[str]) -> None:
        sent.append(list(names))
        put(self, folder, names)

    monkeypatch.setattr(ArtifactStore, "put", counted)
    for _ in range(2):
        publish(tmp_path, ["a.txt"], str(tmp_path / "shelf"))
    assert sent == [["a.txt"], []]


def test_a_copy_that_was_cut_off_is_not_taken_for_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("a")
    store = publish(tmp_path, ["a.txt"], str(tmp_path / "shelf"))
    fs, _ = store.opened()

    def half(_self: Any, _source: str, target: str, **_more: Any) -> None:
        Path(target).write_text("hal")
        raise OSError("no space left")

    monkeypatch.setattr(type(fs), "put_file", half)
    (tmp_path / "a.txt").write_text("other")
    with pytest.raises(StorageError, match="no space left"):
        store.put(tmp_path, ["a.txt"])
    monkeypatch.undo()
    store.get(tmp_path / "there", ["a.txt"])
    assert (tmp_path / "there" / "a.txt").read_text() == "a"
    assert [path.name for path in (tmp_path / "shelf").rglob("*") if path.is_file()] == ["a.txt"]


@pytest.mark.parametrize(
    ("url", "found"), [("nonsense://x", "nonsense"), ("file:///proc/nowhere/x", "nowhere")]
)
def test_storage_that_cannot_be_used_is_refused(url: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(StorageError, match=found):
        publish(tmp_path, ["a.txt"], url)


# Decisions -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Remembered:
    """Decisions in memory."""

    known: dict[str, dict[int, bool]] = dataclasses.field(default_factory=dict)

    def recall(self, name: str) -> Mapping[int, bool]:
        return self.known.get(name, {})

    def keep(self, name: str, steps: int, goes_on: bool) -> None:
        self.known.setdefault(name, {})[steps] = goes_on


def decided(
    memory: Remembered,
    reports: Sequence[tuple[str, int, float]],
    controls: Sequence[str] = (),
    last: int = 8,
) -> list[str]:
    """What is decided about each of ``reports``, in their order."""
    judge = scheduler_of((2, 4, last), 2, controls, memory)
    trials = {name: SimpleNamespace(trial_id=name, config={"name": name}) for name, _, _ in reports}
    for trial in trials.values():
        judge.on_trial_add(None, trial)
    said = []
    for name, steps, loss in reports:
        result = {"loss": loss, "steps": steps}
        said.append(judge.on_trial_result(None, trials[name], result))
        if said[-1] == "STOP" or steps == last:
            judge.on_trial_complete(None, trials[name], result)
    return said


def test_asha_stops_who_is_worse_and_never_a_control() -> None:
    reports = [("a", 2, 1.0), ("b", 2, 2.0), ("a", 4, 0.9), ("a", 8, 0.8)]
    assert decided(Remembered(), reports) == ["CONTINUE", "STOP", "CONTINUE", "CONTINUE"]
    assert decided(Remembered(), reports, ["b"]) == ["CONTINUE"] * 4
    # a control sets no bar for the others either
    for last in (8, 7):  # 7 is no rung of ASHA's own
        reports = [
            ("a", 2, 0.1),
            ("a", 4, 0.1),
            ("a", last, 0.1),
            ("b", 2, 2.0),
            ("c", 2, 3.0),
            ("b", 4, 2.0),
        ]
        assert decided(Remembered(), reports, ["a"], last) == [*["CONTINUE"] * 4, "STOP", "CONTINUE"]


def test_what_was_decided_stays_so_in_whatever_order_it_is_asked_again() -> None:
    memory = Remembered()
    decided(memory, [("a", 2, 2.0), ("b", 2, 1.0), ("c", 2, 3.0), ("a", 4, 1.5)])
    assert memory.known == {"a": {2: True, 4: True}, "b": {2: True}, "c": {2: False}}
    again = [("c", 2, 3.0), ("b", 2, 1.0), ("a", 2, 2.0), ("a", 4, 1.5), ("b", 4, 1.6)]
    assert decided(memory, again) == ["STOP", "CONTINUE", "CONTINUE", "CONTINUE", "STOP"]


# Verdicts --------------------------------------------------------------------------------------------------------


def test_verdicts_of_a_tournament_that_asha_decided() -> None:
    losses = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 1.5}
    spread = np.array([-0.01, 0.0, 0.01, 0.0])

    def measure(names: Sequence[str], steps: int) -> Mapping[str, HeldoutLosses]:
        return {name: "diverged" if (name, steps) == ("d", 4) else losses[name] + spread for name in names}

    tournament = tournament_from_asha(("c", "a", "b", "d"), (2, 4, 8), measure, {"c": 2, "b": 4}, keep=())
    assert [(one.rung, one.name, one.fate) for one in tournament.verdicts] == [
        *((1, "a", "kept"), (1, "d", "kept"), (1, "b", "kept"), (1, "c", "dropped")),
        *((2, "a", "kept"), (2, "b", "dropped"), (2, "d", "failed")),
        (3, "a", "kept"),
    ]
    gone = tournament.fates["c"]
    assert (
        gone.reason
        == "at rung 1 of 3, 2 steps: stopped by ASHA, 2.0000 [2.0000, 2.0000] above the best there"
    )
    assert (gone.against, gone.place) == ("a", 4)
    assert tournament.fates["d"].reason == "diverged"
    assert tournament.survivors == ("a",)
    assert math.isclose(tournament.fates["b"].loss, 2.0)


def test_a_stop_that_may_be_chance_says_so() -> None:
    rows = {"a": np.array([1.0, 2.0, 3.0]), "b": np.array([3.0, 1.0, 2.5])}
    tournament = tournament_from_asha(
        ("a", "b"), (1, 2), lambda names, _steps: {name: rows[name] for name in names}, {"b": 1}
    )
    assert tournament.fates["b"].reason.endswith("above the best there, which may be chance")
