"""How verbs come to their settings and to a run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune_lab.config import RunConfig, load_config
from prune_lab.errors import RunError
from prune_lab.processes import is_main, main_process_first
from prune_lab.runs import open_run

if TYPE_CHECKING:
    from prune_lab.runs import Run


def settings_of(
    model: str,
    run: Path | None,
    config: Path | None,
    *,
    device: str | None,
    seed: int | None,
    dtype: str | None = None,
    **tables: dict[str, Any],
) -> RunConfig:
    """The settings of ``config``, or else of the run folder, or else the defaults, with the flags that were given."""
    if config:
        settings = load_config(config)
    elif run and open_run(run, must_exist=False).config.is_file():
        settings = load_config(open_run(run, must_exist=True).config)
    elif model:
        settings = RunConfig(model=model)
    else:
        raise RunError(
            "asked for a step without saying of which model; give MODEL, --config FILE.toml or --run DIR"
        )
    given: dict[str, Any] = {"model": model or None, "device": device, "seed": seed, "dtype": dtype}
    if seed is not None:
        for name in ("probe", "distill"):
            tables[name] = {**tables.get(name, {}), "seed": seed}
    for name, values in tables.items():
        chosen = {key: value for key, value in values.items() if value not in (None, ())}
        given[name] = dataclasses.replace(getattr(settings, name), **chosen) if chosen else None
    return dataclasses.replace(settings, **{key: value for key, value in given.items() if value is not None})


def model_or_run(model: str, run: Path | None) -> tuple[str, Path | None]:
    """(model, run folder) where the argument may be the folder of a run."""
    if model and run is None and open_run(Path(model), must_exist=False).config.is_file():
        return "", Path(model)
    return model, run


@contextlib.contextmanager
def run_opened(
    settings: RunConfig, folder: Path | None, *, redo: str = "", force: bool = False
) -> Iterator[Run]:
    """The run in ``folder`` with these settings, started when it is new; a temporary one without ``folder``.

    ``redo`` names the step whose files, and those of the later ones, are removed first; ``force`` removes only what
    changed settings touch.
    """
    from prune_lab.runtime import progress_shown
    from prune_lab.workflow import forget, start_run

    with contextlib.ExitStack() as stack:
        if is_main():
            stack.enter_context(progress_shown())
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prune-lab-")))
        with main_process_first():
            run = start_run(settings, folder, force=force or bool(redo))
            if redo:
                forget(run, redo)
        yield run


@contextlib.contextmanager
def existing(folder: Path) -> Iterator[Run]:
    """The run in ``folder``, which must be there, with progress shown."""
    from prune_lab.runtime import progress_shown

    run = open_run(folder, must_exist=True)
    with progress_shown():
        yield run
