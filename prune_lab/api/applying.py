"""Tables of what a model was used for: a subject that it learnt, pictures that it changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from prune_lab.applications import PersonalSettings, personalise
from prune_lab.errors import ConfigError, FormError, PlanError
from prune_lab.export import student_in
from prune_lab.export.snippets import snippet_for
from prune_lab.families import CLASS_NAME, is_own
from prune_lab.models import ModelSource
from prune_lab.models.files import json_object
from prune_lab.runtime import note, write_text
from prune_lab.schemas import PERSONAL_COLUMNS
from prune_lab.tables import Table

_LORA_FILE = "pytorch_lora_weights.safetensors"


def personal_settings(**given: Any) -> PersonalSettings:
    """The settings ``given`` by name; None was not given. Raises ConfigError for an unknown one or a bad value."""
    known = {field.name for field in dataclasses.fields(PersonalSettings)}
    for name in given.keys() - known:
        raise ConfigError(f"asked for the setting {name!r:.60}; there are {', '.join(sorted(known))}")
    return PersonalSettings(**{name: value for name, value in given.items() if value is not None})


def _frozen_in(source: ModelSource) -> tuple[str, ...]:
    """Paths of modules of a student that do nothing as long as their weights stay; none of any other model.

    Raises PlanError where it has such, and its teacher, by which they are known, is not to be found.
    """
    folder = source.model_folder
    if folder is None or not (folder / "plan.json").is_file():
        return ()
    if json_object(folder / "plan.json").get("form") != "neutral":
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
    trusted = is_own(source.config)
    how = {"size": source.config.get("sample_size"), "tokens": source.tokens, "trusted": trusted}
    _, lines = snippet_for(_class_of(source), **how)
    lines = lines.replace('"a red bird on a branch"', repr(settings.prompt))
    if not settings.lora:
        return lines
    loaded = f'pipeline.load_lora_weights(".")  # {_LORA_FILE}\n'
    lines = lines.replace('from_pretrained("."', 'from_pretrained("MODEL"')
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
    found = personalise(
        source,
        images,
        out,
        settings,
        class_images=None if class_images is None else Path(class_images),
        device=device,
        frozen=_frozen_in(source),
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
    if found.class_folder is not None and class_images is None:
        notes.append(f"pictures of the class: {found.class_folder}")
    note(f"peak memory: {learnt.peak_of}")
    return Table("personal", frame, f"{source.text} has learnt {settings.prompt!r}", notes=tuple(notes))
