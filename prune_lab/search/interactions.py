"""Which blocks stand in for each other: main effects and pairwise terms, fitted to the measured impacts of plans.

Assumption: near the budget the impact of a plan is a sum of effects of blocks plus effects of a few pairs. Both the
strength of the ridge penalty (Hoerl and Kennard 1970) and the number of pairs are chosen by cross-validation, and the
figures of merit come from plans that took no part in any of these choices (nested cross-validation).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from prune_lab.errors import DataError
from prune_lab.plans import PruningPlan
from prune_lab.search.effects import Effects, Pair

_STRENGTHS = tuple(10.0**power for power in range(-4, 4))  # of the penalty, per plan
_FOLDS = 5
LEAST_PLANS = 4 * _FOLDS

Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class InteractionFit:
    """Effects fitted to measured plans, and how well plans that were held out are predicted.

    ``r2`` is 1 - (mean squared error) / (variance), ``rank_correlation`` Spearman's of prediction and measurement, both
    over all plans, each predicted by a fit without it. ``additive_r2`` and ``additive_rank_correlation`` are the same
    without pairs. NaN where the measurements do not differ. ``strength`` is the penalty chosen for ``effects``.
    """

    effects: Effects
    r2: float
    rank_correlation: float
    additive_r2: float
    additive_rank_correlation: float
    strength: float
    plans: int

    @property
    def pairs(self) -> tuple[tuple[str, str, float], ...]:
        """(block, block, effect) of the pairs that matter, largest effect first."""
        named = [(min(pair), max(pair), effect) for pair, effect in self.effects.interactions.items()]
        return tuple(sorted(named, key=lambda row: -abs(row[2])))


def fit_interactions(
    plans: Sequence[PruningPlan],
    impacts: Sequence[float] | NDArray[np.float64],
    *,
    prior: Mapping[str, float] | None = None,
    most_pairs: int = 32,
    seed: int = 0,
) -> InteractionFit:
    """Main effects and up to ``most_pairs`` pairwise terms that predict the ``impacts`` (plans,) of ``plans``.

    ``prior`` holds impacts of blocks measured alone: the fit then learns one factor for all of them and what they miss,
    and blocks that no plan removes keep their prior. Without it such blocks get no effect at all, and the solver
    asks for them. Pairs are screened by their correlation with what the main effects leave over. Use the ``effects``
    as the scores of ``search_plans``; far from the budget that was sampled they say little.
    Raises DataError for fewer than 20 plans, impacts that are not finite, or plans of several architectures.
    """
    values = np.asarray(impacts, dtype=np.float64)
    if len(plans) < LEAST_PLANS or values.shape != (len(plans),) or not np.isfinite(values).all():
        raise DataError(
            f"asked to fit interactions to {len(plans)} plans, found impacts of shape {values.shape}, "
            f"{int(np.isfinite(values).sum())} of them finite; give at least {LEAST_PLANS} plans with an impact each"
        )
    if len({plan.architecture for plan in plans}) > 1:
        raise DataError("asked to fit interactions, found plans of several architectures; keep those of one")
    names = sorted({name for plan in plans for name in plan.removed} | set(prior or {}))
    removed = np.array([[name in plan.removed for name in names] for plan in plans], dtype=np.float64)
    known = None if prior is None else np.array([prior.get(name, 0.0) for name in names])
    sizes = sorted({0, *(size for size in (1, 2, 4, 8, 16, 32, 64, 128) if size < most_pairs), most_pairs})
    folds = _folds(len(plans), seed)
    merits = [_held_out(removed, values, known, chosen, folds, seed) for chosen in (sizes, [0])]
    size, strength = _choice(removed, values, known, sizes, seed)
    model = _fitted(removed, values, known, size, [strength])
    seen = removed.max(axis=0) > 0
    main, pairs = model.main[0], model.pair[0]
    effects = Effects(
        {name: float(main[i]) for i, name in enumerate(names) if seen[i] or name in (prior or {})},
        {
            Pair({names[a], names[b]}): float(effect)
            for (a, b), effect in zip(model.pairs, pairs, strict=True)
        },
        float(model.offset[0]),
    )
    return InteractionFit(effects, *merits[0], *merits[1], strength, len(plans))


# Fitting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Model:
    """Fits for a series of penalties: offsets (s,), main effects (s, blocks), pair effects (s, pairs)."""

    offset: Matrix
    main: Matrix
    pair: Matrix
    pairs: tuple[tuple[int, int], ...]

    def predict(self, removed: Matrix) -> Matrix:
        """(s, plans) impacts."""
        found: Matrix = (
            self.offset[:, None] + self.main @ removed.T + self.pair @ _products(removed, self.pairs).T
        )
        return found


def _products(removed: Matrix, pairs: Sequence[tuple[int, int]]) -> Matrix:
    """(plans, pairs) 1 where both blocks of a pair are gone."""
    first, second = ([pair[side] for pair in pairs] for side in (0, 1))
    found: Matrix = removed[:, first] * removed[:, second]
    return found


def _fitted(
    removed: Matrix, values: Matrix, known: Matrix | None, size: int, strengths: Sequence[float]
) -> _Model:
    """Ridge fits with the ``size`` pairs that correlate most with what main effects leave over."""
    factor = 0.0
    if known is not None:
        alone = removed @ known
        spread = float(((alone - alone.mean()) ** 2).sum())
        factor = float((alone - alone.mean()) @ values) / spread if spread > 0 else 1.0
        values = values - factor * alone
    pairs = _screened(removed, values, size) if size else ()
    columns = np.hstack([removed, _products(removed, pairs)])
    weights, offsets = _ridge(columns, values, strengths)
    main = weights[:, : removed.shape[1]]
    if known is not None:
        main = main + factor * known
    return _Model(offsets, main, weights[:, removed.shape[1] :], pairs)


def _ridge(columns: Matrix, values: Matrix, strengths: Sequence[float]) -> tuple[Matrix, Matrix]:
    """(s, columns) weights and (s,) offsets of least squares + strength * plans * |weights|^2; offsets are free."""
    means, mean = columns.mean(axis=0), values.mean()
    left, sizes, right = np.linalg.svd(columns - means, full_matrices=False)
    projected = left.T @ (values - mean)
    penalties = np.array(strengths)[:, None] * len(values)
    weights: Matrix = (sizes / (sizes**2 + penalties) * projected) @ right
    return weights, mean - weights @ means


def _screened(removed: Matrix, values: Matrix, size: int) -> tuple[tuple[int, int], ...]:
    """The pairs whose products correlate most with the residual, both free of main effects; constant ones never."""
    every = list(itertools.combinations(range(removed.shape[1]), 2))
    products = _products(removed, every)
    design = np.hstack([np.ones((len(removed), 1)), removed])
    # A little ridge keeps the residual from vanishing where there are hardly more plans than blocks.
    gram = design.T @ design + 1e-2 * len(removed) * np.diag([0.0] + [1.0] * removed.shape[1])
    solved = np.linalg.solve(gram, design.T)
    residual = values - design @ (solved @ values)
    products = products - design @ (solved @ products)
    norms = np.linalg.norm(products, axis=0)
    useful = norms > 1e-6 * math.sqrt(len(removed))
    strength = np.where(useful, np.abs(products.T @ residual) / np.where(useful, norms, 1.0), -1.0)
    best = np.argsort(-strength, kind="stable")[:size]
    return tuple(every[place] for place in best if strength[place] > 0)


# Choosing and judging --------------------------------------------------------------------------------------------


def _folds(count: int, seed: int) -> NDArray[np.int64]:
    """(plans,) the fold of each, evenly filled."""
    return np.random.default_rng(seed).permutation(np.arange(count) % _FOLDS)


def _choice(
    removed: Matrix, values: Matrix, known: Matrix | None, sizes: Sequence[int], seed: int
) -> tuple[int, float]:
    """The number of pairs and the penalty of least cross-validated squared error; pairs are screened in each fold."""
    folds = _folds(len(values), seed + 1)
    errors = np.zeros((len(sizes), len(_STRENGTHS)))
    for fold in range(_FOLDS):
        out = folds == fold
        for place, size in enumerate(sizes):
            model = _fitted(removed[~out], values[~out], known, size, _STRENGTHS)
            errors[place] += ((model.predict(removed[out]) - values[out]) ** 2).sum(axis=1)
    best = int(errors.argmin())
    return sizes[best // len(_STRENGTHS)], _STRENGTHS[best % len(_STRENGTHS)]


def _held_out(
    removed: Matrix,
    values: Matrix,
    known: Matrix | None,
    sizes: Sequence[int],
    folds: NDArray[np.int64],
    seed: int,
) -> tuple[float, float]:
    """R2 and rank correlation of predictions for each fold by a fit, choices included, to the others."""
    predicted = np.zeros(len(values))
    for fold in range(_FOLDS):
        out = folds == fold
        size, strength = _choice(removed[~out], values[~out], known, sizes, seed)
        model = _fitted(removed[~out], values[~out], known, size, [strength])
        predicted[out] = model.predict(removed[out])[0]
    if np.ptp(values) == 0 or np.ptp(predicted) == 0:
        return math.nan, math.nan
    r2 = 1 - float(((predicted - values) ** 2).sum() / ((values - values.mean()) ** 2).sum())
    return r2, float(spearmanr(predicted, values).statistic)
