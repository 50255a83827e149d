"""Criteria from derivatives by gates: every block is scaled by a gate, and one backward pass gives all derivatives.

A gate g replaces a block's output by ``main + g (output - main)``, where ``main`` is the tensor that is left when the
block is removed: at 1 the block works as usual, at 0 it is bypassed. Each row of a batch has its own gates, so each row
gives its own value; gradients of weights are not computed. The derivative of a group is the sum over its blocks.
Samplers that are removed together with an innermost stage have no gate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prune_lab.blocks import Architecture, BlockGroup
from prune_lab.importance.context import Samples, SampleScores, ScoringContext, require_finite
from prune_lab.importance.hooks import block_hooks, only_requires_grad
from prune_lab.importance.intervals import Floats
from prune_lab.prefix_sharing import ComputeCost
from prune_lab.probes import evaluating
from prune_lab.runtime import device_of, seeded

_ROWS = 8  # per batch if the context does not say; few, because a backward pass keeps all activations
_PASSES = 2  # a forward pass, and a backward pass without gradients of weights
_SIMPSON = {1.0: 1 / 6, 0.5: 4 / 6, 0.0: 1 / 6}  # weights of Simpson's rule by gate value

Objective = Callable[[Tensor, slice], Tensor]
"""(prediction (N, C, H, W), rows) -> (N,) what is differentiated, one value for each row."""


def _per_row(gate: Tensor, block: Tensor) -> Tensor:
    """The gates (N,) in the form of ``block``, whose rows are those of the batch, or several in turn of each."""
    spread = gate.to(block.dtype).repeat_interleave(block.shape[0] // len(gate))
    return spread.reshape(-1, *[1] * (block.ndim - 1))


@contextlib.contextmanager
def gated(model: Any, architecture: Architecture, gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Context in which each block named in ``gates`` is scaled by its gate (N,), one per row; undone on exit."""

    def scale(name: str, main: Tensor, block: Tensor) -> Tensor:
        return main + _per_row(gates[name], block) * (block - main)

    with block_hooks(model, architecture, gates, scale, every=True):
        yield


def gate_derivatives(
    context: ScoringContext, groups: Sequence[BlockGroup], objective: Objective, *, at: float = 1.0
) -> tuple[Floats, ComputeCost]:
    """(groups, rows) derivative of ``objective`` by the gates of each group's blocks, in each row.

    ``at`` is the value of all gates where the derivative is taken.
    """
    model, probe = context.model, context.probe
    blocks = list(dict.fromkeys(name for group in groups for name in group.blocks))
    derivatives = np.empty((len(blocks), len(probe)))
    compute = ComputeCost(forward_macs=context.architecture.total_macs)
    with only_requires_grad(model, ()), evaluating(model):
        for rows, inputs in probe.batches(context.batch or _ROWS, model):
            count = rows.stop - rows.start
            gates = {
                name: torch.full((count,), at, device=device_of(model), requires_grad=True) for name in blocks
            }
            with torch.enable_grad(), gated(model, context.architecture, gates):
                prediction = probe.predicted(rows, model, inputs)
                value = objective(prediction.float(), rows).sum()
                gradients = torch.autograd.grad(value, list(gates.values()))
            derivatives[:, rows] = torch.stack(gradients).double().cpu().numpy()
            compute.macs += _PASSES * compute.forward_macs * count
    member = np.array([[name in group.blocks for name in blocks] for group in groups], dtype=np.float64)
    return member @ derivatives, compute


def gate_gradient(context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    """Absolute derivative of the denoising loss by the group's gates.

    Measures: how fast the loss changes when the group's output is scaled down a little (first order).
    Reads as: the increase of the loss on removal, if the loss were a linear function of the gate; 0, no change.
    Misleads when: the loss is not linear, which is usual: removal is a large step, and training has made the first
    derivatives small.
    Cost: two forward-equivalents for all groups together (a forward pass, and a backward pass without weights).
    Reference: Molchanov et al., arXiv:1906.10771 (gates); the Taylor expansion of arXiv:1611.06440.
    """
    derivatives, compute = gate_derivatives(context, groups, context.probe.denoising_error)
    values = require_finite(np.abs(derivatives), groups, "gate-gradient")
    return SampleScores(values, np.ones(values.shape[1]), Samples.of(context.probe), compute)


def gate_fisher(context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    """Squared derivative of the prediction by the group's gates, estimated with a random projection.

    Measures: the mean squared change of the prediction relative to its mean square, if the prediction were a linear
    function of the gate. This is the Fisher information of the gate under Gaussian errors. The derivative of the
    product with one normal vector per row has the mean square of the full derivative as its expected square.
    Reads as: an estimate of output-mse, on the same scale.
    Misleads when: the prediction is not linear in the gate, or samples are few: the value of one row has a relative
    standard deviation of 1.4.
    Cost: two forward-equivalents for all groups together.
    Reference: Theis et al., arXiv:1801.05787 (Fisher pruning), with the model's own distribution of targets.
    """
    noise = torch.randn(context.probe.target.shape, generator=seeded(context.seed))
    squares = np.empty(len(context.probe))
    size = context.probe.target[0].numel()

    def objective(prediction: Tensor, rows: slice) -> Tensor:
        squares[rows] = prediction.detach().double().square().flatten(1).mean(1).cpu().numpy()
        return (prediction * noise[rows].to(prediction.device)).flatten(1).sum(1)

    derivatives, compute = gate_derivatives(context, groups, objective)
    values = require_finite(derivatives**2 / size, groups, "gate-fisher")
    return SampleScores(values, squares, Samples.of(context.probe), compute)


def gate_path(context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    """Absolute derivative of the denoising loss by the group's gates, averaged over gate values from 1 to 0.

    Measures: the mean slope of the loss on the path from the whole model to the one without any of the scored blocks;
    all gates change together.
    Reads as: as gate-gradient.
    Misleads when: interactions are strong: with all gates low the model no longer works, and a block's derivative
    there describes that broken model.
    Cost: six forward-equivalents for all groups together.
    Reference: integrated gradients, arXiv:1703.01365, by Simpson's rule on the gate values 1, 1/2 and 0.
    """
    total, compute = np.zeros((len(groups), len(context.probe))), ComputeCost()
    for at, weight in _SIMPSON.items():
        derivatives, cost = gate_derivatives(context, groups, context.probe.denoising_error, at=at)
        total += weight * derivatives
        compute.macs, compute.forward_macs = compute.macs + cost.macs, cost.forward_macs
    values = require_finite(np.abs(total), groups, "gate-path")
    return SampleScores(values, np.ones(values.shape[1]), Samples.of(context.probe), compute)
