"""The metrics of models on the features of their pictures, each with its interval and beside its noise floor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from prune_lab.errors import DataError
from prune_lab.metrics import (
    cmmd_without,
    fid_without,
    inception_score_without,
    mean_distances,
    precision_without,
    recall_without,
)
from prune_lab.ranking.paired import Better, verdict_on
from prune_lab.runtime import track
from prune_lab.zero_shot.estimates import Estimate, groups_of, mean_of
from prune_lab.zero_shot.features import Extractors, Features

Against = Literal["", "real", "teacher"]


Function = Callable[[Tensor, Tensor, Tensor], tuple[float, list[float]]]
"""The metric of features (N, D) against others, and without each group of the rows (N,)."""


@dataclass(frozen=True, slots=True)
class SetMetric:
    """A metric of a whole set of pictures: of which features, the first that there are, and against which set."""

    better: Literal["higher", "lower"]
    uses: tuple[str, ...]
    against: Against
    function: Function


def _of_logits(rows: Tensor, _: Tensor, groups: Tensor) -> tuple[float, list[float]]:
    return inception_score_without(rows, groups)


_TWO = ("inception", "clip")
SETS: Mapping[str, SetMetric] = {
    "fid": SetMetric("lower", ("inception",), "real", fid_without),
    "is": SetMetric("higher", ("logits",), "", _of_logits),
    "cmmd": SetMetric("lower", ("clip",), "real", cmmd_without),
    "precision": SetMetric("higher", _TWO, "real", precision_without),
    "recall": SetMetric("higher", _TWO, "real", recall_without),
    "fid-to-teacher": SetMetric("lower", ("inception",), "teacher", partial(fid_without, paired=True)),
    "cmmd-to-teacher": SetMetric("lower", ("clip",), "teacher", partial(cmmd_without, paired=True)),
}
# The means over prompts, of which every prompt has a value: CLIP score, and the distance between seeds of a prompt. Of
# that more is no better in itself: what is broken differs, and what has collapsed does not.
MEANS: Mapping[str, Literal["higher", "neither"]] = {"clip": "higher", "diversity": "neither"}
METRICS = (
    "clip",
    "fid",
    "is",
    "cmmd",
    "precision",
    "recall",
    "diversity",
    "fid-to-teacher",
    "cmmd-to-teacher",
)
_FEATURES = {
    "clip": "clip",
    "texts": "clip",
    "inception": "inception",
    "logits": "inception",
    "pixels": "pixels",
}
_SHARES = ("precision", "recall")  # from 0 to 1, and so is what is left of their intervals
_FEW = 4  # prompts of a kind: the t interval of two or three is as wide as the whole range
_SEVERAL = "not measured: needs --seeds 2 or more"


def _spread(values: Sequence[float] | NDArray[np.float64]) -> float:
    """The largest difference between two of ``values``; NaN of one."""
    return float(max(values) - min(values)) if len(values) > 1 else math.nan


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """A metric of a model; no estimate: not measured, and the reason why.

    ``seeds`` are its values by one seed of each prompt alone: how far they lie apart is the noise floor.
    """

    estimate: Estimate | None
    reason: str = ""
    features: str = ""
    seeds: tuple[float, ...] = ()
    values: NDArray[np.float64] | None = None  # (prompts, seeds), of a mean over both

    @property
    def floor(self) -> float:
        """The largest difference between two seeds of the same model; NaN of one."""
        return _spread(self.seeds)


@dataclass(frozen=True, slots=True, eq=False)
class Sets:
    """The features that a metric is measured on, pictures prompt by prompt and in each seed by seed."""

    prompts: int
    seeds: int
    real: Features | None
    teacher: Features | None

    def by_seed(self, features: Tensor) -> Tensor:
        """``features`` as (seeds, prompts, D)."""
        return features.reshape(self.prompts, self.seeds, -1).transpose(0, 1)


def _lacking(name: str, metric: SetMetric, extractors: Extractors) -> str:
    """What a metric lacks where there are no features for it."""
    if name == "is" and extractors.inception is not None:
        return "not measured: needs an Inception that answers logits, too"
    if "clip" in metric.uses:
        return f"not measured: needs --clip FOLDER_OR_HUB_ID ({extractors.clip_lacks})"
    return "not measured: needs --inception FILE, an Inception in TorchScript"


def _set_metric(name: str, features: Features, sets: Sets, extractors: Extractors) -> Measured:
    metric = SETS[name]
    used = next((one for one in metric.uses if getattr(features, one) is not None), None)
    if used is None:
        return Measured(None, _lacking(name, metric, extractors))
    if metric.against == "real" and sets.real is None:
        return Measured(None, "not measured: needs --real DIR")
    own: Tensor = sets.by_seed(getattr(features, used))
    if metric.against == "teacher":
        others = sets.by_seed(getattr(sets.teacher, used))
        # Pictures of one seed start from the same noise: of another seed, the teacher's own distance is the floor.
        pairs = [(i, j) for i in range(sets.seeds) for j in range(sets.seeds) if i != j] or [(0, 0)]
        parts = [(own[i], others[j]) for i, j in pairs]
    elif metric.against == "real":
        parts = [(one, getattr(sets.real, used)) for one in own]
    else:
        parts = [(one, one) for one in own]

    groups = groups_of(sets.prompts)
    try:
        found = [metric.function(one, other, groups) for one, other in parts]
    except DataError as error:
        return Measured(None, f"not measured: {error}")
    seeds = [value for value, _ in found]
    without = np.array([values for _, values in found]).mean(axis=0)
    whole = len(without) == int(groups.max()) + 1  # else too few are left without a group
    if not all(map(math.isfinite, seeds)):
        return Measured(None, f"not measured: found {seeds}")
    # a share that no group of prompts changes, as 0 or 1 of a few, says nothing of how sure it is
    known = whole and len(without) > 1 and not (name in _SHARES and np.ptp(without) == 0)
    estimate = Estimate(float(np.mean(seeds)), without if known else np.empty(0))
    shown = tuple(seeds)
    if metric.against == "teacher":
        # from itself it is as far one way as the other, and 0 of one seed: that is no spread
        itself = features is sets.teacher
        shown = tuple(
            value for value, (i, j) in zip(seeds, pairs, strict=True) if i < j or (i > j and not itself)
        )
    real = len(getattr(sets.real, used)) if metric.against == "real" else None
    return Measured(estimate, _warning(name, own, metric.against, real), _FEATURES[used], shown)


def _warning(name: str, features: Tensor, against: Against, real: int | None = None) -> str:
    """What a figure of ``features`` against so many ``real`` ones has to be read with; empty for nothing."""
    seeds, count, width = features.shape
    said = []
    if name.startswith("fid") and count < width:
        said.append(
            f"{count:,} pictures are fewer than {width:,} features: the figure is large, and only for comparison"
        )
    elif name.startswith("fid") and real is not None and real < width:
        said.append(
            f"{real:,} real pictures are fewer than {width:,} features: the figure is large, and only for comparison"
        )
    if against == "teacher" and seeds == 1:
        said.append("both from the same noise: --seeds 2 shows how far the teacher is from itself")
    return "; ".join(said)


def _clip(features: Features, sets: Sets, extractors: Extractors) -> Measured:
    if features.clip is None or features.texts is None:
        return Measured(None, f"not measured: needs --clip FOLDER_OR_HUB_ID ({extractors.clip_lacks})")
    scores = (features.clip.double() * features.texts.double()).sum(dim=1).reshape(sets.prompts, sets.seeds)
    found = mean_of(scores.mean(dim=1).numpy())
    return Measured(found, "", "clip", tuple(scores.mean(dim=0).tolist()), scores.numpy())


def _diversity(features: Features, sets: Sets) -> Measured:
    if sets.seeds < 2:
        return Measured(None, _SEVERAL)
    used = "clip" if features.clip is not None else "pixels"
    own: Tensor = getattr(features, used).reshape(sets.prompts, sets.seeds, -1)
    values = mean_distances(own, cosine=used == "clip").numpy()
    return Measured(mean_of(values), "", used)


def measure(features: Features, sets: Sets, extractors: Extractors, title: str = "") -> dict[str, Measured]:
    """Every metric of one model, called ``title``, by its name and in the order of ``METRICS``."""
    found = {"clip": _clip(features, sets, extractors), "diversity": _diversity(features, sets)}
    found |= {
        name: _set_metric(name, features, sets, extractors) for name in track(SETS, f"measuring {title}")
    }
    return {name: found[name] for name in METRICS}


# Rows of tables --------------------------------------------------------------------------------------------------


def _better(name: str) -> Better:
    return MEANS[name] if name in MEANS else SETS[name].better


def _verdict(name: str, difference: Estimate, floor: float) -> str:
    return verdict_on(difference.value, *difference.interval, _better(name), floor)


def metric_rows(
    model: str, found: Mapping[str, Measured], teacher: Mapping[str, Measured] | None
) -> list[dict[str, object]]:
    """A row for each metric of ``model``: value, interval, floor, and the paired difference to the ``teacher``'s."""
    rows = []
    for name, one in found.items():
        value, (low, high) = math.nan, (math.nan, math.nan)
        if one.estimate is not None:
            value, (low, high) = one.estimate.value, one.estimate.interval
            if name in _SHARES:
                low, high = max(low, 0.0), min(high, 1.0)
        row: dict[str, object] = {
            "model": model,
            "metric": name,
            "value": value,
            "low": low,
            "high": high,
            "better": _better(name),
            "floor": one.floor,
            "difference": math.nan,
            "difference_low": math.nan,
            "difference_high": math.nan,
            "verdict": "" if one.estimate is not None else "not measured",
            "features": one.features,
            "reason": one.reason,
        }
        other = teacher[name] if teacher is not None else None
        if one.estimate is not None and other is not None and other.estimate is not None:
            away = one.estimate.minus(other.estimate)
            floors = [f for f in (one.floor, other.floor) if math.isfinite(f)]
            row["difference"] = away.value
            row["difference_low"], row["difference_high"] = away.interval
            row["verdict"] = _verdict(name, away, max(floors, default=math.nan))
            if name.endswith("-to-teacher") and not one.seeds:  # of the same noise: the teacher is at 0
                row["verdict"] = "no floor"
        rows.append(row)
    return rows


def kind_rows(
    kinds: Sequence[str], models: Mapping[str, Mapping[str, Measured]], teacher: str
) -> list[dict[str, object]]:
    """The CLIP score by kind of prompt, and its paired difference to the teacher's beside the larger floor of the two;
    none where nothing is measured. Kinds of fewer than ``_FEW`` prompts have no interval.
    """
    rows: list[dict[str, object]] = []
    known = [kind for kind in dict.fromkeys(kinds) if kind]
    labels = np.array(kinds)
    for kind in sorted(known):
        chosen = labels == kind
        for model, found in models.items():
            values, others = found["clip"].values, models[teacher]["clip"].values
            if values is None or others is None:
                continue
            parts = [part[chosen] for part in (values, others)]
            own, away = mean_of(parts[0].mean(axis=1)), mean_of((parts[0] - parts[1]).mean(axis=1))
            if len(parts[0]) < _FEW:
                own, away = (Estimate(one.value, np.empty(0)) for one in (own, away))
            floor = max(_spread(part.mean(axis=0)) for part in parts)
            row: dict[str, object] = {"kind": kind, "prompts": int(chosen.sum()), "model": model}
            row |= dict(zip(("clip", "low", "high"), (own.value, *own.interval), strict=True))
            ends = (away.value, *away.interval) if model != teacher else (math.nan,) * 3
            row |= dict(zip(("difference", "difference_low", "difference_high"), ends, strict=True))
            row["floor"] = floor
            row["verdict"] = "" if model == teacher else _verdict("clip", away, floor)
            rows.append(row)
    return rows


def estimates(found: Mapping[str, Measured]) -> dict[str, Estimate]:
    """What was measured, by metric."""
    return {name: one.estimate for name, one in found.items() if one.estimate is not None}


def reasons(found: Mapping[str, Measured]) -> dict[str, str]:
    """Why something was not measured, by metric."""
    return {name: one.reason for name, one in found.items() if one.estimate is None}
