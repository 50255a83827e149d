"""A criterion on activations: how much a block changes the direction of the features that pass through it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prune_lab.blocks import BlockGroup
from prune_lab.importance.context import Samples, SampleScores, ScoringContext, require_finite
from prune_lab.importance.hooks import block_hooks
from prune_lab.prefix_sharing import ComputeCost
from prune_lab.probes import evaluating

_ROWS = 32


def block_influence(main: Tensor, block: Tensor) -> Tensor:
    """(N,) one minus the cosine over channels between two (N, C, H, W) or (N, L, C) tensors: the mean of positions."""
    channels = 1 if main.ndim == 4 else -1
    return (1 - F.cosine_similarity(main.double(), block.double(), dim=channels)).flatten(1).mean(1)


def similarity(context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    """One minus the cosine between the main path into a block and the block's output, averaged over positions.

    Measures: how much a block changes the direction of each position's features. A group's value is the sum over its
    blocks.
    Reads as: 0, the output is the input times a factor; 1, the output has nothing in common with the input.
    Misleads when: later layers undo or ignore the change, because the prediction is not looked at. For an up-stage
    block the main path does not contain the skip connection, which disappears together with the block.
    Cost: one forward pass for all groups together.
    Reference: block influence of ShortGPT, arXiv:2403.03853, on feature maps.
    """
    model, probe, architecture = context.model, context.probe, context.architecture
    blocks = list(dict.fromkeys(name for group in groups for name in group.blocks))
    influences = np.empty((len(blocks), len(probe)))
    rows = slice(0)

    def record(name: str, main: Tensor, block: Tensor) -> None:
        found = block_influence(main, block)
        # a block inside one frame, or at one place of all frames, has several rows of each sample
        found = found.reshape(rows.stop - rows.start, -1).mean(1)
        influences[blocks.index(name), rows] = found.cpu().numpy()

    compute = ComputeCost(forward_macs=architecture.total_macs)
    with block_hooks(model, architecture, blocks, record), evaluating(model), torch.inference_mode():
        for rows, inputs in probe.batches(context.batch or _ROWS, model):
            model(**inputs, return_dict=False)
            compute.macs += compute.forward_macs * (rows.stop - rows.start)
    member = np.array([[name in group.blocks for name in blocks] for group in groups])
    # Not `member @ influences`: 0 times NaN is NaN, and a block that is not finite would reach groups without it.
    values = np.stack([influences[row].sum(0) for row in member])
    require_finite(values, groups, "similarity")
    return SampleScores(values, np.ones(len(probe)), Samples.of(probe), compute)
