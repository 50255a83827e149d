"""What a student is a part of: the structure of its teacher, the plan that cut it, and what is where in it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from prune_lab.blocks import Architecture, architecture_of
from prune_lab.errors import FormError, PlanError, PruneLabError
from prune_lab.families import FAMILIES, Layout, meta_model
from prune_lab.forms import layout_of
from prune_lab.models import ModelSource, preset_config, resolve_model, weight_files
from prune_lab.models.files import read_headers, variants_among
from prune_lab.models.sources import PRESETS
from prune_lab.models.written import PLAN, PROVENANCE, beside
from prune_lab.plans import PruningPlan, gone_with, plan_from_json, read_one_plan
from prune_lab.runs import is_plan_id
from prune_lab.runtime import path_text
from prune_lab.surgery import TEACHER

# What works where no addition of the teacher can be converted.
TRAIN_ANOTHER = "use it with the teacher, or train another one on the student"


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Student:
    """A teacher's structure and the plan that cuts it; ``folder`` holds the student where it is built."""

    architecture: Architecture
    plan: PruningPlan
    folder: Path | None = None

    @property
    def layout(self) -> Layout:
        """The config of the student, and the teacher's modules in it."""
        return layout_of(self.architecture, self.plan)

    @property
    def removed_paths(self) -> tuple[str, ...]:
        """Paths in the teacher of the blocks and samplers that the plan takes out; in the neutral form they stay."""
        gone = gone_with(self.architecture, self.plan.removed)
        return tuple(unit.path for unit in self.architecture.outline.units if unit.name in gone)


def model_folder_in(folder: Path) -> Path:
    """The folder of the model of a student: ``folder`` itself, or the model of the pipeline or candidate in it."""
    components = sorted({family.component for family in FAMILIES.values()})
    return next((folder / name for name in (*components, "pruned") if (folder / name).is_dir()), folder)


def provenance_in(model_folder: Path) -> dict[str, Any]:
    """What is known of where the model in ``model_folder`` comes from; empty where nothing is written down."""
    return beside(model_folder, PROVENANCE)


def padded_widths(source: ModelSource) -> str:
    """The widths, in writing, that are zeros in ``source``, a padded student; empty for any other model.

    They are in no config: to what prunes it again it is as wide as its own parent.
    """
    told = {} if source.model_folder is None else provenance_in(source.model_folder)
    if told.get("form") != "padded":
        return ""
    return " ".join(item for item in str(told.get("plan", "")).split() if item.startswith("~"))


def _architecture_with(signature: str, provenance: dict[str, Any]) -> Architecture | None:
    """The architecture of that signature: as the student tells it, of a preset, or of the model it was cut from."""
    told = provenance.get(TEACHER)
    if isinstance(told, dict):
        found = architecture_of(told)
        return found if found.signature == signature else None
    for name in PRESETS:
        if (found := architecture_of(preset_config(name))).signature == signature:
            return found
    try:
        found = resolve_model(str(provenance.get("source", ""))).architecture
    except PruneLabError:
        return None
    return found if found.signature == signature else None


def _check_plan(student: Student, folder: Path) -> None:
    """Raise PlanError where the plan beside the weights in ``folder`` is not the one that they were cut by."""
    told = provenance_in(folder).get("plan_id")
    other = isinstance(told, str) and is_plan_id(told) and told != student.plan.id
    variant = next(iter(variants_among([path.name for path in folder.iterdir() if path.is_file()])), None)
    if variant is not None and not other:
        found = {key: shape for key, (_, shape) in read_headers(weight_files(folder, variant)).items()}
        try:
            tensors = meta_model(student.layout.config).state_dict()
        except FormError:  # then no plain folder holds it
            other = True
        else:
            other = found != {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if other:
        raise PlanError(
            f"asked for the student in {path_text(folder)}, found a plan.json of another student than its weights "
            f"(plan {student.plan.label}); restore its plan.json, or give the plan as text and the teacher with --model"
        )


def student_in(folder: Path, model: str = "") -> Student:
    """The student in ``folder``, a pipeline or model that ``prune-lab`` wrote; ``model`` is its teacher where that is
    not written down. Raises PlanError when it has no plan, one of another student, or its teacher is not known.
    """
    inner = model_folder_in(Path(folder))
    if not (inner / "plan.json").is_file():
        raise PlanError(
            f"asked for the plan of the student in {path_text(folder)}, found no plan.json there; give a folder that "
            "prune-lab wrote, or the plan as text and its teacher with --model"
        )
    written = beside(inner, PLAN)
    if model:
        architecture: Architecture | None = resolve_model(model).architecture
    else:
        architecture = _architecture_with(str(written.get("architecture")), provenance_in(inner))
    if architecture is None:
        raise PlanError(
            f"asked for the teacher of the student in {path_text(folder)}, which was cut from another model than the "
            "presets and does not say which; give it with --model"
        )
    student = Student(architecture, plan_from_json(written, architecture), Path(folder))
    _check_plan(student, inner)
    return student


def student_of(text: str, model: str = "") -> Student:
    """The student that ``text`` names: its folder, or a plan of the teacher ``model`` as text or file.

    Raises PlanError when it cannot be read, FormError when the plan cannot be built.
    """
    if os.path.isdir(text):  # noqa: PTH112 - a plan may be too long for the name of a file
        student = student_in(Path(text), model)
    elif not model:
        raise PlanError(
            f"asked to convert by {path_text(text)!r}, found no such folder; give the folder of a student, or a "
            "plan and its teacher with --model"
        )
    else:
        architecture = resolve_model(model).architecture
        student = Student(architecture, read_one_plan(text, architecture))
    if student.plan.widths:
        raise PlanError(
            f"asked to fit an addition of the teacher to {path_text(text)}, which makes blocks narrower "
            f"({student.plan.widths[0].short}), so that its layers have other rows; {TRAIN_ANOTHER}, or give a student "
            "whose plan removes blocks alone"
        )
    layout_of(student.architecture, student.plan)  # says what is in the way
    return student
