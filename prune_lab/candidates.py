"""A candidate: one plan carried out, saved as a plain diffusers model, and measured."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import ModelMixin

from prune_lab.blocks import Architecture
from prune_lab.errors import RunError
from prune_lab.families import plain_config
from prune_lab.models import ModelSource, load_model, model_digest, resolve_model
from prune_lab.plans import PruningPlan, read_plan
from prune_lab.profiling import ComparedLatency, Profile, Service, profile
from prune_lab.runs import CandidatePaths, read_plan_file, read_typed
from prune_lab.runtime import Environment, pick_dtype, write_json
from prune_lab.surgery import (
    TEACHER,
    Original,
    materialise,
    materialise_from_folder,
    original_of,
    save_model,
)

State = Literal["pruned", "repaired", "distilled"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan, and the folder that holds what it made of the teacher: plan.json, pruned/, profile.json."""

    plan: PruningPlan
    folder: Path

    @property
    def paths(self) -> CandidatePaths:
        """Where the files of this candidate lie."""
        return CandidatePaths(self.folder)

    @property
    def profile(self) -> Profile:
        """What the pruned model costs, as it was measured when the candidate was built."""
        return read_typed(self.paths.profile, Profile)


def load_student(
    candidate: Candidate,
    state: State = "pruned",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ModelMixin:
    """The model of ``candidate`` in eval mode: as it was pruned, after the repair of its cuts, or after distillation.

    Raises RunError when there is none yet, ModelFormatError when its files are damaged.
    """
    paths = candidate.paths
    folder = {"pruned": paths.pruned, "repaired": paths.repaired, "distilled": paths.distilled_model}[state]
    if not folder.is_dir():
        raise RunError(
            f"asked for the {state} model in {folder}, found none yet; prune-lab run makes it, with these settings"
        )
    return load_model(resolve_model(str(folder)), device=device, dtype=dtype, trusted=True)


def load_candidate(folder: Path, architecture: Architecture) -> Candidate:
    """The finished candidate in ``folder``.

    Raises RunError when it is not finished, PlanError when it was made for another architecture.
    """
    paths = CandidatePaths(Path(folder))
    missing = [path.name for path in (paths.plan, paths.pruned, paths.profile) if not path.exists()]
    if missing:
        raise RunError(
            f"asked for the candidate in {folder}, which lacks {' and '.join(missing)}; build it with prune-lab run"
        )
    return Candidate(read_plan(paths.plan, architecture), paths.folder)


def build_candidate(
    teacher: ModelSource | ModelMixin,
    plan: PruningPlan,
    folder: Path,
    *,
    batch: int = 1,
    runs: int = 20,
    warmup: int = 3,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    profiled: bool = True,
) -> Candidate:
    """The candidate of ``plan``, built and profiled in ``folder``; a step whose file is there is not done again.

    From a source with weights only the surviving tensors are read, and kept in the files' own format; a model in memory
    is copied and left as it is. The student has the form of the plan; what is written is proved before it gets its
    name. The profile is that of the student in ``dtype`` on ``device``, one forward pass of ``batch`` samples, ``runs``
    timed after ``warmup``; without ``profiled`` it is left to ``profile_candidate``. Raises FormError when the student
    cannot be built in that form, UnsupportedModelError when ``teacher`` has no weights, RunError when ``folder`` holds
    another plan's candidate, StorageError when writing fails, ProofError when what was written is another model.
    """
    candidate = Candidate(plan, Path(folder))
    paths = candidate.paths
    _check_owner(candidate)
    if not paths.pruned.is_dir():
        original: Original | None = None
        if isinstance(teacher, ModelSource):
            model_folder = teacher.model_folder
            student = (
                materialise(
                    load_model(teacher), plan, hand_over=True
                )  # says why a source without weights will not do
                if model_folder is None
                else materialise_from_folder(model_folder, plan, variant=teacher.variant)
            )
            provenance = {
                **teacher.origin,
                "source_digest": model_digest(teacher),
                TEACHER: plain_config(teacher.config),
            }
            original = original_of(teacher, plan) if model_folder else None
        else:
            student = materialise(teacher, plan)
            provenance = {"source": "a model in memory"}
        environment = Environment.capture(str(device)).as_dict()
        save_model(
            student,
            paths.pruned,
            plan,
            provenance
            | {"plan": plan.text, "plan_id": plan.id, "form": plan.form, "environment": environment},
            original=original,
        )
    write_json(paths.plan, plan.to_json())
    if profiled and not paths.profile.is_file():
        student = load_student(candidate, device=device, dtype=dtype)
        tokens = teacher.tokens if isinstance(teacher, ModelSource) else None
        measured = profile(student, batch=batch, tokens=tokens, runs=runs, warmup=warmup, folder=paths.pruned)
        write_json(paths.profile, measured.as_dict())
    return candidate


def profile_candidate(candidate: Candidate, compared: ComparedLatency, service: Service) -> Profile:
    """The profile of ``candidate`` at ``service``, where its latency was measured in turns with the teacher's.

    Writes profile.json.
    """
    student = load_student(candidate, device=service.device, dtype=pick_dtype(service.dtype))
    found = profile(student, **service.sizes, timed=False, folder=candidate.paths.pruned)
    found = dataclasses.replace(found, latency=compared.latency, change=compared.change, timed=compared.timed)
    write_json(candidate.paths.profile, found.as_dict())
    return found


def _check_owner(candidate: Candidate) -> None:
    if candidate.paths.plan.is_file():
        found = read_plan_file(candidate.paths.plan)["id"]
        if found != candidate.plan.id:
            raise RunError(
                f"asked to build plan {candidate.plan.id} in {candidate.folder}, found plan {found} there; "
                "give every plan a folder of its own"
            )
