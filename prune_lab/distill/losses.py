"""The three losses of BK-SDM (arXiv:2305.15798): task, output and feature, and variants of the feature loss.

All are computed in float32. A variant says which points are compared and how the features of one point are; the paper's
own is ``raw``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from prune_lab.config import DistillConfig
from prune_lab.distill.batches import Batch
from prune_lab.distill.features import FeaturePair, Points, tapped
from prune_lab.families import format_of, forward_inputs, prediction_of

# Features of teacher and student, of equal shapes, in float32 -> a scalar.
Term = Callable[[Tensor, Tensor], Tensor]
OUTLIER_DEVIATIONS = 2.0  # of a sample's features from their mean, beyond which they are masked


# How the features of one point are compared --------------------------------------------------------------------


def squared_error(wanted: Tensor, found: Tensor) -> Tensor:
    """Mean squared difference, as in BK-SDM's code.

    Misleads when: one stage has far larger features than the rest, since it then dominates the sum.
    """
    return mse_loss(found, wanted)


def normalised_error(wanted: Tensor, found: Tensor) -> Tensor:
    """Mean squared difference over the teacher's mean square: every point has equal weight, whatever its scale.

    After LAPTOP-Diff (arXiv:2404.11098), which divides each term by the norm of the teacher's feature.
    """
    return mse_loss(found, wanted) / wanted.square().mean().clamp(min=torch.finfo(torch.float32).tiny)


def masked_error(wanted: Tensor, found: Tensor) -> Tensor:
    """Mean squared difference where neither feature is an outlier of its sample, |x - mean| <= 2 deviations.

    After TinyFusion (arXiv:2412.01199): the few massive activations, which a pruned model cannot reproduce at once,
    would dominate the loss. Misleads when: the outliers themselves have to be learnt.
    """
    kept = _ordinary(wanted) & _ordinary(found.detach())
    errors = torch.where(kept, found - wanted, 0.0).square()
    return errors.sum() / kept.sum().clamp(min=1)


def _ordinary(features: Tensor) -> Tensor:
    """Where ``features`` (B, ...) lie within two standard deviations of their sample's mean, a mask of their shape."""
    rest = tuple(range(1, features.ndim))
    deviation, mean = torch.std_mean(features, dim=rest, keepdim=True, correction=0)
    return (features - mean).abs() <= OUTLIER_DEVIATIONS * deviation


# The variants ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FeatureVariant:
    """A variant of the feature loss: the points that are compared, and the term that is summed over them.

    ``by_sensitivity`` weighs each point by one over the removal impact of its block; the mean weight is 1.
    """

    points: Points
    term: Term
    by_sensitivity: bool = False


FEATURE_VARIANTS: Mapping[str, FeatureVariant] = {
    # BK-SDM, arXiv:2305.15798: stage outputs, nothing normalised
    "raw": FeatureVariant("stages", squared_error),
    "normalised": FeatureVariant("stages", normalised_error),
    "outlier-masked": FeatureVariant("stages", masked_error),
    # KOALA, arXiv:2312.04005: self-attention rather than the last feature of a stage
    "self-attention": FeatureVariant("self-attention", normalised_error),
    # HierarchicalPrune, arXiv:2508.04663: the blocks that matter most are changed least
    "inverse-sensitivity": FeatureVariant("blocks", normalised_error, by_sensitivity=True),
}


# The losses of a batch ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Losses:
    """The unweighted losses of one batch, scalars in float32 that carry gradients to the student.

    task: mean squared error of the student's prediction against the training target (noise, velocity or the way of a
    flow), each sample by its weight in the batch.
    output: mean squared difference between the predictions of student and teacher.
    feature: sum over the feature pairs of the variant's term.
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


@dataclass(frozen=True, slots=True)
class TeacherOutput:
    """The teacher's prediction and features for one batch, without gradients; all students are compared with them."""

    prediction: Tensor  # (B, C, H, W) float32
    features: Mapping[str, Tensor]  # by module path of the teacher, in the format of its forward pass


def teacher_output(
    teacher: nn.Module, paths: Iterable[str], batch: Batch, precision: torch.dtype
) -> TeacherOutput:
    """The teacher's prediction for ``batch`` and the features at its modules ``paths``; one forward pass.

    ``precision`` bfloat16 puts a float32 teacher under autocast.
    """
    with tapped(teacher, tuple(dict.fromkeys(paths))) as features, torch.no_grad():
        with _autocast(batch, precision):
            prediction = _predict(teacher, teacher, batch, format_of(teacher))
        return TeacherOutput(prediction.float(), dict(features))


def student_losses(
    student: nn.Module,
    output: TeacherOutput,
    pairs: Sequence[FeaturePair],
    batch: Batch,
    *,
    variant: str,
    precision: torch.dtype,
    forward: Callable[..., Any],
) -> Losses:
    """The losses of ``student`` on ``batch`` against the teacher's ``output``; one forward pass, with gradients.

    ``precision`` bfloat16 puts the forward pass under autocast; weights stay as they are. ``forward`` is called:
    the student, or its wrapper where it is wrapped (data parallel); features are read from the student itself.
    """
    term = FEATURE_VARIANTS[variant].term
    with tapped(student, [pair.student_path for pair in pairs]) as features:
        with _autocast(batch, precision):
            found = _predict(student, forward, batch, torch.float32).float()
        feature = torch.zeros((), dtype=torch.float32, device=found.device)
        for pair in pairs:
            wanted, own = output.features[pair.teacher_path], features[pair.student_path]
            feature = feature + pair.weight * term(wanted.float(), own.float())
    errors = (found - batch.target.float()).square().flatten(1).mean(dim=1)
    return Losses(
        task=(batch.weights * errors).mean(), output=mse_loss(found, output.prediction), feature=feature
    )


def task_errors(model: nn.Module, batch: Batch, *, precision: torch.dtype) -> Tensor:
    """The task loss of each sample of ``batch``, (B,) float32 with gradients to ``model``; no teacher is needed.

    ``precision`` bfloat16 puts the forward pass under autocast; weights stay as they are.
    """
    with _autocast(batch, precision):
        found = _predict(model, model, batch, torch.float32).float()
    errors: Tensor = (found - batch.target.float()).square().flatten(1).mean(dim=1)
    return batch.weights * errors


def _autocast(batch: Batch, precision: torch.dtype) -> contextlib.AbstractContextManager[object]:
    if precision == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(batch.noisy.device.type, dtype=precision)


def _predict(model: nn.Module, forward: Callable[..., Any], batch: Batch, dtype: torch.dtype) -> Tensor:
    """The prediction of ``model``, called as ``forward``, for the noisy latents of ``batch``, in their form."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    added = {name: cast(tensor) for name, tensor in batch.added.items()}
    noisy = cast(batch.noisy)
    inputs = forward_inputs(model, noisy, batch.timesteps, cast(batch.embeddings), added)
    return prediction_of(model, forward(**inputs, return_dict=False)[0], noisy)
