"""Where a repair is tried: student and teacher, the rows that are fitted, and those that decide what is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from diffusers import ModelMixin
from torch import Tensor, nn

from prune_lab.errors import DataError
from prune_lab.families.endings import ending_of
from prune_lab.importance.outputs import mean_square
from prune_lab.probes import Probe, predict
from prune_lab.repair.activations import FitPoint, corrected, moments_at, restored
from prune_lab.repair.cuts import Cut
from prune_lab.repair.fitting import Correction, Form, Moments, fit
from prune_lab.repair.folding import CorrectionKind, Side, fold, folded_parameters
from prune_lab.repair.reports import Repair

_FOLDS = 4  # of the cross-validation that chooses the ridge
_HELD_OUT = 3  # every third picture is held out
LEAST_PICTURES = _HELD_OUT  # of a probe
FORMS: dict[tuple[Side, CorrectionKind], Form] = {
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


def split_rows(probe: Probe, heldout: Probe | None) -> tuple[Probe, list[int], Probe]:
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


# The bench ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
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
    _moments: dict[tuple[Cut, Side, bool], tuple[list[Moments], Moments]] = field(default_factory=dict)

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

    def fitted_to(self, option: Repair) -> tuple[Correction, float, float]:
        """The correction of ``option``, and the error at the cut on held-out rows without and with it.

        Behind a gate the latter is not a number: there only the prediction tells.
        """
        refit = option.kind == "refit"
        assert isinstance(option.cut, Cut)
        key = option.cut, option.side, refit
        if key not in self._moments:  # of one cut all kinds but the refit share them
            self._moments.clear()
            self._moments[key] = self.moments(option.cut, option.side, refit)
        folds, heldout = self._moments[key]
        correction = fit(folds, FORMS[option.side, option.kind])
        if option.side == "before" and self.gated(option.unit):
            return correction, float("nan"), float("nan")
        return correction, heldout.error, heldout.error_with(correction)

    def gated(self, name: str) -> bool:
        """Whether the unit multiplies what its last layer gives."""
        unit = self.unit(name)
        ending = None if unit is None else ending_of(unit)
        return ending is not None and ending.gated

    def impact_with(self, option: Repair, correction: Correction) -> float:
        """The impact with ``correction`` in the option's unit; it is undone after."""
        with self.trying(option, correction):
            return self.impact()

    @contextlib.contextmanager
    def trying(self, option: Repair, correction: Correction) -> Iterator[None]:
        """Context in which ``correction`` is in the option's unit: folded, or by a hook if it does not fold."""
        unit = self.unit(option.unit)
        assert unit is not None
        if not option.folds:
            with corrected(unit, option.side, correction):
                yield
        else:
            with restored(folded_parameters(unit)):
                fold(unit, option.kind, option.side, correction)
                yield

    def keep(self, option: Repair, correction: Correction) -> None:
        """Fold ``correction`` into the option's unit for good."""
        unit = self.unit(option.unit)
        assert unit is not None
        fold(unit, option.kind, option.side, correction)
        self._moments.clear()
