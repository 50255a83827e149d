"""Criteria on the prediction of one step: what changes in the U-Net's answer when a group is gone, exactly.

All of them come from one walk of the U-Net (``fanout``): whichever is asked for, the values of the others are kept in
the cache beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from prune_lab.blocks import BlockGroup
from prune_lab.errors import DataError
from prune_lab.importance.cache import set_key
from prune_lab.importance.context import Samples, SampleScores, ScoringContext
from prune_lab.plans import gone_with
from prune_lab.prefix_sharing import ComputeCost, fitting_batch, predict_without

Change = Callable[[Tensor, Tensor, Tensor], Tensor]  # (teacher, pruned, target) (N, C, H, W) -> (N,)

_TEACHER = "teacher-square"
_ROWS = 32  # at a time, unless it is said: more are given up for states that share their work


def mean_square(values: Tensor) -> Tensor:
    """(N,) float64 of (N, ...)."""
    return values.double().square().flatten(1).mean(dim=1)


def squared_change(teacher: Tensor, pruned: Tensor, target: Tensor) -> Tensor:
    """Mean squared change of the prediction."""
    return mean_square(pruned.double() - teacher.double())


def cosine_distance(teacher: Tensor, pruned: Tensor, target: Tensor) -> Tensor:
    """One minus the cosine between the predictions."""
    return 1 - F.cosine_similarity(teacher.double().flatten(1), pruned.double().flatten(1))


def loss_increase(teacher: Tensor, pruned: Tensor, target: Tensor) -> Tensor:
    """Rise of the mean squared denoising error."""
    return mean_square(pruned.double() - target.double()) - mean_square(teacher.double() - target.double())


CHANGES: dict[str, Change] = {
    "output-mse": squared_change,
    "output-cosine": cosine_distance,
    "denoising-loss": loss_increase,
}


def _finite(prediction: Tensor, what: str, criterion: str) -> Tensor:
    bad = int((~prediction.flatten(1).isfinite().all(dim=1)).sum())
    if bad:
        raise DataError(
            f"asked for {criterion} of {what}, found predictions that are not finite in {bad} of "
            f"{len(prediction)} rows; score in float32, or check the weights"
        )
    return prediction


def _unknown_rows(
    context: ScoringContext, criterion: str, sets: Iterable[frozenset[str]], wanted: NDArray[np.int64]
) -> dict[tuple[int, ...], list[frozenset[str]]]:
    """Sets by those of the rows ``wanted`` that are still to be measured for them."""
    rows, missing = len(context.probe), dict[tuple[int, ...], list[frozenset[str]]]()
    for removed in sets:
        known = context.cache.values(criterion, set_key(removed), rows)
        left = tuple(wanted[np.isnan(known[wanted])].tolist())
        if left:
            missing.setdefault(left, []).append(removed)
    return missing


def _guided(
    context: ScoringContext, rows: tuple[int, ...], sets: Sequence[frozenset[str]], compute: ComputeCost
) -> Iterator[tuple[slice, list[Tensor]]]:
    """What ``predict_without`` gives for these rows; with guidance both texts' answers, mixed as a sampler does it."""
    probes = [context.probe] if context.unconditional is None else [context.unconditional, context.probe]
    parts = [probe if len(rows) == len(probe) else probe.rows(rows) for probe in probes]
    # Settled once, for both texts: what fits into memory may be another number a moment later.
    batch, width = fitting_batch(
        context.architecture,
        min(context.batch or _ROWS, len(rows)),
        context.unet.device,
        context.unet.dtype.itemsize,
    )
    walks = [
        predict_without(
            context.unet, part, sets, batch=batch, width=width, compute=compute, compiled=context.compiled
        )
        for part in parts
    ]
    for answers in zip(*walks, strict=True):
        chunk, heard = answers[-1]
        if len(answers) == 1:
            yield chunk, heard
        else:
            _, unheard = answers[0]
            yield (
                chunk,
                [
                    unconditional + context.guidance * (with_prompt - unconditional)
                    for unconditional, with_prompt in zip(unheard, heard, strict=True)
                ],
            )


def measure_rows(
    context: ScoringContext,
    named: Mapping[frozenset[str], str],
    criterion: str,
    compute: ComputeCost,
    rows: NDArray[np.int64] | None = None,
) -> None:
    """Bring the cache up to date: every change of every set in ``named`` (set: what to call it) on ``rows``, or on all.

    Raises DataError naming the group when an answer is not finite.
    """
    probe, cache, total = context.probe, context.cache, len(context.probe)
    wanted = np.arange(total) if rows is None else rows
    for left, sets in _unknown_rows(context, criterion, named, wanted).items():
        for chunk, (teacher, *pruned) in _guided(context, left, [frozenset[str](), *sets], compute):
            place = np.array(left[chunk], dtype=np.int64)
            _finite(teacher, "the model itself", criterion)
            cache.put(_TEACHER, "", total, place, mean_square(teacher).numpy())
            for removed, prediction in zip(sets, pruned, strict=True):
                _finite(prediction, named[removed], criterion)
                for name, change in CHANGES.items():
                    found = change(teacher, prediction, probe.target[place]).numpy()
                    cache.put(name, set_key(removed), total, place, found)
            cache.save(now=False)


def named_sets(
    context: ScoringContext, groups: Sequence[BlockGroup]
) -> tuple[list[frozenset[str]], dict[frozenset[str], str]]:
    """The units that are gone with each group, and the distinct sets among them with a name for each.

    A pair or a stage may be the same set of blocks as another group: each set is measured once.
    """
    gone = [gone_with(context.architecture, group.blocks, stand_in=True) for group in groups]
    named: dict[frozenset[str], str] = {}
    for removed, group in zip(gone, groups, strict=True):
        named.setdefault(removed, group.name)
    return gone, named


def known_values(
    context: ScoringContext, gone: Sequence[frozenset[str]], criterion: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values (sets, R) and scales (R,) as far as they are in the cache; NaN where they are not.

    Raises DataError for a model that predicts nothing.
    """
    rows = len(context.probe)
    values = np.stack([context.cache.values(criterion, set_key(removed), rows) for removed in gone])
    squares = context.cache.values(_TEACHER, "", rows)
    if not np.nansum(squares) > 0:
        raise DataError(
            f"asked for {criterion} of {len(gone)} groups, found a model that predicts 0 everywhere; "
            "check its weights"
        )
    return values, squares if criterion == "output-mse" else np.ones(rows)


def _by_output(criterion: str, context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    gone, named = named_sets(context, groups)
    compute = ComputeCost(forward_macs=context.architecture.total_macs)
    measure_rows(context, named, criterion, compute)
    values, scales = known_values(context, gone, criterion)
    return SampleScores(values, scales, Samples.of(context.probe), compute)


def output_mse(context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    """Squared change of the prediction, relative to the prediction's own mean square.

    Measures: how far the answer moves, whatever the right answer is.
    Reads as: 0, the group did nothing for these inputs; 1, the error is as large as the prediction itself.
    Misleads when: the change is one that a short training undoes (a shift, a scale), or the timesteps are not
    balanced, since a v-predicting model has answers of another size at other timesteps.
    Cost: the teacher's pass, and for each group what comes after its first block: about half a pass (``fanout``).
    Reference: LAPTOP-Diff, arXiv:2404.11098 (output loss of a removed layer).
    """
    return _by_output("output-mse", context, groups)


def output_cosine(context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    """One minus the cosine between the two predictions.

    Measures: the turn of the answer's direction.
    Reads as: 0, same direction; 1, unrelated; 2, opposite.
    Misleads when: the group sets the size of the answer, which a cosine does not see.
    Cost: as output-mse, and nothing more after it.
    Reference: the angle analogue of ShortGPT's block influence, arXiv:2403.03853, taken at the output.
    """
    return _by_output("output-cosine", context, groups)


def denoising_loss(context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    """Rise of the mean squared denoising error; the target has mean square about 1.

    Measures: what the task loses, judged by the noise (or velocity) that was truly there.
    Reads as: 0, as good as before; negative, the model is better without the group on these rows.
    Misleads when: samples are few: the loss of one row is noisy, and changes that hurt and help cancel out.
    Cost: as output-mse, and nothing more after it.
    Reference: the training loss of DDPM, arXiv:2006.11239, eq. 14.
    """
    return _by_output("denoising-loss", context, groups)
