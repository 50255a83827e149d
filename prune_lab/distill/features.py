"""Which features of teacher and student belong together, and how they are read off without changing either model."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from prune_lab.blocks import Architecture
from prune_lab.errors import DataError
from prune_lab.families import outline_of
from prune_lab.forms import layout_of
from prune_lab.plans import PruningPlan, gone_with

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

    stages: what stands at the ends of the surviving stages, as the model's family says (``Family.stage_features``).
    For BK-SDM's Base, Small and Tiny these are the pairs of the official code (arXiv:2305.15798): 8, 8 and 6 terms.

    blocks: the output of every surviving residual and attention block, with the block of the same name.
    self-attention: the output of every self-attention inside the surviving attention blocks (KOALA, arXiv:2312.04005).

    ``sensitivities`` (removal impact by block name, for points inside blocks) weighs each pair by one over the impact
    of its block, impacts below a hundredth of their median counted as that, and the mean weight is 1.

    Raises FormError when no plain diffusers config describes the student, DataError when a surviving block has
    no sensitivity.
    """
    layout = layout_of(architecture, plan)
    if points == "stages":
        gone = gone_with(architecture, plan.removed)
        ends = architecture.family.stage_features(architecture.outline, gone)
        found = [(path, origin, 1.0) for path, origin in ends]
    else:
        gone = gone_with(architecture, plan.removed)
        kept = [block for block in architecture.blocks if block.name not in gone]
        weights = _inverse([block.name for block in kept], sensitivities) if sensitivities else {}
        found = [
            (path, path, weights.get(block.name, 1.0))
            for block in kept
            for path in ([block.path] if points == "blocks" else block.self_attention)
        ]
    return tuple(
        FeaturePair(teacher_path, student_path, weight)
        for teacher_path, origin, weight in found  # origin: the teacher's module that writes there in the student
        if (student_path := layout.renamed(origin)) is not None
    )


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


@contextmanager
def tapped(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """A mapping that holds, after each forward pass of ``model``, the output of every module in ``paths``.

    Of an output that is a tuple (a down stage returns hidden state and skips, a block of SD3 text and picture) what is
    on the main path is kept. The hooks are gone on exit, also when the body raises.
    """
    features: dict[str, Tensor] = {}
    main = {unit.path: unit.main for unit in outline_of(model).units}

    def keep(path: str, _module: nn.Module, _inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        features[path] = output if isinstance(output, Tensor) else output[main.get(path, 0)]

    with ExitStack() as hooks:
        hooks.callback(features.clear)
        for path in paths:
            hooks.enter_context(model.get_submodule(path).register_forward_hook(partial(keep, path)))
        yield features
