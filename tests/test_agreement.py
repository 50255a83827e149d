"""Honesty about scores: agreement, additivity, foresight and stability on made-up tables whose answers are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from prune_lab.blocks import BlockGroup, architecture_of
from prune_lab.importance import (
    Importance,
    ImportanceTable,
    Samples,
    additivity,
    agreement,
    describe_agreement,
    describe_stability,
    predictive_correlation,
    random_plans,
    stability,
)
from prune_lab.models import resolve_model
from prune_lab.orders import rank_agreement
from prune_lab.report import write_agreement
from prune_lab.schemas import AGREEMENT_COLUMNS, STABILITY_COLUMNS

BLOCKS = tuple(f"Dn1.R{number}" for number in range(1, 13))


def table(values: NDArray[np.float64], criterion: str = "output-mse") -> ImportanceTable:
    """A table of single blocks with these values (G, R), all samples of scale 1."""
    samples = Samples(
        np.arange(values.shape[1]),
        np.arange(values.shape[1]) * 37 % 1000,
        ("a", "b") * (values.shape[1] // 2),
    )
    entries = tuple(
        Importance(BlockGroup(name, "block", (name,)), float(row.mean()), np.nan, np.nan, len(row))
        for name, row in zip(BLOCKS, values, strict=False)
    )
    return ImportanceTable(
        entries, criterion, "probe", "model", values=values, scales=np.ones(values.shape[1]), samples=samples
    )


def noisy(noise: float, seed: int = 0, rows: int = 40) -> NDArray[np.float64]:
    """Blocks worth 1, 2, 3 ... with normal noise on every sample."""
    generator = np.random.default_rng(seed)
    return np.arange(1.0, 13)[:, None] + generator.normal(0, noise, size=(12, rows))


def test_rank_correlations_by_hand() -> None:
    one = np.array([1.0, 2, 3, 4])
    # One swap of neighbours: 5 of 6 pairs agree; squared rank differences sum to 2.
    spearman, kendall = rank_agreement(one, np.array([1.0, 3, 2, 4]))
    assert (spearman, kendall) == pytest.approx((1 - 6 * 2 / (4 * 15), 4 / 6))
    assert rank_agreement(one, -one) == pytest.approx((-1, -1))
    assert np.isnan(rank_agreement(one, np.ones(4))).all()


def test_agreement_says_how_sure_it_is() -> None:
    clear, rough = table(noisy(0.1)), table(noisy(20.0, seed=1), "rough")
    found = agreement([clear, rough], draws=100).set_index(["criterion", "other"])
    assert list(found.reset_index().columns) == list(AGREEMENT_COLUMNS)
    own = found.loc[("output-mse", "output-mse")]
    assert (own["spearman"], own["spearman_low"]) == pytest.approx((1, 1))
    pair = found.loc[("output-mse", "rough")]
    assert pair["spearman_low"] <= pair["spearman"] <= pair["spearman_high"]
    assert pair["spearman_high"] - pair["spearman_low"] > 0.1
    assert found.loc[("rough", "output-mse"), "spearman"] == pytest.approx(pair["spearman"])


def plans_of(*sets: tuple[int, ...]) -> tuple[BlockGroup, ...]:
    return tuple(
        BlockGroup(f"plan-{number}", "plan", tuple(BLOCKS[place] for place in one))
        for number, one in enumerate(sets)
    )


def test_an_additive_model_has_no_residual_and_foretells() -> None:
    scores = table(noisy(0.01))
    plans = plans_of((0, 1), (2, 3, 4), (5,), (6, 7, 8), (9, 10, 11), (0, 11), (3, 4), (1, 2, 3), (7, 8))
    sums = np.array([sum(scores.block_impacts()[name] for name in plan.blocks) for plan in plans])
    whole = ImportanceTable(
        tuple(
            Importance(plan, float(1.5 * total), np.nan, np.nan, 4)
            for plan, total in zip(plans, sums, strict=True)
        ),
        "output-mse",
        "probe",
        "model",
    )
    frame = additivity(scores, whole)
    assert frame["ratio"].tolist() == pytest.approx([1.5] * 9)
    assert frame["count"].tolist() == [len(plan.blocks) for plan in plans]
    against = table(noisy(0.01)[::-1], "against")
    found = predictive_correlation([scores, against], plans, 1.5 * sums, "the measured impact")
    assert found["spearman"].iloc[0] == pytest.approx(1)
    assert found["spearman_low"].iloc[0] == pytest.approx(1)
    assert found["spearman"].iloc[1] < 0.5
    assert found["count"].tolist() == [9, 9]


def test_conclusions_warn_where_little_can_be_concluded() -> None:
    scores, luck = (
        table(noisy(0.01)),
        table(noisy(0.01, seed=4)[np.random.default_rng(3).permutation(12)], "luck"),
    )
    plans = plans_of((0, 1), (2, 3, 4), (5,), (6, 7, 8), (9, 10, 11), (0, 11), (3, 4), (1, 2, 3), (7, 8))
    outcome = np.random.default_rng(5).normal(size=9)
    frame = pd.concat(
        [
            agreement([scores, luck], draws=20),
            predictive_correlation([scores, luck], plans, outcome, "the loss"),
        ]
    )
    lines = describe_agreement(frame, pd.DataFrame(), {"output-mse": 300.0, "luck": 2.0})
    assert any(
        "luck orders the blocks most like it" in line and "150 times cheaper" in line for line in lines
    )
    assert any(line.startswith("Warning: by the loss") for line in lines)
    control = predictive_correlation([scores, table(noisy(0.01), "random")], plans, outcome, "the loss")
    said = describe_agreement(
        pd.concat([agreement([scores], draws=5), control]), pd.DataFrame(), {"output-mse": 1.0}
    )
    assert any("random scores, summed, reach" in line for line in said)
    few = pd.concat(
        [agreement([scores], draws=5), predictive_correlation([scores], plans[:4], outcome[:4], "the loss")]
    )
    assert any(
        "4 plans are too few" in line for line in describe_agreement(few, pd.DataFrame(), {"output-mse": 1.0})
    )


def test_an_order_is_stable_when_samples_agree_and_not_when_they_do_not() -> None:
    firm, loose = (stability(table(noisy(noise, rows=64)), tops=(5,), draws=30) for noise in (0.01, 30.0))
    assert list(firm.columns) == list(STABILITY_COLUMNS)
    rows = firm[firm["part"] == "samples"]
    assert rows["samples"].tolist() == [4, 8, 16, 32]
    assert rows["overlap"].tolist() == [1, 1, 1, 1]
    rough = loose[loose["part"] == "samples"]["overlap"].to_numpy()
    assert rough[0] < 0.8
    assert rough[-1] > rough[0]
    assert set(firm["part"]) == {"samples", "timesteps", "prompts"}


def test_other_noise_is_compared_and_put_into_words() -> None:
    same, reversed_ = table(noisy(0.01)), table(noisy(0.01)[::-1])
    found = stability(same, {"seed 1": same, "seed 2": reversed_}, tops=(3, 4, 5))
    rows = found[found["part"] == "noise"]
    assert rows["of"].tolist() == ["seed 1"] * 3 + ["seed 2"] * 3
    assert rows["overlap"].tolist() == [1, 1, 1, 0, 0, 0]  # the least of one are the most of the other
    assert rows["samples"].tolist() == [40] * 6
    said = describe_stability(found)
    assert (
        "Of the 4 least important blocks 0% to 100% are the same with other noise (2 tried, mean 50%)."
        in said
    )
    assert any("from one kind of prompt alone (2 tried, mean 100%" in line for line in said)
    assert describe_stability(stability(same).iloc[:0]) == ()


def test_random_plans_are_removable_and_repeatable() -> None:
    architecture = architecture_of(resolve_model("sd-v1.4").config)
    plans = random_plans(architecture, 22, most=12, seed=1)
    assert plans == random_plans(architecture, 22, most=12, seed=1)
    assert [len(plan.blocks) for plan in plans] == [*range(2, 13)] * 2
    assert all(architecture.block(name).removable for plan in plans for name in plan.blocks)


def test_the_page_shows_what_the_tables_hold(tmp_path: Path) -> None:
    scores, other = table(noisy(0.5)), table(noisy(3.0, seed=2), "other")
    plans = plans_of((0, 1), (2, 3, 4), (5, 6))
    sums = pd.DataFrame(
        {"plan": ["x"], "blocks": ["a b"], "count": [2], "measured": [0.3], "added": [0.2], "ratio": [1.5]}
    )
    summary = pd.DataFrame(
        {
            "criterion": ["output-mse", "other"],
            "samples": [40, 40],
            "forwards": [300.0, 2.0],
            **{
                f"{name}_{column}": [1.0, value]
                for name, value in (("leader", 0.25), ("impact", 0.5), ("outcome", np.nan))
                for column in ("spearman", "spearman_low", "spearman_high", "kendall")
            },
        }
    ).assign(outcome_spearman=np.nan)
    frames = {
        "summary": summary,
        "agreement": pd.concat(
            [
                agreement([scores, other], draws=5),
                predictive_correlation([scores, other], plans, np.arange(3.0), "the impact"),
            ]
        ),
        "parts": scores.parts(),
        "additivity": sums,
        "stability": stability(scores, draws=5),
    }
    page = write_agreement(tmp_path, model="tiny", lines=("One sentence.",), frames=frames).read_text()
    assert "- One sentence." in page
    assert "| `other` | 40 | 2 | 0.25 [0.25, 0.25] | 0.50 [0.50, 0.50] |" in page
    assert {path.name for path in tmp_path.glob("*.png")} == {
        *("agreement.png", "additivity.png", "stability.png", "parts.png")
    }
