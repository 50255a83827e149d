"""Importance: by hand, exactly nothing for a block that does nothing, intervals that hold, and no silent NaN."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prune_lab.blocks import BlockGroup, architecture_of, block_groups
from prune_lab.errors import DataError, UnknownBlockError
from prune_lab.importance import (
    Importance,
    ImportanceTable,
    ScoreCache,
    ScoringContext,
    importance_from_frame,
    outputs,
    score,
)
from prune_lab.importance.intervals import intervals
from prune_lab.prefix_sharing import predict_without
from prune_lab.probes import Probe, predict, random_probe
from prune_lab.schemas import IMPORTANCE_COLUMNS

A_PICTURE_EACH = np.arange(200)


@pytest.fixture
def probe(tiny_config: dict[str, Any]) -> Probe:
    return random_probe(tiny_config, samples=4, seed=0)


def single(*names: str) -> tuple[BlockGroup, ...]:
    return tuple(BlockGroup(name, "block", (name,)) for name in names)


def shuffled(probe: Probe, order: list[int]) -> Probe:
    return Probe(
        **{name: tensor[order] for name, tensor in probe.tensors().items()},
        captions=tuple(probe.captions[row] for row in order),
        groups=tuple(probe.groups[row] for row in order),
    )


# Scoring ---------------------------------------------------------------------------------------------------------


def test_impact_by_hand(tiny_unet: Any, probe: Probe) -> None:
    """One attention and one up-stage residual block, taken out by hooks instead of bypass modules."""

    def answer() -> torch.Tensor:
        with torch.no_grad():
            return tiny_unet(probe.noisy, probe.timesteps, probe.embeddings).sample.double()

    def relative(change: torch.Tensor) -> float:
        return float(change.square().sum() / teacher.square().sum())

    teacher = answer()
    hook = tiny_unet.down_blocks[1].attentions[0].register_forward_hook(lambda _, given, out: (given[0],))
    attention = relative(answer() - teacher)
    hook.remove()
    resnet = tiny_unet.up_blocks[1].resnets[1]
    hook = resnet.register_forward_hook(lambda _, given, out: given[0][:, : out.shape[1]])
    residual = relative(answer() - teacher)
    hook.remove()
    table = score(ScoringContext(tiny_unet, probe, batch=3), single("Dn2.A1", "Up2.R2"))
    assert [entry.impact for entry in table.entries] == pytest.approx([attention, residual], rel=1e-4)


def test_all_kinds_of_groups(tiny_unet: Any, tiny_config: dict[str, Any]) -> None:
    architecture = architecture_of(tiny_unet)
    groups = [group for kind in ("block", "pair", "stage") for group in block_groups(architecture, kind)]
    probe = random_probe(tiny_config, samples=2, seed=0)
    table = score(ScoringContext(tiny_unet, probe), groups, bootstrap=100)
    assert [entry.group for entry in table.entries] == groups
    blocks = [entry for entry in table.entries if entry.group.kind == "block"]
    assert len(blocks) == 38
    starred = {entry.group.name for entry in blocks if entry.starred}
    assert starred == {"Dn2.R1", "Dn3.R1", "Up3.R1", "Up4.R1"}
    assert all(0 < entry.low <= entry.impact <= entry.high for entry in table.entries)
    assert all(entry.samples == 2 for entry in table.entries)
    assert [entry.impact for entry in blocks] == list(table.block_impacts().values())
    assert table.values is not None
    assert table.scales is not None
    assert table.values.shape == (len(groups), 2)
    by_rows = table.values.sum(axis=1) / table.scales.sum()
    assert [entry.impact for entry in table.entries] == pytest.approx(by_rows.tolist())


def test_the_model_stays_as_it_was(tiny_unet: Any, probe: Probe) -> None:
    before = predict(tiny_unet, probe)
    score(ScoringContext(tiny_unet, probe), single("Dn1.A1", "Dn2.R1"))
    assert torch.equal(predict(tiny_unet, probe), before)
    tiny_unet.train()
    breaks = tiny_unet.conv_out.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score(ScoringContext(tiny_unet, probe), single("Dn1.A1"))
    breaks.remove()
    assert tiny_unet.training
    assert torch.equal(predict(tiny_unet, probe), before)


def test_equal_sets_are_measured_once(tiny_unet: Any, probe: Probe) -> None:
    pair = BlockGroup("twice", "pair", ("Md.R1", "Md.A1"))
    turned = BlockGroup("turned", "pair", ("Md.A1", "Md.R1"))
    once, twice = (score(ScoringContext(tiny_unet, probe), groups) for groups in ((pair,), (pair, turned)))
    assert once.compute is not None
    assert once.compute == twice.compute  # the teacher and one set
    assert len({entry.impact for entry in (*once.entries, *twice.entries)}) == 1


def test_a_cache_serves_one_model(tiny_unet: Any, probe: Probe) -> None:
    """Else the scores of the first would be given as those of the second, without a word."""
    context = ScoringContext(tiny_unet, probe)
    with pytest.raises(DataError, match="cache of another"):
        dataclasses.replace(context, model=copy.deepcopy(tiny_unet))
    alone = dataclasses.replace(context, model=copy.deepcopy(tiny_unet), cache=ScoreCache())
    assert score(alone, single("Dn1.R2")).entries[0].impact > 0


def test_every_row_of_every_group_is_its_own_whatever_the_batch(tiny_unet: Any, probe: Probe) -> None:
    groups = single("Dn1.A1", "Md.R1", "Up4.A3")
    values = [score(ScoringContext(tiny_unet, probe, batch=batch), groups).values for batch in (1, 3, 4)]
    for other in values[1:]:
        np.testing.assert_allclose(other, values[0], rtol=1e-3)


def test_same_seed_same_table(tiny_unet: Any, tiny_config: dict[str, Any]) -> None:
    groups, probe = single("Dn1.A1", "Md.R1"), random_probe(tiny_config, samples=8, seed=0)
    first, again, other = (score(ScoringContext(tiny_unet, probe, seed=seed), groups) for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(first.frame(), again.frame(), check_exact=True)
    assert first.entries[0].impact == other.entries[0].impact
    assert first.entries[0].low != other.entries[0].low


def test_bfloat16_gives_nearly_the_same_scores(tiny_unet: Any, probe: Probe) -> None:
    groups = single("Dn1.A1", "Dn1.R1")
    exact = score(ScoringContext(tiny_unet, probe), groups)
    rough = score(ScoringContext(tiny_unet.to(torch.bfloat16), probe), groups)
    assert rough.entries[1].impact == pytest.approx(exact.entries[1].impact, rel=0.1)


def test_not_a_number_is_an_error_that_names_the_group(
    tiny_unet: Any, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(*given: Any, **named: Any) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        for rows, (teacher, pruned) in predict_without(*given, **named):
            damaged = pruned.clone()
            damaged[1, 0, 0, 0] = float("nan")
            yield rows, [teacher, damaged]

    monkeypatch.setattr(outputs, "predict_without", spoiled)
    with pytest.raises(DataError, match=r"output-mse of Md\.R1.*1 of 4 rows"):
        score(ScoringContext(tiny_unet, probe), single("Md.R1"))


def test_a_damaged_model_is_an_error(tiny_unet: Any, probe: Probe) -> None:
    with torch.no_grad():
        tiny_unet.conv_out.weight.fill_(0)
        tiny_unet.conv_out.bias.fill_(0)
    with pytest.raises(DataError, match="predicts 0 everywhere"):
        score(ScoringContext(tiny_unet, probe), single("Md.R1"))
    with torch.no_grad():
        tiny_unet.conv_out.bias.fill_(float("inf"))
    with pytest.raises(DataError, match="the model itself"):
        score(ScoringContext(tiny_unet, probe), single("Md.R1"))


def test_an_unknown_block_is_an_error(tiny_unet: Any, probe: Probe) -> None:
    with pytest.raises(UnknownBlockError, match=r"Dn9\.R1"):
        score(ScoringContext(tiny_unet, probe), single("Dn9.R1"))


# Intervals -------------------------------------------------------------------------------------------------------


def test_interval_against_the_normal_approximation() -> None:
    generator = np.random.default_rng(0)
    values = generator.exponential(size=(3, 200)) * [[1.0], [2.0], [10.0]]
    scales = np.ones(200)
    lows, highs = intervals(values, scales, A_PICTURE_EACH, draws=20000, seed=0)
    half = 1.96 * values.std(axis=1) / np.sqrt(200)
    np.testing.assert_allclose(highs - lows, 2 * half, rtol=0.05)
    np.testing.assert_allclose((highs + lows) / 2, values.mean(axis=1), rtol=0.02)


def test_intervals_cover_the_truth() -> None:
    """A ratio whose numerator and denominator move together: 95 % intervals hold it about 95 % of the time."""
    generator = np.random.default_rng(1)
    hits = 0
    for trial in range(300):
        scales = generator.uniform(0.5, 1.5, size=60)
        values = (0.3 * scales + generator.normal(0, 0.1, size=60))[None]
        (low,), (high,) = intervals(values, scales, np.arange(60), draws=400, seed=trial)
        hits += bool(low <= 0.3 <= high)
    assert 0.90 <= hits / 300 <= 0.985


@given(st.integers(2, 12), st.integers(2, 5), st.integers(0, 2**31))
def test_rows_of_one_picture_are_one_piece_of_evidence(pictures: int, copies: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    values, scales = generator.uniform(size=(2, pictures)), generator.uniform(1, 2, size=pictures)
    once = intervals(values, scales, np.arange(pictures), draws=200, seed=seed)
    index = np.repeat(np.arange(pictures), copies)
    repeated = intervals(values[:, index], scales[index], index, draws=200, seed=seed)
    np.testing.assert_allclose(once, repeated)


@given(st.integers(2, 20), st.integers(0, 2**31))
def test_all_groups_see_the_same_resamples(pictures: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    less = generator.uniform(size=pictures)
    more = less + generator.uniform(size=pictures)
    lows, highs = intervals(
        np.stack([less, more, less]), np.ones(pictures), np.arange(pictures), draws=100, seed=seed
    )
    assert lows[0] == lows[2] <= lows[1]
    assert highs[0] == highs[2] <= highs[1]


def test_no_interval_is_not_an_interval_of_zero(tiny_unet: Any, tiny_config: dict[str, Any]) -> None:
    one = random_probe(tiny_config, samples=1, seed=0)
    (entry,) = score(ScoringContext(tiny_unet, one), single("Md.R1")).entries
    assert entry.impact > 0
    assert np.isnan([entry.low, entry.high]).all()
    two = random_probe(tiny_config, samples=2, seed=0)
    (entry,) = score(ScoringContext(tiny_unet, two), single("Md.R1"), bootstrap=0).entries
    assert np.isnan([entry.low, entry.high]).all()


# Tables ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def table() -> ImportanceTable:
    entries = (
        Importance(BlockGroup("Dn2.R1", "block", ("Dn2.R1",)), 0.1 + 0.2, 0.25, 0.4, 8, starred=True),
        Importance(
            BlockGroup("Dn1.R2+A2", "pair", ("Dn1.R2", "Dn1.A2")), 1e-17, float("nan"), float("nan"), 8
        ),
    )
    return ImportanceTable(entries, criterion="output-mse", probe="00ff", model="reference")


def test_columns(table: ImportanceTable) -> None:
    frame = table.frame()
    expected = ["group", "kind", "blocks", "starred", "impact", "low", "high", "samples"]
    expected += ["criterion", "probe", "model"]
    assert list(frame.columns) == expected == list(IMPORTANCE_COLUMNS)
    assert frame["blocks"].tolist() == ["Dn2.R1", "Dn1.R2 Dn1.A2"]
    assert frame["starred"].tolist() == [True, False]


def test_a_table_survives_its_csv(table: ImportanceTable) -> None:
    text = io.StringIO(table.frame().to_csv(index=False))
    again = importance_from_frame(pd.read_csv(text))
    assert (again.criterion, again.model) == ("output-mse", "reference")
    assert [entry.group for entry in again.entries] == [entry.group for entry in table.entries]
    assert again.entries[0] == table.entries[0]
    assert again.entries[1].impact == 1e-17
    assert np.isnan(again.entries[1].low)
    assert again.entries[1].samples == 8


def test_a_digest_of_digits_stays_text(table: ImportanceTable) -> None:
    digits = ImportanceTable(table.entries, criterion="output-mse", probe="0123456789012345", model="12")
    text = io.StringIO(digits.frame().to_csv(index=False))
    read = pd.read_csv(text, dtype={"probe": str, "model": str})
    assert importance_from_frame(read).probe == "0123456789012345"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda frame: frame.drop(columns="impact"), "missing columns: impact"),
        (lambda frame: frame.iloc[:0], "found 0 rows"),
        (lambda frame: frame.assign(impact=[0.5, float("nan")]), "not numbers"),
        (lambda frame: frame.assign(impact=["a lot", "0"]), "not numbers"),
        (lambda frame: frame.assign(kind=["block", "layer"]), "kinds layer"),
        (lambda frame: frame.assign(criterion=["output-mse", "output-cosine"]), "2 combinations"),
    ],
)
def test_a_damaged_table_is_refused(table: ImportanceTable, change: Any, found: str) -> None:
    with pytest.raises(DataError, match=found):
        importance_from_frame(change(table.frame()))
