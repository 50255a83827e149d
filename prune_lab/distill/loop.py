"""The distillation of one student or of many at once, with checkpoints from which each goes on exactly."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from prune_lab.config import DistillConfig
from prune_lab.distill.batches import draw_batch
from prune_lab.distill.features import FeaturePair
from prune_lab.distill.joint import Student, compiled_blocks, joint_step, learning_rate_at
from prune_lab.distill.memory import training_memory
from prune_lab.distill.recovery import Recovery, verdict_path
from prune_lab.distill.setup import (
    VALIDATION,
    DistillSetup,
    StudentRun,
    averaged_weights,
    check_data_fits,
    check_same_files,
    fingerprint_of,
    finished_recovery,
)
from prune_lab.distill.tracking import Log, log_to_trackers
from prune_lab.errors import ConfigError
from prune_lab.probes import Probe
from prune_lab.processes import init_processes
from prune_lab.runs import CandidatePaths
from prune_lab.runtime import note, track

if TYPE_CHECKING:
    from prune_lab.distill.data import TrainingData


# Steps -------------------------------------------------------------------------------------------------------------


def _record(setup: DistillSetup, run: StudentRun, log: Log, step: int, until: int) -> None:
    """After a step: measure the held-out loss, draw a grid, write tables and a checkpoint, each where it is due."""
    student_state, settings, start = run.student_state, setup.settings, time.perf_counter()
    state, last = student_state.state, step == until
    validated = last or step % settings.validate_every == 0
    if validated:
        log({f"{run.paths.folder.name}/heldout": run.validate(setup.validation, settings.diverged)}, step)
    if settings.grid_every and setup.draw and run.main and (last or step % settings.grid_every == 0):
        with averaged_weights(state) as unet:
            setup.draw(unet, run.paths.grids / f"step-{step:06d}.png")
    state.seconds += time.perf_counter() - start
    if student_state.failure:
        run.save()
        return
    if validated:
        run.write_tables()
    if step % settings.checkpoint_every == 0 and not last:
        run.save()


def _train(
    setup: DistillSetup,
    runs: Sequence[StudentRun],
    until: int,
    micro: int,
    accelerator: Accelerator,
    log: Log,
) -> None:
    """Take the steps that are left; students that have come to the same step take the next one together."""
    settings, names = setup.settings, [run.paths.folder.name for run in runs]
    precision = setup.precision(accelerator)
    share = settings.batch // accelerator.num_processes
    own = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    first = min(run.student_state.state.step for run in runs) + 1
    title = names[0] if len(names) == 1 else f"{len(names)} students"
    samples = settings.batch * len(names)
    for step in track(range(first, until + 1), f"distil {title}", unit="samples", per=samples):
        active = [
            run for run in runs if not run.student_state.failure and run.student_state.state.step == step - 1
        ]
        if not active:
            continue
        start = time.perf_counter()
        batch = draw_batch(setup.data, setup.scheduler, settings, step, setup.device, part=own)
        values, micro = joint_step(
            setup.teacher,
            [run.student_state for run in active],
            batch,
            settings,
            precision=precision,
            micro=micro,
            accelerator=accelerator,
        )
        took = (time.perf_counter() - start) / len(active)
        for run, losses in zip(active, values, strict=True):
            student_state, name = run.student_state, run.paths.folder.name
            if student_state.failure:
                run.save()  # the state before the failure
                continue
            student_state.state.seconds += took
            rate = learning_rate_at(settings, step)
            student_state.state.history.append((step, *losses, math.nan, rate, student_state.state.seconds))
            parts = zip(("task", "output", "feature", "total"), losses, strict=True)
            log({f"{name}/{part}": loss for part, loss in parts}, step)
            _record(setup, run, log, step, until)
    for run in runs:
        if not run.student_state.failure and math.isnan(run.student_state.state.history[-1][VALIDATION]):
            _record(setup, run, log, until, until)  # resumed at its last step, which had not been validated


# Students ----------------------------------------------------------------------------------------------------------


def _parallel(student: nn.Module, device: torch.device) -> nn.Module:
    """``student`` for the forward passes of one of several processes; its gradients become the mean of all.

    Not accelerate's own wrapping, which for good puts the student itself under autocast, also where it is judged.
    """
    return nn.parallel.DistributedDataParallel(
        student,
        device_ids=None if device.type == "cpu" else [device],
        gradient_as_bucket_view=True,  # else gradients take memory twice
    )


def _distil_group(
    setup: DistillSetup,
    runs: Sequence[StudentRun],
    until: int,
    micro: int,
    accelerator: Accelerator,
    *,
    keep_checkpoint: bool,
) -> list[Recovery]:
    """Distil the students of ``runs``, which fit into memory together, and write their results."""
    settings = setup.settings
    with contextlib.ExitStack() as stack:
        if settings.compile:
            taps = [pair.teacher_path for run in runs for pair in run.student_state.student.pairs]
            stack.enter_context(compiled_blocks(setup.teacher, taps))
        for run in runs:
            student_state = run.student_state
            if settings.compile:
                own = [pair.student_path for pair in student_state.student.pairs]
                stack.enter_context(compiled_blocks(student_state.state.student, own))
            run.resume(setup.validation, until)
            if accelerator.num_processes > 1:
                student_state.forward = _parallel(student_state.state.student, accelerator.device)
        logs = setup.logs or runs[0].paths.distilled
        log = stack.enter_context(log_to_trackers(settings.trackers, logs, dataclasses.asdict(settings)))
        _train(setup, runs, until, micro, accelerator, log)
    accelerator.free_memory()
    return [run.end(keep_checkpoint=keep_checkpoint) for run in runs]


def _group_sizes(setup: DistillSetup, unet: nn.Module, students: int, share: int) -> tuple[int, int]:
    """(students at once, samples at a time): those of the settings, or as many as fit into memory; shows the estimate.

    The same in all processes: the one with the least memory decides.
    """
    settings = setup.settings
    wanted = (settings.together or students, settings.micro_batch or share)
    memory = training_memory(
        setup.teacher,
        unet,
        tokens=setup.validation.embeddings.shape[1],
        device=torch.device(setup.device),
        checkpointing=settings.gradient_checkpointing,
    )
    if torch.device(setup.device).type == "cpu":  # which the processes of one machine share
        memory = dataclasses.replace(memory, free=memory.free // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    together, micro = map(min, zip(*gather_object([memory.fit(*wanted)]), strict=True))
    sizes = settings.together or together, settings.micro_batch or micro
    note(memory.describe(min(sizes[0], students), sizes[1]))
    return sizes


def distill_together(
    setup: DistillSetup,
    students: Sequence[Student],
    *,
    until: int | None = None,
    force: bool = False,
    keep_checkpoint: bool = False,
) -> tuple[Recovery, ...]:
    """The recovery of each of ``students``, in order, after ``until`` steps (None: ``settings.steps``) of distillation.

    Minimises BK-SDM's task + output + feature loss (arXiv:2305.15798) with AdamW (betas 0.9 and 0.999), gradient
    clipping, a linear warm-up and averaged weights. All students train on one pass of the teacher per batch, so that
    data, noise and timesteps are the same for all; where memory does not hold all of them, they are trained group by
    group. On a CPU every student comes out bit for bit as if it were trained alone. The folder of each gets
    recovery.csv, heldout.csv, distilled/recovery.json, distilled/unet (averaged weights, plain diffusers) and, while
    training, distilled/checkpoint.safetensors; run again, it goes on from there, on a CPU bit for bit as if never
    stopped. The checkpoint is removed at the end unless ``keep_checkpoint``; with it, more steps go on from the last.

    A loss or gradient that is not finite, or a held-out loss ``settings.diverged`` times that before training, ends a
    student with status "failed" and the step in ``reason``; the last good state stays in its checkpoint, no
    distilled/unet is written, and the others go on. Students that have ended already are read back and not trained
    again. Students are trained in float32 on ``setup.device`` and left in eval mode with the averaged weights; the
    teacher is left as it was found. Under ``accelerate launch`` every process takes its share of each batch and of the
    held-out rows, and the main one writes; ``end_processes`` ends that when nothing more is to be distilled.

    Raises RunError when a folder holds the work of other settings, data or weights, or of more steps, without
    ``force``; DataError when data and model do not fit, DeviceError for float16, for a launch
    that shards weights or where memory does not hold one sample, ConfigError when processes cannot share the batch
    evenly, StorageError when writing fails.
    """
    settings, teacher = setup.settings, setup.teacher
    until = settings.steps if until is None else until
    accelerator = init_processes()
    world = accelerator.num_processes
    if settings.batch % world:
        raise ConfigError(
            f"setting distill.batch = {settings.batch} cannot be shared by {world} processes; "
            f"give a multiple of {world}"
        )
    if world > 1:
        setup = dataclasses.replace(setup, device=accelerator.device)
    setup.precision(accelerator)
    origin = next(teacher.parameters()).device
    training = [module for module in teacher.modules() if module.training]
    recoveries: dict[int, Recovery] = {}
    waiting: dict[int, StudentRun] = {}
    sizes = None
    try:
        teacher.eval().to(setup.device)
        for place, student in enumerate(students):
            paths, unet = CandidatePaths(Path(student.folder)), student.load()
            check_data_fits(unet, setup.data)
            fingerprint = fingerprint_of(setup, unet, student.pairs)
            if force and accelerator.is_main_process:
                verdict_path(paths).unlink(missing_ok=True)
                paths.checkpoint.unlink(missing_ok=True)
            accelerator.wait_for_everyone()
            known = finished_recovery(paths, fingerprint, until)
            check_same_files(paths, known)
            if known is not None:
                recoveries[place] = known
            else:
                sizes = sizes or _group_sizes(setup, unet, len(students) - place, settings.batch // world)
                waiting[place] = StudentRun.of(setup, student, unet, fingerprint, accelerator)
            if waiting and sizes and (len(waiting) == sizes[0] or place == len(students) - 1):
                runs = list(waiting.values())
                found = _distil_group(
                    setup, runs, until, sizes[1], accelerator, keep_checkpoint=keep_checkpoint
                )
                recoveries |= dict(zip(waiting, found, strict=True))
                waiting.clear()
    finally:
        teacher.to(origin)
        for module in training:
            module.training = True
    accelerator.wait_for_everyone()
    return tuple(recoveries[place] for place in range(len(students)))


def distill(
    teacher: nn.Module,
    student: nn.Module,
    pairs: Sequence[FeaturePair],
    data: TrainingData,
    scheduler: Any,
    settings: DistillConfig,
    *,
    folder: Path,
    validation: Probe,
    device: torch.device | str = "cpu",
    force: bool = False,
    keep_checkpoint: bool = False,
) -> Recovery:
    """The recovery of one ``student`` after ``settings.steps`` steps; see ``distill_together``.

    ``student`` is trained in place and left in eval mode with the averaged weights.
    """
    setup = DistillSetup(teacher, data, scheduler, settings, validation, device)
    one = Student(lambda: student, tuple(pairs), Path(folder))
    (recovery,) = distill_together(setup, [one], force=force, keep_checkpoint=keep_checkpoint)
    return recovery
