"""The held-out loss of a model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from prune_lab.probes import Probe, predict


def heldout_loss(model: Any, probe: Probe, *, batch: int = 32) -> Tensor:
    """Mean squared error of the prediction against the probe's target, one value per row, (N,) float32 on the CPU.

    Reads as: the training loss on images that were not trained on. Misleads when: compared between probes, because the
    loss depends on the timestep.
    """
    predictions = predict(model, probe, batch=batch)
    return (predictions - probe.target).square().flatten(1).mean(dim=1)
