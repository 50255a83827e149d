"""The three losses of BK-SDM (arXiv:2305.15798): task, output and feature, all computed in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from prune_lab.config import DistillConfig
from prune_lab.distill.data import Batch
from prune_lab.distill.features import FeaturePair, feature_loss, tapped


@dataclass(frozen=True, slots=True)
class Losses:
    """The unweighted losses of one batch, scalars in float32 that carry gradients to the student.

    task: mean squared error of the student's prediction against the training target (noise or velocity).
    output: mean squared difference between the predictions of student and teacher.
    feature: sum over the feature pairs of the mean squared difference of the features.
    """

    task: Tensor
    output: Tensor
    feature: Tensor

    def total(self, settings: DistillConfig) -> Tensor:
        """The weighted sum that is minimised; all three weights are 1 in the paper."""
        return (
            settings.task_weight * self.task
            + settings.output_weight * self.output
            + settings.feature_weight * self.feature
        )


def batch_losses(
    teacher: nn.Module, student: nn.Module, pairs: Sequence[FeaturePair], batch: Batch
) -> Losses:
    """The losses of ``student`` on ``batch``; one forward pass of each model, no gradient for the teacher.

    A teacher in bfloat16 puts the student's forward pass under autocast in bfloat16; its weights stay as they are.
    """
    device, dtype = batch.noisy.device.type, next(teacher.parameters()).dtype
    with (
        tapped(teacher, [pair.teacher_path for pair in pairs]) as teacher_features,
        tapped(student, [pair.student_path for pair in pairs]) as student_features,
    ):
        with torch.no_grad():
            wanted = _predict(teacher, batch, dtype)
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            found = _predict(student, batch, torch.float32)
        return Losses(
            task=mse_loss(found.float(), batch.target.float()),
            output=mse_loss(found.float(), wanted.float()),
            feature=feature_loss(teacher_features, student_features, pairs, like=found),
        )


def _predict(unet: Callable[..., Any], batch: Batch, dtype: torch.dtype) -> Tensor:
    """The prediction of ``unet`` for the noisy latents of ``batch``, shape (B, C, H, W)."""
    added = {name: tensor.to(dtype) for name, tensor in batch.added.items()} or None
    (prediction,) = unet(
        batch.noisy.to(dtype),
        batch.timesteps,
        batch.embeddings.to(dtype),
        added_cond_kwargs=added,
        return_dict=False,
    )
    assert isinstance(prediction, Tensor)
    return prediction
