"""One step of many students on one pass of their teacher: the same data, noise and timesteps for all."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from prune_lab.config import DistillConfig
from prune_lab.distill.batches import Batch
from prune_lab.distill.losses import student_losses, teacher_output
from prune_lab.distill.setup import DistillSetup, StudentRun, not_finite_reason
from prune_lab.errors import DeviceError
from prune_lab.families import family_of
from prune_lab.runtime import generator_for, note

_GRAPHS = 128  # that torch may compile of one class of block: each width is one


def learning_rate_at(settings: DistillConfig, step: int) -> float:
    """The learning rate of step ``step`` (from 1): linear up to ``settings.warmup``, then by ``settings.schedule``.

    constant stays; linear and cosine fall to zero at ``settings.steps``.
    """
    if step <= settings.warmup:
        return settings.learning_rate * step / settings.warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    falling = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return settings.learning_rate * max(0.0, falling[settings.schedule])


@contextlib.contextmanager
def compiled_blocks(model: nn.Module, paths: Sequence[str], *, backend: str = "inductor") -> Iterator[None]:
    """A context in which the modules that repeat in ``model`` run through torch.compile.

    Hooks read the modules at ``paths``: a block with one of them inside is not compiled, since a hook in a compiled
    graph is not called.
    """
    kinds = family_of(model).compiled
    chosen = [
        module
        for name, module in model.named_modules()
        if type(module).__name__ in kinds and not any(path.startswith(f"{name}.") for path in paths)
    ]
    with torch._dynamo.config.patch(recompile_limit=_GRAPHS):
        try:
            for module in chosen:
                module.forward = torch.compile(module.forward, dynamic=False, backend=backend)
            yield
        finally:
            for module in chosen:
                module.__dict__.pop("forward", None)


def _without_sync(forward: Callable[..., Any]) -> contextlib.AbstractContextManager[Any]:
    """A context in which processes keep the gradients of ``forward`` to themselves; they share them once a step."""
    if isinstance(forward, nn.parallel.DistributedDataParallel):
        return forward.no_sync()
    return contextlib.nullcontext()


def _drops(module: nn.Module) -> bool:
    """Whether ``module`` leaves something out at random while it is trained: parts of its input, or classes."""
    return (isinstance(module, nn.Dropout) and module.p > 0) or getattr(module, "dropout_prob", 0) > 0


@contextlib.contextmanager
def _drawn_by_step(run: StudentRun, settings: DistillConfig, first: int) -> Iterator[None]:
    """A context in which what the student leaves out at random follows from the seed, the step and the place in the
    batch alone: it goes on exactly after a stop, and is the same whoever trains beside it.
    """
    if not any(map(_drops, run.state.student.modules())):
        yield
        return
    device = next(run.state.student.parameters()).device
    place = PartialState().process_index * settings.batch + first
    drawn = generator_for(settings.seed, f"dropout {run.state.step + 1}", place)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(drawn.initial_seed())
        yield


def _forward_backward(setup: DistillSetup, runs: Sequence[StudentRun], batch: Batch, micro: int) -> Tensor:
    """Losses of every student, (students, 3) float32: task, output, feature; leaves gradients in the students."""
    settings, precision, count = setup.settings, setup.precision(), len(batch.timesteps)
    wanted = [pair.teacher_path for run in runs for pair in run.pairs]
    sums = torch.zeros(len(runs), 3, device=batch.noisy.device)
    for run in runs:
        run.state.optimizer.zero_grad()
    for first in range(0, count, micro):
        chunk = batch.rows(slice(first, first + micro))
        share = len(chunk.timesteps) / count
        output = teacher_output(setup.teacher, wanted, chunk, precision)
        for place, run in enumerate(runs):
            last = first + micro >= count
            with (
                contextlib.nullcontext() if last else _without_sync(run.forward),
                _drawn_by_step(run, settings, first),
            ):
                losses = student_losses(
                    run.state.student,
                    output,
                    run.pairs,
                    chunk,
                    variant=settings.loss_variant,
                    precision=precision,
                    forward=run.forward,
                )
                (share * losses.total(settings)).backward()  # type: ignore[no-untyped-call]
            parts = torch.stack([losses.task.detach(), losses.output.detach(), losses.feature.detach()])
            sums[place] += share * parts
    return sums


def joint_step(
    setup: DistillSetup, runs: Sequence[StudentRun], batch: Batch, micro: int
) -> tuple[list[tuple[float, ...]], int]:
    """(task, output, feature and total loss of every student before the step; samples at a time that fitted).

    One forward pass of the teacher serves all. Where memory does not suffice for ``micro`` samples at a time, the step
    is taken again with half as many; the sum over the batch stays what it was. A student whose loss or gradient is not
    finite gets a ``failure`` and is left as it was before the step.

    Raises DeviceError when one sample does not fit, or when memory ends in one of several processes.
    """
    settings = setup.settings
    while True:
        try:
            sums = _forward_backward(setup, runs, batch, micro)
            break
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            reason = str(error).splitlines()[0]
        # after the except clause, whose traceback keeps the activations alive
        for run in runs:
            run.state.optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if micro == 1 or PartialState().num_processes > 1:
            raise DeviceError(
                f"asked to distil {len(runs)} students, {micro} samples at a time: no memory ({reason}); "
                "set distill.together or distill.micro_batch lower, or distill.gradient_checkpointing"
            )
        micro = -(-micro // 2)
        note(
            f"out of memory: going on with {micro} samples at a time, {len(batch.timesteps)} a step as before"
        )
    sums = reduce(sums, reduction="mean")  # over the processes
    norms = []
    for run in runs:
        (group,) = run.state.optimizer.param_groups
        group["lr"] = learning_rate_at(settings, run.state.step + 1)
        norms.append(nn.utils.clip_grad_norm_(group["params"], settings.clip_norm or math.inf).detach())
    weights = (settings.task_weight, settings.output_weight, settings.feature_weight)
    # Read in one go: one wait for the device, not one per student.
    rows = torch.cat([sums, torch.stack(norms)[:, None]], dim=1).tolist()
    values = []
    for run, (*parts, norm) in zip(runs, rows, strict=True):
        total = sum(weight * loss for weight, loss in zip(weights, parts, strict=True))
        _update(run, total, norm)
        values.append((*parts, total))
    return values, micro


def _update(run: StudentRun, total: float, norm: float) -> None:
    state = run.state
    for quantity, value in (("loss", total), ("gradient", norm)):
        if not math.isfinite(value):
            state.optimizer.zero_grad()
            run.failure = not_finite_reason(quantity, state.step + 1)
            return
    state.optimizer.step()
    state.ema.step(list(state.student.parameters()))
    state.step += 1
