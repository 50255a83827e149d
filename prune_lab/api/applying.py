"""Tables of what a model was used for: a subject that it learnt, pictures that it changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from prune_lab.applications import PersonalSettings, Sweep, SweepSettings, personalise, sweep
from prune_lab.errors import ConfigError, FormError, PlanError, RunError
from prune_lab.export import student_in
from prune_lab.export.card import is_on_hub
from prune_lab.export.snippets import loaded_in_python, mixes_formats, snippet_for
from prune_lab.families import CLASS_NAME, is_own
from prune_lab.models import ModelSource, resolve_model, usual_drawing
from prune_lab.models.files import json_object
from prune_lab.models.written import form_of_zeros
from prune_lab.report import Column, draw_comparison
from prune_lab.runtime import bytes_text, note, pick_device, pick_dtype, progress_shown, write_text
from prune_lab.runtime.holders import alone_in
from prune_lab.schemas import PERSONAL_COLUMNS
from prune_lab.tables import Pictures, Table

_LORA_FILE = "pytorch_lora_weights.safetensors"


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


def _class_of(source: ModelSource) -> str:
    assert source.folder is not None
    return str(json_object(source.folder / "model_index.json").get(CLASS_NAME))


def _lines_of(source: ModelSource, settings: PersonalSettings) -> str:
    """Lines of Python that draw the subject, in the folder that was written."""
    size, trusted = source.config.get("sample_size"), is_own(source.config)
    _, lines = snippet_for(
        _class_of(source), size=size, tokens=source.tokens, trusted=trusted, usual=usual_drawing(source)
    )
    lines = lines.replace('"a red bird on a branch"', repr(settings.prompt))
    if not settings.lora:
        return lines
    loaded = f'pipeline.load_lora_weights(".")  # {_LORA_FILE}\n'
    assert source.folder is not None, "a pipeline lies in a folder"
    given = '"MODEL"'
    if mixes_formats(source.folder):
        lines, given = f"import torch\n{lines}", '"MODEL", torch_dtype=torch.float32'
    lines = lines.replace('from_pretrained("."', f"from_pretrained({given}")
    lines = lines.replace(
        "# In this folder; from anywhere else give its path, or its name on the hub.",
        f"# MODEL: the folder or hub id of {source.name}. The LoRA lies in this folder.",
    )
    return lines.replace("picture = pipeline(", f"{loaded}picture = pipeline(", 1)


def _write_readme(folder: Path, source: ModelSource, settings: PersonalSettings) -> None:
    what = f"A LoRA of rank {settings.lora} for {source.name}" if settings.lora else source.name
    text = (
        f"# {what}, taught one subject\n\n"
        f"`{settings.prompt}` draws it; `{settings.class_prompt}` draws others of its class. Learnt by prune-lab in "
        f"{settings.steps:,} steps from a few pictures, by DreamBooth (arXiv:2208.12242).\n\n"
        f"```python\n{_lines_of(source, settings)}```\n"
    )
    write_text(folder / "README.md", text)


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
    place = out.expanduser().resolve()
    with alone_in(place.parent, place.name, f"asked to personalise into {out}"):
        found = personalise(
            source,
            images,
            out,
            settings,
            class_images=None if class_images is None else Path(class_images),
            device=device,
            frozen=_frozen_in(source, settings),
            force=force,
            finish=lambda folder, asked: _write_readme(folder, source, asked),
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
    if found.class_folder is not None and class_images is None:
        notes.append(
            f"pictures of the class: {found.class_folder}; --class-images takes them for another run"
        )
    note(f"peak memory {bytes_text(learnt.peak_bytes)}: {learnt.peak_of}")
    return Table("personal", frame, f"{source.text} has learnt {settings.prompt!r}", notes=tuple(notes))


def _as_pictures(found: Sweep, out: Path) -> Pictures:
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
    prompt = str(rows["prompt"].iloc[0])
    notes = (f"scorer: {found.scorer}", f"pictures, sweep.csv and sweep.png: {out}")
    return Pictures(
        "sweep",
        found.frame,
        f"Changed towards {prompt!r}",
        lambda theme: draw_comparison(columns, labels, {}, theme),
        notes=notes,
        columns=tuple(columns),
        labels=labels,
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
) -> Pictures:
    """What each of ``models`` makes of ``picture`` for ``prompt``, by how much of it may change: a grid, with scores as
    its table; pictures, ``sweep.csv`` and ``sweep.png`` are written
    to ``out``.

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
    with progress_shown():
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
