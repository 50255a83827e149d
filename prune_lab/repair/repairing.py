"""Repair of a pruned model before any training: closed-form corrections at its cuts, folded into its weights.

Cuts are repaired in order of execution; each is fitted on the student with all earlier repairs. The fit uses sums over
the pixels of the fitted rows of a probe; whether a correction is kept is decided by the student's prediction on
held-out rows. Activations are taken from the student and not from the teacher with bypassed blocks: both compute the
same bit for bit, but only the student's weights may change.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, get_args

from diffusers import ModelMixin

from prune_lab.blocks import Architecture, architecture_of
from prune_lab.errors import ConfigError, DataError, PlanError
from prune_lab.families.endings import ending_of
from prune_lab.forms import layout_of
from prune_lab.plans import PruningPlan
from prune_lab.probes import Probe, predict
from prune_lab.repair.activations import OtherPlaces, layer_moments_at, restored
from prune_lab.repair.bench import FORMS, Bench, split_rows
from prune_lab.repair.cuts import Cut, Narrowing, find_cuts, find_narrowings, student_paths, teacher_paths
from prune_lab.repair.fitting import Correction, fit
from prune_lab.repair.folding import (
    MOST_UNKNOWNS,
    CorrectionKind,
    Side,
    refit_layer,
    why_not,
)
from prune_lab.repair.reports import Repair, RepairKind, RepairReport
from prune_lab.runtime import track

_OTHER_PLACES = "what stands behind the cut has other pixels or tokens than what stands ahead of it"
_NOT_NEARER = "the prediction on held-out rows does not come nearer to the teacher's"


def _options(bench: Bench, cut: Cut, choice: RepairKind) -> list[Repair]:
    """The corrections to try at the cut: first before it, then after it, on the result of the first.

    The reason of a correction is why it has no exact fold there; empty when it has one.
    """

    def option(side: Side, kind: CorrectionKind, obstacle: str) -> Repair:
        return Repair(cut, kind, side, folds=not obstacle, applied=False, reason=obstacle)

    kinds: tuple[CorrectionKind, ...] = get_args(CorrectionKind) if choice == "best" else (choice,)
    before: list[Repair] = []
    after: list[Repair] = []
    for kind in kinds:
        obstacle = why_not(kind, "before", bench.unit(cut.before), cut.before)
        if ("after", kind) in FORMS and (obstacle or choice == "best"):
            obstacle_after = why_not(kind, "after", bench.unit(cut.after), cut.after)
            if not obstacle_after:
                after.append(option("after", kind, ""))
            elif obstacle:
                obstacle = f"{obstacle}; {obstacle_after}"
        before.append(option("before", kind, obstacle))
    if not any(one.folds for one in before):
        shift = why_not("shift", "before", bench.unit(cut.before), cut.before)
        before = [*before, option("before", "shift", "")] if not shift else before
    return before + after


def _repair_side(bench: Bench, options: Iterable[Repair], impact: float) -> list[Repair]:
    """The results of the ``options`` of one side; the best is folded into the student if it lowers the ``impact``."""
    repairs: list[Repair] = []
    best: tuple[Repair, Correction] | None = None
    lowest = impact
    for option in options:
        # What does not fold is measured all the same, but for what cannot be fitted at the tensor itself.
        if not option.folds and (option.kind == "refit" or not _measurable(bench, option)):
            repairs.append(option)
            continue
        try:
            correction, error_before, error_after = bench.fitted_to(option)
        except OtherPlaces:
            repairs.append(replace(option, folds=False, reason=_OTHER_PLACES))
            continue
        tried = replace(
            option,
            strength=correction.strength,
            cut_error_before=error_before,
            cut_error_after=error_after,
            impact_before=impact,
            impact_after=bench.impact_with(option, correction),
        )
        repairs.append(tried)
        if tried.folds and tried.impact_after < lowest:
            best, lowest = (tried, correction), tried.impact_after
    if best is None:
        return [replace(one, reason=one.reason or _NOT_NEARER) for one in repairs]
    kept, correction = best
    bench.keep(kept, correction)
    return [
        replace(one, applied=True)
        if one is kept
        else replace(
            one,
            reason=one.reason or (_NOT_NEARER if one.impact_after >= impact else f"{kept.kind} is better"),
        )
        for one in repairs
    ]


def _measurable(bench: Bench, option: Repair) -> bool:
    """Whether a correction that does not fold can be tried on the tensor of its unit."""
    unit = bench.unit(option.unit)
    return unit is not None and ending_of(unit) is not None and not bench.gated(option.unit)


def repair_cuts(
    bench: Bench, cuts: Sequence[Cut], kind: RepairKind, impact: float, *, folding: bool = False
) -> tuple[list[Repair], float]:
    """What was tried at each of ``cuts``, in order of execution, and the impact after what was kept.

    ``impact`` is that before; with ``folding`` what cannot be folded is not tried.
    """
    repairs: list[Repair] = []
    for cut in cuts:
        options = [one for one in _options(bench, cut, kind) if one.folds or not folding]
        for _, of_side in itertools.groupby(options, key=lambda option: option.side):
            tried = _repair_side(bench, of_side, impact)
            repairs += tried
            impact = next((one.impact_after for one in tried if one.applied), impact)
    return repairs, impact


def _repair_width(bench: Bench, narrowing: Narrowing, kind: RepairKind, impact: float) -> Repair:
    """The refit of the layer that reads what is left of a width; it stays in the student if it lowers the ``impact``.

    The block's later layers are fed by it alone, so it folds exactly: only its own weights change.
    """
    layer: Any = bench.student.get_submodule(narrowing.student_path)
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
    models = (bench.student, bench.teacher)
    folds = layer_moments_at(*models, paths, bench.fitted, bench.folds, batch=bench.batch)
    none = [0] * len(bench.heldout)
    (heldout,) = layer_moments_at(*models, paths, bench.heldout, none, batch=bench.batch)
    correction = fit(folds, "linear" if layer.bias is None else "linear-shift")
    with restored(layer.parameters()):
        refit_layer(layer, correction)
        after = bench.impact()
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


def check_student(student: ModelMixin, architecture: Architecture, plan: PruningPlan) -> None:
    """Raise PlanError unless ``student`` is of the architecture that ``plan`` leaves."""
    expected = architecture_of(layout_of(architecture, plan).config)
    if architecture_of(student).signature != expected.signature:
        raise PlanError(
            f"asked to repair the student of plan {plan.label}, found a student of another architecture; "
            "give the model that materialise(teacher, plan) returns"
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
    check_student(student, architecture, plan)
    fitted, folds, heldout = split_rows(probe, heldout)
    prediction = predict(teacher, heldout, batch=batch).double()
    if not prediction.isfinite().all() or not prediction.any():
        raise DataError(
            "asked to repair with a teacher whose prediction is 0 or not finite; "
            "repair in float32, or check its weights"
        )
    bench = Bench(
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
    before = impact = bench.impact()
    repairs: list[Repair] = []
    for cut in track(cuts, "repairing cuts", len(cuts)):
        tried, impact = repair_cuts(bench, [cut], kind, impact)
        repairs += tried
    narrowings = find_narrowings(architecture, plan)
    for narrowing in track(narrowings, "repairing widths", len(narrowings)):
        repairs.append(_repair_width(bench, narrowing, kind, impact))
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
