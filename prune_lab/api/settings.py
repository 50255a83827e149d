"""How verbs come to their settings and to a run folder, from Python and from the command line; imports no torch."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune_lab.config import (
    AUTO,
    SETTINGS,
    RunConfig,
    load_config,
    parse_assignment,
    recipe_names,
    recipe_path,
    setting_named,
    with_settings,
)
from prune_lab.config.budget_texts import check_budget_texts
from prune_lab.config.declaration import MOST
from prune_lab.errors import ConfigError, PruneLabError, RunError
from prune_lab.processes import is_main
from prune_lab.runs import open_run

if TYPE_CHECKING:
    from prune_lab.runs import Run

VERB_TABLES: dict[str, tuple[str, ...]] = {
    "score": ("score", "probe", "data"),
    "search": ("search",),
    "data": ("data",),
    "distill": ("distill", "data"),
    "rank": ("rank", "engine", "distill"),
    "evaluate": ("evaluate",),
}
"""The tables in which a verb looks for a setting that is given without its table."""


def settings_by_name(verb: str, given: Mapping[str, object]) -> dict[str, object]:
    """The settings ``given`` to ``verb`` by their dotted names, each checked; one may stand without its table.

    Raises ConfigError for an unknown setting and for a value of another kind.
    """
    found = {}
    for key, value in given.items():
        known = (f"{table}.{key}" for table in VERB_TABLES.get(verb, ()))
        name = next((one for one in known if one in SETTINGS), key)
        found[name] = setting_named(name, value)
    return found


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


def _without_model(what: str, folder: Path | None) -> str:
    """What to say where nothing names a model, and ``folder`` is not the run of one."""
    if folder is None:
        return f"asked for a {what} without saying of which model"
    found = "no config.toml there" if folder.is_dir() else "no such folder"
    return f"asked for the run {folder} without saying of which model, found {found}"


def _how(asked: Mapping[str, Any]) -> dict[str, Any]:
    """How MODEL is to be found."""
    return {name: asked.get(name) or "" for name in ("revision", "subfolder", "variant")}


def _as_meant(asked: Mapping[str, Any]) -> dict[str, object]:
    """Settings of drawing that suit the model which was ``asked`` for; none where those that are usual do."""
    from prune_lab.models import resolve_model, usual_drawing

    try:
        usual = usual_drawing(resolve_model(asked["model"], **_how(asked)))
    except PruneLabError:
        return {}  # whoever reads the model says what is wrong with it
    steps = {f"{table}.steps": usual.steps for table in ("evaluate", "data")}
    return (
        steps | {f"{table}.guidance": usual.guidance for table in ("evaluate", "data")} if usual.few else {}
    )


def _asked_for(
    model: str,
    assignments: Sequence[str],
    options: Mapping[str, object],
    device: str | None,
    seed: int | None,
) -> dict[str, object]:
    """The settings that were asked for, by their names; a seed is that of everything that is drawn.

    Raises ConfigError for one that is there twice or no seed, BudgetError for a budget that no model could meet.
    """
    options = {**options, "device": device, "seed": seed}
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    asked = assigned(assignments, given | ({"model": model} if model else {}))
    if "seed" in asked:
        number, name = asked["seed"], "seed" if seed is None else "--seed"
        if isinstance(number, int) and not 0 <= number <= MOST:
            raise ConfigError(f"asked for {name} {number}; a seed is a whole number from 0 to {MOST}")
        seeds = (name for name in SETTINGS if name.endswith(".seed"))
        asked = dict.fromkeys(seeds, asked["seed"]) | asked
    budgets = asked.get("search.budgets", ())
    assert isinstance(budgets, tuple), "settings have been read by their kinds"
    check_budget_texts([text for text in budgets if text != AUTO])
    return asked


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
    check: Callable[[RunConfig], None] | None = None,
) -> RunConfig:
    """The settings of ``config``, or else of the run folder, or else ``base`` (the defaults), with what was asked for.

    A model that was distilled for few steps draws in these, where neither file nor folder says otherwise.
    ``assignments`` are the texts of ``--set``, ``options`` values by the names of settings; None and () were not given.
    What can be told from these alone is refused before a model is looked at, which takes seconds; ``check`` raises what
    else is. Raises ConfigError for a setting that is given twice, BudgetError for a budget that no model could meet,
    RunError when nothing says which model.
    """
    asked = _asked_for(model, assignments, options, device, seed)
    if config is None and run and open_run(run, must_exist=False).config.is_file():
        config = open_run(run, must_exist=True).config
    if config is None and "model" not in asked:
        found = _without_model("step", run)
        raise RunError(f"{found}; give MODEL, --config FILE.toml or --run DIR")
    settings = load_config(config) if config else base or RunConfig()
    wanted = with_settings(settings, asked)
    if check is not None:
        check(wanted)
    return wanted if config else with_settings(settings, _as_meant(asked) | asked)


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


# The whole job ----------------------------------------------------------------------------------------------------


def _check_recipe(name: str, model: str, asked: Mapping[str, Any]) -> None:
    """Raise ConfigError, which names the recipes that fit, when ``model`` is built otherwise than the recipe's."""
    from prune_lab.models import resolve_model

    wanted = resolve_model(model, **_how(asked)).architecture.signature
    made_for = {one: load_config(recipe_path(one)).model for one in recipe_names()}
    fitting = [one for one in made_for if resolve_model(made_for[one]).architecture.signature == wanted]
    if name not in fitting:
        remedy = f"these fit: {', '.join(fitting)}" if fitting else "none fits it: leave --recipe out"
        raise ConfigError(
            f"recipe {name} is for models built as {made_for[name]}, {model} is another; {remedy}"
        )


def job_settings(
    model: str,
    folder: Path | None,
    config: Path | None,
    recipe: str,
    assignments: Sequence[str],
    asked: Mapping[str, Any],
    place: Mapping[str, Any],
) -> RunConfig:
    """The settings of the TOML, the recipe, the run that was started before, or those that suit model and device."""
    if config and recipe:
        raise ConfigError("asked for a run by --config and by --recipe; give one of them")
    if recipe:
        path = recipe_path(recipe)
        if model:
            _check_recipe(recipe, model, asked)
        return settings_of(model, None, path, assignments, asked, **place)
    started = folder is not None and open_run(folder, must_exist=False).config.is_file()
    if config or started:
        return settings_of(model, folder, config, assignments, asked, **place)
    if not model:
        found = _without_model("run", folder)
        raise RunError(f"{found}; give MODEL, --config FILE.toml or --recipe NAME")
    # what no model makes good is told before one is read
    with_settings(RunConfig(), _asked_for(model, assignments, asked, place.get("device"), place.get("seed")))
    from prune_lab.models import resolve_model
    from prune_lab.models.protection import check_run_folder
    from prune_lab.runtime import free_bytes, pick_device
    from prune_lab.workflow import settings_for

    if folder is not None:  # before blocks are counted
        read = {"the model": (model,), "the data": (asked.get("data.source") or "",)}
        check_run_folder(folder, RunConfig(), **read)
    architecture = resolve_model(model, **_how(asked)).architecture
    device = pick_device(place.get("device") or "auto")
    base = settings_for(architecture, device, free_bytes(device), asked.get("data.source") or "")
    return settings_of(model, None, None, assignments, asked, **place, base=base)
