"""What a search measures of plans: the impact as they are cut, or after the repair of their cuts; and what it costs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from prune_lab.blocks import Architecture, BlockGroup
from prune_lab.importance import ScoringContext, score
from prune_lab.repair import RepairKind, SharedRepair
from prune_lab.session import Session, ensure_probe, run_scoring_context


class OneShot:
    """The impact of sets of blocks by output-mse, before anything is mended; an ``ImpactOf``."""

    def __init__(self, context: Callable[[], ScoringContext]) -> None:
        self._context = functools.cache(
            context
        )  # loaded when first called: the exact solver measures nothing
        self.forwards = 0.0
        """What was run so far, in passes of the whole model over the whole probe."""

    def __call__(self, sets: Sequence[frozenset[str]]) -> NDArray[np.float64]:
        """(sets,) impacts, one walk shared by all."""
        groups = [BlockGroup(" ".join(sorted(removed)), "plan", tuple(sorted(removed))) for removed in sets]
        context = self._context()
        table = score(context, groups, "output-mse", bootstrap=0)
        if table.compute is not None:
            self.forwards += table.compute.forwards / len(context.probe)
        return table.impacts


class Repaired:
    """The impact of sets of blocks after the closed-form repair of their cuts, on held-out rows; an ``ImpactOf``."""

    def __init__(self, shared: Callable[[], SharedRepair]) -> None:
        self._shared = functools.cache(shared)
        self.forwards = 0.0
        """What was run so far, the fits included, in passes of the whole model over the whole probe."""

    def __call__(self, sets: Sequence[frozenset[str]]) -> NDArray[np.float64]:
        """(sets,) impacts, one walk shared by all."""
        shared = self._shared()
        impacts = shared.impact_of(sets)
        self.forwards = shared.forwards
        return impacts


Objective = OneShot | Repaired


def repair_in_search(architecture: Architecture, asked: str) -> RepairKind:
    """The kind of repair in a search: ``auto`` is the cheapest that maps what a model's units give.

    In a U-Net a linear map of the channels folds at many cuts; into a transformer's blocks only a refit does.
    """
    if asked == "auto":
        return "linear" if architecture.family.component == "unet" else "refit"
    return asked  # type: ignore[return-value]  # the settings have checked it


def one_shot(session: Session) -> OneShot:
    """The impact on the run's probe; repeats are cached."""
    return OneShot(lambda: run_scoring_context(session))


def objective_of(session: Session) -> Objective:
    """What ``search.objective`` names."""
    settings = session.config.search
    if settings.objective == "impact":
        return one_shot(session)
    kind, batch = repair_in_search(session.architecture, settings.repair), session.config.score.batch or 32
    return Repaired(lambda: SharedRepair(session.model, ensure_probe(session), kind=kind, batch=batch))
