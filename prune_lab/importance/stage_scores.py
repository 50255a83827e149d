"""What stays of stages that get narrower: by Taylor, by the size of weights, or by chance as a control."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from prune_lab.errors import UnknownCriterionError
from prune_lab.importance.context import ScoringContext
from prune_lab.importance.unit_scores import loss_gradients
from prune_lab.runtime import seeded
from prune_lab.width.graph import Estimator, magnitude_estimator, taylor_estimator


@contextlib.contextmanager
def _by_taylor(context: ScoringContext) -> Iterator[Estimator]:
    """By the first-order change of the denoising loss (torch-pruning's GroupTaylorImportance, arXiv:1906.10771)."""
    with loss_gradients(context, list(context.model.parameters())):
        yield taylor_estimator()


@contextlib.contextmanager
def _by_magnitude(_context: ScoringContext) -> Iterator[Estimator]:
    """By the squares of weights (torch-pruning's GroupMagnitudeImportance, arXiv:2301.12900)."""
    yield magnitude_estimator()


@contextlib.contextmanager
def _by_chance(context: ScoringContext) -> Iterator[Estimator]:
    """Numbers of the seed, in the order in which groups are asked for."""
    generator = seeded(context.seed)

    def drawn(group: object) -> Tensor:
        return torch.rand(len(group[0].idxs), generator=generator)  # type: ignore[index]

    yield drawn


STAGE_CRITERIA: Mapping[str, Callable[[ScoringContext], contextlib.AbstractContextManager[Estimator]]] = {
    "taylor": _by_taylor,
    "magnitude": _by_magnitude,
    "random": _by_chance,
}


def stage_estimator(
    context: ScoringContext, criterion: str = "taylor"
) -> contextlib.AbstractContextManager[Estimator]:
    """A context that gives what ``width.narrowed_stages`` chooses by, while the model of ``context`` carries what it
    needs for that. Raises UnknownCriterionError for another criterion.
    """
    if criterion not in STAGE_CRITERIA:
        raise UnknownCriterionError(
            f"no criterion of stage widths is called {criterion!r:.60}; choose one of: {', '.join(STAGE_CRITERIA)}"
        )
    return STAGE_CRITERIA[criterion](context)
