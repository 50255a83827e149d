"""Where removed blocks leave a cut in a model, and which units read the tensor that stands there.

The student is walked on names: the hidden tensor and the waiting skips each carry two names, the unit that wrote the
tensor in the student, and the unit whose output stands at that place in the teacher. Where the two differ, the
student's reader gets another tensor than the teacher's did.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from prune_lab.blocks import Architecture
from prune_lab.plans import PruningPlan, gone_with, native_layout


@dataclass(frozen=True, slots=True)
class Reader:
    """A surviving unit that reads the tensor at a cut, and the unit whose output it reads there in the teacher."""

    unit: str
    slot: Literal["main", "skip"]
    place: str

    @property
    def text(self) -> str:
        """``Up4.R1 (skip, Dn1.A2)``."""
        return f"{self.unit} ({self.slot}, {self.place})"


@dataclass(frozen=True, slots=True)
class Cut:
    """Consecutive removed units, the unit before them, and every reader of what that unit writes.

    Names are those of the teacher. ``before`` is the model's stem (of a U-Net ``conv_in``) where nothing survives
    before, a reader its head (``conv_out``) where nothing survives behind.
    """

    before: str
    gone: tuple[str, ...]
    readers: tuple[Reader, ...]  # in order of execution; exactly one reads the main path

    @property
    def main(self) -> Reader:
        """The reader of the main path behind the cut."""
        return next(reader for reader in self.readers if reader.slot == "main")

    @property
    def after(self) -> str:
        """The unit behind the cut."""
        return self.main.unit

    @property
    def torn(self) -> tuple[Reader, ...]:
        """Readers to which the teacher gives another tensor than to the main path; the student has one for all."""
        return tuple(reader for reader in self.readers if reader.place != self.main.place)

    @property
    def label(self) -> str:
        """``Dn1.A1 [Dn1.R2 Dn1.A2] Dn1.down``."""
        return f"{self.before} [{' '.join(self.gone)}] {self.after}"


def find_cuts(architecture: Architecture, plan: PruningPlan) -> tuple[Cut, ...]:
    """The cuts that ``plan`` leaves in a model of ``architecture``, in order of execution.

    Samplers that leave with an innermost stage belong to the cut. Raises UnremovableBlockError or UnknownBlockError
    when the plan does not fit.
    """
    removed = gone_with(architecture, plan.removed)
    readers: dict[str, list[Reader]] = defaultdict(list)
    runs: dict[str, list[str]] = defaultdict(list)
    writer = place = architecture.family.stem
    skips = [(writer, place)]
    for unit in architecture.units:
        skip = skips.pop() if unit.takes_skip else None
        if unit.name in removed:
            runs[writer].append(unit.name)
            place = unit.name
        else:
            readers[writer].append(Reader(unit.name, "main", place))
            if skip is not None:
                readers[skip[0]].append(Reader(unit.name, "skip", skip[1]))
            writer = place = unit.name
        if unit.gives_skip:
            skips.append((writer, place))
    readers[writer].append(Reader(architecture.family.head, "main", place))
    return tuple(Cut(before, tuple(gone), tuple(readers[before])) for before, gone in runs.items())


def teacher_paths(architecture: Architecture) -> dict[str, str]:
    """Module path of every unit by name, the stem among them."""
    stem = architecture.family.stem
    return {stem: stem} | {unit.name: unit.path for unit in architecture.units}


def student_paths(architecture: Architecture, plan: PruningPlan) -> dict[str, str]:
    """Module path in the native student of every surviving unit, by its name in the teacher.

    Raises NonNativePlanError when no plain diffusers config describes the student.
    """
    layout = native_layout(architecture, plan)
    paths = {name: layout.renamed(path) for name, path in teacher_paths(architecture).items()}
    return {name: path for name, path in paths.items() if path is not None}
