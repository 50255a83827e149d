"""What was made for a teacher and fits its student: as it is, after conversion, or not at all; from the plan alone."""

from __future__ import annotations

import pandas as pd

from prune_lab.errors import PruneLabError
from prune_lab.export.ip_adapter import new_numbers
from prune_lab.export.students import Student
from prune_lab.families import CLASS_NAME
from prune_lab.families.adapter_names import (
    attention_projections,
    attentions,
    has_additions,
    is_cross_attention,
    kept_path,
)
from prune_lab.families.controlnet import controlnet_config, cut_controlnet, takes_adapter_features
from prune_lab.families.ldm_keys import unet_places
from prune_lab.schemas import COMPATIBILITY_COLUMNS

AS_IT_IS, CONVERTED, NOT_AT_ALL = "as it is", "after conversion", "not at all"

_Row = tuple[str, str, int | None, int | None, int | None, str]  # see COMPATIBILITY_COLUMNS


def _fit(kept: int, of: int, renamed: int) -> str:
    return NOT_AT_ALL if not kept else AS_IT_IS if kept == of and not renamed else CONVERTED


def _lora(student: Student) -> _Row:
    modules = attention_projections(attentions(student.architecture.config))
    layout, removed = student.layout, student.removed_paths
    names = {module: kept_path(layout, removed, module) for module in modules}
    kept = [module for module, new in names.items() if new is not None]
    renamed = sum(names[module] != module for module in kept)
    fit = _fit(len(kept), len(modules), renamed)
    note = "modules of all attentions"
    if renamed:
        note += f"; as it is, {renamed} would go to another block without a word"
    elif fit == AS_IT_IS and student.plan.removed:
        note += "; one with convolutions too: convert it"
    return "LoRA", fit, len(kept), len(modules), renamed, note


def _controlnet(student: Student) -> _Row:
    teacher = student.architecture
    try:
        cut = cut_controlnet(controlnet_config(teacher.config), teacher.outline, student.layout)
    except PruneLabError as error:
        return "ControlNet", NOT_AT_ALL, None, None, None, str(error)
    renamed = sum(old != new for new, old in cut.skips.items())
    fit = _fit(len(cut.skips), cut.teacher_skips, renamed)
    note = "skip connections; its blocks leave by the same plan, its mid stage stays"
    if cut.zero:
        note = "skip connections; its blocks leave by the same plan, its mid stage has no place"
    return "ControlNet", fit, len(cut.skips), cut.teacher_skips, renamed, note


def _ip_adapter(student: Student) -> _Row:
    paths = attentions(student.architecture.config)
    numbers = {n: new for n, new in new_numbers(student).items() if is_cross_attention(paths[n])}
    kept = [number for number, new in numbers.items() if new is not None]
    renamed = sum(numbers[number] != number for number in kept)
    # without their blocks the first ones still count on, so equal numbers in front of the removed ones fit as they are
    fit = _fit(len(kept), len(numbers) if renamed else len(kept), renamed)
    return "IP-Adapter", fit, len(kept), len(numbers), renamed, "cross-attentions"


def _adapter(student: Student) -> _Row:
    taken, features = takes_adapter_features(student.architecture.config, student.layout.config)
    note = "features, one for each stage of the way down"
    if not taken:
        note += "; a stage lost its attention and takes its feature elsewhere"
    elif taken < features:
        note += "; the rest is left out without a word"
    return "T2I-Adapter", AS_IT_IS if taken else NOT_AT_ALL, taken, features, 0, note


def _single_file(student: Student) -> _Row:
    if student.plan.form == "own":
        return "single file", NOT_AT_ALL, None, None, None, "it has no place for code of its own"
    try:
        unet_places(student.layout.config)
    except PruneLabError as error:
        return "single file", NOT_AT_ALL, None, None, None, str(error)
    return "single file", CONVERTED, None, None, None, "prune-lab export STUDENT --to single-file"


def _outside(what: str, where: str) -> _Row:
    return what, AS_IT_IS, None, None, None, f"{where}, which pruning leaves alone"


def _unknown(what: str, student: Student) -> _Row:
    why = f"nothing is known here of those for a {student.architecture.config[CLASS_NAME]}; as it is, it may go to "
    return what, NOT_AT_ALL, None, None, None, f"{why}another block without a word"


def _made_for_blocks(student: Student) -> list[_Row]:
    if not has_additions(student.architecture.config):
        return [_unknown(what, student) for what in ("LoRA", "ControlNet", "IP-Adapter")]
    if student.plan.form == "native":
        return [_lora(student), _controlnet(student), _ip_adapter(student), _adapter(student)]
    # These count skip connections and stages, which only plain configs without the blocks tell.
    note = f"not known for a student in the {student.plan.form} form"
    counted = [(kind, NOT_AT_ALL, None, None, None, note) for kind in ("ControlNet", "T2I-Adapter")]
    return [_lora(student), counted[0], _ip_adapter(student), counted[1]]


def compatibility(student: Student) -> pd.DataFrame:
    """A row for each kind of file: whether it fits the student, and how many of its parts; COMPATIBILITY_COLUMNS.

    ``kept`` of ``of`` parts have a place, ``renamed`` of them another one than in the teacher.
    """
    rows = [
        *_made_for_blocks(student),
        _outside("textual inversion", "words of the text encoder"),
        _outside("VAE", "a part of the pipeline"),
        _outside("scheduler", "a part of the pipeline"),
        *([_single_file(student)] if has_additions(student.architecture.config) else []),
    ]
    frame = pd.DataFrame(rows, columns=list(COMPATIBILITY_COLUMNS))
    counts = ["kept", "of", "renamed"]
    return frame.astype(dict.fromkeys(counts, "Int64"))
