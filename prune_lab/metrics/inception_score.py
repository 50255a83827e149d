"""Inception score (Salimans et al. 2016): how sure a classifier is of each picture, and how many classes it sees."""

from __future__ import annotations

from torch import Tensor

from prune_lab.errors import DataError
from prune_lab.metrics.rows import check_finite


def inception_score(logits: Tensor, splits: int = 10) -> float:
    """Exp of the mean Kullback-Leibler divergence of p(class | picture) from p(class), from ``logits`` (N, classes).

    The mean over ``splits`` parts of consecutive rows, as published figures are; from 1 to the number of classes.
    Misleads when: the pictures are of nothing that the classifier knows, and between different N. Raises DataError for
    fewer rows than parts.
    """
    if logits.ndim != 2 or len(logits) < splits:
        raise DataError(
            f"asked for the inception score of logits of shape {tuple(logits.shape)} in {splits} parts; give (N, "
            "classes), one row at least for each part"
        )
    check_finite(logits, "the inception score")
    scores = []
    for part in logits.double().log_softmax(dim=1).tensor_split(splits):
        probabilities = part.exp()
        marginal = probabilities.mean(dim=0)
        # where p(class) is zero all p(class | picture) are, and zero times anything is zero here
        divergence = (probabilities * (part - marginal.clamp_min(1e-300).log())).sum(dim=1)
        scores.append(divergence.mean().exp())
    return float(sum(scores) / splits)


def inception_score_without(logits: Tensor, groups: Tensor, splits: int = 10) -> tuple[float, list[float]]:
    """``inception_score``, and what it is without the rows of each of the ``groups`` (N,), numbered from 0."""
    kept = [groups != group for group in range(int(groups.max()) + 1)]
    without = [inception_score(logits[rows], splits) for rows in kept if int(rows.sum()) >= splits]
    return inception_score(logits, splits), without
