"""What Python begins with: a model, a whole run, a finished run, a comparison, a student."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prune_lab.api.model import Model
from prune_lab.api.results import RunResults, open_run
from prune_lab.api.settings import budgets_asked, job_settings, settings_by_name, settings_of
from prune_lab.config import with_settings
from prune_lab.families.drawing import needed_by, told
from prune_lab.models import load_model, load_pipeline, resolve_model
from prune_lab.runs import open_run as run_in
from prune_lab.runtime import pick_device, pick_dtype, progress_shown
from prune_lab.tables import Table
from prune_lab.workflow import (
    compared_with,
    comparison,
    run_all,
)


def load(
    model: str | Path = "reference",
    *,
    run: str | Path | None = None,
    config: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    seed: int | None = None,
    settings: Mapping[str, object] | None = None,
) -> Model:
    """The model that ``model`` names: ``reference`` or ``transformer`` (they ship), a preset, a folder, a single file,
    a ``config.json`` or a hub id.

    Its files are checked and its weights stay unread until a verb needs them. ``run`` is the folder for results,
    ``config`` a TOML of settings and ``settings`` single ones by their dotted names, ``{"probe.samples": 16}``. Raises
    ModelNotFoundError, ModelFormatError or UnsupportedModelError for the model, ConfigError for a setting.
    """
    given = settings_by_name("", settings or {})
    folder, toml = (None if one is None else Path(one) for one in (run, config))
    found = settings_of(str(model), folder, toml, (), {"dtype": dtype, **given}, device=device, seed=seed)
    return Model(with_settings(found, given), folder)  # also those that are empty


def run(
    model: str | Path = "",
    *,
    run: str | Path,
    macs: str = "",
    params: str = "",
    latency: str = "",
    memory: str = "",
    data: str | Path | None = None,
    config: str | Path | None = None,
    recipe: str = "",
    force: bool = False,
    settings: Mapping[str, object] | None = None,
) -> RunResults:
    """The whole job in the folder ``run``: score, search, prune, profile, distill, rank, report; then its results.

    ``macs``, ``params``, ``latency`` and ``memory`` are budgets that hold at once, such as ``latency="0.7x"``, and
    ``data`` pictures of one's own. Settings are those of ``config``, of ``recipe``, or of the folder, else those that
    suit model and device, with ``settings`` by their dotted names. The same call again resumes; ``force`` redoes the
    steps that changed settings touch, all when none did. Raises ConfigError for a setting, BudgetError for a budget.
    """
    folder, toml = Path(run), None if config is None else Path(config)
    asked = {
        "search.budgets": budgets_asked(macs, params, latency, memory),
        "data.source": None if data is None else str(data),
    }
    given = settings_by_name("", settings or {})
    found = job_settings(str(model), folder, toml, recipe, (), asked | given, {})
    with progress_shown():
        run_all(with_settings(found, given), folder, force=force)  # also those that are empty
    return open_run(folder)


def compare(*targets: str | Path, model: str | Path | None = None) -> Table:
    """Plans, candidate folders, models and run folders side by side: costs, changes, and quality where it was measured.

    A run folder and then plans: the plans for the run's model, with their impact on its probe and a map of each. Else
    plans are for ``model``, and changes relative to it: by default the first target where that is a model, the teacher
    of the student or run that stands first, else the shipped U-Net. Raises PlanError for a target that is nothing of
    these.
    """
    first, *plans = map(str, targets)
    folder = run_in(Path(first), must_exist=False)
    if plans and folder.config.is_file() and not any(Path(text).is_dir() for text in plans):
        return open_run(first).compare(*plans)
    rows = [first, *plans]
    if model is None:
        model, left = compared_with(rows)
        rows = list(left)
    frame = comparison(str(model), rows)
    return Table("comparison", frame, f"Compared with {model}")


def load_student(folder: str | Path, *, device: str = "auto", dtype: str = "float32") -> Any:
    """The pipeline, or the model alone, in ``folder``: of plain diffusers, in eval mode, ready to draw.

    Its call is told the length of texts and the size of pictures that its model is meant for, where the class of the
    pipeline expects others. Raises ModelNotFoundError where there is no model, UnsupportedModelError where there are no
    weights.
    """
    source = resolve_model(str(folder))
    place: dict[str, Any] = {"device": pick_device(device), "dtype": pick_dtype(dtype)}
    if not source.is_pipeline:
        return load_model(source, **place)
    pipeline = load_pipeline(source, **place)
    return told(pipeline, needed_by(type(pipeline), source.config.get("sample_size"), source.tokens))
