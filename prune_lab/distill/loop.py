"""The distillation of one student or of many at once, with checkpoints from which each goes on exactly."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Sequence

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, release_memory
from torch import nn

from prune_lab.distill.batches import draw_batch
from prune_lab.distill.conditioning import check_captions_fit, recondition
from prune_lab.distill.joint import compiled_blocks, joint_step, learning_rate_at
from prune_lab.distill.memory import training_memory
from prune_lab.distill.recovery import Recovery, verdict_path
from prune_lab.distill.setup import (
    VALIDATION,
    DistillSetup,
    Student,
    StudentRun,
    averaged_weights,
    check_data_fits,
    check_same_files,
    fingerprint_of,
    finished_recovery,
)
from prune_lab.distill.tracking import Log, log_to_trackers
from prune_lab.errors import ConfigError
from prune_lab.families import known_conditions
from prune_lab.processes import init_processes
from prune_lab.runs import CandidatePaths
from prune_lab.runtime import note, track

# Steps -------------------------------------------------------------------------------------------------------------


def _record(setup: DistillSetup, run: StudentRun, log: Log, step: int, until: int) -> None:
    """After a step: measure the held-out loss, draw a grid, write tables and a checkpoint, each where it is due."""
    settings, start, last = setup.settings, time.perf_counter(), step == until
    main = PartialState().is_main_process
    validated = last or step % settings.validate_every == 0
    if validated:
        log({f"{run.name}/heldout": run.validate(setup.validation, settings.diverged)}, step)
    if settings.grid_every and setup.draw and main and (last or step % settings.grid_every == 0):
        with averaged_weights(run.state) as model:
            setup.draw(model, run.paths.grids / f"step-{step:06d}.png")
    run.state.seconds += time.perf_counter() - start
    if validated and not run.failure:
        run.write_tables()
    if run.failure or (step % settings.checkpoint_every == 0 and not last):
        run.save()


def _train(setup: DistillSetup, runs: Sequence[StudentRun], until: int, micro: int, log: Log) -> None:
    """Take the steps that are left; students that have come to the same step take the next one together."""
    settings, processes = setup.settings, PartialState()
    share = settings.batch // processes.num_processes
    own = slice(processes.process_index * share, (processes.process_index + 1) * share)
    first = min(run.state.step for run in runs) + 1
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} students"
    samples = settings.batch * len(runs)
    conditions = known_conditions(setup.teacher)
    for step in track(range(first, until + 1), f"distil {title}", unit="samples", per=samples):
        active = [run for run in runs if not run.failure and run.state.step == step - 1]
        if not active:
            continue
        start = time.perf_counter()
        batch = draw_batch(
            setup.data, setup.scheduler, settings, step, setup.device, part=own, conditions=conditions
        )
        if setup.others is not None:
            batch = recondition(batch, setup.others, setup.data, setup.scheduler, settings, step, part=own)
        values, micro = joint_step(setup, active, batch, micro)
        took = (time.perf_counter() - start) / len(active)
        for run, losses in zip(active, values, strict=True):
            if run.failure:
                run.save()  # the state before the failure
                continue
            run.state.seconds += took
            rate = learning_rate_at(settings, step)
            run.state.history.append((step, *losses, math.nan, rate, run.state.seconds))
            parts = zip(("task", "output", "feature", "total"), losses, strict=True)
            log({f"{run.name}/{part}": loss for part, loss in parts}, step)
            _record(setup, run, log, step, until)
    for run in runs:
        if not run.failure and math.isnan(run.state.history[-1][VALIDATION]):
            _record(setup, run, log, until, until)  # resumed at its last step, which had not been validated


# Students ----------------------------------------------------------------------------------------------------------


def _distil_group(
    setup: DistillSetup, runs: Sequence[StudentRun], until: int, micro: int, *, keep_checkpoint: bool
) -> list[Recovery]:
    """Distil the students of ``runs``, which fit into memory together, and write their results."""
    settings, processes = setup.settings, PartialState()
    with contextlib.ExitStack() as stack:
        if settings.compile:
            taps = [pair.teacher_path for run in runs for pair in run.pairs]
            stack.enter_context(compiled_blocks(setup.teacher, taps))
        for run in runs:
            if settings.compile:
                own = [pair.student_path for pair in run.pairs]
                stack.enter_context(compiled_blocks(run.state.student, own))
            run.resume(setup.validation, until)
            if processes.num_processes > 1:
                # The gradients become the mean of all processes. Not by accelerate's own wrapping, which for good puts
                # the student itself under autocast, also where it is judged.
                run.forward = nn.parallel.DistributedDataParallel(
                    run.state.student,
                    device_ids=None if processes.device.type == "cpu" else [processes.device],
                    gradient_as_bucket_view=True,  # else gradients take memory twice
                )
        logs = setup.logs or runs[0].paths.distilled
        log = stack.enter_context(log_to_trackers(settings.trackers, logs, dataclasses.asdict(settings)))
        _train(setup, runs, until, micro, log)
    release_memory()
    return [run.end(keep_checkpoint=keep_checkpoint) for run in runs]


def _group_sizes(setup: DistillSetup, model: nn.Module, students: int, share: int) -> tuple[int, int]:
    """(students at once, samples at a time): those of the settings, or as many as fit into memory; shows the estimate.

    The same in all processes: the one with the least memory decides.
    """
    settings, device = setup.settings, torch.device(setup.device)
    wanted = (settings.together or students, settings.micro_batch or share)
    height, width = setup.validation.noisy.shape[-2:]
    memory = training_memory(
        setup.teacher,
        model,
        tokens=setup.validation.embeddings.shape[1],
        device=device,
        checkpointing=settings.gradient_checkpointing,
        latent=height if height == width else None,
    )
    if device.type == "cpu":  # which the processes of one machine share
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
    recovery.csv, heldout.csv, distilled/recovery.json, distilled/model (averaged weights, plain diffusers) and, while
    training, distilled/checkpoint.safetensors; run again, it goes on from there, on a CPU bit for bit as if never
    stopped. The checkpoint is removed at the end unless ``keep_checkpoint``; with it, more steps go on from the last.

    A loss or gradient that is not finite, or a held-out loss ``settings.diverged`` times that before training, ends a
    student with status "failed" and the step in ``reason``; the last good state stays in its checkpoint, no
    distilled/model is written, and the others go on. Students that have ended already are read back and not trained
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
    setup.precision()  # raises for float16
    if setup.others is not None:
        check_captions_fit(setup.others, setup.data)
    origin = next(teacher.parameters()).device
    training = [module for module in teacher.modules() if module.training]
    recoveries: dict[int, Recovery] = {}
    waiting: dict[int, StudentRun] = {}
    sizes = None
    try:
        teacher.eval().to(setup.device)
        for place, student in enumerate(students):
            paths, model = CandidatePaths(student.folder), student.load()
            check_data_fits(model, setup.data)
            fingerprint = fingerprint_of(setup, student, model)
            if force and accelerator.is_main_process:
                verdict_path(paths).unlink(missing_ok=True)
                paths.checkpoint.unlink(missing_ok=True)
            accelerator.wait_for_everyone()
            known = finished_recovery(paths, fingerprint, until)
            check_same_files(paths, known)
            if known is not None:
                recoveries[place] = known
            else:
                sizes = sizes or _group_sizes(setup, model, len(students) - place, settings.batch // world)
                waiting[place] = StudentRun.of(setup, student, model, fingerprint)
            if waiting and sizes and (len(waiting) == sizes[0] or place == len(students) - 1):
                runs = list(waiting.values())
                found = _distil_group(setup, runs, until, sizes[1], keep_checkpoint=keep_checkpoint)
                recoveries |= dict(zip(waiting, found, strict=True))
                waiting.clear()
    finally:
        teacher.to(origin)
        for module in training:
            module.training = True
    accelerator.wait_for_everyone()
    return tuple(recoveries[place] for place in range(len(students)))
