"""Criteria on weights: magnitude and Taylor as BK-SDM defines them, and chance."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from prune_lab.blocks import BlockGroup
from prune_lab.importance.context import Samples, SampleScores, ScoringContext, checked
from prune_lab.importance.hooks import only_requires_grad
from prune_lab.prefix_sharing import ComputeCost
from prune_lab.probes import evaluating

_ROWS = 8
_PASSES = 3  # forward, and backward with the gradients of activations and of weights


def weight_matrices(context: ScoringContext, group: BlockGroup) -> Iterator[nn.Parameter]:
    """The weights of the convolutions and linear layers of a group, in order; not biases and norms."""
    for name in group.blocks:
        for parameter in context.unet.get_submodule(context.architecture.block(name).path).parameters():
            if parameter.ndim >= 2:
                yield parameter


def neuron_mean(matrices: Sequence[Tensor]) -> float:
    """Mean over layers of the mean over output neurons of the sum of absolute values (BK-SDM, footnote 1)."""
    return float(np.mean([float(one.double().abs().flatten(1).sum(1).mean()) for one in matrices]))


def magnitude(context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    """Sum of absolute weights into an output neuron, averaged over neurons and layers.

    Measures: the size of a group's weights, by no sample at all.
    Reads as: larger, larger weights; the number has no unit that a prediction could be compared with.
    Misleads when: layers are followed by normalisation or differ in width: wide layers have more weights to a neuron.
    torch-pruning's magnitude importance ranks channels within a dependency group and is not defined for a block.
    Cost: nothing: no forward pass.
    Reference: BK-SDM, arXiv:2305.15798 (ECCV 2024), footnote 1.
    """
    with torch.no_grad():
        values = np.array([[neuron_mean(list(weight_matrices(context, group)))] for group in groups])
    checked(values, [group.name for group in groups], "magnitude")
    return SampleScores(
        values, np.ones(1), Samples(np.zeros(1, np.int64)), ComputeCost(forward_macs=_forward(context))
    )


def taylor(context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    """Sum of absolute products of weight and gradient into an output neuron, averaged over neurons and layers.

    Measures: by first order and weight by weight, how much the denoising loss feels the group's weights. One sample is
    the mean loss of all rows at one timestep, as products are formed of mean gradients.
    Reads as: larger, felt more; the number has no unit that a prediction could be compared with.
    Misleads when: effects of weights cancel, which a sum of absolute values does not see; compared between numbers of
    samples, since noise in the gradients adds to it.
    Cost: three forward-equivalents for all groups together.
    Reference: BK-SDM, arXiv:2305.15798 (ECCV 2024), footnote 1; arXiv:1906.10771.
    """
    unet, probe = context.unet, context.probe
    matrices = {group.name: list(weight_matrices(context, group)) for group in groups}
    learning = list(dict.fromkeys(one for group in matrices.values() for one in group))
    times = np.unique(probe.timesteps.numpy())
    values = np.empty((len(groups), len(times)))
    with only_requires_grad(unet, learning), evaluating(unet), torch.enable_grad():
        for column, time in enumerate(times):
            part = probe.rows(np.flatnonzero(probe.timesteps.numpy() == time).tolist())
            gradients = [torch.zeros_like(one) for one in learning]
            for rows, inputs in part.batches(context.batch or _ROWS, unet.device, unet.dtype):
                prediction = unet(**inputs, return_dict=False)[0].float()
                target = part.target[rows].to(prediction.device)
                loss = (prediction - target).square().mean((1, 2, 3)).sum() / len(part)
                torch._foreach_add_(gradients, torch.autograd.grad(loss, learning))
            product = {
                one: (one.detach() * gradient) for one, gradient in zip(learning, gradients, strict=True)
            }
            values[:, column] = [neuron_mean([product[one] for one in found]) for found in matrices.values()]
    checked(values, [group.name for group in groups], "taylor")
    compute = ComputeCost(macs=_PASSES * len(probe) * _forward(context), forward_macs=_forward(context))
    return SampleScores(values, np.ones(len(times)), Samples(np.arange(len(times)), times), compute)


def random_scores(context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    """A number between 0 and 1 drawn from the seed and the group's name: the control that every criterion should beat.

    Measures: nothing.
    Reads as: how well an order can agree with another one by luck.
    Misleads when: one draw is taken for the distribution; draw several seeds.
    Cost: nothing.
    Reference: the random baseline of every pruning study.
    """

    def draw(group: BlockGroup) -> float:
        digest = hashlib.sha256(f"{context.seed}:{' '.join(sorted(group.blocks))}".encode()).digest()
        return int.from_bytes(digest[:6], "big") / 2**48

    for group in groups:
        for name in group.blocks:
            context.architecture.block(name)
    values = np.array([[draw(group)] for group in groups])
    return SampleScores(
        values, np.ones(1), Samples(np.zeros(1, np.int64)), ComputeCost(forward_macs=_forward(context))
    )


def _forward(context: ScoringContext) -> int:
    return context.architecture.total_macs
