"""Tables of what a model was used for: a subject that it learnt, pictures that it changed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from prune_lab.api.subject_page import add_sheet, draw_sheet, write_page
from prune_lab.applications import PersonalSettings, Sweep, SweepSettings, personalise, sweep, sweep_means
from prune_lab.applications.before_and_after import SHEET
from prune_lab.applications.sweep_means import FEW_SEEDS
from prune_lab.errors import ConfigError, FormError, PlanError, RunError
from prune_lab.export import student_in
from prune_lab.export.card import is_on_hub
from prune_lab.export.snippets import loaded_in_python
from prune_lab.models import ModelSource, resolve_model
from prune_lab.models.protection import check_apart
from prune_lab.models.written import form_of_zeros
from prune_lab.report import Column, Theme, draw_comparison
from prune_lab.runtime import bytes_text, cache_folder, note, pick_device, pick_dtype, progress_shown
from prune_lab.runtime.holders import alone_in
from prune_lab.schemas import PERSONAL_COLUMNS
from prune_lab.tables import NOT_TOLD_APART, Pictures, Table

_SHEET_ROWS = 12  # of a figure of changed pictures, where several seeds would make more


def personal_settings(**given: Any) -> PersonalSettings:
    """The settings ``given`` by name; None was not given. Raises ConfigError for an unknown one or a bad value."""
    known = {field.name for field in dataclasses.fields(PersonalSettings)}
    for name in given.keys() - known:
        raise ConfigError(f"asked for the setting {name!r:.60}; there are {', '.join(sorted(known))}")
    return PersonalSettings(**{name: value for name, value in given.items() if value is not None})


def _frozen_in(source: ModelSource, settings: PersonalSettings) -> tuple[str, ...]:
    """Paths of modules of a student that do nothing as long as their weights stay; none of any other model.

    Raises PlanError where it has such, and its teacher, by which they are known, is not to be found; RunError for a
    student whose zeros lie inside of modules that are trained.
    """
    folder = source.model_folder
    form = form_of_zeros(folder)
    if form == "padded" and not settings.lora:
        raise RunError(
            f"asked to train all of {source.text}, found a student in the padded form, whose zeros would be trained "
            "away; give the same plan in its own form (prune-lab prune --form own), or a LoRA with --lora RANK"
        )
    if folder is None or form != "neutral":
        return ()
    try:
        return student_in(folder).layout.frozen
    except FormError:
        raise
    except PlanError as error:
        raise PlanError(
            f"asked to train {source.text}, whose removed blocks are there and do nothing, and have to stay so: {error}"
        ) from None


def _alone_for(out: Path, what: str) -> AbstractContextManager[None]:
    """A block in which no other process writes ``out``. Raises StorageError where one does, or nothing can be."""
    place = Path(os.path.realpath(check_apart(out, {})))
    return alone_in(place.parent, place.name, f"asked to {what} {out}")


def personal_table(
    source: ModelSource,
    images: Path,
    out: Path,
    settings: PersonalSettings,
    class_images: str | Path | None,
    device: torch.device,
    *,
    force: bool,
) -> Table:
    """What was learnt, in one row, with notes on where it lies and how it draws (``Model.personalise``)."""
    with _alone_for(out, "personalise into"):
        found = personalise(
            source,
            images,
            out,
            settings,
            class_images=None if class_images is None else Path(class_images),
            device=device,
            frozen=_frozen_in(source, settings),
            force=force,
            finish=lambda folder, asked: write_page(folder, source, asked),
            show=lambda folder, shown: add_sheet(folder, source, settings, shown),
        )
    learnt = found.learnt
    prior = learnt.class_loss or (None, None)
    cells = (
        source.text,
        f"lora {settings.lora}" if settings.lora else source.called,
        settings.prompt,
        str(found.out),
        found.pictures,
        found.class_pictures,
        learnt.trained,
        settings.steps,
        settings.batch,
        settings.rate,
        *learnt.subject_loss,
        *prior,
        learnt.steps_per_second,
        learnt.seconds,
        learnt.peak_bytes,
        str(device),
        settings.precision,
        settings.seed,
    )
    frame = pd.DataFrame([cells], columns=list(PERSONAL_COLUMNS))
    notes = [f"{found.out / 'README.md'} has the lines that draw {settings.prompt!r}"]
    base = source.folder if settings.lora else found.out
    assert base is not None, "a pipeline lies in a folder"
    loaded = loaded_in_python(
        base,
        found.out if settings.lora else None,
        source.text if settings.lora and is_on_hub(source) else "",
    )
    notes.append(f"in Python: {loaded}")
    draw: Callable[[Theme], Figure] | None = None
    if found.shown is not None:
        draw = partial(draw_sheet, found.shown)
        notes.append(
            f"{found.out / SHEET} shows what it draws, before and after, beside your own: if these are private, "
            "take it out before you pass the folder on"
        )
    if found.class_folder is not None and class_images is None:
        again = "whatever learns one of this class next takes them again"
        if cache_folder("class_pictures") not in found.class_folder.parents:
            again = "--class-images takes them for another run"
        notes.append(f"pictures of the class: {found.class_folder}; {again}")
    note(f"peak memory {bytes_text(learnt.peak_bytes)}: {learnt.peak_of}")
    title = f"{source.text} has learnt {settings.prompt!r}"
    return Table("personal", frame, title, draw, notes=tuple(notes))


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class Changed(Pictures):
    """Pictures that models changed; ``means`` are over seeds, None of one seed."""

    means: Table | None = None


def _means_of(found: Sweep) -> Table | None:
    """Means over seeds, with notes on how they are read; None of one seed."""
    first, *others = found.names
    seeds = found.frame["seed"].nunique()
    if seeds < 2:
        return None
    notes = [f"mean and standard deviation over {seeds} seeds"]
    if others:
        notes.append(
            f"{NOT_TOLD_APART}: not told apart from {first}, the 95 % interval of the difference over the same seeds "
            "holds zero (each interval is for one comparison alone); means.csv has all of them"
        )
    if others and seeds < FEW_SEEDS:
        notes.append(f"{seeds} seeds tell little apart; {FEW_SEEDS} or more tell much more")
    prompt = str(found.frame["prompt"].iloc[0])
    return Table("sweep means", sweep_means(found.frame), f"Changed towards {prompt!r}", notes=tuple(notes))


def _shown_seeds(
    found: Sweep, columns: Sequence[Column], labels: Sequence[str]
) -> tuple[list[Column], list[str]]:
    """The rows of the first few seeds, as many as a figure has room for, and of one at least."""
    rows = found.frame[found.frame["model"] == found.names[0]]
    seeds = list(dict.fromkeys(rows["seed"]))
    kept = seeds[: max(1, _SHEET_ROWS * len(seeds) // len(rows))]
    places = [place for place, seed in enumerate(rows["seed"]) if seed in kept]
    cut = [
        dataclasses.replace(one, pictures=tuple(one.pictures[place] for place in places)) for one in columns
    ]
    return cut, [labels[place] for place in places]


def _as_pictures(found: Sweep, out: Path) -> Changed:
    """The sweep as a grid: a row for each strength and seed, a column for the picture and each model."""
    rows = found.frame[found.frame["model"] == found.names[0]]
    several = rows["seed"].nunique() > 1
    labels = tuple(
        f"strength {row.strength:g}" + (f", seed {row.seed}" if several else "") for row in rows.itertuples()
    )
    given = found.picture.permute(1, 2, 0).numpy()
    columns = [Column("", "given", "", (given,) * len(labels))]
    for name, drawn in zip(found.names, found.pictures, strict=True):
        pixels = drawn.flatten(0, 1).permute(0, 2, 3, 1).numpy()
        columns.append(Column("", Path(name).name or name, "", tuple(pixels)))
    shown, said = _shown_seeds(found, columns, labels)
    prompt = str(rows["prompt"].iloc[0])
    notes = [f"scorer: {found.scorer}", f"pictures, sweep.csv and sweep.png: {out}"]
    if len(said) < len(labels):
        notes.append(
            f"sweep.png shows {len(said)} of {len(labels)} pictures of each model, those of the first seeds"
        )
    return Changed(
        "sweep",
        found.frame,
        f"Changed towards {prompt!r}",
        lambda theme: draw_comparison(shown, said, {}, theme),
        notes=tuple(notes),
        columns=tuple(columns),
        labels=labels,
        means=_means_of(found),
    )


def img2img(
    *models: str | Path,
    picture: str | Path,
    prompt: str,
    out: str | Path,
    mask: str | Path | None = None,
    device: str = "auto",
    dtype: str = "float32",
    force: bool = False,
    **settings: Any,
) -> Changed:
    """What each of ``models`` makes of ``picture`` for ``prompt``, by how much of it may change: a grid, with scores as
    its table; pictures, ``sweep.csv`` and ``sweep.png`` are written to ``out``, of several seeds ``means.csv``, too,
    which ``means`` holds.

    ``strengths`` are shares of ``steps`` that are taken; noise comes from ``seeds``, the same for all models. With
    ``mask``, a picture, only what is white in it is drawn anew. More settings: ``guidance``, ``scorer``. Raises
    UnsupportedModelError for a model that cannot, ConfigError for a number out of range, DataError for a picture that
    cannot be read.
    """
    known = {field.name for field in dataclasses.fields(SweepSettings)}
    for name in settings.keys() - known:
        raise ConfigError(f"asked for the setting {name!r:.60}; there are {', '.join(sorted(known))}")
    given = {name: value for name, value in settings.items() if value is not None}
    asked = SweepSettings(prompt=prompt, **given)
    with progress_shown(), _alone_for(Path(out), "change a picture into"):
        found = sweep(
            [resolve_model(str(one)) for one in models],
            Path(picture),
            asked,
            Path(out),
            mask=None if mask is None else Path(mask),
            device=pick_device(device),
            dtype=pick_dtype(dtype),
            force=force,
            finish=lambda folder, one: _as_pictures(one, Path(out)).plot().save(folder / "sweep.png"),
        )
    return _as_pictures(found, Path(out))
