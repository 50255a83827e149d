"""How a run is started, redone from a step on, or lent its scores by another."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from prune_lab.config import SETTINGS, RunConfig, changed_settings, to_toml
from prune_lab.errors import ConfigError, PruneLabError, RunError
from prune_lab.models import configured_model, model_digest
from prune_lab.profiling import latency_key
from prune_lab.runs import FORMAT, GIVEN, Manifests, Part, Run, load_run_config, open_run
from prune_lab.runs.manifest_files import ORIGINS, files_of
from prune_lab.runs.records import read_typed
from prune_lab.runs.removing import remains
from prune_lab.runtime import Environment, atomic_write, note, read_json, write_json, write_text
from prune_lab.runtime.holders import is_temporary
from prune_lab.session import Session, origin_of
from prune_lab.session.origins import TEACHER, check_teacher, teacher_digest
from prune_lab.session.parts import (
    binding_settings,
    blocks_part,
    costs_part,
    latency_part,
    probe_part,
    reads_evaluation,
    record,
    scores_part,
    width_scores_part,
)
from prune_lab.workflow.measuring import service_of
from prune_lab.workflow.steps import STEPS, steps_from


def affecting(changed: Iterable[str]) -> tuple[str, ...]:
    """Those of the ``changed`` settings, dotted names such as ``distill.steps``, that finished results depend on."""
    return tuple(name for name in changed if not SETTINGS[name].free)


def first_affected(changed: Iterable[str], config: RunConfig | None = None) -> str:
    """The first step that reads one of the ``changed`` settings; some are read earlier under other settings of
    ``config``.
    """
    readers = {SETTINGS[name].read_by for name in changed}
    if config is not None and any(name.startswith("evaluate.") for name in changed):
        drawn = origin_of(config, configured_model(config)) == "drawn"
        readers.add(reads_evaluation(config, drawn=drawn))
    return next(step.name for step in STEPS if step.name in readers)


def forget(run: Run, name: str, *, plan_ids: Collection[str] | None = None) -> None:
    """Remove the files of the step called ``name`` and of the later ones, so that they are done again.

    With ``plan_ids`` the folders of other candidates stay as they are. Raises RunError, before anything is removed, as
    ``remains`` does for files that no step has written.
    """
    # All paths first: the candidates are read from plans, which may be among them. The manifests first of all, so that
    # what is half removed is not taken for damaged.
    steps, known = steps_from(name), Manifests(run.folder)

    def chosen(path: Path) -> bool:
        return (
            plan_ids is None
            or not path.is_relative_to(run.candidates_dir)
            or path.relative_to(run.candidates_dir).parts[0] in plan_ids
        )

    manifests = filter(chosen, known.of_steps([step.name for step in steps]))
    products = filter(chosen, (path for step in steps for path in step.products(run)))
    found = remains(run.folder, [*manifests, *products], known.listed)
    found.remove(f"asked to redo {name} in {run.folder}")


def _record(run: Run, config: RunConfig) -> None:
    environment = Environment.capture(config.device, config.dtype).as_dict()
    source, manifests = configured_model(config), Manifests(run.folder)
    write_json(run.environment, {"format": FORMAT} | environment | {"model_digest": model_digest(source)})
    manifests.save_origins(**{TEACHER: teacher_digest(manifests, source)})
    write_text(run.config, to_toml(config))


def changed_in(run: Run, config: RunConfig, manifests: Manifests) -> tuple[str, ...]:
    """The settings in which ``config`` differs from config.toml, or from what finished steps were made with."""
    known = changed_settings(load_run_config(run), config) if run.done(run.config) else ()
    # config.toml may have been edited, or be gone
    made = manifests.other_settings(binding_settings(config))
    return tuple(dict.fromkeys((*known, *made)))


def _tell_versions(manifests: Manifests) -> None:
    if found := manifests.other_versions:
        words = ", ".join(f"{name} {old} (here {new})" for name, (old, new) in found.items())
        note(f"{manifests.root} was made with {words}; what is done stays")


# Of the user's own pictures alone; what says it of the others.
_OF_OWN_DATA = {
    "data.limit": {"shipped": "distill.pictures", "drawn": "data.count"},
    "data.caption_column": {},
    "data.outside": {},
}


def check_effect(config: RunConfig, run: Run) -> None:
    """Raise ConfigError for a setting that ``run`` was not started with and that nothing reads, as its pictures come
    from elsewhere.
    """
    if config.data.source and not (source := configured_model(config)).is_pipeline:
        raise ConfigError(
            f"asked to use the pictures of {config.data.source} (--data), found that {source.text} is a "
            f"{source.called} alone, without the parts of a pipeline that encode pictures and captions and say how "
            "noise is added; give the folder of the whole pipeline, or leave the pictures out: blocks are then scored "
            "on random noise"
        )
    known = load_run_config(run) if run.done(run.config) else RunConfig()
    given = set(changed_settings(known, config)) & set(changed_settings(RunConfig(), config))
    if not (asked := [name for name in _OF_OWN_DATA if name in given]):
        return
    origin = origin_of(config, configured_model(config))
    if origin == "own":
        return
    whose = {"shipped": "the shipped pictures", "drawn": "pictures that the model draws", "none": "noise"}[
        origin
    ]
    if not (instead := _OF_OWN_DATA[asked[0]].get(origin)):
        cure = "leave it out, or name pictures with data.source"
    else:
        cure = f"set {instead} instead, or name pictures with data.source"
    raise ConfigError(
        f"asked for {asked[0]}, found that this run uses {whose}, which it says nothing about; {cure}"
    )


def _readable(path: Path) -> bool:
    try:
        return bool(read_json(path)) if path.suffix == ".json" else path.stat().st_size > 0
    except (OSError, PruneLabError):
        return False


def _is_of_start(path: Path, run: Run) -> bool:
    """Whether a start that did not come to its end may have left ``path`` in ``run``: the next one takes it over."""
    if path == run.environment:
        try:
            return read_typed(path, dict[str, str | int]).get("format") == FORMAT
        except PruneLabError:
            return False
    empty = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    return empty or path == run.lock or is_temporary(path.name)


def start_run(config: RunConfig, folder: Path, *, force: bool = False) -> Run:
    """The run in ``folder`` with these settings; writes config.toml and environment.json when it is new, or lacks them.

    Settings that no finished step has read may change. Where one has, ``force`` removes the files of that step and of
    the later ones; without it RunError says which settings differ. RunError too for a folder that holds something else,
    and for a model whose weights are not those that the run was started with.
    """
    run = open_run(folder, must_exist=False)
    manifests = Manifests(run.folder)
    if not run.done(run.config) and not manifests.started:
        found = run.folder.iterdir() if run.folder.is_dir() else ()
        if not all(_is_of_start(path, run) for path in found):
            raise RunError(
                f"asked to start a run in {folder}, found other files there; give a new or an empty folder"
            )
        check_effect(config, run)
        _record(run, config)
        return run
    changed = changed_in(run, config, manifests)
    check_effect(config, run)
    if "model" not in changed:
        try:
            check_teacher(run, manifests, configured_model(config))
        except RunError:
            if not force:
                raise
            forget(run, STEPS[0].name)
            _record(run, config)
            return run
    if touched := affecting(changed):
        name = first_affected(touched, load_run_config(run) if run.done(run.config) else config)
        if not force and any(run.done(path) for step in steps_from(name) for path in step.products(run)):
            raise RunError(
                f"run {folder} was made with other settings of {', '.join(touched)}; give another --run folder, "
                f"the old settings, or --force to redo it from the step {name!r}"
            )
        forget(run, name)
    lost = [path.name for path in (run.config, run.environment) if not _readable(path)]
    if manifests.without_origins:
        lost.append(f"manifests/{ORIGINS}.json")
    if lost:
        note(f"{' and '.join(lost)} of {folder} written anew")
    if changed or lost:
        _record(run, config)
    _tell_versions(manifests)
    return run


def _intact(run: Run, manifests: Manifests, part: Part) -> bool:
    """Whether ``part`` of a run that lends is there. Raises RunError where it is not what it was."""
    verdict = manifests.verdict(part)
    if verdict.state == "redo":
        raise RunError(
            f"asked to search with the scores of {run.folder}, found that {verdict.why}; "
            f"make it again with: prune-lab run --run {run.folder}"
        )
    return verdict.state == "done"


def _copy(old: Path, new: Path) -> None:
    """Copy a file, whole or not at all. Raises StorageError."""
    with atomic_write(new) as temporary:
        shutil.copyfile(old, temporary)


def borrow_scores(lender: Run, session: Session) -> None:
    """Copy probe, scores, costs and latency from ``lender`` into the run of ``session``, which is new.

    So plans can be searched under other settings, and a finished run stays as it is. Nothing is copied where the
    settings of the model, its probe or its scores are others, and no latency of another service. Raises RunError where
    ``lender`` was made of other weights, or is damaged.
    """
    run, theirs = session.run, Session(lender)
    changed = set(changed_settings(theirs.config, session.config)) - {"device"}
    # Another seed is another probe.
    if any(SETTINGS[name].read_by in ("blocks", "probe", "scores") for name in changed):
        return
    _intact(lender, theirs.manifests, blocks_part(theirs))  # which blocks can leave together is said there
    parts = [probe_part, scores_part, costs_part]
    if latency_key(theirs.architecture, service_of(theirs)) == latency_key(
        session.architecture, service_of(session)
    ):
        parts.append(latency_part)
    if theirs.config.search.widths == session.config.search.widths:
        parts.append(width_scores_part)
    for part in parts:
        lent, own = part(theirs), part(session)
        if not _intact(lender, theirs.manifests, lent):
            continue
        there = [(old, new) for old, new in zip(lent.outputs, own.outputs, strict=True) if old.is_file()]
        for old, new in there:
            _copy(old, new)
        record(session, own)
    if lender.scores_dir.is_dir():
        for old in files_of(lender.scores_dir):
            _copy(old, run.scores_dir / old.relative_to(lender.scores_dir))


def use_scores(session: Session, table: Path) -> None:
    """Search the run of ``session`` with the scores in the CSV ``table`` instead of measuring any."""
    part = scores_part(session)
    _copy(table, session.run.importance)
    given = {GIVEN: session.manifests.digest(session.run.importance)}
    record(session, dataclasses.replace(part, reads=(), inputs=given))
