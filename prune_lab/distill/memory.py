"""The memory that distilling needs, estimated before it starts: students at once and samples at a time."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from prune_lab.families import example_inputs, meta_model, plain_config, runs_on_meta
from prune_lab.profiling import LiveBytes
from prune_lab.runtime import bytes_text, free_bytes

# Per parameter of a student: weight, gradient, two moments of AdamW and the average, all float32.
STATE_BYTES = 4 * (1 + 1 + 2 + 1)
# Of the free memory; the rest is for workspaces and an allocator's rounding, which are not counted.
_SHARE = 0.85


class _FusedAttention(torch.autograd.Function):
    """The tensors that a fused kernel keeps: query, key, value and result, and no matrix of attention weights."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        found = torch.empty_like(query)  # (B, heads, N, width), laid out as the query is
        ctx.save_for_backward(query, key, value, found)
        return found

    @staticmethod
    def backward(ctx: Any, _gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _fused(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    return _FusedAttention.apply(query, key, value)  # type: ignore[no-untyped-call]


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def pass_bytes(
    config: Mapping[str, Any],
    *,
    tokens: int,
    training: bool,
    checkpointing: bool = False,
    latent: int | None = None,
) -> int:
    """Bytes of activations of one float32 sample that are alive at the peak of a pass of ``config``'s model.

    ``latent`` is the side of the latents, None: the one that the model is meant for. With ``training`` of forward and
    backward, without the gradients of the weights; counted on ``meta``, so without weights and without computing.
    Misleads when: the pass runs under autocast, which needs as little as half of it.
    """
    settings = json.dumps(plain_config(config), sort_keys=True)
    return _peak_bytes(settings, tokens, training, checkpointing, latent)


@functools.lru_cache(maxsize=64)
def _peak_bytes(
    settings: str, tokens: int, training: bool, checkpointing: bool, latent: int | None = None
) -> int:
    model: Any = meta_model(json.loads(settings))
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.train(training).requires_grad_(training)
    if training:
        # Gradients of the weights are counted elsewhere; kept, they would hide the end of the forward pass.
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_forget_gradient)
    inputs = example_inputs(
        plain_config(model), tokens=tokens, latent=latent, frames=1, device="meta", dtype=torch.float32
    )
    # Patched, not by a mode of torch: a backward pass that computes forward again does not see modes.
    with (
        runs_on_meta(),
        mock.patch.object(F, "scaled_dot_product_attention", _fused),
        LiveBytes(model) as watch,
        torch.set_grad_enabled(training),
    ):
        prediction = model(**inputs, return_dict=False)[0]
        if training:
            prediction.square().mean().backward()
    return int(watch.peak)


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes that a joint distillation needs on its device, part by part, and what is free there."""

    teacher: int  # weights
    student: int  # weights, gradients, moments and averages of the largest student
    teacher_sample: int  # activations of one sample
    student_sample: int  # the same with the tensors that the backward pass reads
    free: int

    def needed(self, students: int, samples: int) -> int:
        """Bytes for ``students`` trained together, ``samples`` of one at a time."""
        passes = max(self.teacher_sample, self.student_sample) * samples
        return self.teacher + students * self.student + passes

    def fit(self, students: int, samples: int) -> tuple[int, int]:
        """(students at once, samples at a time) that fit: samples are halved first, then students take turns.

        One student with one sample is the least, whether it fits or not.
        """
        room = self.free * _SHARE
        while students > 1 and self.needed(students, 1) > room:
            students -= 1
        while samples > 1 and self.needed(students, samples) > room:
            samples = -(-samples // 2)
        return students, samples

    def describe(self, together: int, micro: int) -> str:
        """One line for the user: the memory needed, part by part, and the memory free."""
        parts = (
            f"teacher {bytes_text(self.teacher)}",
            f"{together} x {bytes_text(self.student)} for students, their gradients and moments",
            f"{micro} x {bytes_text(max(self.teacher_sample, self.student_sample))} for activations",
        )
        needed, free = bytes_text(self.needed(together, micro)), bytes_text(self.free)
        return f"memory: {needed} expected ({', '.join(parts)}), {free} free"


def training_memory(
    teacher: Any,
    student: Any,
    *,
    tokens: int,
    device: torch.device,
    checkpointing: bool = False,
    latent: int | None = None,
) -> TrainingMemory:
    """The bytes that distilling students as large as ``student`` from ``teacher`` needs on ``device``.

    ``latent`` is the side of the latents, None: the one that the model is meant for. Activations are those of passes in
    float32. Free memory is counted as if neither model were loaded.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in teacher.parameters())
    there = next(teacher.parameters()).device
    return TrainingMemory(
        teacher=weights,
        student=sum(parameter.numel() for parameter in student.parameters()) * STATE_BYTES,
        teacher_sample=pass_bytes(plain_config(teacher), tokens=tokens, training=False, latent=latent),
        student_sample=pass_bytes(
            plain_config(student), tokens=tokens, training=True, checkpointing=checkpointing, latent=latent
        ),
        free=free_bytes(device) + (weights if there == device else 0),
    )
