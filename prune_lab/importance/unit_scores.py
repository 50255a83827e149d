"""The importance of units of widths: norm groups, heads, channels of feed-forwards; all sites of a model at once.

A unit's gate multiplies it at the narrow point, where the next layer reads it: at 1 the model works as usual, at 0 it
is the model without the unit. One backward pass gives the derivative by all gates of all sites, in each row of a batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from prune_lab.blocks import Architecture
from prune_lab.errors import DataError, UnknownCriterionError
from prune_lab.families import Site, cut_tensors
from prune_lab.importance.context import ScoringContext
from prune_lab.importance.hooks import only_requires_grad
from prune_lab.importance.intervals import Floats
from prune_lab.prefix_sharing import ComputeCost
from prune_lab.probes import evaluating
from prune_lab.runtime import seeded
from prune_lab.schemas import WIDTH_SCORE_COLUMNS
from prune_lab.width.graph import (
    Estimator,
    dependency_graph,
    magnitude_estimator,
    taylor_estimator,
    unit_importance,
)

_ROWS = 8  # per batch if the context does not say; few, because a backward pass keeps all activations


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class UnitScores:
    """What a criterion says of the units of ``sites``: ``values`` (U, R) of all their units in turn, in R columns.

    ``samples`` is the number of rows of the probe that were looked at; 0 for a criterion that looks at none.

    The impact of a unit is the sum of its values divided by the sum of ``scales`` (R,); impacts of units add up to that
    of a cut as far as units do not interact.
    """

    criterion: str
    sites: tuple[Site, ...]
    values: Floats
    scales: Floats
    samples: int
    compute: ComputeCost

    @property
    def impacts(self) -> Mapping[Site, Floats]:
        """(units,) impacts by site."""
        impacts = self.values.sum(1) / self.scales.sum()
        ends = np.cumsum([site.count for site in self.sites])[:-1]
        return dict(zip(self.sites, np.split(impacts, ends), strict=True))


# Gates ---------------------------------------------------------------------------------------------------------------


def _gating(gate: Tensor, size: int, channels_first: bool) -> Any:
    """A hook that multiplies a layer's input by ``gate`` (N, units), each for ``size`` channels."""

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        state: Tensor = args[0]
        spread = gate.to(state.dtype).repeat_interleave(size, dim=1)
        # Rows of the batch may be several in turn, as where attention is inside one frame of a film.
        spread = spread.repeat_interleave(state.shape[0] // len(spread), dim=0)
        between = [1] * (state.ndim - 2)
        form = (len(spread), -1, *between) if channels_first else (len(spread), *between, spread.shape[1])
        return (state * spread.reshape(form), *args[1:])

    return hook


@contextlib.contextmanager
def units_gated(model: Any, gates: Mapping[Site, Tensor]) -> Iterator[None]:
    """Context in which the units of each site are multiplied by their gates (N, units), a row for each of the batch."""
    with contextlib.ExitStack() as hooks:
        for site, gate in gates.items():
            for path in site.narrow:
                layer = model.get_submodule(path)
                hook = _gating(gate, site.size, isinstance(layer, nn.Conv2d))
                hooks.enter_context(layer.register_forward_pre_hook(hook))
        yield


def _derivatives(
    context: ScoringContext, sites: Sequence[Site], objective: Callable[[Tensor, slice], Tensor]
) -> tuple[Floats, ComputeCost]:
    """(U, R) derivative of ``objective`` by the gate of each unit, in each row of the probe."""
    model, probe = context.model, context.probe
    found = np.empty((sum(site.count for site in sites), len(probe)))
    compute = ComputeCost(forward_macs=context.architecture.total_macs)
    with only_requires_grad(model, ()), evaluating(model):
        for rows, inputs in probe.batches(context.batch or _ROWS, model):
            count = rows.stop - rows.start
            gates = {
                site: torch.ones(count, site.count, device=model.device, requires_grad=True) for site in sites
            }
            with torch.enable_grad(), units_gated(model, gates):
                prediction = probe.predicted(rows, model, inputs)
                value = objective(prediction.float(), rows).sum()
                gradients = torch.autograd.grad(value, list(gates.values()))
            found[:, rows] = torch.cat(gradients, dim=1).T.double().cpu().numpy()
            compute.macs += 2 * compute.forward_macs * count
    return found, compute


def gate_fisher(context: ScoringContext, sites: Sequence[Site]) -> UnitScores:
    """Squared derivative of the prediction by the unit's gate, estimated with a random projection.

    Measures: the mean squared change of the prediction relative to its mean square, if the prediction were a linear
    function of the gate, as gate-fisher of blocks does.
    Reads as: an estimate of output-mse without the unit.
    Misleads when: many units of one site leave, whose parts make up for each other; or when samples are few.
    Cost: two forward-equivalents for all units of all sites together.
    Reference: Theis et al., arXiv:1801.05787 (Fisher pruning).
    """
    probe = context.probe
    noise = torch.randn(probe.target.shape, generator=seeded(context.seed))
    squares = np.empty(len(probe))

    def objective(prediction: Tensor, rows: slice) -> Tensor:
        squares[rows] = prediction.detach().double().square().flatten(1).mean(1).cpu().numpy()
        return (prediction * noise[rows].to(prediction.device)).flatten(1).sum(1)

    derivatives, compute = _derivatives(context, sites, objective)
    values = derivatives**2 / probe.target[0].numel()
    return _checked("gate-fisher", sites, values, squares, len(probe), compute)


def gate_gradient(context: ScoringContext, sites: Sequence[Site]) -> UnitScores:
    """Absolute derivative of the denoising loss by the unit's gate.

    Measures: how fast the loss changes when the unit is scaled down a little (first order).
    Reads as: the change of the loss without the unit, if the loss were a linear function of the gate.
    Misleads when: the loss is not linear in the gate; training has made first derivatives small.
    Cost: two forward-equivalents for all units of all sites together.
    Reference: Molchanov et al., arXiv:1906.10771 (gates).
    """
    derivatives, compute = _derivatives(context, sites, context.probe.denoising_error)
    samples = len(context.probe)
    return _checked("gate-gradient", sites, np.abs(derivatives), np.ones(samples), samples, compute)


# Weights -------------------------------------------------------------------------------------------------------------


def _by_torch_pruning(
    context: ScoringContext,
    sites: Sequence[Site],
    name: str,
    estimator: Estimator,
    samples: int,
    compute: ComputeCost,
) -> UnitScores:
    """One value for each unit, by torch-pruning's groups of the tensors that hang together."""
    graph = dependency_graph(context.model)
    values = [unit_importance(graph, context.model, site, estimator) for site in sites]
    together = torch.cat(values).cpu().numpy()[:, None]
    return _checked(name, sites, together, np.ones(1), samples, compute)


def magnitude(context: ScoringContext, sites: Sequence[Site]) -> UnitScores:
    """Sum of the squares of all weights that leave with the unit.

    Measures: the size of the weights; no samples are used.
    Reads as: larger, larger weights; comparable within a site, and between sites only as far as weights are alike.
    Misleads when: layers are followed by a norm, which takes the size of weights away.
    Cost: a forward pass, by which torch-pruning finds what leaves together.
    Reference: torch-pruning's GroupMagnitudeImportance (DepGraph, arXiv:2301.12900), sums that are not normalised.
    """
    return _by_torch_pruning(
        context,
        sites,
        "magnitude",
        magnitude_estimator(),
        0,
        ComputeCost(forward_macs=context.architecture.total_macs),
    )


@contextlib.contextmanager
def loss_gradients(context: ScoringContext, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, each of ``weights`` of the model carries the gradient of the mean denoising loss of the probe; what it
    carried before is back on exit.
    """
    model, probe = context.model, context.probe
    before = [weight.grad for weight in weights]
    try:
        gradients = [torch.zeros_like(weight) for weight in weights]
        with only_requires_grad(model, weights), evaluating(model), torch.enable_grad():
            for rows, inputs in probe.batches(context.batch or _ROWS, model):
                prediction = probe.predicted(rows, model, inputs).float()
                loss = probe.denoising_error(prediction, rows).sum() / len(probe)
                torch._foreach_add_(gradients, torch.autograd.grad(loss, weights))
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        yield
    finally:
        for weight, was in zip(weights, before, strict=True):
            weight.grad = was


def taylor(context: ScoringContext, sites: Sequence[Site]) -> UnitScores:
    """Sum over all weights that leave with the unit of the size of weight times gradient of the denoising loss.

    Measures: how much the loss changes when single weights are set to 0 (first order), by the mean gradient.
    Reads as: larger, more effect; the number says nothing about the size of the change of the prediction.
    Misleads when: effects of weights cancel, which a sum of sizes ignores.
    Cost: three forward-equivalents, and a forward pass by which torch-pruning finds what leaves together.
    Reference: torch-pruning's GroupTaylorImportance; arXiv:1906.10771.
    """
    names = {name for site in sites for name in cut_tensors(context.model, site)}
    weights = [parameter for name, parameter in context.model.named_parameters() if name in names]
    forward_macs = context.architecture.total_macs
    compute = ComputeCost(macs=3 * len(context.probe) * forward_macs, forward_macs=forward_macs)
    with loss_gradients(context, weights):
        return _by_torch_pruning(context, sites, "taylor", taylor_estimator(), len(context.probe), compute)


def random_units(context: ScoringContext, sites: Sequence[Site]) -> UnitScores:
    """A random number between 0 and 1 from the seed and the name of the unit: a control for the other criteria.

    Measures: nothing.
    Reads as: how well an order agrees with another one by chance.
    Misleads when: one seed is taken for the distribution; use several.
    Cost: no forward pass.
    Reference: the random baseline that is usual in pruning studies.
    """

    def number(site: Site, unit: int) -> float:
        digest = hashlib.sha256(f"{context.seed}:{site.name}:{unit}".encode()).digest()
        return int.from_bytes(digest[:6], "big") / 2**48

    values = np.array([[number(site, unit)] for site in sites for unit in range(site.count)])
    compute = ComputeCost(forward_macs=context.architecture.total_macs)
    return UnitScores("random", tuple(sites), values, np.ones(1), 0, compute)


def _checked(
    name: str, sites: Sequence[Site], values: Floats, scales: Floats, samples: int, compute: ComputeCost
) -> UnitScores:
    """The scores. Raises DataError naming the first site with a value that is not finite."""
    start = 0
    for site in sites:
        if not np.isfinite(values[start : start + site.count]).all():
            raise DataError(
                f"asked for {name} of {site.name}, found values that are not finite; score in float32, or check the "
                "weights"
            )
        start += site.count
    return UnitScores(name, tuple(sites), values, scales, samples, compute)


UnitCriterion = Callable[[ScoringContext, Sequence[Site]], UnitScores]

UNIT_CRITERIA: dict[str, UnitCriterion] = {
    "gate-fisher": gate_fisher,
    "gate-gradient": gate_gradient,
    "taylor": taylor,
    "magnitude": magnitude,
    "random": random_units,
}


def score_units(
    context: ScoringContext, sites: Sequence[Site] | None = None, criterion: str = "gate-fisher"
) -> UnitScores:
    """The impact of each unit of ``sites`` (None: all of the model) by one criterion.

    Raises UnknownCriterionError, and DataError when a value is not finite.
    """
    if criterion not in UNIT_CRITERIA:
        raise UnknownCriterionError(
            f"no criterion of units is called {criterion!r}; choose one of: {', '.join(UNIT_CRITERIA)}"
        )
    return UNIT_CRITERIA[criterion](context, context.architecture.sites if sites is None else sites)


# Tables ---------------------------------------------------------------------------------------------------------------


def width_scores_frame(scores: UnitScores, model: str = "") -> pd.DataFrame:
    """One row per unit of each site, columns WIDTH_SCORE_COLUMNS; units count from 0."""
    rows = [
        (
            site.name,
            site.block,
            site.kind,
            unit,
            site.size,
            impact,
            scores.criterion,
            scores.samples,
            model,
        )
        for site, impacts in scores.impacts.items()
        for unit, impact in enumerate(impacts.tolist())
    ]
    return pd.DataFrame(rows, columns=list(WIDTH_SCORE_COLUMNS))


def unit_impacts_from(frame: pd.DataFrame, architecture: Architecture) -> dict[Site, Floats]:
    """(units,) impacts by site, of the rows of ``width_scores_frame`` or its CSV, for the model they were made for.

    Raises DataError for a site that is not there, or whose units are others.
    """
    sites = {site.name: site for site in architecture.sites}
    found: dict[Site, Floats] = {}
    for name, rows in frame.groupby("site", sort=False):
        site = sites.get(str(name))
        if site is None or rows["unit"].tolist() != list(range(site.count)):
            there = 0 if site is None else site.count
            raise DataError(
                f"asked to read the scores of {name}, found {len(rows)} units where this model has {there}; score it "
                "again"
            )
        found[site] = rows["score"].to_numpy(np.float64)
    return {site: found[site] for site in architecture.sites if site in found}
