"""Whether a run is as its steps wrote it: what those that only read ask before they show anything of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prune_lab.errors import DataError, PruneLabError
from prune_lab.runs import Manifests, Run
from prune_lab.runtime import read_json
from prune_lab.session import Session


def lost_records(run: Run, manifests: Manifests) -> Iterator[tuple[str, str]]:
    """(title, what is wrong) of the records of the machine, and of what lies outside of the run folder."""
    if not run.environment.exists():
        yield run.environment.name, f"{run.environment.name} is missing"
    else:
        try:
            read_json(run.environment)
        except PruneLabError as error:
            yield run.environment.name, str(error).split(";")[0]
    if why := manifests.without_origins:
        yield "model and data", why


def _refuse(run: Run, why: str) -> None:
    shown = run.folder
    raise DataError(
        f"asked to read {shown}, found that {why}; make it again with: prune-lab run --run {shown} "
        f"(prune-lab doctor {shown} lists all that is damaged)"
    )


def check_parts(run: Run, manifests: Manifests, within: Path) -> None:
    """Raise DataError where a part made in the folder ``within`` is not as it was written; pages can be made anew."""
    for path, why in manifests.damaged():
        if path.is_relative_to(within) and path.stem != "report":
            _refuse(run, why)


def check_intact(session: Session) -> None:
    """Raise DataError where something that a step of the run wrote was changed or is missing.

    Raises RunError for settings that were edited since. A folder in which no step is recorded is taken as it is.
    """
    run, manifests = session.run, session.manifests
    if not manifests.started:
        return
    _ = session.config
    for _, why in lost_records(run, manifests):
        _refuse(run, why)
    check_parts(run, manifests, run.folder)
