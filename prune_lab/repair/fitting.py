"""Least squares from moments: the change of a tensor that brings it nearest to another one.

Everything is fitted as a change, ``wanted - found ~ M x + b``, and the ridge pulls M to 0: with few samples the repair
goes to a mere shift, not to a map that forgets what was there. Only sums over pixels are kept (float64), so that folds
of the cross-validation and rows that were held out cost no second look at the activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Form = Literal["shift", "scale-shift", "scale", "linear", "linear-shift"]

# Of the ridge, relative to the mean variance of the features (of each channel for a scale); infinite: a mere shift.
STRENGTHS = (1e-10, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, math.inf)


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Sums over P pixels of F features x, the C changes e that are wanted, and the wanted tensor itself; float64."""

    count: int
    x: Tensor  # (F,)
    e: Tensor  # (C,)
    xx: Tensor  # (F, F)
    xe: Tensor  # (F, C)
    ee: float
    wanted: float  # sum of squares

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count,
            self.x + other.x,
            self.e + other.e,
            self.xx + other.xx,
            self.xe + other.xe,
            self.ee + other.ee,
            self.wanted + other.wanted,
        )

    @property
    def error(self) -> float:
        """What is there now against what is wanted: mean square, relative to the mean square of what is wanted."""
        return self.ee / self.wanted if self.wanted else 0.0

    def error_with(self, change: Change) -> float:
        """The same after ``change``."""
        weight, bias = change.weight, change.bias
        left = (
            self.ee
            - 2 * (weight.T * self.xe).sum()
            - 2 * bias @ self.e
            + ((weight @ self.xx) * weight).sum()
            + 2 * bias @ (weight @ self.x)
            + self.count * (bias @ bias)
        )
        # A sum of squares; what rounding leaves of an exact repair may be a hair below 0.
        return max(0.0, float(left)) / self.wanted if self.wanted else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What to add to a tensor: ``weight @ x + bias`` at each pixel; float64."""

    weight: Tensor  # (C, F)
    bias: Tensor  # (C,)
    strength: float  # of the ridge

    @property
    def map(self) -> Tensor:
        """(C, C): the linear map that the change makes of the tensor's own channels."""
        return torch.eye(len(self.weight), dtype=self.weight.dtype, device=self.weight.device) + self.weight


def moments_of(features: Tensor, changes: Tensor, wanted: Tensor) -> Moments:
    """Of features (P, F), the changes wanted (P, C) and the wanted tensor (P, C)."""
    x, e = features.double(), changes.double()
    return Moments(
        count=len(x),
        x=x.sum(dim=0),
        e=e.sum(dim=0),
        xx=x.T @ x,
        xe=x.T @ e,
        ee=float(e.square().sum()),
        wanted=float(wanted.double().square().sum()),
    )


def _solver(moments: Moments, form: Form) -> Callable[[float], Change]:
    """The least-squares change of ``form`` by strength of the ridge; the costly part is done once."""
    n, centred = moments.count, form not in ("scale", "linear")
    mean_x = moments.x / n if centred else torch.zeros_like(moments.x)
    mean_e = moments.e / n if centred else torch.zeros_like(moments.e)
    crossed = moments.xe / n - torch.outer(mean_x, mean_e)  # (F, C)
    spread = moments.xx / n - torch.outer(mean_x, mean_x)
    nothing = torch.zeros_like(crossed.T)
    if form in ("scale", "scale-shift"):
        variance = spread.diagonal().clamp(min=0)
        slope = torch.where(variance > 0, crossed.diagonal() / variance, 0.0)

        def weight(strength: float) -> Tensor:
            return torch.diag(slope / (1 + strength))
    elif form in ("linear", "linear-shift"):
        values, vectors = torch.linalg.eigh(spread)
        values = values.clamp(min=0)
        size, rotated = values.mean(), vectors.T @ crossed

        def weight(strength: float) -> Tensor:
            damped = (values + strength * size)[:, None]
            found: Tensor = torch.where(damped > 0, rotated / damped, 0.0).T @ vectors.T
            return found
    else:

        def weight(strength: float) -> Tensor:
            return nothing

    def solve(strength: float) -> Change:
        found = nothing if math.isinf(strength) else weight(strength)
        return Change(found, mean_e - found @ mean_x, strength)

    return solve


def _left_out(folds: Sequence[Moments]) -> Iterator[tuple[Moments, Moments]]:
    """(the others together, the one) for each fold."""
    for left in range(len(folds)):
        others = [fold for number, fold in enumerate(folds) if number != left]
        total = others[0]
        for fold in others[1:]:
            total = total + fold
        yield total, folds[left]


def fit(folds: Sequence[Moments], form: Form) -> Change:
    """The change of ``form`` that least squares finds, its ridge chosen by the error on folds that were left out.

    ``scale`` and ``linear`` have no bias. Shapes of the folds: F features and C changes, F = C unless ``linear-shift``.
    """
    strengths = STRENGTHS if form != "shift" else (math.inf,)
    errors = dict.fromkeys(strengths, 0.0)
    if len(strengths) > 1:
        for others, one in _left_out(folds):
            solve = _solver(others, form)
            for strength in strengths:
                errors[strength] += one.wanted * one.error_with(solve(strength))
    total = folds[0]
    for fold in folds[1:]:
        total = total + fold
    return _solver(total, form)(min(strengths, key=lambda strength: errors[strength]))
