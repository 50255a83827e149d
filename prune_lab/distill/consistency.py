"""Consistency distillation of a latent model (LCM, arXiv:2310.04378): a student that draws in a few steps.

Along one path of the teacher's guided DDIM from noise to a picture, all points lead to the same picture. The student
learns to name it from any of them: its answer at a timestep t is drawn to the one that its own moving average gives at
the point k timesteps further on, where the teacher's step leads. Guidance is a number that is fixed here and baked in:
the student draws with it in one pass a step, and is to be asked for a guidance of 1.

    f(x, t) = c_skip(t) x + c_out(t) x0(x, t)    with c_skip(0) = 1 and c_out(0) = 0

as ``LCMScheduler`` of diffusers computes it, with which the student draws.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from diffusers import LCMScheduler, ModelMixin
from torch import Tensor, nn

from prune_lab.config import DistillConfig
from prune_lab.distill.batches import Batch, draw_batch
from prune_lab.distill.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from prune_lab.distill.data import TrainingData
from prune_lab.distill.joint import learning_rate_at
from prune_lab.distill.setup import (
    DistillSetup,
    averaged_weights,
    check_data_fits,
    fresh_state,
    not_finite_reason,
)
from prune_lab.errors import ConfigError, RunError, UnsupportedModelError
from prune_lab.families import embedding_width, format_of, known_conditions, predict_with
from prune_lab.models.schedulers import goes_by_flow
from prune_lab.probes import Schedule, schedule_of
from prune_lab.runtime import note, tensors_digest, track, write_frame
from prune_lab.schemas import CONSISTENCY_COLUMNS
from prune_lab.surgery import save_model

_FEWEST = 4  # steps of the teacher: LCMScheduler draws in no more than it was distilled over, and 4 are usual
_HUBER = 1e-3  # of the pseudo-Huber loss, as in the LCM scripts of diffusers
_WITHOUT = (  # settings of a distillation that mean nothing here
    *("task_weight", "output_weight", "feature_weight", "loss_variant", "min_snr", "random_conditioning"),
    *("precision", "gradient_checkpointing", "compile"),
)
_SIGMA_DATA = 0.5  # of LCMScheduler
# Settings that LCMScheduler shares with others: how noise is added, and what is predicted.
_OF_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Consistency:
    """How a student learns to draw in a few steps, beside the settings of every distillation."""

    guidance: float = 7.5  # of the teacher's steps, baked into the student; 1: none
    grid: int = 50  # steps that the teacher would draw in: the student learns at their timesteps

    def __post_init__(self) -> None:
        if not 1 <= self.guidance < math.inf or self.grid < _FEWEST:
            raise RunError(
                f"asked for consistency distillation with guidance {self.guidance:g} over {self.grid} steps of the "
                f"teacher; give a guidance of at least 1 (none) and at least {_FEWEST} steps, as the student draws in"
            )


# The schedule ---------------------------------------------------------------------------------------------------------


def lcm_scheduler(scheduler: Any, grid: int) -> Any:
    """The LCMScheduler that draws with a student of the model that ``scheduler`` draws with.

    Raises UnsupportedModelError for one of flow matching, and for betas that LCMScheduler does not have.
    """
    if goes_by_flow(scheduler):
        raise UnsupportedModelError(
            f"asked for consistency distillation with a {type(scheduler).__name__}, which goes by flow matching; "
            "LCMScheduler, and what is built here, are for noise that goes by betas: draw with fewer steps or a student"
        )
    settings = {name: scheduler.config[name] for name in _OF_SCHEDULE if name in scheduler.config}
    # pipelines warn of another steps_offset, which LCMScheduler does not read
    found = LCMScheduler(**settings, original_inference_steps=grid, clip_sample=False, steps_offset=1)
    kept = schedule_of(scheduler.config).kept
    if found.alphas_cumprod.shape != kept.shape or not torch.allclose(
        found.alphas_cumprod.float(), kept, atol=1e-6
    ):
        raise UnsupportedModelError(
            f"asked for consistency distillation with a {type(scheduler).__name__}, whose schedule of noise "
            "LCMScheduler does not have"
        )
    return found


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """The timesteps at which a student learns, and where each leads in one step of the teacher."""

    timesteps: Tensor  # (grid,) int64, rising; those that LCMScheduler draws at
    skip: int  # timesteps of one step of the teacher
    scheduler: Any  # LCMScheduler
    schedule: Schedule

    @classmethod
    def of(cls, scheduler: Any, grid: int) -> Trajectory:
        """That of the model which ``scheduler`` draws with, in ``grid`` steps."""
        lcm, schedule = lcm_scheduler(scheduler, grid), schedule_of(scheduler.config)
        if grid > schedule.length:
            raise RunError(
                f"asked for consistency distillation over {grid} steps of the teacher, found a schedule of "
                f"{schedule.length} timesteps; give at most as many"
            )
        lcm.set_timesteps(grid)
        return cls(lcm.timesteps.flip(0).long(), schedule.length // grid, lcm, schedule)

    def next(self, timesteps: Tensor) -> Tensor:
        """Where one step of the teacher leads from ``timesteps`` (B,)."""
        return (timesteps - self.skip).clamp(min=0)

    def answer(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """f(x, t) (B, ...): the picture's latents as the student names them, from what it predicts."""
        latents, _ = self.schedule.parts(prediction, noisy, timesteps)
        scaled = timesteps.to(noisy.device, torch.float32) * self.scheduler.config.timestep_scaling
        data = _SIGMA_DATA
        skip = data**2 / (scaled**2 + data**2)
        out = scaled / (scaled**2 + data**2) ** 0.5
        shape = (-1, *[1] * (noisy.ndim - 1))
        found: Tensor = skip.reshape(shape) * noisy + out.reshape(shape) * latents
        return found


# A step ---------------------------------------------------------------------------------------------------------------


def _predict(model: Any, noisy: Tensor, timesteps: Tensor, batch: Batch) -> Tensor:
    """The prediction (B, ...) float32 of ``model``, which may hold its weights in a shorter format."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(format_of(model)) if tensor.is_floating_point() else tensor

    added = {name: cast(tensor) for name, tensor in batch.added.items()}
    return predict_with(model, cast(noisy), timesteps, cast(batch.embeddings), added).float()


def _without_text(batch: Batch, data: TrainingData) -> Batch:
    """``batch`` with the empty caption in every row."""
    empty = data.empty_embedding.to(batch.embeddings).expand_as(batch.embeddings)
    added = dict(batch.added)
    for name, row in data.empty_added.items():
        added[name] = row.to(added[name]).expand_as(added[name])
    return dataclasses.replace(batch, embeddings=empty, added=added)


def teacher_step(
    teacher: Any, batch: Batch, data: TrainingData, trajectory: Trajectory, guidance: float
) -> Tensor:
    """Noisy latents (B, ...) where one guided DDIM step of ``teacher`` leads from those of ``batch``."""
    with torch.no_grad():
        found = _predict(teacher, batch.noisy, batch.timesteps, batch)
        if guidance > 1:
            plain = _predict(teacher, batch.noisy, batch.timesteps, _without_text(batch, data))
            found = plain + guidance * (found - plain)
        latents, noise = trajectory.schedule.parts(found, batch.noisy, batch.timesteps)
        return trajectory.schedule.add_noise(latents, noise, trajectory.next(batch.timesteps))


def huber(found: Tensor, wanted: Tensor) -> Tensor:
    """The pseudo-Huber loss, a scalar: the distance of each value where it is large, and its square where it is not."""
    return (((found - wanted).square() + _HUBER**2).sqrt() - _HUBER).mean()


def _losses(
    setup: DistillSetup, state: TrainingState, batch: Batch, trajectory: Trajectory, guidance: float
) -> float:
    """The loss of ``batch`` before the step; leaves gradients in the student."""
    state.optimizer.zero_grad()
    micro, count = setup.settings.micro_batch or len(batch.timesteps), len(batch.timesteps)
    total = 0.0
    for first in range(0, count, micro):
        part = batch.rows(slice(first, first + micro))
        after = teacher_step(setup.teacher, part, setup.data, trajectory, guidance)
        later = trajectory.next(part.timesteps)
        with torch.no_grad(), averaged_weights(state) as target:
            wanted = trajectory.answer(_predict(target, after, later, part), after, later)
        prediction = _predict(state.student, part.noisy, part.timesteps, part)
        loss = huber(trajectory.answer(prediction, part.noisy, part.timesteps), wanted)
        (len(part.timesteps) / count * loss).backward()  # type: ignore[no-untyped-call]
        total += len(part.timesteps) / count * float(loss.detach())
    return total


# The training ---------------------------------------------------------------------------------------------------------


def _check_settings(settings: DistillConfig) -> None:
    """Raise ConfigError for a setting that means nothing here: none is left out without a word."""
    usual = DistillConfig()
    for name in _WITHOUT:
        if getattr(settings, name) != getattr(usual, name):
            raise ConfigError(
                f"asked for distill.{name} = {getattr(settings, name)!r}, which consistency distillation does not "
                "have; leave it out"
            )


def check_consistency(setup: DistillSetup, student: Any, how: Consistency) -> Trajectory:
    """The trajectory that ``student`` learns along. Raises UnsupportedModelError where it cannot learn to draw so."""
    _check_settings(setup.settings)
    trajectory = Trajectory.of(setup.scheduler, how.grid)
    check_data_fits(student, setup.data)
    if not embedding_width(student):
        raise UnsupportedModelError(
            "asked for consistency distillation of a model that reads no text, with whose pipeline LCMScheduler does "
            "not draw; draw with fewer steps or a student"
        )
    if any(condition.place == "timestep_cond" for condition in known_conditions(student)):
        raise UnsupportedModelError(
            "asked for consistency distillation of a model that is told its guidance (time_cond_proj_dim): it draws "
            "in a few steps already"
        )
    return trajectory


def _fingerprint(setup: DistillSetup, student: nn.Module, how: Consistency) -> dict[str, Any]:
    settings = setup.settings
    named = ("batch", "learning_rate", "weight_decay", "ema_decay", "clip_norm", "warmup", "schedule", "seed")
    kept = {name: getattr(settings, name) for name in named}
    kept |= {} if settings.schedule == "constant" else {"steps": settings.steps}
    return kept | {
        "guidance": how.guidance,
        "grid": how.grid,
        "teacher": tensors_digest(dict(setup.teacher.named_parameters())),
        "student": tensors_digest(dict(student.named_parameters())),
        "data": setup.data.digest,
        "prediction": schedule_of(setup.scheduler.config).kind,
    }


@dataclasses.dataclass(frozen=True, slots=True)
class ConsistencyPaths:
    """The files of one consistency distillation."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        """The state from which it goes on."""
        return self.folder / "checkpoint.safetensors"

    @property
    def losses(self) -> Path:
        """Its loss by step."""
        return self.folder / "consistency.csv"

    @property
    def model(self) -> Path:
        """The model that came of it; there when all steps were taken."""
        return self.folder / "model"


def _update(state: TrainingState, settings: DistillConfig, loss: float) -> None:
    """One step of AdamW. Raises RunError when the loss or the gradient is not finite."""
    step = state.step + 1
    (group,) = state.optimizer.param_groups
    group["lr"] = learning_rate_at(settings, step)
    norm = float(nn.utils.clip_grad_norm_(group["params"], settings.clip_norm or math.inf))
    for quantity, value in (("loss", loss), ("gradient", norm)):
        if not math.isfinite(value):
            raise RunError(
                f"asked for consistency distillation: {not_finite_reason(quantity, step)}; its last state is kept"
            )
    state.optimizer.step()
    state.ema.step(list(state.student.parameters()))
    state.step = step


def _frame(state: TrainingState) -> pd.DataFrame:
    return pd.DataFrame(state.history, columns=list(CONSISTENCY_COLUMNS)).astype({"step": "int64"})


def distill_consistency(
    setup: DistillSetup,
    student: ModelMixin,
    folder: Path,
    how: Consistency,
    notes: Mapping[str, object],
    *,
    plan: Mapping[str, object] | None = None,
    force: bool = False,
) -> ConsistencyPaths:
    """``student`` after ``setup.settings.steps`` steps of consistency distillation from ``setup.teacher``; its files.

    It trains in float32 and evaluation mode (no dropout), by AdamW as every distillation; what is kept is the moving
    average of its weights, which is also the target. Captions are never dropped: guidance is the teacher's. Run again,
    it goes on from its checkpoint, on a CPU bit for bit as if never stopped. Raises RunError when the folder holds the
    work of other settings, data or weights, or where a loss is not finite; UnsupportedModelError as
    ``check_consistency``. ``plan`` and ``notes`` are written beside its weights.
    """
    settings, paths = setup.settings, ConsistencyPaths(folder)
    trajectory = check_consistency(setup, student, how)
    model: Any = nn.Module.to(student, setup.device, torch.float32)
    fingerprint = _fingerprint(setup, model, how)
    model.eval().requires_grad_(True)
    setup.teacher.eval().to(setup.device)
    state = fresh_state(model, settings)
    if force:
        paths.checkpoint.unlink(missing_ok=True)
    if paths.checkpoint.is_file():
        load_checkpoint(paths.checkpoint, state, fingerprint)
        if state.step > settings.steps:
            raise RunError(
                f"asked for {settings.steps} steps of consistency distillation, found {state.step} taken in {folder}; "
                "ask for at least as many, or --force to start again"
            )
        if state.step:
            note(f"going on from step {state.step} in {folder.name}")
    conditions = known_conditions(model)
    whole = dataclasses.replace(settings, caption_dropout=0.0, min_snr=0.0)
    for step in track(
        range(state.step + 1, settings.steps + 1), "consistency", unit="samples", per=settings.batch
    ):
        start = time.perf_counter()
        batch = draw_batch(
            setup.data,
            setup.scheduler,
            whole,
            step,
            setup.device,
            conditions=conditions,
            among=trajectory.timesteps,
        )
        loss = _losses(setup, state, batch, trajectory, how.guidance)
        try:
            _update(state, settings, loss)
        except RunError:
            save_checkpoint(paths.checkpoint, state, fingerprint)
            raise
        state.seconds += time.perf_counter() - start
        state.history.append((step, loss, learning_rate_at(settings, step), state.seconds))
        if step % settings.checkpoint_every == 0 or step == settings.steps:
            save_checkpoint(paths.checkpoint, state, fingerprint)
            write_frame(paths.losses, _frame(state))
    state.ema.copy_to(state.student.parameters())
    save_model(cast("ModelMixin", state.student), paths.model, plan, dict(notes))
    return paths
