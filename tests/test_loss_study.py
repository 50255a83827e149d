"""The comparison of feature losses: its jobs, and a page that says what its tables hold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from benchmarks import losses_page
from benchmarks.losses import FIRST, NEXT_BLOCK, PLANS, THEN, UNIT, VARIANTS, frames_of, jobs_of, plans_of
from benchmarks.outcome_tables import append_tables, read_tables
from benchmarks.outcomes import Job
from benchmarks.paired import crossed_difference, verdict
from prune_lab.config import RunConfig

NONE = pd.DataFrame(columns=[*UNIT, "step"])


def test_every_prefix_of_the_jobs_can_be_compared_and_each_says_whether_it_repairs() -> None:
    jobs = jobs_of("reference", NONE, list(VARIANTS), (0, 1), 150)
    then = len(THEN) - len(NEXT_BLOCK)  # a U-Net's features stand elsewhere
    assert [job.seed for job in jobs] == [0] * len(FIRST) + [1] * len(FIRST) + [0] * then + [1] * then
    assert not {job.study.split()[2] for job in jobs} & set(NEXT_BLOCK)
    on_chain = jobs_of("transformer", NONE, list(VARIANTS), (0,), 150)
    assert {job.study.split()[2] for job in on_chain} == set(VARIANTS)
    assert [job.study.split()[2] for job in jobs[: len(FIRST)]] == list(FIRST)
    for job in jobs:
        repaired = job.study.endswith("+repair")
        assert job.settings["repair.kind"] == ("best" if repaired else "none")
        assert set(job.plans) == set(PLANS["reference"][2])
    assert len({job.key for job in jobs}) == len(jobs)


@pytest.mark.parametrize("model", PLANS)
def test_plans_are_those_of_the_committed_tables(model: str) -> None:
    assert {name: text.split()[0][0] for name, text in plans_of(model).items()} == dict.fromkeys(
        PLANS[model][2], "-"
    )


def test_jobs_are_settings_of_a_run_and_others_repair_nothing(tmp_path: Path) -> None:
    for job in jobs_of("reference", NONE, list(VARIANTS), (0,), 150):
        found: RunConfig = job.config(tmp_path, "cpu")
        assert found.distill.steps == 150
        assert found.distill.loss_variant in job.study or "no-feature" in job.study
        assert found.distill.feature_weight == (0 if "no-feature" in job.study else 1)
        assert (found.distill.random_conditioning > 0) == job.study.endswith("+conditioning")
    assert Job("width", "reference", {"a": "bk-small"}, 0, 10).config(tmp_path, "cpu").repair.kind == "none"


def _line(variant: str, plan: str, seed: int, last: list[float], status: str = "done") -> dict[str, Any]:
    return {
        "study": f"losses reference {variant}",
        "plan": plan,
        "plan_id": f"id-{plan}",
        "seed": seed,
        "status": status,
        "steps": 150,
        "losses": {"0": [1.0, 1.0], "150": last},
        "teacher": 0.3,
        "seconds": 9.0,
        "device": "cpu",
        "torch": "2.13",
        "diffusers": "0.42",
    }


def test_what_is_in_the_table_is_not_asked_for_again(tmp_path: Path) -> None:
    names = PLANS["reference"][2]
    lines = [_line("raw", name, 0, [0.4, 0.6]) for name in names]
    lines += [
        _line("normalised", names[0], 0, [0.4, 0.6]),
        _line("normalised", names[1], 0, [0.4, 0.6], "stopped"),
    ]
    append_tables(tmp_path, UNIT, *frames_of(lines))
    append_tables(tmp_path, UNIT, *frames_of(lines))  # twice is the same
    outcomes, rows = read_tables(tmp_path, UNIT)
    assert outcomes.groupby("step")["loss"].mean().to_dict() == {0: 1.0, 150: 0.5}
    assert len(outcomes) == 8
    assert len(rows) == 8
    jobs = jobs_of("reference", outcomes, ["raw", "normalised"], (0, 1), 150)
    assert [(job.study.split()[2], job.seed, len(job.plans)) for job in jobs] == [
        ("normalised", 0, 2),
        ("raw", 1, 3),
        ("normalised", 1, 3),
    ]
    assert len(jobs_of("reference", outcomes, ["raw"], (0,), 300)) == 1  # longer ones are not there


def test_a_difference_is_paired_over_rows_and_seeds() -> None:
    base = pd.DataFrame([[1.0, 5.0], [2.0, 7.0]], index=[0, 1])
    other = base - np.array([[0.1, 0.3], [0.3, 0.5]])  # means of rows -0.2 and -0.4, of seeds -0.2 and -0.4
    found = crossed_difference(other, base)
    # the variance of either's mean is 0.02 / 2 = 0.01; 1 degree of freedom each, 2 together: t = 4.302653
    half = 4.302653 * math.sqrt(0.02)
    assert [found.mean, found.low, found.high] == pytest.approx([-0.3, -0.3 - half, -0.3 + half])
    one = crossed_difference(other.loc[[1]], base)  # one seed: over its rows, t of 1 degree 12.706205
    assert [one.mean, one.high - one.mean] == pytest.approx([-0.4, 12.706205 * 0.1])
    assert math.isnan(crossed_difference(other.set_axis([7, 8]), base).mean)
    same = crossed_difference(base, base)
    assert (same.mean, same.direction) == (0, "tie")
    with pytest.raises(ValueError, match="different held-out rows"):
        crossed_difference(other[[0]], base)


def _table(ends: dict[tuple[str, str], float]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Outcomes and rows of two models and two plans each; ``ends`` is what variants lose to raw, by model and name."""
    rows = [
        {
            "model": model,
            "variant": variant,
            "plan": plan,
            "plan_id": plan,
            "seed": seed,
            "step": 150,
            "row": row,
        }
        | {"loss": 0.4 + 0.1 * row + 0.01 * seed + ends.get((model, variant), 0) + 2e-4 * ((row + seed) % 2)}
        for model in ("reference", "transformer")
        for plan in ("good", "bad")
        for variant in ("raw", "normalised", "no-feature", "raw+repair")
        for seed in (0, 1, 2)
        for row in range(4)
    ]
    table = pd.DataFrame(rows)
    unit = [name for name in table if name not in ("row", "loss")]
    outcomes = table.groupby(unit, sort=False, as_index=False)["loss"].mean()
    return outcomes.assign(teacher=0.3, device="cpu", torch="2.13"), table


def test_the_page_says_which_variant_wins_on_all_plans_of_both_models() -> None:
    won = {
        ("reference", "normalised"): -0.02,
        ("transformer", "normalised"): -0.01,
        ("reference", "no-feature"): 0.03,
    }
    text = losses_page.page(*_table(won))
    assert (
        "**`normalised` ends below `raw` beyond its interval in all 4 cases of reference and transformer.**"
        in text
    )
    line = next(line for line in text.splitlines() if line.startswith("| no-feature |"))
    assert (
        line.count("0.5901 | +0.0300 [+0.0300, +0.0300] | 4") == 2
    )  # 0.4 + 0.15 + 0.01 + 0.03, and noise of 1e-4
    assert "Against `raw+repair`" not in text  # nothing else is repaired


def test_the_page_says_that_none_wins_where_one_ties_on_one_model() -> None:
    won = {("reference", "normalised"): -0.02}
    text = losses_page.page(*_table(won))
    assert (
        "**No variant ends below `raw` beyond its interval in all 4 cases of reference and transformer.**"
        in text
    )
    assert (
        "Nearest to it is `normalised`: below in 2, above in 0, no difference to be told in 2 of 4." in text
    )


def test_no_verdict_on_one_model_nor_on_what_was_not_measured_everywhere() -> None:
    outcomes, rows = _table({("reference", "normalised"): -0.02, ("transformer", "normalised"): -0.02})
    one = rows["model"] == "reference"
    assert "only reference was compared so far" in losses_page.page(outcomes, rows[one])
    left = rows[
        ~((rows["model"] == "transformer") & (rows["variant"] == "normalised") & (rows["plan"] == "bad"))
    ]
    text = losses_page.page(outcomes, left)
    assert "**No variant ends below" in text
    assert (
        "Nearest to it is `normalised`: below in 3, above in 0, no difference to be told in 0 of 3." in text
    )
    table = losses_page.differences(left, "raw")
    assert verdict(table[table["name"] == "raw"], "raw", "variant").endswith(
        "only `raw` was measured so far."
    )


def test_page_and_figure_are_written(tmp_path: Path) -> None:
    outcomes, rows = _table({})
    outcomes.to_csv(tmp_path / "outcomes.csv", index=False)
    rows.to_parquet(tmp_path / "rows.parquet")
    losses_page.write_page(tmp_path)
    assert (tmp_path / "README.md").read_text() == losses_page.page(outcomes, rows)
    assert (tmp_path / "losses.png").is_file()
    assert np.isclose(losses_page.differences(rows, "raw")["difference"], 0).all()
