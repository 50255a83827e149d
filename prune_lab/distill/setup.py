"""The set-up that all students of a distillation share, and one student in training with its files."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object, reduce
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from torch import nn

from prune_lab.config import SETTINGS, DistillConfig
from prune_lab.distill.checkpoint import TrainingState, check_fingerprint, load_checkpoint, save_checkpoint
from prune_lab.distill.conditioning import OtherCaptions
from prune_lab.distill.data import TrainingData
from prune_lab.distill.features import FeaturePair
from prune_lab.distill.recovery import Recovery, load_recovery, verdict_path, write_heldout, write_verdict
from prune_lab.errors import DataError, DeviceError, RunError
from prune_lab.evaluation import heldout_loss
from prune_lab.families import embedding_width, format_of, known_conditions, latent_channels
from prune_lab.probes import Probe, drawn_rows, schedule_of
from prune_lab.runs import CandidatePaths, read_typed
from prune_lab.runtime import pick_dtype, seeded, tensors_digest, write_frame
from prune_lab.schemas import RECOVERY_COLUMNS
from prune_lab.surgery import save_model

VALIDATION = RECOVERY_COLUMNS.index("validation")
Draw = Callable[[nn.Module, Path], None]  # writes a grid of pictures, drawn with a model, to a file


# The set-up --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class DistillSetup:
    """What all students of one distillation share: teacher, data, noise schedule, settings and validation rows.

    ``draw`` writes a grid of pictures for ``distill.grid_every``; ``logs`` is the folder that trackers write to.
    """

    teacher: nn.Module
    data: TrainingData
    scheduler: Any  # of diffusers: its noise schedule and prediction type are used
    settings: DistillConfig
    validation: Probe
    device: torch.device | str = "cpu"
    draw: Draw | None = None
    logs: Path | None = None
    others: OtherCaptions | None = None  # of random conditioning

    def precision(self) -> torch.dtype:
        """The format of the forward passes; ``init_processes`` comes first, because the launch may name one.

        Raises DeviceError for float16, in which students lose their gradients.
        """
        weights = format_of(self.teacher)
        launched = {"bf16": "bfloat16", "fp16": "float16"}.get(AcceleratorState().mixed_precision, "")
        asked = self.settings.precision or launched
        found = pick_dtype(asked) if asked else weights
        if torch.float16 in (found, weights):
            raise DeviceError(
                "asked to distil in float16, where gradients underflow; load the teacher in bfloat16 or float32"
            )
        return found


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Student:
    """A pruned model to be trained: how it is loaded, its feature pairs, and the folder of its candidate.

    ``frozen`` are paths of modules that do nothing as long as their weights stay: they are not trained.
    """

    load: Callable[[], nn.Module]
    pairs: tuple[FeaturePair, ...]
    folder: Path
    frozen: tuple[str, ...] = ()
    label: str = ""  # what the plan is called where people read it; empty: by its id


def check_data_fits(student: Any, data: TrainingData) -> None:
    """Raise DataError when ``student`` takes other latents, text or further inputs than ``data`` hold."""
    channels, width = latent_channels(student), embedding_width(student)
    found = data.empty_embedding.shape[-1]
    if data.channels != channels or width != found:
        raise DataError(
            f"the model takes latents of {channels} channels and text of width {width}, the cached data have "
            f"{data.channels} and {found}; encode the pictures with the pipeline of this model"
        )
    conditions = known_conditions(student)
    told = [condition for condition in conditions if not condition.classes]  # a class is that of the picture
    wanted = {condition.name for condition in conditions} - drawn_rows(told, 1, seeded(0)).keys()
    first = torch.zeros(1, dtype=torch.int64)
    if missing := sorted(wanted - data.rows(first, first).added.keys()):
        raise DataError(
            f"the model takes {', '.join(missing)} of each picture, the cached data have none; "
            "encode the pictures with the pipeline of this model"
        )


def fingerprint_of(setup: DistillSetup, student: Student, model: nn.Module) -> dict[str, Any]:
    """Settings, data and weights that a distillation must have in common with the one that it resumes, by name.

    ``model`` is what ``student`` loads.
    """
    settings = setup.settings
    kept = {
        name: value
        for name, value in dataclasses.asdict(settings).items()
        if not SETTINGS[f"distill.{name}"].resumes
    }
    if settings.schedule == "constant":  # the learning rate of a step does not depend on how many follow
        del kept["steps"]

    def written(pair: FeaturePair) -> str:
        weight = "" if pair.weight == 1 else f"*{pair.weight:.6g}"
        return f"{pair.teacher_path}={pair.student_path}{weight}"

    del kept["captions"]
    if setup.others is None:
        del kept["random_conditioning"]  # a run from before there was this setting goes on
    else:
        kept["captions"] = setup.others.digest  # of their embeddings, wherever the file lies
    return kept | {
        "student": tensors_digest(dict(model.named_parameters())),
        "pairs": " ".join(map(written, student.pairs)),
        "data": setup.data.digest,
        "validation": setup.validation.digest,
        "prediction": schedule_of(setup.scheduler.config).kind,
    }


def _check_reach(found: int, asked: int, paths: CandidatePaths) -> None:
    if found > asked:
        raise RunError(
            f"asked to distil for {asked} steps, found {found} steps taken in {paths.folder}; "
            "ask for at least as many, or --force to start again"
        )


def finished_recovery(paths: CandidatePaths, fingerprint: Mapping[str, Any], steps: int) -> Recovery | None:
    """The recovery in ``paths`` when nothing is left to do: done at ``steps`` steps, or failed before; else None.

    Raises RunError when it was made with other settings, data or weights, or has taken more steps.
    """
    recovery = load_recovery(paths.folder)
    if recovery is None:
        return None
    check_fingerprint(recovery.fingerprint, fingerprint, verdict_path(paths))
    complete = recovery.status == "done" and recovery.steps == steps and paths.distilled_model.is_dir()
    if complete or (recovery.status == "failed" and recovery.steps <= steps):
        return recovery
    _check_reach(recovery.steps, steps, paths)
    return None


def check_same_files(paths: CandidatePaths, found: Recovery | None) -> None:
    """Raise RunError when the processes do not see the same files in ``paths``; this one saw ``found``.

    They would take different steps and wait for each other for ever.
    """
    seen = gather_object([(found.steps if found else -1, paths.checkpoint.is_file())])
    if len(set(seen)) > 1:
        raise RunError(
            f"asked to distil by {len(seen)} processes, found that not all of them see the same files in "
            f"{paths.folder}; give a folder that all machines share"
        )


# One student -------------------------------------------------------------------------------------------------------


def fresh_state(model: nn.Module, settings: DistillConfig) -> TrainingState:
    """The state of a training of ``model`` before its first step."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=settings.weight_decay,
        fused=True,  # one pass over the weights instead of ten
    )
    ema = EMAModel(model.parameters(), decay=settings.ema_decay, foreach=True)
    return TrainingState(model, optimizer, ema, step=0, seconds=0.0, history=[])


@contextlib.contextmanager
def averaged_weights(state: TrainingState) -> Iterator[nn.Module]:
    """The student of ``state`` with its averaged weights; its own return on exit."""
    parameters = list(state.student.parameters())
    state.ema.store(parameters)
    try:
        state.ema.copy_to(parameters)
        yield state.student
    finally:
        state.ema.restore(parameters)


def shared_heldout_losses(model: nn.Module, validation: Probe) -> torch.Tensor:
    """Held-out losses (rows,) float32 on the CPU; each process computes some, and all get all of them.

    So every process decides alike whether a student has diverged.
    """
    processes = PartialState()
    world, rank = processes.num_processes, processes.process_index
    if world == 1:
        return heldout_loss(model, validation)
    losses = torch.zeros(len(validation), device=processes.device)
    if own := range(rank, len(validation), world):
        losses[rank::world] = heldout_loss(model, validation.rows(own)).to(processes.device)
    return cast("torch.Tensor", reduce(losses, reduction="sum")).cpu()


def not_finite_reason(quantity: str, step: int) -> str:
    """The reason to stop a student whose ``quantity`` became nan or infinite at ``step``."""
    return f"the {quantity} was no longer finite at step {step}; try a smaller distill.learning_rate"


@dataclasses.dataclass(slots=True, eq=False)
class StudentRun:
    """A student in training and its files; ``failure`` says why it was stopped and is empty until then."""

    state: TrainingState
    pairs: tuple[FeaturePair, ...]
    paths: CandidatePaths
    fingerprint: Mapping[str, Any]
    forward: Callable[..., Any]  # the student, or its wrapper for data parallel training
    failure: str = ""
    label: str = ""  # what the plan is called where people read it

    @classmethod
    def of(
        cls, setup: DistillSetup, student: Student, model: nn.Module, fingerprint: Mapping[str, Any]
    ) -> StudentRun:
        """The student ``model`` on the device, before its first step."""
        settings = setup.settings
        # Steps this small are rounded away in shorter formats.
        nn.Module.to(model.train(), setup.device, torch.float32)
        for path in student.frozen:
            model.get_submodule(path).requires_grad_(False)
        if settings.gradient_checkpointing:
            cast("Any", model).enable_gradient_checkpointing()
        state = fresh_state(model, settings)
        paths = CandidatePaths(student.folder)
        return cls(state, student.pairs, paths, fingerprint, model, label=student.label or paths.folder.name)

    @property
    def name(self) -> str:
        """The id of the plan, which the folder is called by."""
        return self.paths.folder.name

    def resume(self, validation: Probe, until: int) -> None:
        """Load the checkpoint; without one, measure the held-out loss before training."""
        state = self.state
        if self.paths.checkpoint.is_file():
            load_checkpoint(self.paths.checkpoint, state, self.fingerprint)
            _check_reach(state.step, until, self.paths)
            return
        state.heldout[0] = shared_heldout_losses(state.student, validation)
        state.history.append((0, *(math.nan,) * 4, float(state.heldout[0].double().mean()), 0.0, 0.0))

    def validate(self, validation: Probe, diverged: float) -> float:
        """The held-out loss of the averaged weights after the last step; it goes into history and tables too.

        A loss that is not finite, or more than ``diverged`` times the one before training, fails the student.
        """
        state = self.state
        with averaged_weights(state) as model:
            losses = state.heldout[state.step] = shared_heldout_losses(model, validation)
        found, before = float(losses.double().mean()), state.history[0][VALIDATION]
        row = list(state.history[-1])
        row[VALIDATION] = found
        state.history[-1] = tuple(row)
        if not math.isfinite(found):
            self.failure = not_finite_reason("held-out loss", state.step)
        elif found > diverged * before:
            self.failure = (
                f"diverged: the held-out loss rose from {before:.4g} to {found:.4g} by step {state.step}, more than "
                f"{diverged:g} times; try a smaller distill.learning_rate"
            )
        return found

    @property
    def recovery(self) -> Recovery:
        """The recovery of the student so far."""
        state = self.state
        return Recovery(
            plan_id=self.name,
            steps=state.step,
            before=state.history[0][VALIDATION],
            after=math.nan if self.failure else state.history[-1][VALIDATION],
            seconds=state.seconds,
            status="failed" if self.failure else "done",
            reason=self.failure,
            fingerprint=self.fingerprint,
            rows=tuple(state.history),
        )

    def save(self) -> None:
        """Write the checkpoint; of several processes, the main one does."""
        if PartialState().is_main_process:
            save_checkpoint(self.paths.checkpoint, self.state, self.fingerprint)

    def write_tables(self) -> None:
        """Write recovery.csv and heldout.csv as far as they go; of several processes, the main one does."""
        if PartialState().is_main_process:
            write_frame(self.paths.recovery, self.recovery.frame())
            write_heldout(self.paths, self.state.heldout)

    def end(self, *, keep_checkpoint: bool) -> Recovery:
        """Write averaged weights, proved to be these, tables and, last, the verdict; the recovery comes back."""
        state, failure, recovery = self.state, self.failure, self.recovery
        state.student.eval()
        if not failure:
            if keep_checkpoint:
                self.save()
            state.ema.copy_to(state.student.parameters())
        if not PartialState().is_main_process:
            return recovery
        if not failure:
            plan = read_typed(self.paths.plan, dict[str, Any]) if self.paths.plan.is_file() else None
            notes = {"plan_id": self.name, "steps": state.step}
            save_model(cast("ModelMixin", state.student), self.paths.distilled_model, plan, notes)
        self.write_tables()
        write_verdict(self.paths, recovery)
        if not failure and not keep_checkpoint:
            self.paths.checkpoint.unlink(missing_ok=True)
        return recovery
