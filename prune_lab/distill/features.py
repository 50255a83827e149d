"""Which features of teacher and student belong together, and how they are read off without changing either model."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from prune_lab.blocks import Architecture
from prune_lab.errors import DataError
from prune_lab.plans import PruningPlan, native_layout

Points = Literal["stages", "blocks", "self-attention"]


@dataclass(frozen=True, slots=True)
class FeaturePair:
    """Two module paths whose outputs the feature loss compares; both outputs have the same shape.

    ``weight`` is what the term of this pair counts in the sum.
    """

    teacher_path: str
    student_path: str
    weight: float = 1.0


def feature_pairs(
    architecture: Architecture,
    plan: PruningPlan,
    points: Points = "stages",
    *,
    sensitivities: Mapping[str, float] | None = None,
) -> tuple[FeaturePair, ...]:
    """The feature points of a native student, in order of execution.

    stages: one pair per surviving stage, down and up: the stage's output, that is the hidden state after its sampler.
    Stages vanish from the inside, so student up stage i faces teacher up stage i + number of vanished stages. A student
    whose inner stages are gone has no down-sampler in its last down stage any more, and the teacher's stage output is
    half its size there: that stage is compared before the sampler, at the ``proj_out`` of the last attention block of
    each (the last residual block where either has no attention there). The mid stage is never compared. For Base,
    Small and Tiny these are the pairs of the official code of BK-SDM (arXiv:2305.15798): 8, 8 and 6 terms.

    blocks: the output of every surviving residual and attention block, with the block of the same name.
    self-attention: the output of every self-attention inside the surviving attention blocks (KOALA, arXiv:2312.04005).

    ``sensitivities`` (removal impact by block name, for points inside blocks) weighs each pair by one over the impact
    of its block, impacts below a hundredth of their median counted as that, and the mean weight is 1.

    Raises NonNativePlanError when no plain diffusers config describes the student, DataError when a surviving block has
    no sensitivity.
    """
    layout = native_layout(architecture, plan)
    if points == "stages":
        return _stage_pairs(architecture.config, layout.config)
    students = {source: path for path, source in layout.sources.items()}
    kept = [(block, students[block.path]) for block in architecture.blocks if block.path in students]
    weights = _inverse([block.name for block, _ in kept], sensitivities) if sensitivities else {}
    pairs = []
    for block, path in kept:
        inner = [f".transformer_blocks.{layer}.attn1" for layer in range(block.transformer_layers)]
        for rest in [""] if points == "blocks" else inner:
            pairs.append(FeaturePair(block.path + rest, path + rest, weights.get(block.name, 1.0)))
    return tuple(pairs)


def _inverse(names: Sequence[str], sensitivities: Mapping[str, float]) -> dict[str, float]:
    """Weights of the blocks ``names``, one over their sensitivity, with mean 1."""
    missing = [name for name in names if name not in sensitivities]
    if missing:
        raise DataError(
            f"asked to weigh features by inverse sensitivity, found no score of {missing[0]}; score every block first"
        )
    known = [sensitivities[name] for name in names]
    floor = max(statistics.median(known) / 100, 1e-12)
    inverse = [1 / max(value, floor) for value in known]
    mean = statistics.fmean(inverse)
    return {name: value / mean for name, value in zip(names, inverse, strict=True)}


def _stage_pairs(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> tuple[FeaturePair, ...]:
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
    teacher_path, student_path = (f"down_blocks.{stage}." + point.format(count - 1) for count in layers)
    return (FeaturePair(teacher_path, student_path),)


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
