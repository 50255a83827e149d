"""What a group of blocks is worth: how the model's answers change when it is removed, with an interval.

Every group is removed by bypass on one fixed probe, so all groups answer the same questions; what the removals share is
computed once (``fanout``). Starred blocks, which cannot be removed, are scored through a channel-interpolation stand-in
as in BK-SDM (arXiv:2305.15798).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from prune_lab.blocks import BlockGroup, GroupKind, architecture_of
from prune_lab.errors import DataError, UnknownCriterionError
from prune_lab.fanout import Effort, gone_with, predict_without
from prune_lab.probes import Probe

Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]  # (teacher, pruned, target) -> one value per row
Scale = Callable[[Tensor], Tensor]  # teacher -> one value per row

INTERVAL = (2.5, 97.5)  # percentiles: a 95 % interval

COLUMNS = (
    "group",
    "kind",
    "blocks",
    "starred",
    "impact",
    "low",
    "high",
    "samples",
    "criterion",
    "probe",
    "model",
)


# Criteria: predictions (N, C, H, W) in, float64 (N,) out; an identity block gives 0 everywhere ---------------------


def _mean_square(values: Tensor) -> Tensor:
    return values.double().square().flatten(1).mean(dim=1)


def output_mse(teacher: Tensor, pruned: Tensor, target: Tensor) -> Tensor:
    """Mean squared change of the prediction, one value per row; a table divides by the teacher's mean square.

    Measures: how far the answer moves, whatever the right answer is.
    Reads as: 0, the group did nothing for these inputs; 1, the error is as large as the prediction itself.
    Misleads when: the change is one that a short training undoes (a shift, a scale), or the timesteps are not
    balanced, since a v-predicting model has answers of another size at other timesteps.
    Cost: the teacher's pass, and for each group what comes after its first block: about half a pass (``fanout``).
    Reference: LAPTOP-Diff, arXiv:2404.11098 (output loss of a removed layer).
    """
    return _mean_square(pruned.double() - teacher.double())


def output_cosine(teacher: Tensor, pruned: Tensor, target: Tensor) -> Tensor:
    """One minus the cosine between the two predictions, one value per row.

    Measures: the turn of the answer's direction.
    Reads as: 0, same direction; 1, unrelated; 2, opposite.
    Misleads when: the group sets the size of the answer, which a cosine does not see.
    Cost: as output-mse.
    Reference: the angle analogue of ShortGPT's block influence, arXiv:2403.03853, taken at the output.
    """
    return 1 - F.cosine_similarity(teacher.double().flatten(1), pruned.double().flatten(1))


def denoising_loss(teacher: Tensor, pruned: Tensor, target: Tensor) -> Tensor:
    """Rise of the mean squared denoising error, one value per row; the target has mean square about 1.

    Measures: what the task loses, judged by the noise that was truly added.
    Reads as: 0, as good as before; negative, the model is better without the group on these rows.
    Misleads when: samples are few: the loss of one row is noisy, and changes that hurt and help cancel out.
    Cost: as output-mse.
    Reference: the training loss of DDPM, arXiv:2006.11239, eq. 14.
    """
    return _mean_square(pruned.double() - target.double()) - _mean_square(teacher.double() - target.double())


CRITERIA: dict[str, Criterion] = {
    "output-mse": output_mse,
    "output-cosine": output_cosine,
    "denoising-loss": denoising_loss,
}


def _ones(teacher: Tensor) -> Tensor:
    return torch.ones(len(teacher), dtype=torch.float64)


# What the values are relative to: impact = sum of values / sum of scales, over rows.
_SCALES: dict[str, Scale] = {"output-mse": _mean_square, "output-cosine": _ones, "denoising-loss": _ones}


def criterion_named(name: str) -> Criterion:
    """The criterion called ``name``; UnknownCriterionError lists the names there are."""
    try:
        return CRITERIA[name]
    except KeyError:
        raise UnknownCriterionError(
            f"no criterion is called {name!r}; choose one of: {', '.join(CRITERIA)}"
        ) from None


# Tables ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Importance:
    """What one group is worth: its impact and the 95 % bootstrap interval over pictures.

    ``low`` and ``high`` are NaN when there is no interval: fewer than two pictures, or none asked for.
    """

    group: BlockGroup
    impact: float
    low: float
    high: float
    samples: int  # rows of the probe
    starred: bool = False  # has a block that cannot be removed and was scored through its stand-in


@dataclass(frozen=True, slots=True, eq=False)
class ImportanceTable:
    """Impacts of many groups by one criterion on one probe, in the order the groups were given."""

    entries: tuple[Importance, ...]
    criterion: str
    probe: str  # digest
    model: str
    values: NDArray[np.float64] | None = field(default=None, repr=False)
    """(groups, rows) what every row contributed; a table read from a file has none."""
    scales: NDArray[np.float64] | None = field(default=None, repr=False)
    """(rows,) what the values are relative to: impact = values.sum() / scales.sum()."""
    effort: Effort | None = None
    """What measuring it cost; a table read from a file does not say."""

    def of_kind(self, kind: GroupKind) -> tuple[Importance, ...]:
        """The entries of one kind of group, in table order."""
        return tuple(entry for entry in self.entries if entry.group.kind == kind)

    def ranked(self, kind: GroupKind = "block") -> tuple[Importance, ...]:
        """The entries of one kind, least impact first; equal impacts stay in table order."""
        return tuple(sorted(self.of_kind(kind), key=lambda entry: entry.impact))

    def block_impacts(self) -> dict[str, float]:
        """Impact of every single block that was scored, by block name."""
        return {entry.group.blocks[0]: entry.impact for entry in self.of_kind("block")}

    def frame(self) -> pd.DataFrame:
        """One row per group: group kind blocks starred impact low high samples criterion probe model.

        ``blocks`` holds the names with spaces between them.
        """
        rows = [
            (
                entry.group.name,
                entry.group.kind,
                " ".join(entry.group.blocks),
                entry.starred,
                entry.impact,
                entry.low,
                entry.high,
                entry.samples,
                self.criterion,
                self.probe,
                self.model,
            )
            for entry in self.entries
        ]
        return pd.DataFrame(rows, columns=list(COLUMNS))


def importance_from_frame(frame: pd.DataFrame) -> ImportanceTable:
    """The table that ``frame`` (as from ``ImportanceTable.frame``, or its CSV) holds, without values per row.

    Raises DataError when columns are missing, an impact is not a number, or several measurements are mixed.
    """
    missing = [column for column in COLUMNS if column not in frame.columns]
    if missing or frame.empty:
        raise DataError(
            f"asked to read a table of importance, found {len(frame)} rows without the columns "
            f"{', '.join(missing) or '(all are there)'}; make it with `prune-lab score`"
        )
    origin = frame[["criterion", "probe", "model"]].fillna("").astype(str).drop_duplicates()
    if len(origin) > 1:
        raise DataError(
            f"asked to read one table of importance, found {len(origin)} mixed (criterion, probe, model); "
            "keep the rows of one of them"
        )
    unknown = sorted(map(str, set(frame["kind"]) - set(get_args(GroupKind))))
    if unknown or not np.isfinite(pd.to_numeric(frame["impact"], errors="coerce")).all():
        found = f"kinds {', '.join(unknown)}" if unknown else "impacts that are not numbers"
        raise DataError(
            f"asked to read a table of importance, found {found}; make it again with `prune-lab score`"
        )
    entries = tuple(
        Importance(
            group=BlockGroup(str(row["group"]), row["kind"], tuple(str(row["blocks"]).split())),
            impact=float(row["impact"]),
            low=float(row["low"]),
            high=float(row["high"]),
            samples=int(row["samples"]),
            starred=str(row["starred"]) == "True",
        )
        for row in frame.to_dict("records")
    )
    criterion, probe, model = origin.iloc[0]
    return ImportanceTable(entries, criterion=criterion, probe=probe, model=model)


# Scoring --------------------------------------------------------------------------------------------------


def _resampled_impacts(
    values: NDArray[np.float64], scales: NDArray[np.float64], pictures: Tensor, *, draws: int, seed: int
) -> NDArray[np.float64]:
    """(draws, groups) impacts on bootstrap samples of pictures, the same samples for every group.

    Rows of one picture come and go together: they share its content, so they are no independent evidence.
    """
    _, index = np.unique(pictures.numpy(), return_inverse=True)
    count = int(index.max()) + 1
    member = np.zeros((len(index), count))
    member[np.arange(len(index)), index] = 1.0
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)
    numerators: NDArray[np.float64] = drawn @ (values @ member).T
    denominators: NDArray[np.float64] = drawn @ (scales @ member)
    return numerators / denominators[:, None]


def _intervals(
    values: NDArray[np.float64], scales: NDArray[np.float64], pictures: Tensor, *, draws: int, seed: int
) -> NDArray[np.float64]:
    """(2, groups) ends of the percentile interval; NaN where there is none (unknown is not zero)."""
    if draws < 1 or len(torch.unique(pictures)) < 2:
        return np.full((2, len(values)), np.nan)
    impacts = _resampled_impacts(values, scales, pictures, draws=draws, seed=seed)
    ends: NDArray[np.float64] = np.percentile(impacts, INTERVAL, axis=0)
    return ends


def _check_finite(prediction: Tensor, what: str, criterion: str) -> None:
    bad = int((~prediction.flatten(1).isfinite().all(dim=1)).sum())
    if bad:
        raise DataError(
            f"asked for {criterion} of {what}, found predictions that are not finite in {bad} of "
            f"{len(prediction)} rows; score in float32, or check the weights"
        )


def score_groups(
    unet: Any,
    groups: Sequence[BlockGroup],
    probe: Probe,
    *,
    criterion: str = "output-mse",
    batch: int = 32,
    bootstrap: int = 1000,
    seed: int = 0,
    model: str = "",
) -> ImportanceTable:
    """Impact of removing each of ``groups`` from ``unet``, measured on ``probe``, ``batch`` rows at a time.

    All removals are answered in one walk of the U-Net (``fanout``), on its device and in its number format; it is left
    as it was. ``bootstrap`` resamplings of the pictures, the same for all groups, give the intervals; 0 means none.
    ``model`` is noted in the table; empty means the architecture's signature. Raises UnknownCriterionError,
    UnknownBlockError, and DataError when an answer is not finite.
    """
    measure = criterion_named(criterion)
    architecture = architecture_of(unet)
    starred = [any(architecture.block(name).starred for name in group.blocks) for group in groups]
    # A pair or a stage may be the same set of blocks as another group: each set is measured once.
    gone = [gone_with(architecture, group.blocks, stand_in=True) for group in groups]
    names = {removed: group.name for removed, group in zip(reversed(gone), reversed(groups), strict=True)}
    sets = list(dict.fromkeys([frozenset[str](), *gone]))
    effort = Effort()
    scales = np.empty(len(probe))
    measured = np.empty((len(sets), len(probe)))
    for rows, (teacher, *pruned) in predict_without(unet, probe, sets, batch=batch, effort=effort):
        _check_finite(teacher, "the model itself", criterion)
        scales[rows] = _SCALES[criterion](teacher).numpy()
        target = probe.target[rows]
        for number, (removed, prediction) in enumerate(zip(sets[1:], pruned, strict=True), start=1):
            _check_finite(prediction, names[removed], criterion)
            measured[number, rows] = measure(teacher, prediction, target).numpy()
    if not scales.sum() > 0:
        raise DataError(
            f"asked for {criterion} of {len(groups)} groups, found a model that predicts 0 everywhere; "
            "check its weights"
        )
    place = {removed: number for number, removed in enumerate(sets)}
    values = measured[[place[removed] for removed in gone]].reshape(len(groups), len(probe))
    lows, highs = _intervals(values, scales, probe.pictures, draws=bootstrap, seed=seed)
    impacts = values.sum(axis=1) / scales.sum()
    entries = tuple(
        Importance(group, float(impact), float(low), float(high), len(probe), star)
        for group, impact, low, high, star in zip(groups, impacts, lows, highs, starred, strict=True)
    )
    return ImportanceTable(
        entries,
        criterion=criterion,
        probe=probe.digest,
        model=model or architecture.signature,
        values=values,
        scales=scales,
        effort=effort,
    )
