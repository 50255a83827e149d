"""Criteria on the prediction of one denoising step: the exact change of the prediction when a group is removed.

One computation with shared prefixes (``prefix_sharing``) gives all of them: whichever criterion is asked for, the
values of the others are put into the cache too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from prune_lab.blocks import BlockGroup
from prune_lab.errors import DataError
from prune_lab.importance.cache import set_key
from prune_lab.importance.context import Samples, SampleScores, ScoringContext
from prune_lab.importance.intervals import Floats, Integers
from prune_lab.plans import gone_with
from prune_lab.prefix_sharing import ComputeCost, fitting_batch, predict_without
from prune_lab.runtime import device_of

OutputMetric = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(teacher, pruned, target), all (N, C, H, W) -> (N,)."""

_TEACHER_SQUARE = "teacher-square"
_ROWS = 32  # per batch if the context does not say; memory beyond that is better used for more shared states


def mean_square(values: Tensor) -> Tensor:
    """(N,) float64 mean square of each row of ``values`` (N, ...)."""
    return values.double().square().flatten(1).mean(dim=1)


def squared_change(teacher: Tensor, pruned: Tensor, target: Tensor) -> Tensor:
    """Mean squared change of the prediction."""
    return mean_square(pruned.double() - teacher.double())


def cosine_distance(teacher: Tensor, pruned: Tensor, target: Tensor) -> Tensor:
    """One minus the cosine between the predictions."""
    return 1 - F.cosine_similarity(teacher.double().flatten(1), pruned.double().flatten(1))


def loss_increase(teacher: Tensor, pruned: Tensor, target: Tensor) -> Tensor:
    """Increase of the mean squared denoising error."""
    return mean_square(pruned.double() - target.double()) - mean_square(teacher.double() - target.double())


OUTPUT_METRICS: dict[str, OutputMetric] = {
    "output-mse": squared_change,
    "output-cosine": cosine_distance,
    "denoising-loss": loss_increase,
}


def _check_finite(prediction: Tensor, name: str, criterion: str) -> None:
    bad = int((~prediction.flatten(1).isfinite().all(dim=1)).sum())
    if bad:
        raise DataError(
            f"asked for {criterion} of {name}, found predictions that are not finite in {bad} of "
            f"{len(prediction)} rows; score in float32, or check the weights"
        )


def _rows_to_measure(
    context: ScoringContext, criterion: str, sets: Iterable[frozenset[str]], rows: Integers
) -> dict[tuple[int, ...], list[frozenset[str]]]:
    """The removed sets by those of ``rows`` that are not in the cache yet; equal work is grouped."""
    sets_by_rows: dict[tuple[int, ...], list[frozenset[str]]] = {}
    for removed in sets:
        cached = context.cache.values(criterion, set_key(removed), len(context.probe))
        missing = tuple(rows[np.isnan(cached[rows])].tolist())
        if missing:
            sets_by_rows.setdefault(missing, []).append(removed)
    return sets_by_rows


def _predictions(
    context: ScoringContext, rows: tuple[int, ...], sets: Sequence[frozenset[str]], compute: ComputeCost
) -> Iterator[tuple[slice, list[Tensor]]]:
    """The batches of ``predict_without`` for ``rows``, each with its predictions, one for every set.

    With guidance they are computed with and without the prompt and combined as a sampler does.
    """
    probes = [context.probe] if context.unconditional is None else [context.unconditional, context.probe]
    parts = [probe if len(rows) == len(probe) else probe.rows(rows) for probe in probes]
    # Decided once for both, because they run side by side: free memory may be different a moment later.
    model, most = context.model, min(context.batch or _ROWS, len(rows))
    side = max(context.probe.noisy.shape[-2:])
    batch, width = fitting_batch(context.architecture, most, device_of(model), model.dtype.itemsize, side)
    compiled = context.compiled
    streams = [
        predict_without(model, part, sets, batch=batch, width=width, compute=compute, compiled=compiled)
        for part in parts
    ]
    for results in zip(*streams, strict=True):
        batch_rows, predictions = results[-1]
        if len(results) > 1:
            predictions = [
                unconditional + context.guidance * (with_prompt - unconditional)
                for unconditional, with_prompt in zip(results[0][1], predictions, strict=True)
            ]
        yield batch_rows, predictions


def measure_outputs(
    context: ScoringContext,
    names: Mapping[frozenset[str], str],
    criterion: str,
    compute: ComputeCost,
    rows: Integers | None = None,
) -> None:
    """Put all output metrics of the removed sets in ``names`` into the cache, for ``rows`` of the probe or for all.

    ``names`` maps each set to the name of its group. The cost is added to ``compute``. Raises DataError naming the
    group when a prediction is not finite.
    """
    probe, cache, total = context.probe, context.cache, len(context.probe)
    rows = np.arange(total) if rows is None else rows
    for missing, sets in _rows_to_measure(context, criterion, names, rows).items():
        for batch_rows, (teacher, *pruned) in _predictions(context, missing, [frozenset(), *sets], compute):
            index = np.array(missing[batch_rows], dtype=np.int64)
            _check_finite(teacher, "the model itself", criterion)
            cache.put(_TEACHER_SQUARE, "", total, index, mean_square(teacher).numpy())
            for removed, prediction in zip(sets, pruned, strict=True):
                _check_finite(prediction, names[removed], criterion)
                for name, metric in OUTPUT_METRICS.items():
                    values = metric(teacher, prediction, probe.target[index]).numpy()
                    cache.put(name, set_key(removed), total, index, values)
            cache.save(now=False)


def removed_sets(
    context: ScoringContext, groups: Sequence[BlockGroup]
) -> tuple[list[frozenset[str]], dict[frozenset[str], str]]:
    """The set of removed units of each group, and each distinct set with the name of the first group that has it.

    Different groups may remove the same set, such as a pair and a stage; it is measured once.
    """
    sets = [gone_with(context.architecture, group.blocks, stand_in=True) for group in groups]
    names: dict[frozenset[str], str] = {}
    for removed, group in zip(sets, groups, strict=True):
        names.setdefault(removed, group.name)
    return sets, names


def cached_values(
    context: ScoringContext, sets: Sequence[frozenset[str]], criterion: str
) -> tuple[Floats, Floats]:
    """Values (sets, R) and scales (R,) from the cache; NaN where a value is not in it.

    Raises DataError for a model whose predictions are all 0.
    """
    rows = len(context.probe)
    values = np.stack([context.cache.values(criterion, set_key(removed), rows) for removed in sets])
    squares = context.cache.values(_TEACHER_SQUARE, "", rows)
    if not np.nansum(squares) > 0:
        raise DataError(
            f"asked for {criterion} of {len(sets)} groups, found a model that predicts 0 everywhere; "
            "check its weights"
        )
    return values, squares if criterion == "output-mse" else np.ones(rows)


def _by_output(criterion: str, context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    sets, names = removed_sets(context, groups)
    compute = ComputeCost(forward_macs=context.architecture.total_macs)
    measure_outputs(context, names, criterion, compute)
    values, scales = cached_values(context, sets, criterion)
    return SampleScores(values, scales, Samples.of(context.probe), compute)


def output_mse(context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    """Mean squared change of the prediction, divided by the mean square of the prediction.

    Measures: how much the prediction changes, without regard to the target.
    Reads as: 0, the group did nothing for these inputs; 1, the error is as large as the prediction itself.
    Misleads when: a short training would correct the change (a shift, a scale), or the timesteps are not balanced,
    because the predictions of a v-predicting model differ in size between timesteps.
    Cost: a forward pass of the whole model, and for each group the part after its first block: about half a pass.
    Reference: LAPTOP-Diff, arXiv:2404.11098 (output loss of a removed layer).
    """
    return _by_output("output-mse", context, groups)


def output_cosine(context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    """One minus the cosine between the two predictions.

    Measures: how much the direction of the prediction changes.
    Reads as: 0, same direction; 1, unrelated; 2, opposite.
    Misleads when: the group changes only the size of the prediction, which a cosine ignores.
    Cost: as output-mse; nothing when output-mse was computed before.
    Reference: the angle analogue of ShortGPT's block influence, arXiv:2403.03853, taken at the output.
    """
    return _by_output("output-cosine", context, groups)


def denoising_loss(context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    """Increase of the mean squared denoising error; the target has a mean square of about 1.

    Measures: how much worse the model does its task: the prediction is compared with the true noise (or velocity).
    Reads as: 0, as good as before; negative, the model is better without the group on these rows.
    Misleads when: samples are few, because the loss of one row is noisy and changes for better and worse cancel.
    Cost: as output-mse; nothing when output-mse was computed before.
    Reference: the training loss of DDPM, arXiv:2006.11239, eq. 14.
    """
    return _by_output("denoising-loss", context, groups)
