"""Widths in a run: what the parts of blocks are worth, which plans have them, and what such a plan costs the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from prune_lab.blocks import Architecture
from prune_lab.config import RunConfig, SearchConfig
from prune_lab.config.axes import SAME_SCALE, check_axes_fit, searches_widths
from prune_lab.errors import PlanError, UnknownCriterionError
from prune_lab.families import Form, Site
from prune_lab.forms import form_named
from prune_lab.importance import (
    UNIT_CRITERIA,
    ImportanceTable,
    score_units,
    unit_impacts_from,
    width_scores_frame,
)
from prune_lab.importance.intervals import Floats
from prune_lab.importance.outputs import mean_square
from prune_lab.models import configured_model
from prune_lab.plans import PruningPlan, chosen_units
from prune_lab.probes import predict
from prune_lab.runs import read_records
from prune_lab.runtime import write_frame
from prune_lab.schemas import WIDTH_SCORES
from prune_lab.search import predicted_impact, predicted_loss
from prune_lab.session import Session, ensure_probe, run_scoring_context
from prune_lab.session.parts import lacking, record, width_scores_part
from prune_lab.surgery import bypassed


def needs_width_scores(config: RunConfig) -> bool:
    """Whether the search of a run reads what parts of blocks are worth."""
    return bool(config.search.budgets) and searches_widths(config.search)


def form_of(settings: SearchConfig) -> Form:
    """The form of plans that are not native: with widths none is, so that ``native`` stands for code of its own."""
    form = form_named(settings.form)
    return "own" if searches_widths(settings) and form == "native" else form


def check_axes(config: RunConfig) -> None:
    """Raise ConfigError for settings of a search of widths that do not fit each other, PlanError for a model without
    any; needs no weights.
    """
    check_axes_fit(config)
    if needs_width_scores(config):
        check_has_sites(configured_model(config).architecture)


def check_has_sites(architecture: Architecture) -> None:
    """Raise PlanError for a model of which no width is known."""
    if not architecture.sites:
        raise PlanError(
            f"asked for the widths of a {architecture.config['_class_name']}, of which none is known; remove whole "
            "blocks of it"
        )


# Scores ----------------------------------------------------------------------------------------------------------


def check_unit_criterion(name: str) -> None:
    """Raise UnknownCriterionError unless parts of blocks can be scored by the criterion ``name``."""
    if name not in UNIT_CRITERIA:
        raise UnknownCriterionError(
            f"no criterion of parts of blocks is called {name!r}; choose one of: {', '.join(UNIT_CRITERIA)}"
        )


def ensure_width_scores(session: Session, criterion: str = "") -> Mapping[Site, Floats]:
    """(units,) scores of the parts of each site by ``criterion`` on the run's probe; writes widths/<criterion>.csv.

    Empty: by ``search.widths``, with which plans are searched.
    """
    criterion = criterion or session.config.search.widths
    run, part = session.run, width_scores_part(session, criterion)
    if not session.manifests.settled(part):
        ensure_probe(session)
    if lacking(session, part):
        check_has_sites(session.architecture)
        scores = score_units(run_scoring_context(session), criterion=criterion)
        write_frame(run.width_scores(criterion), width_scores_frame(scores, session.source.name))
        record(session, part)
    return read_width_scores(session, criterion)


def read_width_scores(session: Session, criterion: str = "") -> Mapping[Site, Floats]:
    """The scores of ``ensure_width_scores``; RunError before they are measured."""
    return unit_impacts_from(width_frame(session, criterion), session.architecture)


def width_frame(session: Session, criterion: str = "") -> pd.DataFrame:
    """The scores of the parts of blocks, a row for each; RunError before they are measured."""
    run, criterion = session.run, criterion or session.config.search.widths
    return read_records(run.needs(run.width_scores(criterion), f"score --widths {criterion}"), WIDTH_SCORES)


def score_notes(config: RunConfig, criterion: str) -> tuple[str, ...]:
    """How scores of parts of blocks by ``criterion`` are read, and whether a search goes by them."""
    read = (
        "a score is an impact, as of whole blocks: 0.01 moves the prediction by a hundredth of its mean square"
        if criterion == SAME_SCALE[1]
        else f"scores by {criterion} put parts in an order; they are no impacts, and do not add up with those of blocks"
    )
    used = config.search.widths
    if criterion == used:
        return (read,)
    return (read, f"a search goes by {used} (search.widths) unless it is told --widths {criterion}")


def width_notes(config: RunConfig) -> tuple[str, ...]:
    """By which scores of parts of blocks plans are searched; empty where they leave no block narrower."""
    if not needs_width_scores(config):
        return ()
    chance = ", which is chance" if config.search.widths == "random" else ""
    return (f"widths were searched by {config.search.widths} of the parts of blocks{chance} (search.widths)",)


# Plans -----------------------------------------------------------------------------------------------------------


def check_chosen(architecture: Architecture, plans: Sequence[PruningPlan]) -> None:
    """Raise PlanError for a plan that says how many units of a site stay, and not which."""
    for plan in plans:
        chosen_units(architecture, plan)


def predicted_of(session: Session, plan: PruningPlan, importance: ImportanceTable) -> float:
    """What the scores of blocks and of their parts add up to; NaN where the parts were not scored on the same scale."""
    found = predicted_impact(plan, importance)
    if not plan.widths:
        return found
    run, scale = session.run, (importance.criterion, session.config.search.widths)
    if scale != SAME_SCALE or not run.done(run.width_scores(scale[1])):
        return math.nan
    return found + predicted_loss(plan, read_width_scores(session))


def measured_impacts(session: Session, plans: Sequence[PruningPlan]) -> list[float]:
    """Mean squared change of the prediction by each whole plan, relative to its mean square: output-mse with widths."""
    if not plans:
        return []
    context = run_scoring_context(session)
    model, probe = context.model, context.probe
    batch: dict[str, int] = {"batch": context.batch} if context.batch else {}
    whole = predict(model, probe, **batch)
    scale, found = float(mean_square(whole).sum()), []
    for plan in plans:
        with bypassed(model, plan):
            change = mean_square(predict(model, probe, **batch).double() - whole.double())
        found.append(float(np.divide(float(change.sum()), scale)))
    return found
