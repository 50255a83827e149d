"""The whole run: its checks before it starts, all steps in order, and their states."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pandas as pd

from prune_lab.config import RunConfig
from prune_lab.errors import ConfigError, DataError, StorageError
from prune_lab.evaluation import check_steps
from prune_lab.models import resolve_model
from prune_lab.models.protection import check_run_folder
from prune_lab.probes.latents import check_side
from prune_lab.ranking import Ranking
from prune_lab.runs import Manifests, open_run, read_records, writing
from prune_lab.runs.removing import remains
from prune_lab.runtime import note, track, write_frame
from prune_lab.schemas import STEP_SECONDS, STEP_SECONDS_COLUMNS, STEPS_COLUMNS
from prune_lab.session import Session, tell_roles
from prune_lab.session.parts import lacking, record, remains_of, steps_part
from prune_lab.workflow.measuring import controls, criteria_of, score_groups_of, service_of
from prune_lab.workflow.ranking import ensure_ranking
from prune_lab.workflow.starting import changed_in, forget, start_run
from prune_lab.workflow.states import state_of, states
from prune_lab.workflow.steps import STEPS, can_be_done, why_left_out
from prune_lab.workflow.targets import check_budgets, check_controls


def check_settings(session: Session) -> None:
    """Raise the errors of settings that later steps would raise, before hours are spent on earlier ones."""
    config = session.config
    _ = session.device, session.dtype, service_of(session)
    if session.source.is_pipeline:
        _ = session.pipeline, session.scorer
        drawing = {"evaluate.steps": config.evaluate.steps}
        if session.data_origin == "drawn":
            drawing |= {"data.steps": config.data.steps, "probe.steps": config.probe.steps}
        for name, steps in drawing.items():
            check_steps(session.pipeline, steps, name)
        if config.data.resolution and session.data_origin == "drawn":
            check_side(session.pipeline, config.data.resolution)
    criteria_of(session)
    score_groups_of(session)
    check_controls(config)
    for preset in config.report.also_presets:
        controls(session, resolve_model(preset).architecture)
    check_budgets(config)
    if config.search.budgets and "block" not in config.score.groups:
        raise ConfigError(
            f"search.budgets needs the score of every single block, score.groups is {list(config.score.groups)}; "
            "add 'block' to it or leave the budgets out"
        )


def check_files_of_others(session: Session) -> None:
    """Raise RunError, before any step is redone, where files of others lie in what will be made again."""
    again: list[Path] = []
    with session.manifests.looking_ahead():
        for state in states(session):
            for part, verdict in state.parts:
                if verdict.state == "redo":
                    again += [*part.outputs, *remains_of(part)]
    remains(session.run.folder, again, session.manifests.listed)


def run_all(config: RunConfig, folder: Path, *, force: bool = False) -> Ranking | None:
    """The ranking after all steps in order, the report last; finished steps are only read. None for a model alone, of
    which the steps are left out that train and draw.

    With ``force`` the steps that read changed settings are redone, with the later ones; all steps when no setting
    changed. Writes steps.csv: the seconds of each step when it was last done.
    """
    if force:
        check_controls(config)
        check_budgets(config)  # before anything is removed
    check_run_folder(folder, config)
    with writing(open_run(folder, must_exist=False)):
        return _run_all(config, folder, force=force)


def _run_all(config: RunConfig, folder: Path, *, force: bool) -> Ranking | None:
    run = open_run(folder, must_exist=False)
    redo_all = force and run.done(run.config) and not changed_in(run, config, Manifests(run.folder))
    run = start_run(config, folder, force=force)
    if redo_all:
        forget(run, STEPS[0].name)
    session = Session(run)
    check_files_of_others(session)
    check_settings(session)
    tell_roles(session)
    lacking(session, steps_part(run))
    known: dict[str, float] = {}
    with contextlib.suppress(DataError):  # nothing follows from these times
        frame = read_records(run.steps, STEP_SECONDS) if run.steps.is_file() else pd.DataFrame()
        known = dict(zip(frame["step"], frame["seconds"], strict=True)) if len(frame) else {}
    seconds = dict(known)
    if why := why_left_out(session.source):
        note(why)
    steps = [step for step in STEPS if can_be_done(session, step)]
    for step in track(steps, "step", name=lambda step: step.name):
        finished = state_of(session, step).done
        start = time.perf_counter()
        step.ensure(session)
        took = time.perf_counter() - start
        seconds[step.name] = known.get(step.name, took) if finished else took
        if seconds != known:
            rows = [(one.name, seconds[one.name]) for one in STEPS if one.name in seconds]
            write_frame(run.steps, pd.DataFrame(rows, columns=list(STEP_SECONDS_COLUMNS)))
        record(session, steps_part(run))
    with contextlib.suppress(StorageError):  # without it files of another time are only read once more
        session.manifests.renew()
    return ensure_ranking(session) if session.source.is_pipeline else None


def steps_frame(config: RunConfig, folder: Path) -> pd.DataFrame:
    """One row per step as ``run_all`` would find it: step, state (done, to do, redo, n of m, left out), does."""
    run = open_run(folder, must_exist=False)
    session = Session(run, config=config)
    rows = [(state.step.name, state.text, state.step.does) for state in states(session)]
    return pd.DataFrame(rows, columns=list(STEPS_COLUMNS))
