"""Races: the order of the whole probe for a part of its cost, and nothing claimed that was not measured."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import kendalltau

from prune_lab.blocks import Architecture, BlockGroup, architecture_of, block_groups
from prune_lab.errors import ConfigError
from prune_lab.importance import Race, Samples, ScoreCache, ScoringContext, score
from prune_lab.importance.intervals import impacts_of, resampled_impacts
from prune_lab.importance.racing import sample_order, separations
from prune_lab.plans import gone_with
from prune_lab.prefix_sharing import macs_without
from prune_lab.probes import Probe, random_probe


@pytest.fixture
def probe(tiny_config: dict[str, Any]) -> Probe:
    return random_probe(tiny_config, samples=24, seed=0, timesteps=4)


def blocks_of(unet: Any) -> tuple[BlockGroup, ...]:
    return block_groups(architecture_of(unet), "block")


# Impacts where values are missing ------------------------------------------------------------------------------------


def test_missing_values_are_put_in_by_the_ratio() -> None:
    # The first group says that the third sample counts twice the mean; the second was measured on the first two.
    values = np.array([[1.0, 1.0, 4.0], [10.0, 12.0, np.nan]])
    scales = np.array([1.0, 2.0, 3.0])
    # Profile of the complete group: 1/2, 1/2, 2 (sum 3). Second: 22 / (1/2 + 1/2) * 3 = 66 over all samples.
    assert impacts_of(values, scales) == pytest.approx([6 / 6, 66 / 6])


def test_values_below_zero_are_put_in_by_the_scales() -> None:
    values = np.array([[-1.0, 1.0, 4.0], [10.0, 12.0, np.nan]])
    assert impacts_of(values, np.array([1.0, 2.0, 3.0])) == pytest.approx([4 / 6, 22 / 3])


def test_a_group_without_a_value_has_no_impact() -> None:
    found = impacts_of(np.array([[1.0, 2.0], [np.nan, np.nan]]), np.ones(2))
    assert found[0] == 1.5
    assert np.isnan(found[1])


def test_resamples_of_missing_values_are_impacts_of_the_rows_drawn() -> None:
    generator = np.random.default_rng(0)
    values, scales = generator.uniform(1, 2, (3, 8)), generator.uniform(1, 2, 8)
    values[2, 5:] = np.nan
    found = resampled_impacts(values, scales, np.arange(8), draws=50, seed=3)
    counts = np.random.default_rng(3).multinomial(8, np.full(8, 1 / 8), size=50)
    # The profile is that of all samples, the sums are over those that were drawn, as often as they were.
    profile = (values[:2] / values[:2].mean(1, keepdims=True)).mean(0)
    for row, count in zip(found, counts, strict=True):
        over = (count * profile).sum() / (count * scales).sum()
        known = count * np.array([1, 1, 1, 1, 1, 0, 0, 0])
        wanted = (known * np.nan_to_num(values[2])).sum() / (known * profile).sum() * over
        assert row[2] == pytest.approx(wanted)
        assert row[0] == pytest.approx((count * values[0]).sum() / (count * profile).sum() * over)


# How a race decides --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_every_beginning_of_the_order_is_spread_over_the_timesteps(seed: int) -> None:
    samples = Samples(np.arange(60), np.arange(60) % 7 * 100)
    order = sample_order(samples, seed)
    assert sorted(order) == list(range(60))
    for length in (7, 20, 41):
        _, counts = np.unique(samples.timesteps[order[:length]], return_counts=True)  # type: ignore[index]
        assert counts.max() - counts.min() <= 1
    assert order.tolist() != sample_order(samples, seed + 1).tolist()
    assert sorted(sample_order(Samples(np.arange(5)), seed)) == list(range(5))


def test_distances_by_hand() -> None:
    values = np.array([[1.0, 3.0, 2.0, 2.0], [4.0, 4.0, 6.0, 6.0], [90.0, 90.0, 94.0, 94.0]])
    # Paired differences: 3, 1, 4, 4 (mean 3, deviation sqrt 2) and 86, 86, 88, 88 (mean 87, deviation 2 / sqrt 3).
    # Four samples of eight: the error of the mean is deviation / 2 * sqrt(1 / 2).
    first, second = 3 / (2**0.5 / 2 * 0.5**0.5), 87 / (2 / 3**0.5 / 2 * 0.5**0.5)
    found = separations(values, np.ones(4), population=8)
    assert found == pytest.approx([first, first, second])
    assert separations(values, np.full(4, 7.0), population=8) == pytest.approx(found)  # whatever the unit
    assert np.isinf(separations(values, np.ones(4), population=4)).all()  # nothing is left to be known


def suffix(architecture: Architecture, name: str) -> int:
    """MACs after a block by hand: those of all units behind it, and what stands before and behind the stages."""
    units = architecture.units
    place = [unit.name for unit in units].index(name)
    around = architecture.total_macs - sum(unit.macs for unit in units)
    return around + sum(unit.macs for unit in units[place + 1 :])


def test_what_a_removal_costs(tiny_unet: Any) -> None:
    architecture = architecture_of(tiny_unet)
    for name in ("Dn1.R1", "Md.A1", "Up4.A3"):
        assert macs_without(architecture, frozenset([name])) == suffix(architecture, name)
    both = macs_without(architecture, frozenset(["Dn2.A1", "Up4.R1"]))
    assert both == suffix(architecture, "Dn2.A1") - next(
        u.macs for u in architecture.units if u.name == "Up4.R1"
    )


# Races ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.1, 0.2, 0.4])
def test_a_race_stays_within_its_budget_and_says_what_it_spent(
    tiny_unet: Any, probe: Probe, budget: float
) -> None:
    groups, race = blocks_of(tiny_unet), Race(budget, start=4, step=2)
    table = score(ScoringContext(tiny_unet, probe), groups, race=race, bootstrap=50)
    assert table.compute is not None
    assert table.compute.naive_macs == len(groups) * len(probe) * table.compute.forward_macs
    assert table.compute.macs <= budget * table.compute.naive_macs
    assert table.values is not None
    assert [entry.samples for entry in table.entries] == (~np.isnan(table.values)).sum(1).tolist()
    assert min(entry.samples for entry in table.entries) >= 2
    assert (
        table.parts()["samples"].sum() == sum(entry.samples for entry in table.entries) * 2
    )  # timesteps and prompts
    by_hand = 0
    architecture = architecture_of(tiny_unet)
    for entry in table.entries:
        by_hand += entry.samples * macs_without(
            architecture, gone_with(architecture, entry.group.blocks, stand_in=True)
        )
    by_hand += max(entry.samples for entry in table.entries) * architecture.total_macs
    assert table.compute.macs == by_hand


@pytest.mark.long
def test_a_race_that_may_cost_everything_and_settles_nothing_is_the_whole_score(
    tiny_unet: Any, probe: Probe
) -> None:
    groups = blocks_of(tiny_unet)
    whole = score(ScoringContext(tiny_unet, probe), groups)
    race = score(ScoringContext(tiny_unet, probe), groups, race=Race(1.0, start=4, step=5, separation=1e9))
    assert [entry.samples for entry in race.entries] == [len(probe)] * len(groups)
    assert race.impacts == pytest.approx(whole.impacts, rel=1e-4)  # batches differ


@pytest.mark.long
def test_settled_groups_get_no_more_samples_and_close_ones_do(tiny_unet: Any, probe: Probe) -> None:
    """Those that stop first are further from their neighbours than those that go on to the end."""
    groups = blocks_of(tiny_unet)
    # The budget allows to measure everything; the race does not.
    race = score(ScoringContext(tiny_unet, probe), groups, race=Race(1.0, start=4, step=2))
    whole = score(ScoringContext(tiny_unet, probe), groups, bootstrap=0)
    samples = np.array([entry.samples for entry in race.entries])
    assert samples.min() < samples.max()
    order = np.sort(np.log(whole.impacts))
    gaps = np.full(len(order), np.inf)
    steps = np.diff(order)
    gaps[1:], gaps[:-1] = np.minimum(gaps[1:], steps), np.minimum(gaps[:-1], steps)
    near = gaps[np.argsort(np.argsort(whole.impacts))]  # to the nearer neighbour, in table order
    assert np.median(near[samples == samples.max()]) < np.median(near[samples == samples.min()])
    assert kendalltau(race.impacts, whole.impacts).statistic > 0.8


@pytest.mark.long
def test_the_same_seed_gives_the_same_race_also_from_a_cache(
    tiny_unet: Any, probe: Probe, tmp_path: Path
) -> None:
    groups, race = blocks_of(tiny_unet), Race(0.2, start=4, step=2)
    fresh = score(ScoringContext(tiny_unet, probe), groups, race=race)
    path = tmp_path / "scores.safetensors"
    # The cache then holds more values than the race measures.
    score(ScoringContext(tiny_unet, probe, cache=ScoreCache(path)), groups[:9])
    again = score(ScoringContext(tiny_unet, probe, cache=ScoreCache(path)), groups, race=race)
    assert [entry.samples for entry in again.entries] == [entry.samples for entry in fresh.entries]
    assert again.impacts == pytest.approx(fresh.impacts, rel=1e-4)
    last = score(ScoringContext(tiny_unet, probe, cache=ScoreCache(path)), groups, race=race)
    assert last.compute is not None
    assert last.compute.macs == 0
    assert last.impacts == pytest.approx(again.impacts, rel=0)
    other = score(ScoringContext(tiny_unet, probe, seed=1), groups, race=race)
    assert other.impacts.tolist() != fresh.impacts.tolist()


def test_equal_sets_race_as_one(tiny_unet: Any, probe: Probe) -> None:
    groups = (*blocks_of(tiny_unet)[:6], BlockGroup("copy", "plan", blocks_of(tiny_unet)[2].blocks))
    table = score(ScoringContext(tiny_unet, probe), groups, race=Race(0.5, start=4, step=2), bootstrap=0)
    assert table.entries[2].impact == table.entries[6].impact
    assert table.entries[2].samples == table.entries[6].samples


def test_impossible_races_say_what_would_do(tiny_unet: Any, probe: Probe) -> None:
    groups = blocks_of(tiny_unet)
    with pytest.raises(ConfigError, match="less than two samples of every group; give a budget of 0"):
        score(ScoringContext(tiny_unet, probe), groups, race=Race(0.001))
    with pytest.raises(
        ConfigError, match=r"race by gate-fisher.*race by denoising-loss, output-cosine, output-mse"
    ):
        score(ScoringContext(tiny_unet, probe), groups, "gate-fisher", race=Race())
    for wrong in ({"budget": 0.0}, {"budget": 1.5}, {"start": 1}, {"step": 0}, {"separation": 0.0}):
        with pytest.raises(ConfigError, match="cannot race"):
            Race(**wrong)  # type: ignore[arg-type]


def table_of_ties(seed: int) -> NDArray[np.float64]:
    """Values (12, 200) of groups worth 1, 1.5, 2.25 ... with the noise of each sample shared by all, and some own."""
    generator = np.random.default_rng(seed)
    shared, own = generator.lognormal(0, 0.8, 200), generator.lognormal(0, 0.2, (12, 200))
    return 1.5 ** np.arange(12)[:, None] * shared * own


def test_shared_noise_cancels_in_the_ratio() -> None:
    """Half the groups miss most samples: the ratio is nearer to the whole than a plain mean, over 20 draws."""
    away = []
    for seed in range(20):
        values = table_of_ties(seed)
        whole, missing = values.mean(1), values.copy()
        missing[::2, 60:] = np.nan
        both = impacts_of(missing, np.ones(200)), np.nanmean(missing, axis=1)
        away.append([np.abs(np.log(found[::2] / whole[::2])).mean() for found in both])
    ratio, plain = np.mean(away, axis=0)
    assert ratio < plain / 2


@pytest.mark.long
def test_torch_compile_gives_the_same_scores(
    tiny_unet: Any, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the compiler's front end alone, on some blocks: its code generator takes minutes, and is torch's to test."""
    compiled: list[Any] = []
    real = torch.compile

    def compile_only_in_front(module: Any, **settings: Any) -> Any:
        compiled.append(module)
        return real(module, backend="eager", **settings) if len(compiled) < 7 else module

    monkeypatch.setattr(torch, "compile", compile_only_in_front)
    groups = tuple(itertools.islice(blocks_of(tiny_unet), 0, 38, 9))
    few = probe.rows([0, 1])
    plain = score(ScoringContext(tiny_unet, few), groups, bootstrap=0)
    assert not compiled
    found = score(ScoringContext(tiny_unet, few, compiled=True), groups, bootstrap=0)
    assert len(compiled) >= 38
    assert found.impacts == pytest.approx(plain.impacts, rel=1e-4)
