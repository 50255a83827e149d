"""The short distillation of one student: the loop, with checkpoints from which it goes on exactly."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from prune_lab.config import DistillConfig
from prune_lab.distill.checkpoint import TrainingState, check_fingerprint, load_checkpoint, save_checkpoint
from prune_lab.distill.data import LatentData, draw_batch
from prune_lab.distill.features import FeaturePair
from prune_lab.distill.losses import Losses, batch_losses
from prune_lab.distill.recovery import (
    RECOVERY_COLUMNS,
    Recovery,
    checkpoint_path,
    load_fingerprint,
    load_recovery,
    verdict_path,
    write_recovery,
)
from prune_lab.errors import DataError, DeviceError, RunError
from prune_lab.probes import Probe, predict
from prune_lab.runs import CandidatePaths
from prune_lab.runtime import atomic_folder, tensors_digest, track, write_frame

# These say how far to go and how often to look, and change no step.
_FREE_SETTINGS = {"steps", "checkpoint_every", "validate_every", "pictures"}
_VALIDATION = RECOVERY_COLUMNS.index("validation")


def learning_rate(settings: DistillConfig, step: int) -> float:
    """The learning rate of step ``step`` (from 1): linear up to ``settings.warmup``, then constant."""
    return settings.learning_rate * min(1.0, step / max(1, settings.warmup))


def heldout_mean(unet: nn.Module, validation: Probe) -> float:
    """Mean squared error of ``unet``'s predictions against the target of ``validation``, over all its rows."""
    errors = (predict(unet, validation) - validation.target).square()
    return float(errors.double().mean())


def averaged_heldout_mean(state: TrainingState, validation: Probe) -> float:
    """``heldout_mean`` of the averaged weights; the student's own weights return, also when it raises."""
    parameters = list(state.student.parameters())
    state.ema.store(parameters)
    try:
        state.ema.copy_to(parameters)
        return heldout_mean(state.student, validation)
    finally:
        state.ema.restore(parameters)


def take_step(state: TrainingState, losses: Losses, settings: DistillConfig) -> str:
    """Update weights and averages of ``state`` by the gradient of ``losses``; the reason if that is impossible.

    Nothing has changed when the reason (loss or gradient not finite) is not empty.
    """
    parameters = list(state.student.parameters())
    rate = learning_rate(settings, state.step + 1)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    total = losses.total(settings)
    state.optimizer.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(parameters, settings.clip_norm or math.inf)
    for what, value in (("loss", total.detach()), ("gradient", norm)):
        if not math.isfinite(float(value)):
            state.optimizer.zero_grad(set_to_none=True)
            return f"the {what} was no longer finite at step {state.step + 1}; try a smaller distill.learning_rate"
    state.optimizer.step()
    state.ema.step(parameters)
    state.step += 1
    return ""


def _recovery(state: TrainingState, paths: CandidatePaths, reason: str = "") -> Recovery:
    return Recovery(
        plan_id=paths.folder.name,
        steps=state.step,
        before=state.history[0][_VALIDATION],
        after=math.nan if reason else state.history[-1][_VALIDATION],
        seconds=state.seconds,
        status="failed" if reason else "done",
        reason=reason,
        rows=tuple(state.history),
    )


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """What stays the same over all steps of one distillation."""

    teacher: nn.Module
    pairs: Sequence[FeaturePair]
    data: LatentData
    scheduler: Any
    settings: DistillConfig
    validation: Probe
    device: torch.device | str
    paths: CandidatePaths
    fingerprint: Mapping[str, Any]

    def save(self, state: TrainingState) -> None:
        save_checkpoint(checkpoint_path(self.paths), state, self.fingerprint)


def _train(task: _Task, state: TrainingState) -> str:
    """Take the steps that are left; the reason why it had to stop, empty when all are done."""
    settings = task.settings
    start = time.perf_counter() - state.seconds
    steps = range(state.step + 1, settings.steps + 1)
    for step in track(steps, f"distil {task.paths.folder.name}", len(steps)):
        batch = draw_batch(task.data, task.scheduler, settings, step, task.device)
        losses = batch_losses(task.teacher, state.student, task.pairs, batch)
        reason = take_step(state, losses, settings)
        if reason:
            task.save(state)  # the last good state
            return reason
        last = step == settings.steps
        due = last or step % settings.validate_every == 0
        held_out = averaged_heldout_mean(state, task.validation) if due else math.nan
        state.seconds = time.perf_counter() - start
        parts = (losses.task, losses.output, losses.feature, losses.total(settings))
        values = [float(part.detach()) for part in parts]
        state.history.append((step, *values, held_out, learning_rate(settings, step), state.seconds))
        if due and not math.isfinite(held_out):
            return (
                f"the held-out loss was no longer finite at step {step}; try a smaller distill.learning_rate"
            )
        if due:
            write_frame(task.paths.recovery, _recovery(state, task.paths).frame())
        if step % settings.checkpoint_every == 0 and not last:
            task.save(state)
    if math.isnan(state.history[-1][_VALIDATION]):  # resumed at its last step, which was not validated then
        row = list(state.history[-1])
        row[_VALIDATION] = averaged_heldout_mean(state, task.validation)
        state.history[-1] = tuple(row)
    return ""


def _check_fit(student: Any, data: LatentData) -> None:
    channels, width = student.config.in_channels, student.config.cross_attention_dim
    found = (data.latents.shape[1], data.embeddings.shape[-1])
    widths = set(width) if isinstance(width, (list, tuple)) else {width}
    if found[0] != channels or widths != {found[1]}:
        raise DataError(
            f"the U-Net takes latents of {channels} channels and text of width {width}, the cached data have "
            f"{found[0]} and {found[1]}; encode the pictures with the pipeline of this U-Net"
        )


def _fingerprint(
    student: nn.Module,
    pairs: Sequence[FeaturePair],
    data: LatentData,
    scheduler: Any,
    settings: DistillConfig,
    validation: Probe,
) -> dict[str, Any]:
    """What a resumed distillation must share with the one it goes on with."""
    kept = {name: value for name, value in dataclasses.asdict(settings).items() if name not in _FREE_SETTINGS}
    return kept | {
        "student": tensors_digest(dict(student.named_parameters())),
        "pairs": " ".join(f"{pair.teacher_path}={pair.student_path}" for pair in pairs),
        "data": data.digest,
        "validation": validation.digest,
        "prediction": scheduler.config.prediction_type,
    }


def _check_reach(found: int, asked: int, paths: CandidatePaths) -> None:
    if found > asked:
        raise RunError(
            f"asked to distil for {asked} steps, found {found} steps taken in {paths.folder}; "
            "ask for at least as many, or --force to start again"
        )


def _finished(paths: CandidatePaths, fingerprint: Mapping[str, Any], steps: int) -> Recovery | None:
    """The recovery in ``paths`` when it is what is asked for: finished at as many steps, or failed on the way."""
    recovery = load_recovery(paths.folder)
    if recovery is None:
        return None
    check_fingerprint(load_fingerprint(paths), fingerprint, verdict_path(paths))
    complete = recovery.status == "done" and recovery.steps == steps and paths.distilled_unet.is_dir()
    if complete or (recovery.status == "failed" and recovery.steps <= steps):
        return recovery
    _check_reach(recovery.steps, steps, paths)
    return None


def _start(task: _Task, student: nn.Module) -> TrainingState:
    """The state before the first step, or the one in the checkpoint."""
    settings = task.settings
    optimizer = torch.optim.AdamW(
        student.parameters(),
        lr=settings.learning_rate,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=settings.weight_decay,
        fused=True,  # one pass over the weights instead of ten
    )
    ema = EMAModel(student.parameters(), decay=settings.ema_decay)
    state = TrainingState(student, optimizer, ema, step=0, seconds=0.0, history=[])
    checkpoint = checkpoint_path(task.paths)
    if checkpoint.is_file():
        load_checkpoint(checkpoint, state, task.fingerprint)
        _check_reach(state.step, settings.steps, task.paths)
    else:
        unknown = (math.nan,) * 4
        state.history.append((0, *unknown, heldout_mean(student, task.validation), 0.0, 0.0))
    return state


def distill(
    teacher: nn.Module,
    student: nn.Module,
    pairs: Sequence[FeaturePair],
    data: LatentData,
    scheduler: Any,
    settings: DistillConfig,
    *,
    folder: Path,
    validation: Probe,
    device: torch.device | str = "cpu",
    force: bool = False,
    keep_checkpoint: bool = False,
) -> Recovery:
    """What ``settings.steps`` steps of BK-SDM's distillation (arXiv:2305.15798) make of ``student``.

    Minimises task + output + feature loss with AdamW (betas 0.9 and 0.999), gradient clipping, a constant learning rate
    after a linear warm-up, and averaged weights. ``folder`` is the candidate's: it gets recovery.csv,
    distilled/recovery.json, distilled/unet (averaged weights, plain diffusers) and, while training,
    distilled/checkpoint.safetensors; run again, it goes on from there, on a CPU bit for bit as if never stopped. The
    checkpoint is removed at the end unless ``keep_checkpoint``; with it, more ``steps`` go on from the last.

    A loss or gradient that is not finite ends it with status "failed" and the step in ``reason``; the last good state
    stays in the checkpoint and no distilled/unet is written. What has ended already is read back and not trained again.
    ``student`` is trained in place, in float32 on ``device``, and left
    in eval mode with the averaged weights; ``teacher`` is left as it was found.

    Raises RunError when ``folder`` holds the work of other settings, data or weights, or of more steps, without
    ``force``; DataError when data and model do not fit, DeviceError for a teacher in float16, StorageError when writing
    fails.
    """
    paths = CandidatePaths(Path(folder))
    origin, dtype = next((parameter.device, parameter.dtype) for parameter in teacher.parameters())
    if dtype == torch.float16:
        raise DeviceError(
            "asked to distil from a teacher in float16, where gradients underflow; load it in bfloat16"
        )
    _check_fit(student, data)
    fingerprint = _fingerprint(student, pairs, data, scheduler, settings, validation)
    if force:
        verdict_path(paths).unlink(missing_ok=True)
        checkpoint_path(paths).unlink(missing_ok=True)
    finished = _finished(paths, fingerprint, settings.steps)
    if finished is not None:
        return finished

    task = _Task(teacher, pairs, data, scheduler, settings, validation, device, paths, fingerprint)
    training = [module for module in teacher.modules() if module.training]
    try:
        teacher.eval().to(device)
        student.train().to(device, torch.float32)  # steps this small are lost in shorter formats
        state = _start(task, student)
        reason = _train(task, state)
    finally:
        student.eval()
        teacher.to(origin)
        for module in training:
            module.training = True

    if not reason:
        if keep_checkpoint:
            task.save(state)
        state.ema.copy_to(student.parameters())
        with atomic_folder(paths.distilled_unet, force=True) as temporary:
            cast("Any", student).save_pretrained(temporary, safe_serialization=True)
    recovery = _recovery(state, paths, reason)
    write_recovery(paths, recovery, fingerprint)
    if not reason and not keep_checkpoint:
        checkpoint_path(paths).unlink(missing_ok=True)
    return recovery
