"""How verbs come to their model, their settings and a run folder."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from prune_lab.config import SETTINGS, RunConfig, load_config, parse_assignment, with_settings
from prune_lab.errors import ConfigError, RunError
from prune_lab.processes import is_main
from prune_lab.runs import open_run

if TYPE_CHECKING:
    from prune_lab.models import ModelSource
    from prune_lab.runs import Run


def model_found(
    text: str, *, revision: str = "", subfolder: str = "", variant: str = "", random_weights: bool = False
) -> ModelSource:
    """The model as ``resolve_model`` finds it; what is worth knowing of how it was found goes to stderr."""
    from prune_lab.models import resolve_model

    source = resolve_model(
        text, revision=revision, subfolder=subfolder, variant=variant, random_weights=random_weights
    )
    for line in source.notes:
        typer.echo(f"note: {line}", err=True)
    return source


def model_title(settings: RunConfig) -> str:
    """The model of ``settings`` as titles of tables call it."""
    return f"{settings.model}, random weights" if settings.random_weights else settings.model


def assigned(assignments: Sequence[str], given: Mapping[str, object]) -> dict[str, object]:
    """The settings ``given`` and those of ``assignments``. Raises ConfigError for one that is there twice."""
    found = dict(given)
    for text in assignments:
        name, value = parse_assignment(text)
        if name in found:
            raise ConfigError(f"asked for {name} = {found[name]!r} and {name} = {value!r}; give it once")
        found[name] = value
    return found


def budgets_asked(macs: str, params: str, latency: str, memory: str) -> tuple[str, ...]:
    """``search.budgets`` of the options of the same names, which hold at once; none where none was given."""
    limits = {"macs": macs, "params": params, "latency": latency, "memory": memory}
    together = ", ".join(f"{metric}<={limit}" for metric, limit in limits.items() if limit)
    return (together,) if together else ()


def settings_of(
    model: str,
    run: Path | None,
    config: Path | None,
    assignments: Sequence[str],
    options: Mapping[str, object],
    *,
    device: str | None = None,
    seed: int | None = None,
    base: RunConfig | None = None,
) -> RunConfig:
    """The settings of ``config``, or else of the run folder, or else ``base`` (the defaults), with what was asked for.

    ``assignments`` are the texts of ``--set``, ``options`` values by the names of settings; None and () were not given.
    Raises ConfigError for a setting that is given twice, RunError when nothing says which model.
    """
    options = {**options, "device": device, "seed": seed}
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    asked = assigned(assignments, given | ({"model": model} if model else {}))
    if config is None and run and open_run(run, must_exist=False).config.is_file():
        config = open_run(run, must_exist=True).config
    if config:
        settings = load_config(config)
    elif "model" in asked:
        settings = base or RunConfig()
    else:
        raise RunError(
            "asked for a step without saying of which model; give MODEL, --config FILE.toml or --run DIR"
        )
    if "seed" in asked:
        seeds = (name for name in SETTINGS if name.endswith(".seed"))
        asked = dict.fromkeys(seeds, asked["seed"]) | asked
    return with_settings(settings, asked)


def model_or_run(model: str, run: Path | None) -> tuple[str, Path | None]:
    """(model, run folder) where the argument may be the folder of a run."""
    if (
        Path(model).is_dir()
        and model
        and run is None
        and open_run(Path(model), must_exist=False).config.is_file()
    ):
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
    from accelerate import PartialState

    from prune_lab.runtime import progress_shown
    from prune_lab.workflow import forget, start_run

    with contextlib.ExitStack() as stack:
        if is_main():
            stack.enter_context(progress_shown())
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prune-lab-")))
        with PartialState().main_process_first():
            run = start_run(settings, folder, force=force or bool(redo))
            if redo:
                forget(run, redo)
        yield run
