"""The folder of a run: the only code that says where a file of it lies.

Files appear under their final name only when complete, so a step is done when its file is there.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Protocol, overload

from prune_lab.errors import RunError

_PLAN_ID = re.compile(r"[0-9a-f]{12}")


# Paths -----------------------------------------------------------------------------------------------------------


class _Place(Protocol):
    @property
    def folder(self) -> Path: ...


class PathIn:
    """A path in the folder of its owner, whether or not the file is there yet; its docstring says what it holds."""

    def __init__(self, name: str, meaning: str) -> None:
        self.name = name
        self.__doc__ = meaning

    @overload
    def __get__(self, place: None, kind: type) -> PathIn: ...
    @overload
    def __get__(self, place: _Place, kind: type) -> Path: ...
    def __get__(self, place: _Place | None, kind: type) -> PathIn | Path:
        return self if place is None else place.folder / self.name


def is_plan_id(text: str) -> bool:
    """Whether ``text`` is the id of a plan: 12 hexadecimal digits."""
    return _PLAN_ID.fullmatch(text) is not None


def _checked_id(plan_id: str) -> str:
    # ids become folder names, and some arrive from the command line
    if not is_plan_id(plan_id):
        raise RunError(
            f"{plan_id!r} is not the id of a plan; an id is 12 hexadecimal digits, see the plans folder"
        )
    return plan_id


@dataclasses.dataclass(frozen=True, slots=True)
class CandidatePaths:
    """Where the files of one candidate lie."""

    folder: Path

    plan = PathIn("plan.json", "The plan.")
    pruned = PathIn("pruned", "The model as it was cut, before any training.")
    repair = PathIn("repair.csv", "What the repair of the cut tried and what it came to, a row per change.")
    repaired = PathIn("repaired", "The model after the repair of the cut, before any training.")
    kept = PathIn("kept.json", "Whether the repair was kept, and the losses that decided it.")
    profile = PathIn("profile.json", "Parameters, MACs, latency, memory and size on disk.")
    recovery = PathIn("recovery.csv", "The losses of the distillation, a row per recorded step.")
    heldout = PathIn("heldout.csv", "The held-out loss of every row at every validation: step, row, loss.")
    grids = PathIn("grids", "Grids of pictures drawn in the course of the training, a file per step.")
    distilled = PathIn("distilled", "The folder of the distillation: its checkpoint, and the model at the end.")
    checkpoint = PathIn("distilled/checkpoint.safetensors", "The state from which a distillation goes on.")
    distilled_model = PathIn("distilled/model", "The model after the distillation (averaged weights).")
    pictures_pruned = PathIn("pictures/pruned", "Pictures drawn before training, a file per prompt and seed.")
    pictures_distilled = PathIn("pictures/distilled", "The same pictures drawn after the distillation.")

    @property
    def repaired_files(self) -> tuple[Path, Path]:
        """What tells of a repair."""
        return self.repair, self.kept


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """A run folder."""

    folder: Path

    lock = PathIn("writer.lock", "Which process writes to the folder now.")
    config = PathIn("config.toml", "The settings that the run was started with.")
    environment = PathIn("environment.json", "Format of the folder, and the machine and versions behind it.")
    blocks = PathIn("blocks.csv", "The inventory of the teacher's blocks.")
    probe = PathIn("probe.safetensors", "The fixed inputs of scoring.")
    importance = PathIn("importance.csv", "The removal impact of every block, pair and stage.")
    importance_parts = PathIn("importance_parts.csv", "Impacts per tenth of the schedule and kind of prompt.")
    criteria = PathIn("criteria.csv", "The scores by all criteria that were measured, the run's own first.")
    width_scores_dir = PathIn("widths", "What parts of blocks are worth, a file per criterion: <criterion>.csv.")
    scores_dir = PathIn("scores", "Every value measured for a score, so that it is not measured again.")
    comparison_dir = PathIn("comparison", "How the criteria agree: tables, figures and words.")
    choices = PathIn("choices.json", "Which blocks can leave together natively, level by level, and what they take along in the neutral form.")
    costs = PathIn("costs.csv", "Parameters and MACs of every block, sampler and the rest.")
    latency = PathIn("latency.json", "What each block's removal saves in time.")
    latency_rounds = PathIn("latency_rounds.csv", "Times of teacher and students, round by round, in turns.")
    reductions = PathIn("reductions.csv", "What the controls leave of parameters, MACs and latency.")
    pipeline_profile = PathIn("pipeline.csv", "Shares of text encoder, model and decoder in one generation.")
    sources = PathIn("sources.json", "Where probe, training and held-out rows and the scorer come from.")
    validation = PathIn(
        "validation.safetensors", "The held-out rows of the user's data, or of drawn pictures."
    )
    data = PathIn("data.safetensors", "Latents and text embeddings of shipped or drawn training pictures.")
    data_dir = PathIn("data", "Latents and text embeddings of the pictures that the settings name.")
    captions = PathIn("captions.safetensors", "Text embeddings of other captions, for random conditioning.")
    plans_dir = PathIn("plans", "The plans that become candidates, <id>.json.")
    searched = PathIn("plans/searched.csv", "Which plan came from which budget; written last of all plans.")
    searches = PathIn("plans/searches.csv", "A row per budget: how its plans were found, and at what cost.")
    gates = PathIn("plans/gates.csv", "What was learnt of each block, by the solver learned-gates.")
    gate_steps = PathIn("plans/gate_steps.csv", "The steps in which it was learnt: loss, and what the masks leave.")
    evolution_dir = PathIn("plans/evolution", "The journal of the evolution, by which it goes on.")
    candidates_dir = PathIn("candidates", "One folder per candidate, named by its plan's id.")
    picture_prompts = PathIn("pictures/prompts.csv", "File, prompt and seed of every picture of a set.")
    teacher_pictures = PathIn("pictures/teacher", "The teacher's pictures, a file per prompt and seed.")
    curves_dir = PathIn("curves", "Where trackers such as TensorBoard write the curves of the distillation.")
    repairs = PathIn("repairs.csv", "A row per candidate: whether its repair was kept, and what it came to.")
    tournament = PathIn("tournament.csv", "What each rung decided about each candidate, if there were rungs.")
    ranking = PathIn("ranking.csv", "The candidates in order, with those left out and why.")
    steps = PathIn("steps.csv", "How long each step took when it was last done; not shown in the report.")
    report_dir = PathIn("report", "Everything that the report shows, as files.")
    report = PathIn("report/index.html", "The report as one HTML file that works offline.")

    def width_scores(self, criterion: str) -> Path:
        """What the parts of each block are worth by ``criterion``: norm groups, heads, channels."""
        return self.width_scores_dir / f"{criterion}.csv"

    def plan(self, plan_id: str) -> Path:
        """The JSON of the plan with this id."""
        return self.plans_dir / f"{_checked_id(plan_id)}.json"

    def candidate(self, plan_id: str) -> CandidatePaths:
        """Where the files of the candidate of this plan lie."""
        return CandidatePaths(self.candidates_dir / _checked_id(plan_id))

    def plan_ids(self) -> tuple[str, ...]:
        """The ids of the plans that are written down, in alphabetical order."""
        names = (path.stem for path in self.plans_dir.glob("*.json"))
        return tuple(sorted(name for name in names if is_plan_id(name)))

    def done(self, path: Path) -> bool:
        """Whether the step that writes ``path`` is finished: the file or folder is there and not empty."""
        if path.is_dir():
            return any(path.iterdir())
        return path.is_file() and path.stat().st_size > 0

    def needs(self, path: Path, verb: str) -> Path:
        """``path``, which the step called ``verb`` has written.

        Raises RunError that names the step when it has not.
        """
        if not self.done(path):
            name = path.relative_to(self.folder) if path.is_relative_to(self.folder) else path
            raise RunError(
                f"run {self.folder} has no {name} yet; make it with: prune-lab {verb} --run {self.folder}"
            )
        return path
