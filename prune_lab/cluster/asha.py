"""A tournament on a cluster: candidates as trials of Ray Tune that ASHA stops, and the verdicts on them.

ASHA does not wait until a rung is complete: a candidate that comes to a rung is stopped when it is worse than the best
1/eta of those that came before it. So the order of arrival decides which candidates go on; their weights do not depend
on it.

Reference: Li et al., arXiv:1810.05934.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

from prune_lab.cluster.connection import Cluster, check_room, last_word
from prune_lab.ranking import HeldoutLosses, Tournament, Verdict, run_tournament

Report = Callable[[int, float], None]
"""Called with the steps taken and the loss after them; does not return when the candidate is to stop."""
Trial = Callable[[str, Report], None]
"""Trains the named candidate and reports at each rung, also at rungs that it came to before."""


class DecisionLog(Protocol):
    """The decisions of ASHA, kept where they outlive the process that makes them."""

    def recall(self, name: str) -> Mapping[int, bool]:
        """Whether ``name`` went on, by the steps at which that was decided."""

    def keep(self, name: str, steps: int, goes_on: bool) -> None:
        """Keep one decision."""


def scheduler_of(rungs: Sequence[int], eta: int, controls: Collection[str], memory: DecisionLog) -> Any:
    """ASHA over ``rungs``, as Ray Tune wants it."""
    from ray.tune.schedulers import ASHAScheduler, TrialScheduler

    class RememberingASHA(ASHAScheduler):  # type: ignore[misc]  # Ray ships no types
        """ASHA that makes each decision once, and none about controls."""

        def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
            name, steps = trial.config["name"], int(result["steps"])
            if name in controls or steps not in rungs[:-1]:
                return str(TrialScheduler.CONTINUE)  # the last rung ends by itself
            decision = str(super().on_trial_result(controller, trial, result))
            known = memory.recall(name)
            if steps in known:
                return str(TrialScheduler.CONTINUE if known[steps] else TrialScheduler.STOP)
            memory.keep(name, steps, decision != TrialScheduler.STOP)
            return decision

        def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
            """Do nothing: ASHA would count the last report again, and those of controls."""

    return RememberingASHA(
        metric="loss",
        mode="min",
        time_attr="steps",
        grace_period=rungs[0],
        reduction_factor=eta,
        max_t=rungs[-1],
    )


def _trainable(config: dict[str, Any], trial: Trial) -> None:
    from ray import tune

    trial(config["name"], lambda steps, loss: tune.report({"loss": loss, "steps": steps}))


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep Ray's tables off our standard output, and the tracebacks of workers that are restarted off the terminal."""
    logger = logging.getLogger("ray.tune")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)


def compete(
    ray: Any,
    cluster: Cluster,
    names: Sequence[str],
    rungs: Sequence[int],
    eta: int,
    trial: Trial,
    memory: DecisionLog,
    *,
    controls: Collection[str] = (),
    storage: tuple[Any, str] | str,
) -> dict[str, str]:
    """The error of each trial that could not be finished, by name, after ``trial`` ran for all ``names``.

    ASHA stops trials at the rungs, ``controls`` excepted. A trial whose worker died is restarted, ``cluster.retries``
    times. ``storage`` is for Ray's own files: a folder that all machines see, or a filesystem of fsspec and a path.
    """
    from ray import tune

    check_room(ray, cluster)
    place: dict[str, Any] = {"storage_path": storage}
    if not isinstance(storage, str):
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        fs, path = storage
        place = {"storage_filesystem": PyFileSystem(FSSpecHandler(fs)), "storage_path": path}
    resources = {"cpu": cluster.cpus, "gpu": cluster.gpus or 0}
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trainable, trial=trial), resources),
        param_space={"name": tune.grid_search(list(names))},
        tune_config=tune.TuneConfig(
            scheduler=scheduler_of(rungs, eta, controls, memory),
            reuse_actors=True,  # the next candidate finds the teacher loaded
        ),
        run_config=tune.RunConfig(
            name="tune",
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=cluster.retries),
            **place,
        ),
    )
    with _hushed():
        results = tuner.fit()
    errors = {result.config["name"]: result.error for result in results if result.error and result.config}
    return {name: last_word(error) for name, error in errors.items()}


def tournament_from_asha(
    names: Sequence[str],
    rungs: Sequence[int],
    measure: Callable[[Sequence[str], int], Mapping[str, HeldoutLosses]],
    stopped: Mapping[str, int],
    keep: Collection[str] = (),
) -> Tournament:
    """The tournament whose decisions ASHA made: ``stopped`` says after how many steps a candidate was stopped.

    At each rung places, ties and differences are those of ``run_tournament`` at its last rung: among all candidates
    that came there, against the best of them. The CLIP score decides nothing, since no candidate waits for others.
    """
    verdicts: list[Verdict] = []
    going = tuple(names)
    for number, steps in enumerate(rungs, start=1):
        if not going:
            break
        for one in run_tournament(going, (steps,), 2, measure, keep=set(keep) & set(going)).verdicts:
            fate, reason = one.fate, one.reason
            if one.kept and stopped.get(one.name) == steps:
                gap = "" if one.difference is None else f", {one.difference} above the best there"
                hint = ", which may be chance" if one.tied else ""
                reason = f"at rung {number} of {len(rungs)}, {steps} steps: stopped by ASHA{gap}{hint}"
                fate = "dropped"
            verdicts.append(dataclasses.replace(one, rung=number, fate=fate, reason=reason))
        kept = {one.name for one in verdicts if one.rung == number and one.kept}
        going = tuple(name for name in going if name in kept)
    return Tournament(tuple(names), tuple(rungs), tuple(verdicts))
