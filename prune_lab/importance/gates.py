"""Criteria from gradients at gates: every block is scaled by a gate, and one backward pass asks all gates at once.

A gate g hands on ``main + g (block - main)``, where ``main`` is what is there when the block is gone: at 1 the block
works, at 0 it is bypassed. Each row of a batch has gates of its own, so every row gives a value of its own; gradients
of weights are never formed. A group's gates move together: its derivative is the sum of theirs. Samplers that leave
with an innermost stage have no gate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prune_lab.blocks import Architecture, BlockGroup
from prune_lab.importance.context import Samples, SampleScores, ScoringContext, checked
from prune_lab.importance.hooks import block_hooks, only_requires_grad
from prune_lab.prefix_sharing import ComputeCost
from prune_lab.probes import evaluating
from prune_lab.runtime import seeded

_ROWS = 8  # at a time, unless it is said: a backward pass keeps all activations
_PASSES = 2  # a forward pass, and a backward pass without gradients of weights
_PATH = (1.0, 0.5, 0.0)

Cotangent = Callable[[Tensor, slice], Tensor]  # prediction (N, C, H, W), rows -> one scalar to derive


@contextlib.contextmanager
def gated(unet: Any, architecture: Architecture, gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, each block named in ``gates`` is scaled by its gate (N,), one per row; nothing stays behind."""

    def scaled(name: str, main: Tensor, block: Tensor) -> Tensor:
        return main + gates[name].to(block.dtype).reshape(-1, 1, 1, 1) * (block - main)

    with block_hooks(unet, architecture, gates, scaled):
        yield


def gate_derivatives(
    context: ScoringContext, wanted: Sequence[str], scalar: Cotangent, *, at: float = 1.0
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], ComputeCost]:
    """(blocks, rows) derivative of ``scalar``, a sum over rows, by each block's and row's gate, all gates at ``at``."""
    unet, probe = context.unet, context.probe
    found = np.empty((len(wanted), len(probe)))
    compute = ComputeCost(forward_macs=context.architecture.total_macs)
    with only_requires_grad(unet, ()), evaluating(unet):
        for rows, inputs in probe.batches(context.batch or _ROWS, unet.device, unet.dtype):
            count = rows.stop - rows.start
            gates = {
                name: torch.full((count,), at, device=unet.device, requires_grad=True) for name in wanted
            }
            with torch.enable_grad(), gated(unet, context.architecture, gates):
                prediction = unet(**inputs, return_dict=False)[0]
                derived = torch.autograd.grad(scalar(prediction.float(), rows), list(gates.values()))
            found[:, rows] = torch.stack(derived).double().cpu().numpy()
            compute.macs += _PASSES * compute.forward_macs * count
    return found, compute


def _summed(
    context: ScoringContext, groups: Sequence[BlockGroup], scalar: Cotangent, *, at: float = 1.0
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], ComputeCost]:
    """(groups, rows): the derivatives of each group's gates together."""
    blocks = list(dict.fromkeys(name for group in groups for name in group.blocks))
    for name in blocks:
        context.architecture.block(name)  # an unknown one is an error before anything is run
    found, compute = gate_derivatives(context, blocks, scalar, at=at)
    member = np.array([[name in group.blocks for name in blocks] for group in groups], dtype=np.float64)
    return member @ found, compute


def _task_loss(context: ScoringContext) -> Cotangent:
    """The denoising error of each row, summed over rows."""

    def scalar(prediction: Tensor, rows: slice) -> Tensor:
        target = context.probe.target[rows].to(prediction.device)
        return (prediction - target).square().mean((1, 2, 3)).sum()

    return scalar


def gate_gradient(context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    """Size of the derivative of the denoising loss by the group's gates.

    Measures: how steeply the loss changes where a group begins to fade, by first order.
    Reads as: 0, fading it a little changes nothing; the rise of the loss if the loss were a straight line in the gate.
    Misleads when: removal is a large step, which it is: a trained model sits where first derivatives are small.
    Cost: two forward-equivalents for all groups together (one pass, and its gradients without those of weights).
    Reference: Molchanov et al., arXiv:1906.10771 (gates); the Taylor expansion of arXiv:1611.06440.
    """
    slopes, compute = _summed(context, groups, _task_loss(context))
    values = checked(np.abs(slopes), [group.name for group in groups], "gate-gradient")
    return SampleScores(values, np.ones(values.shape[1]), Samples.of(context.probe), compute)


def gate_fisher(context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    """Squared response of the prediction to the group's gates, by a random projection, relative to its mean square.

    Measures: the mean squared change of the prediction if the prediction were a straight line in the gate: the Fisher
    information of the gate under Gaussian errors. Projecting on one normal vector per row gives its square's mean.
    Reads as: an estimate of output-mse, on the same scale.
    Misleads when: removal is a large step, or samples are few: each row's value has a relative spread of 1.4.
    Cost: two forward-equivalents for all groups together.
    Reference: Theis et al., arXiv:1801.05787 (Fisher pruning), with the model's own distribution of targets.
    """
    noise = torch.randn(context.probe.target.shape, generator=seeded(context.seed))
    squares = np.empty(len(context.probe))
    size = context.probe.target[0].numel()

    def scalar(prediction: Tensor, rows: slice) -> Tensor:
        squares[rows] = prediction.detach().double().square().flatten(1).mean(1).cpu().numpy()
        return (prediction * noise[rows].to(prediction.device)).sum()

    slopes, compute = _summed(context, groups, scalar)
    values = checked(slopes**2 / size, [group.name for group in groups], "gate-fisher")
    return SampleScores(values, squares, Samples.of(context.probe), compute)


def gate_path(context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    """Size of the derivative of the denoising loss by the group's gates, averaged over all gates at 1, 1/2 and 0.

    Measures: the loss's slope along the way from the whole model to one without any of the groups' blocks.
    Reads as: as gate-gradient.
    Misleads when: interactions are strong: with all gates low together the model is one that nobody would use, and a
    block's slope there says what it is worth in that company.
    Cost: six forward-equivalents for all groups together.
    Reference: integrated gradients, arXiv:1703.01365, by Simpson's rule on three points.
    """
    weights = (1 / 6, 4 / 6, 1 / 6)
    total, compute = np.zeros((len(groups), len(context.probe))), ComputeCost()
    for at, weight in zip(_PATH, weights, strict=True):
        slopes, spent = _summed(context, groups, _task_loss(context), at=at)
        total += weight * slopes
        compute.macs, compute.forward_macs = compute.macs + spent.macs, spent.forward_macs
    values = checked(np.abs(total), [group.name for group in groups], "gate-path")
    return SampleScores(values, np.ones(values.shape[1]), Samples.of(context.probe), compute)
