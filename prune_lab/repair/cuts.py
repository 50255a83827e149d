"""The cuts that removed blocks leave in a model, and the units that consume the tensor at each cut.

The execution of the student is followed by names: the hidden tensor and the stored skips each carry two names,
the unit that wrote the tensor in the student, and the unit whose output is at that point in the teacher. Where the two
differ, a consumer in the student gets another tensor than in the teacher.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from prune_lab.blocks import Architecture
from prune_lab.forms import layout_of
from prune_lab.plans import PruningPlan, gone_with
from prune_lab.width import site_named


@dataclass(frozen=True, slots=True)
class Consumer:
    """A remaining unit that consumes the tensor at a cut, and the unit whose output it consumes in the teacher."""

    unit: str
    slot: Literal["main", "skip"]
    teacher_source: str

    @property
    def text(self) -> str:
        """The consumer in words: ``Up4.R1 (skip, Dn1.A2)``."""
        return f"{self.unit} ({self.slot}, {self.teacher_source})"


@dataclass(frozen=True, slots=True)
class Cut:
    """Consecutive removed units, the unit before them, and all consumers of the output of that unit.

    Names are those of the teacher. ``before`` is the model's stem (of a U-Net ``conv_in``) where no unit remains
    before the cut; a consumer is its head (``conv_out``) where none remains after it.
    """

    before: str
    removed: tuple[str, ...]
    consumers: tuple[Consumer, ...]  # in order of execution; exactly one consumes the main path

    @property
    def main(self) -> Consumer:
        """The consumer of the main path."""
        return next(one for one in self.consumers if one.slot == "main")

    @property
    def after(self) -> str:
        """The unit after the cut on the main path."""
        return self.main.unit

    @property
    def mismatched(self) -> tuple[Consumer, ...]:
        """Consumers that get another tensor than the main path in the teacher; in the student all get the same."""
        return tuple(one for one in self.consumers if one.teacher_source != self.main.teacher_source)

    @property
    def label(self) -> str:
        """The cut in words: ``Dn1.A1 [Dn1.R2 Dn1.A2] Dn1.down``."""
        return f"{self.before} [{' '.join(self.removed)}] {self.after}"


@dataclass(frozen=True, slots=True)
class Narrowing:
    """A block that lost parts of its inside, and the layer of it that reads what is left of them."""

    label: str
    """Its site, and the layer where several read it: ``Dn3.A1.heads``."""
    block: str
    teacher_path: str  # of the layer
    student_path: str
    mismatched: tuple[Consumer, ...] = ()

    @property
    def before(self) -> str:
        """The block that a correction is folded into."""
        return self.block

    @property
    def after(self) -> str:
        """The same."""
        return self.block


def find_narrowings(architecture: Architecture, plan: PruningPlan) -> tuple[Narrowing, ...]:
    """The layers of the student of ``plan`` that read less than in the teacher by its widths, in order of execution."""
    layout, found = layout_of(architecture, plan), []
    for width in plan.widths:
        site = site_named(width.site, architecture.sites)
        for path in site.narrow:
            new = layout.renamed(path)
            assert new is not None, f"{path} is of a block that leaves"
            layer = path.removeprefix(f"{site.path}.")
            label = site.name if len(site.narrow) == 1 else f"{site.name} {layer}"
            found.append(Narrowing(label, site.block, path, new))
    return tuple(found)


def find_cuts(architecture: Architecture, plan: PruningPlan) -> tuple[Cut, ...]:
    """The cuts that ``plan`` leaves in a model of ``architecture``, in order of execution.

    Samplers that are removed together with an innermost stage are part of the cut. Raises UnremovableBlockError or
    UnknownBlockError when the plan does not fit.
    """
    removed = gone_with(architecture, plan.removed)
    consumers: dict[str, list[Consumer]] = defaultdict(list)
    runs: dict[str, list[str]] = defaultdict(list)
    writer = source = architecture.stem
    skips = [(writer, source)]
    for unit in architecture.units:
        skip = skips.pop() if unit.takes_skip else None
        if unit.name in removed:
            runs[writer].append(unit.name)
            source = unit.name
        else:
            consumers[writer].append(Consumer(unit.name, "main", source))
            if skip is not None:
                consumers[skip[0]].append(Consumer(unit.name, "skip", skip[1]))
            writer = source = unit.name
        if unit.gives_skip:
            skips.append((writer, source))
    consumers[writer].append(Consumer(architecture.head, "main", source))
    return tuple(Cut(before, tuple(run), tuple(consumers[before])) for before, run in runs.items())


def teacher_paths(architecture: Architecture) -> dict[str, str]:
    """Module path of every unit by name, including the stem."""
    stem = architecture.stem
    return {stem: stem} | {unit.name: unit.path for unit in architecture.units}


def student_paths(architecture: Architecture, plan: PruningPlan) -> dict[str, str]:
    """Module path in the native student of every remaining unit, by its name in the teacher.

    Raises FormError when no plain diffusers config describes the student.
    """
    layout = layout_of(architecture, plan)
    paths = {name: layout.renamed(path) for name, path in teacher_paths(architecture).items()}
    return {name: path for name, path in paths.items() if path is not None}
