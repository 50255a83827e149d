"""The steps of a run in order with the files that each writes, and how a run is started, redone or borrowed from."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from prune_lab.config import SETTINGS, SHIPPED, DataConfig, RunConfig, changed_settings, to_toml
from prune_lab.distill import CACHE_INDEX, is_cache
from prune_lab.errors import RunError, StorageError
from prune_lab.importance import NEEDS_PIPELINE
from prune_lab.models import configured_model, model_digest
from prune_lab.runs import FORMAT, Run, load_run_config, open_run
from prune_lab.runtime import Environment, read_json, write_json, write_text
from prune_lab.runtime.holders import is_temporary
from prune_lab.session import Session, ensure_data, ensure_probe, origin_of
from prune_lab.workflow.distilling import ensure_distilled
from prune_lab.workflow.measuring import (
    ensure_blocks,
    ensure_costs,
    ensure_reductions,
    ensure_scores,
    ensure_shares,
)
from prune_lab.workflow.ranking import ensure_pictures, ensure_ranking, ensure_report
from prune_lab.workflow.searching import ensure_plans
from prune_lab.workflow.students import ensure_candidates, ensure_repaired

Paths = Callable[[Run], tuple[Path, ...]]


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a run."""

    name: str  # ``SETTINGS`` names the step that reads a setting first
    does: str
    ensure: Callable[[Session], object]
    products: Paths  # files and folders that it writes
    last: Paths | None = None  # those that it writes last; None: all

    def marks(self, run: Run) -> tuple[Path, ...]:
        """Files and folders that exist when the step is finished."""
        return (self.last or self.products)(run)


def _of_candidates(*parts: str) -> Paths:
    """These paths of every candidate, by the names of the attributes of ``CandidatePaths``."""
    return lambda run: tuple(getattr(run.candidate(one), part) for one in run.plan_ids() for part in parts)


def _files(*names: str) -> Paths:
    """These paths of a run, by the names of the attributes of ``Run``."""
    return lambda run: tuple(getattr(run, name) for name in names)


def _pictures(run: Run) -> tuple[Path, ...]:
    drawn = _of_candidates("pictures_pruned", "pictures_distilled")(run)
    return run.picture_prompts, run.teacher_pictures, *drawn


def _repaired(run: Run) -> tuple[Path, ...]:
    """The repaired U-Nets; none where ``repair.kind`` is none."""
    if not run.config.is_file() or load_run_config(run).repair.kind == "none":
        return ()
    return _of_candidates("repaired")(run)


def _data(run: Run) -> tuple[Path, ...]:
    """The encoded training data; none where another folder holds them, or where batches are encoded when drawn."""
    settings = load_run_config(run).data if run.config.is_file() else DataConfig()
    drawn = run.data_dir / CACHE_INDEX
    if settings.source == SHIPPED or (not settings.source and not drawn.is_file()):
        return (run.data,)
    ready = is_cache(Path(settings.source).expanduser())
    return (drawn,) if settings.cached and not ready else ()


def _distilled(run: Run) -> tuple[Path, ...]:
    return run.tournament, run.curves_dir, *_of_candidates("recovery", "heldout", "grids", "distilled")(run)


# The one statement of the order. A step asks earlier ones for their results; a test sees that none asks a later one.
STEPS: tuple[Step, ...] = (
    Step("blocks", "lists the blocks of the U-Net", ensure_blocks, _files("choices", "blocks")),
    Step(
        "probe",
        "encodes held-out pictures and captions",
        ensure_probe,
        _files("probe", "sources"),
        _files("probe"),
    ),
    Step(
        "scores",
        "removes each block, pair and stage in turn and measures the damage",
        ensure_scores,
        _files("importance_parts", "criteria", "importance"),
        _files("importance"),
    ),
    Step("costs", "counts parameters and multiply-adds of every block", ensure_costs, _files("costs")),
    Step(
        "plans",
        "searches the best plans under each budget",
        ensure_plans,
        _files("plans_dir", "latency"),
        _files("searched"),
    ),
    Step(
        "candidates",
        "cuts and profiles a smaller model for every plan",
        ensure_candidates,
        lambda run: (run.latency_rounds, *_of_candidates("folder")(run)),
        _of_candidates("profile"),
    ),
    Step(
        "repaired",
        "mends the cuts in closed form, where repair.kind asks for it",
        ensure_repaired,
        _of_candidates("repair", "repaired"),
        _repaired,
    ),
    Step(
        "data",
        "encodes or draws the training pictures",
        ensure_data,
        _files("data", "data_dir", "validation", "captions"),
        _data,
    ),
    Step(
        "distilled",
        "retrains every candidate from the teacher",
        ensure_distilled,
        _distilled,
        _of_candidates("distilled_unet"),
    ),
    Step(
        "reductions",
        "counts and times what the controls leave, here and of other models",
        ensure_reductions,
        _files("reductions"),
    ),
    Step("shares", "times the parts of the pipeline", ensure_shares, _files("pipeline_profile")),
    Step("pictures", "draws the same prompts with every model", ensure_pictures, _pictures),
    Step("ranking", "orders the candidates by quality at their cost", ensure_ranking, _files("ranking")),
    Step("report", "writes the pages", ensure_report, _files("report_dir"), _files("report")),
)


# Starting and redoing ----------------------------------------------------------------------------------------


def steps_from(name: str) -> tuple[Step, ...]:
    """The step called ``name`` and all that follow it."""
    names = [step.name for step in STEPS]
    return STEPS[names.index(name) :]


def affecting(changed: Iterable[str]) -> tuple[str, ...]:
    """Those of the ``changed`` settings, dotted names such as ``distill.steps``, that finished results depend on."""
    return tuple(name for name in changed if not SETTINGS[name].free)


def _reads_evaluation(config: RunConfig) -> str:
    """The first step that draws or judges pictures with the settings of ``[evaluate]``; empty: as they are declared."""
    if config.probe.prompts or origin_of(config, configured_model(config)) == "drawn":
        return "probe"
    if NEEDS_PIPELINE & {config.score.criterion, *config.score.also}:
        return "scores"
    return "distilled" if config.rank.eta and config.rank.clip else ""


def first_affected(changed: Iterable[str], config: RunConfig | None = None) -> str:
    """The first step that reads one of the ``changed`` settings; some are read earlier under other settings of
    ``config``.
    """
    readers = {SETTINGS[name].read_by for name in changed}
    if config is not None and any(name.startswith("evaluate.") for name in changed):
        readers.add(_reads_evaluation(config))
    return next(step.name for step in STEPS if step.name in readers)


def forget(run: Run, name: str, *, plan_ids: Collection[str] | None = None) -> None:
    """Remove the files of the step called ``name`` and of the later ones, so that they are done again.

    With ``plan_ids`` the folders of other candidates stay as they are.
    """
    # All paths first: the candidates are read from plans, which may be among them.
    for path in [path for step in steps_from(name) for path in step.products(run)]:
        ours = plan_ids is None or not path.is_relative_to(run.candidates_dir)
        if not ours and path.relative_to(run.candidates_dir).parts[0] not in (plan_ids or ()):
            continue
        try:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                f"asked to redo {name} in {run.folder}, cannot remove {path}: {error.strerror}; remove it by hand"
            ) from None


def _recorded_digest(run: Run) -> str:
    """The digest of the model that the run was started with; empty when unknown."""
    found = read_json(run.environment) if run.environment.is_file() else {}
    return str(found.get("model_digest", "")) if isinstance(found, dict) else ""


def _record(run: Run, config: RunConfig) -> None:
    environment = Environment.capture(config.device, config.dtype).as_dict()
    digest = model_digest(configured_model(config))
    write_json(run.environment, {"format": FORMAT} | environment | {"model_digest": digest})
    write_text(run.config, to_toml(config))


def start_run(config: RunConfig, folder: Path, *, force: bool = False) -> Run:
    """The run in ``folder`` with these settings; writes config.toml and environment.json when it is new.

    Settings that no finished step has read may change. Where one has, ``force`` removes the files of that step and of
    the later ones; without it RunError says which settings differ. RunError too for a folder that holds something else,
    and for a model whose weights are not those that the run was started with.
    """
    run = open_run(folder, must_exist=False)
    if not run.config.is_file():
        found = run.folder.iterdir() if run.folder.is_dir() else ()
        if any(path != run.lock and not is_temporary(path.name) for path in found):
            raise RunError(
                f"asked to start a run in {folder}, found other files there; give a new or an empty folder"
            )
        _record(run, config)
        return run
    changed = changed_settings(load_run_config(run), config)
    recorded = "" if "model" in changed else _recorded_digest(run)
    if recorded and recorded != model_digest(configured_model(config)):
        if not force:
            raise RunError(
                f"run {folder} was started with other weights of {config.model}; give another --run folder, "
                "or --force to redo all of it"
            )
        forget(run, STEPS[0].name)
        _record(run, config)
    elif changed:
        touched = affecting(changed)
        if touched:
            name = first_affected(touched, load_run_config(run))
            if not force and any(run.done(path) for step in steps_from(name) for path in step.products(run)):
                raise RunError(
                    f"run {folder} was made with other settings of {', '.join(touched)}; give another --run folder, "
                    f"the old settings, or --force to redo it from the step {name!r}"
                )
            forget(run, name)
        _record(run, config)
    return run


def borrow(lender: Run, run: Run) -> None:
    """Copy probe, scores, costs and latency from ``lender`` into ``run``, which is new and of the same model.

    So plans can be searched under other settings, and a finished run stays as it is.
    """
    for name in ("blocks", "probe", "importance_parts", "criteria", "importance", "costs", "latency"):
        path: Path = getattr(lender, name)
        if path.is_file():
            shutil.copyfile(path, getattr(run, name))
    if lender.scores_dir.is_dir():
        shutil.copytree(lender.scores_dir, run.scores_dir, dirs_exist_ok=True)


def borrow_scores(lender: Run, run: Run) -> None:
    """``borrow`` from ``lender``, unless ``run`` has other settings of the model, its probe or its scores."""
    changed = set(changed_settings(load_run_config(lender), load_run_config(run))) - {"device"}
    # Another seed is another probe.
    if not any(SETTINGS[name].read_by in ("blocks", "probe", "scores") for name in changed):
        borrow(lender, run)
