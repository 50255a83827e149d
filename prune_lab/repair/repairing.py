"""Repair of a pruned model before any training: closed-form corrections at its cuts, folded into its weights.

Cuts are repaired in order of execution; each is fitted on the student with all earlier repairs. The fit uses sums over
the pixels of the fitted rows of a probe; whether a correction is kept is decided by the student's prediction on
held-out rows. Activations are taken from the student and not from the teacher with bypassed blocks: both compute the
same bit for bit, but only the student's weights may change.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import pandas as pd
from diffusers import ModelMixin
from torch import Tensor, nn

from prune_lab.blocks import architecture_of
from prune_lab.errors import ConfigError, DataError, PlanError
from prune_lab.forms import layout_of
from prune_lab.importance.outputs import mean_square
from prune_lab.plans import PruningPlan
from prune_lab.probes import Probe, predict
from prune_lab.repair.activations import FitPoint, corrected, layer_moments_at, moments_at, restored
from prune_lab.repair.cuts import Cut, Narrowing, find_cuts, find_narrowings, student_paths, teacher_paths
from prune_lab.repair.fitting import Correction, Form, Moments, fit
from prune_lab.repair.folding import (
    MOST_UNKNOWNS,
    CorrectionKind,
    Side,
    fold,
    folded_parameters,
    refit_layer,
    why_not,
)
from prune_lab.repair.reports import Repair, RepairKind, RepairReport
from prune_lab.runtime import track

_FOLDS = 4  # of the cross-validation that chooses the ridge
_HELD_OUT = 3  # every third picture is held out
_NOT_NEARER = "the prediction on held-out rows does not come nearer to the teacher's"
_FORMS: dict[tuple[Side, CorrectionKind], Form] = {
    ("before", "shift"): "shift",
    ("before", "scale-shift"): "scale-shift",
    ("before", "linear"): "linear-shift",
    ("before", "refit"): "linear-shift",
    ("after", "scale-shift"): "scale",
    ("after", "linear"): "linear",
}


# Fitted rows and held-out rows --------------------------------------------------------------------------------------


def _rows_of(probe: Probe, pictures: Sequence[int]) -> Probe:
    return probe.rows(np.flatnonzero(np.isin(probe.pictures.numpy(), pictures)).tolist())


def _split(probe: Probe, heldout: Probe | None) -> tuple[Probe, list[int], Probe]:
    """(rows to fit on, the fold of each of them, held-out rows); no picture is in two folds or two of these parts."""
    earliest = pd.Series(probe.timesteps.numpy()).groupby(probe.pictures.numpy()).min()
    # In the order of their earliest timesteps, so that every third picture covers the whole schedule.
    pictures = earliest.sort_values(kind="stable").index.tolist()
    least = _HELD_OUT if heldout is None else 2
    if len(pictures) < least:
        raise DataError(
            f"asked to repair with a probe of {len(pictures)} pictures, found too few to fit on some and hold out "
            f"others; give at least {least}, better 64"
        )
    if heldout is None:
        heldout = _rows_of(probe, pictures[1::_HELD_OUT])
        del pictures[1::_HELD_OUT]
    fold_of = {picture: number % min(_FOLDS, len(pictures)) for number, picture in enumerate(pictures)}
    fitted = _rows_of(probe, pictures)
    return fitted, [fold_of[picture] for picture in fitted.pictures.tolist()], heldout


# One cut after the other --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Setup:
    """Student and teacher, and the rows on which they are fitted and compared."""

    student: ModelMixin
    teacher: ModelMixin
    student_paths: Mapping[str, str]  # module path of each unit
    teacher_paths: Mapping[str, str]
    fitted: Probe
    folds: Sequence[int]  # of the fitted rows
    heldout: Probe
    prediction: Tensor  # (N, C, H, W) of the teacher on the held-out rows
    batch: int

    def unit(self, name: str) -> nn.Module | None:
        path = self.student_paths.get(name)
        return None if path is None else self.student.get_submodule(path)

    def impact(self) -> float:
        """The output-mse (see ``importance``) of the student in its current state, on the held-out rows."""
        prediction = predict(self.student, self.heldout, batch=self.batch).double()
        return float(mean_square(prediction - self.prediction).sum() / mean_square(self.prediction).sum())

    def moments(self, cut: Cut, side: Side, refit: bool) -> tuple[list[Moments], Moments]:
        """(the moments of each fold of the fitted rows, those of the held-out rows)."""
        # Before the cut, one tensor serves all consumers. The least-squares fit to all of their targets is the fit to
        # the mean of the targets.
        consumers = cut.consumers if side == "before" else (cut.main,)
        point = FitPoint(
            student_path=self.student_paths[cut.before if side == "before" else cut.after],
            side=side,
            teacher_paths=tuple(self.teacher_paths[one.teacher_source] for one in consumers),
            refit=refit,
        )
        models = (self.student, self.teacher)
        folds = moments_at(*models, point, self.fitted, self.folds, batch=self.batch)
        (heldout,) = moments_at(*models, point, self.heldout, [0] * len(self.heldout), batch=self.batch)
        return folds, heldout


def _options(setup: _Setup, cut: Cut, choice: RepairKind) -> list[Repair]:
    """The corrections to try at the cut: first before it, then after it, on the result of the first.

    The reason of a correction is why it has no exact fold there; empty when it has one.
    """

    def option(side: Side, kind: CorrectionKind, obstacle: str) -> Repair:
        return Repair(cut, kind, side, folds=not obstacle, applied=False, reason=obstacle)

    kinds: tuple[CorrectionKind, ...] = get_args(CorrectionKind) if choice == "best" else (choice,)
    before: list[Repair] = []
    after: list[Repair] = []
    for kind in kinds:
        obstacle = why_not(kind, "before", setup.unit(cut.before), cut.before)
        if ("after", kind) in _FORMS and (obstacle or choice == "best"):
            obstacle_after = why_not(kind, "after", setup.unit(cut.after), cut.after)
            if not obstacle_after:
                after.append(option("after", kind, ""))
            elif obstacle:
                obstacle = f"{obstacle}; {obstacle_after}"
        before.append(option("before", kind, obstacle))
    if not any(one.folds for one in before):
        before.append(option("before", "shift", ""))
    return before + after


def _impact_with(setup: _Setup, option: Repair, correction: Correction) -> float:
    """The impact with ``correction`` in the option's unit: folded, or by a hook if it does not fold; undone after."""
    unit = setup.unit(option.unit)
    assert unit is not None
    if not option.folds:
        with corrected(unit, option.side, correction):
            return setup.impact()
    with restored(folded_parameters(unit)):
        fold(unit, option.kind, option.side, correction)
        return setup.impact()


def _repair_side(setup: _Setup, options: Iterable[Repair], impact: float) -> list[Repair]:
    """The results of the ``options`` of one side; the best is folded into the student if it lowers the ``impact``."""
    repairs: list[Repair] = []
    best: tuple[Repair, Correction] | None = None
    lowest = impact
    moments: dict[bool, tuple[list[Moments], Moments]] = {}  # by whether they are those of a refit
    for option in options:
        refit = option.kind == "refit"
        if refit and not option.folds:
            repairs.append(option)
            continue
        if refit not in moments:
            assert isinstance(option.cut, Cut)
            moments[refit] = setup.moments(option.cut, option.side, refit)
        folds, heldout = moments[refit]
        correction = fit(folds, _FORMS[option.side, option.kind])
        tried = replace(
            option,
            strength=correction.strength,
            cut_error_before=heldout.error,
            cut_error_after=heldout.error_with(correction),
            impact_before=impact,
            impact_after=_impact_with(setup, option, correction),
        )
        repairs.append(tried)
        if tried.folds and tried.impact_after < lowest:
            best, lowest = (tried, correction), tried.impact_after
    if best is None:
        return [replace(one, reason=one.reason or _NOT_NEARER) for one in repairs]
    kept, correction = best
    unit = setup.unit(kept.unit)
    assert unit is not None
    fold(unit, kept.kind, kept.side, correction)
    return [
        replace(one, applied=True)
        if one is kept
        else replace(
            one,
            reason=one.reason or (_NOT_NEARER if one.impact_after >= impact else f"{kept.kind} is better"),
        )
        for one in repairs
    ]


def _repair_width(setup: _Setup, narrowing: Narrowing, kind: RepairKind, impact: float) -> Repair:
    """The refit of the layer that reads what is left of a width; it stays in the student if it lowers the ``impact``.

    The block's later layers are fed by it alone, so it folds exactly: only its own weights change.
    """
    layer: Any = setup.student.get_submodule(narrowing.student_path)
    unknowns = layer.weight[0].numel()
    obstacle = ""
    if kind not in ("refit", "best"):
        obstacle = f"no {kind} goes into a block that is narrower; a refit does"
    elif unknowns > MOST_UNKNOWNS:
        obstacle = f"the layer has {unknowns:,} inputs; at most {MOST_UNKNOWNS:,} can be fitted"
    tried = Repair(narrowing, "refit", "before", folds=not obstacle, applied=False, reason=obstacle)
    if obstacle:
        return tried
    paths = (narrowing.student_path, narrowing.teacher_path)
    models = (setup.student, setup.teacher)
    folds = layer_moments_at(*models, paths, setup.fitted, setup.folds, batch=setup.batch)
    none = [0] * len(setup.heldout)
    (heldout,) = layer_moments_at(*models, paths, setup.heldout, none, batch=setup.batch)
    correction = fit(folds, "linear" if layer.bias is None else "linear-shift")
    with restored(layer.parameters()):
        refit_layer(layer, correction)
        after = setup.impact()
    if after < impact:
        refit_layer(layer, correction)
    return replace(
        tried,
        applied=after < impact,
        reason="" if after < impact else _NOT_NEARER,
        strength=correction.strength,
        cut_error_before=heldout.error,
        cut_error_after=heldout.error_with(correction),
        impact_before=impact,
        impact_after=after,
    )


def repair(
    student: ModelMixin,
    teacher: ModelMixin,
    plan: PruningPlan,
    probe: Probe,
    *,
    kind: RepairKind = "best",
    heldout: Probe | None = None,
    batch: int = 32,
) -> RepairReport:
    """Change the weights of ``student`` in place so that its predictions come nearer to those of ``teacher``.

    ``student`` is the native model of ``plan``. At each cut a correction of the student's tensor is fitted by least
    squares: a ``shift`` (one number per channel), a ``scale-shift``, a ``linear`` map of the channels, or a ``refit``
    of the last layer before the cut on that layer's own input. If the wanted kind has no exact fold, it is reported
    with the reason, and a weaker kind that folds takes its place. ``best`` tries all kinds and keeps the one that
    lowers the impact most. Where a block is narrower, a refit of the layer that reads what is left is tried, after the
    cuts and in order of execution. A correction that does not lower the impact is not kept. ``teacher`` is not changed;
    equal arguments give equal weights.

    Two thirds of the probe's pictures are fitted on and the others held out; with ``heldout``, all pictures of the
    probe are fitted on, and ``heldout`` holds the held-out rows. The impacts in the report are measured on held-out
    rows, which have also decided what is kept; use other rows to compare plans.

    Raises FormError or PlanError when the plan or the student does not fit, ConfigError for an unknown kind,
    DataError for too few pictures, or a teacher whose predictions are 0 or not finite.
    Source: bias correction, arXiv:1906.04721; reconstruction of a layer's output by least squares, arXiv:1707.06168.
    """
    if kind not in get_args(RepairKind):
        raise ConfigError(
            f"asked for a repair of kind {kind!r}; known kinds are {', '.join(get_args(RepairKind))}"
        )
    architecture = architecture_of(teacher)
    expected = architecture_of(layout_of(architecture, plan).config)
    if architecture_of(student).signature != expected.signature:
        raise PlanError(
            f"asked to repair the student of plan {plan.label}, found a student of another architecture; "
            "give the model that materialise(teacher, plan) returns"
        )
    fitted, folds, heldout = _split(probe, heldout)
    prediction = predict(teacher, heldout, batch=batch).double()
    if not prediction.isfinite().all() or not prediction.any():
        raise DataError(
            "asked to repair with a teacher whose prediction is 0 or not finite; "
            "repair in float32, or check its weights"
        )
    setup = _Setup(
        student=student,
        teacher=teacher,
        student_paths=student_paths(architecture, plan),
        teacher_paths=teacher_paths(architecture),
        fitted=fitted,
        folds=folds,
        heldout=heldout,
        prediction=prediction,
        batch=batch,
    )
    cuts = find_cuts(architecture, plan)
    before = impact = setup.impact()
    repairs: list[Repair] = []
    for cut in track(cuts, "repairing cuts", len(cuts)):
        for _, options in itertools.groupby(_options(setup, cut, kind), key=lambda option: option.side):
            tried = _repair_side(setup, options, impact)
            repairs += tried
            impact = next((one.impact_after for one in tried if one.applied), impact)
    narrowings = find_narrowings(architecture, plan)
    for narrowing in track(narrowings, "repairing widths", len(narrowings)):
        repairs.append(_repair_width(setup, narrowing, kind, impact))
        impact = repairs[-1].impact_after if repairs[-1].applied else impact
    return RepairReport(
        plan=plan,
        kind=kind,
        cuts=cuts,
        repairs=tuple(repairs),
        fitted_rows=len(fitted),
        heldout_rows=len(heldout),
        impact_before=before,
        impact_after=impact,
    )
