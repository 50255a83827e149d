"""Which features of teacher and student belong together, and how they are read off without changing either model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.blocks import Architecture
from prune_lab.plans import PruningPlan, native_layout


@dataclass(frozen=True, slots=True)
class FeaturePair:
    """Two module paths whose outputs the feature loss compares; both outputs have the same shape."""

    teacher_path: str
    student_path: str


def feature_pairs(architecture: Architecture, plan: PruningPlan) -> tuple[FeaturePair, ...]:
    """The feature points of a native student, outermost down stage first, outermost up stage last.

    One pair per surviving stage, down and up: the stage's output, that is the hidden state after its sampler. Stages
    vanish from the inside, so student up stage i faces teacher up stage i + number of vanished stages. A student whose
    inner stages are gone has no down-sampler in its last down stage any more, and the teacher's stage output is
    half its size there: that stage is compared before the sampler, at the ``proj_out`` of the last attention block of
    each (the last residual block where either has no attention there). The mid stage is never compared. For Base,
    Small and Tiny these are the pairs of the official code of BK-SDM (arXiv:2305.15798): 8, 8 and 6 terms.

    Raises NonNativePlanError when no plain diffusers config describes the student.
    """
    teacher = architecture.config
    student = native_layout(architecture, plan).config
    kept = len(student["down_block_types"])
    vanished = len(teacher["down_block_types"]) - kept
    down = [FeaturePair(f"down_blocks.{stage}", f"down_blocks.{stage}") for stage in range(kept)]
    if vanished:
        down[-1:] = _before_the_sampler(teacher, student, kept - 1)
    up = [FeaturePair(f"up_blocks.{stage + vanished}", f"up_blocks.{stage}") for stage in range(kept)]
    return (*down, *up)


def _before_the_sampler(
    teacher: Mapping[str, Any], student: Mapping[str, Any], stage: int
) -> tuple[FeaturePair, ...]:
    """The pair at the end of down stage ``stage`` ahead of the sampler; none when the student has no block there."""
    layers = (_layers(teacher, stage), _layers(student, stage))
    if min(layers) == 0:
        return ()
    attends = all("Attn" in config["down_block_types"][stage] for config in (teacher, student))
    point = "attentions.{}.proj_out" if attends else "resnets.{}"
    paths = (f"down_blocks.{stage}." + point.format(count - 1) for count in layers)
    return (FeaturePair(*paths),)


def _layers(config: Mapping[str, Any], stage: int) -> int:
    layers = config["layers_per_block"]
    return int(layers if isinstance(layers, int) else layers[stage])


@contextmanager
def tapped(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """A mapping that holds, after each forward pass of ``model``, the output of every module in ``paths``.

    Of an output that is a tuple (a down stage returns hidden state and skips) the first element is kept. The hooks are
    gone on exit, also when the body raises.
    """
    features: dict[str, Tensor] = {}

    def keep(path: str, output: Tensor | tuple[Tensor, ...]) -> None:
        features[path] = output if isinstance(output, Tensor) else output[0]

    hooks = []
    try:
        for path in paths:
            module = model.get_submodule(path)
            hooks.append(
                module.register_forward_hook(lambda _module, _inputs, output, path=path: keep(path, output))
            )
        yield features
    finally:
        for hook in hooks:
            hook.remove()
        features.clear()


def feature_loss(
    teacher: Mapping[str, Tensor], student: Mapping[str, Tensor], pairs: Sequence[FeaturePair], like: Tensor
) -> Tensor:
    """Sum over ``pairs`` of the mean squared difference of the features, a scalar in float32.

    No normalisation and no regressors, as in the official code; ``like`` gives the device of an empty sum.
    Misleads when: one stage has far larger features than the rest, since it then carries most of the sum.
    """
    total = torch.zeros((), dtype=torch.float32, device=like.device)
    for pair in pairs:
        wanted, found = teacher[pair.teacher_path], student[pair.student_path]
        total = total + nn.functional.mse_loss(found.float(), wanted.float())
    return total
