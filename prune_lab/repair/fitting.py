"""Ridge regression from moments: the correction of a tensor that brings it nearest to a target.

The error is fitted, ``target - tensor ~ M x + b``, and the ridge penalty pulls M to 0. With few samples the correction
becomes a shift b, not a map that ignores the tensor. Only sums over pixels are kept (float64), so that
cross-validation and held-out errors need no second pass over the activations.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Form = Literal["shift", "scale-shift", "scale", "linear", "linear-shift"]

# Ridge penalties, relative to the mean variance of the features (for a scale: of each channel); infinite: only a shift.
STRENGTHS = (1e-10, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, math.inf)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Sums over P pixels of F features x and C errors e (target minus tensor); float64."""

    count: int  # P
    x: Tensor  # (F,)
    e: Tensor  # (C,)
    xx: Tensor  # (F, F)
    xe: Tensor  # (F, C)
    ee: float
    target_square: float  # sum of squares of the target

    def __add__(self, other: Moments) -> Moments:
        names = [one.name for one in dataclasses.fields(self)]
        return Moments(*(getattr(self, name) + getattr(other, name) for name in names))

    @property
    def error(self) -> float:
        """Mean squared error of the tensor without correction, divided by the mean square of the target."""
        return self.ee / self.target_square if self.target_square else 0.0

    def error_with(self, correction: Correction) -> float:
        """The same error with ``correction``."""
        weight, bias = correction.weight, correction.bias
        squares = (
            self.ee
            - 2 * (weight.T * self.xe).sum()
            - 2 * bias @ self.e
            + ((weight @ self.xx) * weight).sum()
            + 2 * bias @ (weight @ self.x)
            + self.count * (bias @ bias)
        )
        # A sum of squares, but rounding may make that of an exact correction slightly negative.
        return max(0.0, float(squares)) / self.target_square if self.target_square else 0.0


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Correction:
    """A correction that adds ``weight @ x + bias`` to a tensor at each pixel, with features x; float64."""

    weight: Tensor  # (C, F)
    bias: Tensor  # (C,)
    strength: float  # the ridge penalty

    @property
    def map(self) -> Tensor:
        """(C, C) the linear map of the corrected tensor, where the features are the tensor's own channels."""
        return torch.eye(len(self.weight), dtype=self.weight.dtype, device=self.weight.device) + self.weight


def moments_of(features: Tensor, errors: Tensor, target: Tensor) -> Moments:
    """The moments of features (P, F), errors (P, C) and target (P, C)."""
    x, e = features.double(), errors.double()
    return Moments(
        count=len(x),
        x=x.sum(dim=0),
        e=e.sum(dim=0),
        xx=x.T @ x,
        xe=x.T @ e,
        ee=float(e.square().sum()),
        target_square=float(target.double().square().sum()),
    )


def _solver(moments: Moments, form: Form) -> Callable[[float], Correction]:
    """A function from ridge penalty to the best correction of ``form``; the expensive part is computed only once."""
    n, centred = moments.count, form not in ("scale", "linear")
    mean_x = moments.x / n if centred else torch.zeros_like(moments.x)
    mean_e = moments.e / n if centred else torch.zeros_like(moments.e)
    cross_covariance = moments.xe / n - torch.outer(mean_x, mean_e)  # (F, C)
    covariance = moments.xx / n - torch.outer(mean_x, mean_x)
    if form in ("linear", "linear-shift"):
        values, vectors = torch.linalg.eigh(covariance)
        values = values.clamp(min=0)
        size, rotated = values.mean(), vectors.T @ cross_covariance

        def weight(strength: float) -> Tensor:
            damped = (values + strength * size)[:, None]
            solution: Tensor = torch.where(damped > 0, rotated / damped, 0.0).T @ vectors.T
            return solution
    else:  # a shift is only asked for at an infinite penalty, and has no weight
        variance = covariance.diagonal().clamp(min=0)
        slope = torch.where(variance > 0, cross_covariance.diagonal() / variance, 0.0)

        def weight(strength: float) -> Tensor:
            return torch.diag(slope / (1 + strength))

    def solve(strength: float) -> Correction:
        solution = torch.zeros_like(cross_covariance.T) if math.isinf(strength) else weight(strength)
        return Correction(solution, mean_e - solution @ mean_x, strength)

    return solve


def _total(folds: Sequence[Moments]) -> Moments:
    return functools.reduce(operator.add, folds)


def fit(folds: Sequence[Moments], form: Form) -> Correction:
    """The least-squares correction of ``form``; its ridge penalty has the lowest error in cross-validation over folds.

    ``scale`` and ``linear`` have no bias. The number of features F equals that of channels C unless ``linear-shift``.
    """
    strengths = STRENGTHS if form != "shift" else (math.inf,)
    errors = dict.fromkeys(strengths, 0.0)
    if len(strengths) > 1:
        for number, fold in enumerate(folds):
            solve = _solver(_total([*folds[:number], *folds[number + 1 :]]), form)
            for strength in strengths:
                errors[strength] += fold.target_square * fold.error_with(solve(strength))
    return _solver(_total(folds), form)(min(strengths, key=lambda strength: errors[strength]))
