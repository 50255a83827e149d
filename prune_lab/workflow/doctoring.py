"""What is missing, damaged, stale or left over in a run, and what the next ``prune-lab run`` would do about it."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from prune_lab.errors import PruneLabError
from prune_lab.runs import Manifests, Run, load_run_config
from prune_lab.runtime.holders import is_temporary
from prune_lab.schemas import DOCTOR_COLUMNS
from prune_lab.session import Session
from prune_lab.session.parts import binding_settings
from prune_lab.workflow.intact import lost_records
from prune_lab.workflow.searching import plan_in
from prune_lab.workflow.states import states

Row = tuple[str, str, str, str]  # DOCTOR_COLUMNS
WELL = ("done", "not asked for", "left out")  # states in which nothing is wrong and nothing is left to do


def _settings(run: Run, manifests: Manifests) -> Iterator[Row]:
    """What is wrong with the settings and the record of the machine."""
    try:
        config = load_run_config(run)
    except PruneLabError as error:
        yield "settings", "config.toml", "refused", str(error)
    else:
        for name in manifests.other_settings(binding_settings(config)):
            why = "finished steps were made with another value; set it back, or run with --force"
            yield "settings", name, "refused", why
    for title, why in lost_records(run, manifests):
        yield "settings", title, "redo", why


def _plans(session: Session) -> Iterator[Row]:
    for plan_id in session.run.plan_ids():
        try:
            plan_in(session, session.run.plan(plan_id))
        except PruneLabError as error:
            yield "plans", plan_id, "refused", str(error)


def _steps(session: Session) -> Iterator[Row]:
    """A row per step, or one per part of it that is not done."""
    run = session.run
    for state in states(session):
        waiting = [(part, verdict) for part, verdict in state.parts if verdict.state != "done"]
        if not state.possible:
            yield (
                state.step.name,
                "",
                state.text,
                "of a model alone there is nothing to train on or to draw with",
            )
            continue
        if not state.asked_for or not (waiting or state.follows):
            yield state.step.name, "", state.text, ""
            continue
        if state.follows:
            why = f"{state.follows} would be made again; what was made from it follows where that changes it"
            yield state.step.name, "", "may follow", why
        for part, verdict in waiting:
            why = verdict.why
            if part.name == "distilled" and run.done(part.folder / "distilled" / "checkpoint.safetensors"):
                why = why or "goes on from its checkpoint"
            title = "" if part.name == state.step.name else part.name.replace("_", " ")
            yield state.step.name, ": ".join(filter(None, (part.label, title))), verdict.state, why


def _leftovers(run: Run, plan_ids: tuple[str, ...]) -> Iterator[Row]:
    """Files of interrupted writers, and candidates of plans that are gone."""
    for path in sorted(run.folder.rglob(".*")):
        if is_temporary(path.name):
            yield (
                "files",
                path.relative_to(run.folder).as_posix(),
                "left over",
                "of a writer that was stopped",
            )
    for folder in sorted(run.candidates_dir.glob("*")):
        if folder.is_dir() and folder.name not in plan_ids:
            why = "no plan of this run has that id; remove the folder if nobody needs it"
            yield "files", folder.relative_to(run.folder).as_posix(), "left over", why


def _damaged(run: Run, manifests: Manifests) -> Iterator[Row]:
    """What is not as it was written, where the steps cannot be gone through."""
    for path, why in manifests.damaged():
        yield path.stem, path.parent.parent.name if path.parent.parent != run.folder else "", "redo", why


def diagnosis(run: Run) -> pd.DataFrame:
    """A row per finding in the run, columns DOCTOR_COLUMNS; a step without one has a row that says ``done``.

    ``state``: done, to do, redo, may follow (where a redo changes what was read), refused (``why`` names the cure),
    left over, not asked for, or left out (of a model alone). Nothing is written.
    """
    manifests = Manifests(run.folder)
    rows = list(_settings(run, manifests))
    try:
        session = Session(run, config=load_run_config(run))
        _ = session.teacher
        rows += _plans(session)
        rows += _steps(session)
    except PruneLabError as error:
        if not any(row[2] == "refused" for row in rows):
            rows.append(("model", "", "refused", str(error)))
        rows += _damaged(run, manifests)
    rows += _leftovers(run, run.plan_ids())
    return pd.DataFrame(rows, columns=list(DOCTOR_COLUMNS))


def is_well(frame: pd.DataFrame) -> bool:
    """Whether nothing is wrong, left over or left to do in the ``diagnosis`` ``frame``."""
    return bool(frame["state"].isin(WELL).all())
