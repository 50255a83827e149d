"""Opening a run folder and reading the settings that it was started with."""

from __future__ import annotations

import contextlib
from pathlib import Path

from prune_lab.config import RunConfig, load_config
from prune_lab.errors import ConfigError, DataError, RunError
from prune_lab.runs.paths import Run
from prune_lab.runs.records import read_typed
from prune_lab.runtime.reading import what_is

_OF_MODELS = ("model_index.json", "config.json")
FORMAT = 3  # of run folders, in environment.json; those of version 0.1 name none


def open_run(folder: Path | str, *, must_exist: bool) -> Run:
    """The run in ``folder``; nothing is created.

    Raises RunError when ``folder`` is a file, when ``must_exist`` and it is not a run folder, and for one that version
    0.1 made.
    """
    run = Run(Path(folder))
    try:
        run.config.exists()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no name of a folder"
        raise RunError(f"asked for the run folder {str(folder)[:60]!r}: {reason}; give another name") from None
    if run.folder.exists() and not run.folder.is_dir():
        raise RunError(f"asked for the run folder {folder}, found {what_is(folder)} there; give the path of a folder")
    of_model = [name for name in _OF_MODELS if (run.folder / name).is_file()]
    if must_exist and of_model and not run.config.is_file():
        raise RunError(
            f"asked for the run folder {folder}, found a model or a part of one there ({of_model[0]}); give the folder "
            "that was --run of prune-lab run, in which config.toml lies"
        )
    if must_exist and not run.config.is_file():
        found = "a folder without config.toml" if run.folder.is_dir() else "nothing"
        raise RunError(
            f"asked for the run folder {folder}, found {found} there; "
            f"start a run with: prune-lab run --config FILE.toml --run {folder}"
        )
    there = run.config.is_file() and run.environment.exists()
    written = read_typed(run.environment, dict[str, str | int]) if there else {"format": FORMAT}
    if written.get("format") != FORMAT:
        raise RunError(
            f"asked for the run folder {folder}, found one of an older version (format {written.get('format', 1)}, not {FORMAT}), "
            "which this version does not read; start a new run folder, or use the version that wrote it"
        )
    return run


def load_run_config(run: Run) -> RunConfig:
    """The settings that ``run`` was started with.

    Raises RunError when it was not started, ConfigError when its file is damaged.
    """
    try:
        return load_config(run.needs(run.config, "run --config FILE.toml"))
    except ConfigError as error:
        again = f"prune-lab run --config FILE.toml --run {run.folder}"
        raise ConfigError(f"{error}; or remove {run.config} and give the settings again: {again}") from None
