"""Metrics of sets of pictures: against closed forms, and against loops that are written out."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from scipy import linalg
from torch import Tensor

from prune_lab.errors import DataError
from prune_lab.metrics import (
    Gaussian,
    cmmd,
    cmmd_without,
    fid,
    fid_without,
    frechet_distance,
    gaussian_of,
    inception_score,
    inception_score_without,
    mean_distances,
    precision_recall,
    precision_without,
    recall_without,
)


def rows(count: int, width: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(
        count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


# Frechet distance ------------------------------------------------------------------------------------------------


def test_the_distance_of_gaussians_of_one_dimension_is_known() -> None:
    one = Gaussian(torch.tensor([1.0]).double(), torch.tensor([[2.0]]).double(), 9)
    other = Gaussian(torch.tensor([4.0]).double(), torch.tensor([[0.5]]).double(), 9)
    assert frechet_distance(one, other) == pytest.approx(3**2 + (2 - 0.5) ** 2)


def test_the_distance_of_gaussians_with_the_same_axes_is_known() -> None:
    axes = torch.linalg.qr(rows(6, 6, 1)).Q
    spreads = torch.tensor([1.0, 2, 3, 4, 5, 6]).double(), torch.tensor([2.0, 2, 1, 0, 1, 9]).double()
    means = rows(6, 1, 2)[:, 0], rows(6, 1, 3)[:, 0]
    one, other = (
        Gaussian(mean, spread[:, None] * axes.T, 9) for mean, spread in zip(means, spreads, strict=True)
    )
    known = (means[0] - means[1]).square().sum() + (spreads[0] - spreads[1]).square().sum()
    assert frechet_distance(one, other) == pytest.approx(float(known), rel=1e-12)


@pytest.mark.parametrize("counts", [(300, 200), (5, 200), (5, 4)])
def test_fid_is_that_of_the_root_of_a_product(counts: tuple[int, int]) -> None:
    """Also with fewer pictures than dimensions, where the product is singular."""
    one, other = rows(counts[0], 8, 1), rows(counts[1], 8, 2, 1.5) + 0.3
    covariances = [torch.cov(part.T) for part in (one, other)]
    values = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp_min(0)
    known = (one.mean(0) - other.mean(0)).square().sum() + sum(part.trace() for part in covariances)
    assert fid(one, other) == pytest.approx(float(known - 2 * values.sqrt().sum()), rel=1e-5)
    if min(counts) > 8:
        root = linalg.sqrtm((covariances[0] @ covariances[1]).numpy())
        assert fid(one, other) == pytest.approx(float(known) - 2 * root.real.trace(), rel=1e-9)
    for part, covariance in zip((one, other), covariances, strict=True):
        assert torch.allclose(gaussian_of(part).covariance, covariance)


def test_fid_of_a_set_with_itself_is_zero_and_it_is_symmetric() -> None:
    one, other = rows(40, 16, 1), rows(30, 16, 2)
    assert fid(one, one) == 0
    assert fid(one[:5], one[:5]) == 0
    assert fid(one, other) == pytest.approx(fid(other, one), rel=1e-12)


# Inception score -------------------------------------------------------------------------------------------------


def test_the_inception_score_counts_classes_that_are_sure() -> None:
    sure = 1e4 * torch.eye(5)
    assert inception_score(sure.repeat(4, 1), splits=4) == pytest.approx(5)
    assert inception_score(torch.zeros(20, 5)) == pytest.approx(1)
    assert inception_score(sure[:1].repeat(20, 1)) == pytest.approx(1)


def test_the_inception_score_by_loops() -> None:
    logits, scores = rows(23, 6, 4, 2.0), []
    for part in logits.tensor_split(3):
        shares = [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in part.tolist()]
        mean = [sum(column) / len(shares) for column in zip(*shares, strict=True)]
        terms = [sum(p * math.log(p / m) for p, m in zip(row, mean, strict=True)) for row in shares]
        scores.append(math.exp(sum(terms) / len(terms)))
    assert inception_score(logits, splits=3) == pytest.approx(sum(scores) / 3, rel=1e-12)


# CMMD ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unbiased", [False, True])
def test_cmmd_by_loops(unbiased: bool) -> None:
    one, other = rows(7, 5, 1), rows(9, 5, 2, 2.0)

    def kernel(x: Tensor, y: Tensor) -> float:
        return math.exp(-float((x - y).square().sum()) / 200)

    def within(part: Tensor) -> float:
        pairs = [(x, y) for x, y in itertools.product(range(len(part)), repeat=2) if not unbiased or x != y]
        return sum(kernel(part[x], part[y]) for x, y in pairs) / len(pairs)

    between = sum(kernel(x, y) for x in one for y in other) / (len(one) * len(other))
    known = 1000 * (within(one) + within(other) - 2 * between)
    assert cmmd(one, other, unbiased=unbiased) == pytest.approx(known, rel=1e-9)


def test_cmmd_of_a_set_with_itself_is_zero_and_of_two_draws_without_bias_about_zero() -> None:
    one, other = rows(400, 4, 1), rows(400, 4, 2)
    assert cmmd(one, one) == pytest.approx(0, abs=1e-9)
    assert cmmd(one, other) > 0
    assert abs(cmmd(one, other, unbiased=True)) < cmmd(one, other)


def test_cmmd_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = rows(7, 5, 1), rows(9, 5, 2)
    whole = cmmd(one, other)
    monkeypatch.setattr("prune_lab.metrics.mmd._ROWS", 2)
    assert cmmd(one, other) == pytest.approx(whole, rel=1e-12)


# Precision and recall --------------------------------------------------------------------------------------------


def test_precision_and_recall_by_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, real = rows(30, 3, 1, 0.6), rows(40, 3, 2)

    def share(points: Tensor, centres: Tensor) -> float:
        found = 0
        for point in points.tolist():
            for centre in centres.tolist():
                others = sorted(math.dist(centre, other) for other in centres.tolist())
                if math.dist(point, centre) <= others[3]:  # others[0] is the centre itself
                    found += 1
                    break
        return found / len(points)

    for part in (2048, 7):
        monkeypatch.setattr("prune_lab.metrics.manifold._ROWS", part)
        found = precision_recall(drawn, real)
        assert (found.precision, found.recall) == (share(drawn, real), share(real, drawn))
    assert found.precision > found.recall  # it draws the middle alone


def test_a_set_has_all_of_itself_and_nothing_of_one_far_away() -> None:
    one = rows(20, 4, 1)
    assert precision_recall(one, one).recall == 1
    assert precision_recall(one + 100, one).precision == 0


# Diversity -------------------------------------------------------------------------------------------------------


def test_the_distance_between_seeds_by_loops() -> None:
    features = rows(3 * 4, 5, 1).reshape(3, 4, 5)
    pairs = list(itertools.combinations(range(4), 2))
    cosines, roots = [], []
    for prompt in features:
        cosines.append(
            sum(1 - float(prompt[i] @ prompt[j] / prompt[i].norm() / prompt[j].norm()) for i, j in pairs) / 6
        )
        roots.append(sum(float((prompt[i] - prompt[j]).square().mean().sqrt()) for i, j in pairs) / 6)
    assert mean_distances(features, cosine=True).tolist() == pytest.approx(cosines)
    assert mean_distances(features, cosine=False).tolist() == pytest.approx(roots)
    alike = features[:, :1].repeat(1, 4, 1)
    assert mean_distances(alike, cosine=True).tolist() == pytest.approx([0, 0, 0], abs=1e-12)


# Without groups of rows ------------------------------------------------------------------------------------------

WITHOUT = {
    "fid": (fid_without, fid),
    "cmmd": (cmmd_without, cmmd),
    "precision": (precision_without, lambda one, other: precision_recall(one, other).precision),
    "recall": (recall_without, lambda one, other: precision_recall(one, other).recall),
    "is": (lambda one, _, groups: inception_score_without(one, groups), lambda one, _: inception_score(one)),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_what_a_metric_is_without_a_group_is_what_it_is_of_the_others(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prune_lab.metrics.manifold._ROWS", 7)
    monkeypatch.setattr("prune_lab.metrics.mmd._ROWS", 7)
    function, plain = WITHOUT[name]
    drawn, real = rows(24, 3, 1, 0.7), rows(31, 3, 2)
    groups = torch.arange(24) % 5
    value, without = function(drawn, real, groups)
    assert value == pytest.approx(plain(drawn, real))
    assert without == pytest.approx([plain(drawn[groups != group], real) for group in range(5)])
    assert len(set(without)) > 1


@pytest.mark.parametrize(("function", "plain"), [(fid_without, fid), (cmmd_without, cmmd)])
def test_of_pairs_both_are_left_out(function: Any, plain: Any) -> None:
    drawn, other, groups = rows(24, 3, 1, 0.7), rows(24, 3, 2), torch.arange(24) % 5
    _, without = function(drawn, other, groups, paired=True)
    assert without == pytest.approx(
        [plain(drawn[groups != group], other[groups != group]) for group in range(5)]
    )


def test_too_little_is_refused_in_one_line() -> None:
    for call in (
        lambda: fid(rows(1, 3, 1), rows(9, 3, 2)),
        lambda: fid(rows(9, 3, 1), rows(9, 4, 2)),
        lambda: inception_score(rows(9, 3, 1)),
        lambda: cmmd(rows(1, 3, 1), rows(9, 3, 2)),
        lambda: precision_recall(rows(3, 3, 1), rows(9, 3, 2)),
        lambda: mean_distances(rows(3, 3, 1)[:, None], cosine=True),
    ):
        with pytest.raises(DataError) as found:
            call()
        assert "give" in str(found.value)


# What is no number ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("metric", ["fid", "cmmd", "precision", "recall", "inception", "diversity"])
def test_features_that_are_no_numbers_are_refused(metric: str, value: float) -> None:
    one, other, groups = rows(30, 6, 1), rows(30, 6, 2), torch.arange(30) % 3
    bad = one.clone()
    bad[7, 2] = value
    functions: dict[str, Any] = {
        "fid": lambda given: (fid(given, other), fid_without(other, given, groups)),
        "cmmd": lambda given: (cmmd(given, other), cmmd(other, given)),
        "precision": lambda given: precision_without(given, other, groups),
        "recall": lambda given: recall_without(other, given, groups),
        "inception": lambda given: inception_score(given, 3),
        "diversity": lambda given: mean_distances(given.reshape(30, 2, 3), cosine=True),
    }
    functions[metric](one)
    with pytest.raises(DataError, match="not finite in 1 of them, first in row 7"):
        functions[metric](bad)


def test_features_of_other_widths_are_refused() -> None:
    one, other, groups = rows(30, 6, 1), rows(30, 5, 2), torch.arange(30) % 3
    for function in (fid_without, cmmd_without, precision_without, recall_without):
        with pytest.raises(DataError, match="asked for"):
            function(one, other, groups)
