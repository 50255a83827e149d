"""A criterion on activations: how far a block turns what runs through it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prune_lab.blocks import BlockGroup
from prune_lab.importance.context import Samples, SampleScores, ScoringContext, checked
from prune_lab.importance.hooks import block_hooks
from prune_lab.prefix_sharing import ComputeCost
from prune_lab.probes import evaluating

_ROWS = 32


def block_influence(main: Tensor, block: Tensor) -> Tensor:
    """(N,) one minus the cosine over channels between (N, C, H, W) and (N, C, H, W), averaged over positions."""
    return (1 - F.cosine_similarity(main.double(), block.double(), dim=1)).flatten(1).mean(1)


def similarity(context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    """One minus the cosine between what goes past a block and what comes out of it, averaged over positions.

    Measures: how far a block turns each position's features; a group's value is the sum of its blocks'.
    Reads as: 0, the block hands on its input (up to its size); 1, something unrelated.
    Misleads when: later layers undo or ignore the turn: it does not look at the answer. What goes past is the main
    path: the skip that an up-stage block reads is gone with the block.
    Cost: one forward pass for all groups together.
    Reference: block influence of ShortGPT, arXiv:2403.03853, on feature maps.
    """
    unet, probe, architecture = context.unet, context.probe, context.architecture
    blocks = list(dict.fromkeys(name for group in groups for name in group.blocks))
    found = np.empty((len(blocks), len(probe)))
    place: dict[str, slice] = {}

    def turned(name: str, main: Tensor, block: Tensor) -> None:
        found[blocks.index(name), place["rows"]] = block_influence(main, block).cpu().numpy()

    compute = ComputeCost(forward_macs=architecture.total_macs)
    with block_hooks(unet, architecture, blocks, turned), evaluating(unet), torch.inference_mode():
        for rows, inputs in probe.batches(context.batch or _ROWS, unet.device, unet.dtype):
            place["rows"] = rows
            unet(**inputs, return_dict=False)
            compute.macs += compute.forward_macs * (rows.stop - rows.start)
    member = np.array([[name in group.blocks for name in blocks] for group in groups], dtype=np.float64)
    # 0 times NaN is NaN: a block that is not finite must not spoil the groups without it.
    values = np.stack([found[row.astype(bool)].sum(0) for row in member])
    checked(values, [group.name for group in groups], "similarity")
    return SampleScores(values, np.ones(len(probe)), Samples.of(probe), compute)
