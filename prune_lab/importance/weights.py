"""Criteria on weights, magnitude and Taylor as BK-SDM defines them; and random scores as a control."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from prune_lab.blocks import BlockGroup
from prune_lab.importance.context import Samples, SampleScores, ScoringContext, require_finite
from prune_lab.importance.hooks import only_requires_grad
from prune_lab.prefix_sharing import ComputeCost
from prune_lab.probes import evaluating

_ROWS = 8
_PASSES = 3  # forward, and backward with the gradients of activations and of weights


def weight_matrices(context: ScoringContext, group: BlockGroup) -> Iterator[nn.Parameter]:
    """The weights of the convolutions and linear layers of a group, in order; no biases, no norms."""
    for name in group.blocks:
        for parameter in context.model.get_submodule(context.architecture.block(name).path).parameters():
            if parameter.ndim >= 2:
                yield parameter


def neuron_mean(matrices: Sequence[Tensor]) -> float:
    """Sum of absolute values per output neuron, averaged over neurons, then over layers (BK-SDM, footnote 1)."""
    return float(np.mean([float(one.double().abs().flatten(1).sum(1).mean()) for one in matrices]))


def _without_samples(context: ScoringContext, values: Sequence[float]) -> SampleScores:
    """The scores of a criterion that gives one value (G,) per group and runs no forward pass."""
    compute = ComputeCost(forward_macs=context.architecture.total_macs)
    return SampleScores(np.array(values)[:, None], np.ones(1), Samples(np.zeros(1, np.int64)), compute)


def magnitude(context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    """Sum of the absolute weights of an output neuron, averaged over neurons and layers.

    Measures: the size of a group's weights; no samples are used.
    Reads as: larger, larger weights; the number says nothing about the size of the change of the prediction.
    Misleads when: layers are followed by normalisation or differ in width: neurons of wide layers have more weights.
    torch-pruning's magnitude importance ranks channels within a dependency group and is not defined for a block.
    Cost: no forward pass.
    Reference: BK-SDM, arXiv:2305.15798 (ECCV 2024), footnote 1.
    """
    with torch.no_grad():
        values = [neuron_mean(list(weight_matrices(context, group))) for group in groups]
    scores = _without_samples(context, values)
    require_finite(scores.values, groups, "magnitude")
    return scores


def taylor(context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    """Sum of the absolute products of weight and gradient of an output neuron, averaged over neurons and layers.

    Measures: how much the denoising loss changes when single weights are set to 0 (first order). One sample is one
    timestep: the products are formed from the mean gradient over all rows with that timestep.
    Reads as: larger, more effect; the number says nothing about the size of the change of the prediction.
    Misleads when: effects of weights cancel, which a sum of absolute values ignores; or when scores from different
    numbers of samples are compared, because noise in the gradients increases the sum.
    Cost: three forward-equivalents for all groups together.
    Reference: BK-SDM, arXiv:2305.15798 (ECCV 2024), footnote 1; arXiv:1906.10771.
    """
    model, probe = context.model, context.probe
    matrices = {group.name: list(weight_matrices(context, group)) for group in groups}
    weights = list(dict.fromkeys(one for group in matrices.values() for one in group))
    timesteps = np.unique(probe.timesteps.numpy())
    values = np.empty((len(groups), len(timesteps)))
    with only_requires_grad(model, weights), evaluating(model), torch.enable_grad():
        for column, timestep in enumerate(timesteps):
            part = probe.rows(np.flatnonzero(probe.timesteps.numpy() == timestep).tolist())
            gradients = [torch.zeros_like(one) for one in weights]
            for rows, inputs in part.batches(context.batch or _ROWS, model):
                prediction = part.predicted(rows, model, inputs).float()
                loss = part.denoising_error(prediction, rows).sum() / len(part)
                torch._foreach_add_(gradients, torch.autograd.grad(loss, weights))
            product = {
                one: (one.detach() * gradient) for one, gradient in zip(weights, gradients, strict=True)
            }
            values[:, column] = [neuron_mean([product[one] for one in group]) for group in matrices.values()]
    require_finite(values, groups, "taylor")
    forward_macs = context.architecture.total_macs
    compute = ComputeCost(macs=_PASSES * len(probe) * forward_macs, forward_macs=forward_macs)
    samples = Samples(np.arange(len(timesteps)), timesteps)
    return SampleScores(values, np.ones(len(timesteps)), samples, compute)


def random_scores(context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    """A random number between 0 and 1 from the seed and the group's blocks: a control for the other criteria.

    Measures: nothing.
    Reads as: how well an order agrees with another one by chance.
    Misleads when: one seed is taken for the distribution; use several.
    Cost: no forward pass.
    Reference: the random baseline that is usual in pruning studies.
    """

    def random_number(group: BlockGroup) -> float:
        digest = hashlib.sha256(f"{context.seed}:{' '.join(sorted(group.blocks))}".encode()).digest()
        return int.from_bytes(digest[:6], "big") / 2**48

    return _without_samples(context, [random_number(group) for group in groups])
