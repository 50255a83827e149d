"""Criteria side by side: ranks, and how the orders agree, on made-up scores whose answers are counted by hand."""

from __future__ import annotations

import itertools
import json
import math
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from prune_lab.api.scores import ComparedScores, scores_table
from prune_lab.cli import app
from prune_lab.errors import DataError
from prune_lab.orders import orders_agreement, ranks_of, side_by_side
from prune_lab.report.criteria import criteria_parts
from prune_lab.report.document import Table as ReportTable
from prune_lab.schemas import IMPORTANCE_COLUMNS, ORDERS_COLUMNS

NAMES = ("Dn1.R1", "Dn1.A1", "Dn1.R2", "Md.R1", "Up1.R1", "Up1.A1")


def scores(starred: tuple[str, ...] = (), kind: str = "block", **impacts: list[float]) -> pd.DataFrame:
    """A table of scores by these criteria of the first of NAMES, and of one stage."""
    rows: list[dict[str, Any]] = []
    for criterion, values in impacts.items():
        for name, impact in [*zip(NAMES, values, strict=False), ("Md", 9 * max(values))]:
            own = {"group": name, "kind": "stage" if name == "Md" else kind, "blocks": name}
            measured = {"starred": name in starred, "impact": impact, "low": np.nan, "high": np.nan}
            more = {"samples": 4, "probe": "", "model": "m"}
            rows.append({**own, **measured, **more, "criterion": criterion.replace("_", "-")})
    return pd.DataFrame(rows)[list(IMPORTANCE_COLUMNS)]


MSE, SIZE, RANDOM = (
    [0.3, 0.1, 0.2, 0.5, 0.4, 0.6],
    [9.0, 7.0, 7.0, 20.0, 1.0, 7.0],
    [0.6, 0.2, 0.1, 0.4, 0.3, 0.5],
)


def by_counting(one: list[float], other: list[float]) -> tuple[float, float]:
    """Spearman as the correlation of mean ranks, and Kendall's tau-b by all pairs with its correction for ties."""

    def mean_ranks(values: list[float]) -> NDArray[np.float64]:
        return np.array([sum(v < own for v in values) + (values.count(own) + 1) / 2 for own in values])

    signs = [
        (np.sign(a - b), np.sign(c - d))
        for (a, c), (b, d) in itertools.combinations(zip(one, other, strict=True), 2)
    ]
    both = sum(left * right for left, right in signs)
    untied = [sum(pair[side] != 0 for pair in signs) for side in (0, 1)]
    spearman = np.corrcoef(mean_ranks(one), mean_ranks(other))[0, 1]
    return float(spearman), float(both / math.sqrt(untied[0] * untied[1]))


def test_ranks_are_within_a_kind_and_equal_impacts_share_one() -> None:
    table = side_by_side(scores(output_mse=MSE, magnitude=SIZE))
    assert list(table["group"]) == [*NAMES, "Md"]
    assert list(table.columns[4:]) == ["output-mse", "output-mse_rank", "magnitude", "magnitude_rank"]
    assert list(table["output-mse_rank"]) == [3, 1, 2, 5, 4, 6, 1]  # the stage is alone of its kind
    assert list(table["magnitude_rank"]) == [5, 2, 2, 6, 1, 2, 1]
    assert list(table["magnitude"][:2]) == [9, 7]


def test_every_two_criteria_are_compared_by_rank_correlations() -> None:
    found = orders_agreement(scores(output_mse=MSE, magnitude=SIZE, random=RANDOM))
    assert tuple(found.columns) == ORDERS_COLUMNS
    pairs = {"magnitude": SIZE, "output-mse": MSE, "random": RANDOM}
    assert list(zip(found["criterion"], found["other"], strict=True)) == [
        ("output-mse", "magnitude"),
        ("output-mse", "random"),
        ("magnitude", "random"),
    ]
    assert set(found["over"]) == {"blocks"}
    assert set(found["count"]) == {6}  # without the stage
    for row in found.itertuples():
        expected = by_counting(pairs[str(row.criterion)], pairs[str(row.other)])
        assert (row.spearman, row.kendall) == pytest.approx(expected)


def test_units_do_not_matter_and_blocks_that_cannot_leave_are_left_out() -> None:
    plain = scores(output_mse=MSE, magnitude=SIZE)
    other = scores(output_mse=[math.exp(30 * one) for one in MSE], magnitude=[one / 1e6 for one in SIZE])
    pd.testing.assert_frame_equal(orders_agreement(plain), orders_agreement(other))
    starred = orders_agreement(scores(("Dn1.R1", "Md.R1"), output_mse=MSE, magnitude=SIZE))
    kept = [1, 2, 4, 5]
    expected = by_counting([MSE[place] for place in kept], [SIZE[place] for place in kept])
    assert list(starred["count"]) == [4]
    assert (starred["spearman"][0], starred["kendall"][0]) == pytest.approx(expected)


def test_groups_without_single_blocks_are_compared_kind_by_kind() -> None:
    found = orders_agreement(scores(kind="plan", output_mse=MSE[:4], random=RANDOM[:4]))
    assert list(found["over"]) == ["plans", "stages"]
    assert list(found["count"]) == [4, 1]
    assert found["spearman"].notna().tolist() == [True, False]  # one stage has no order


def test_criteria_that_scored_other_groups_are_not_put_side_by_side() -> None:
    whole = scores(output_mse=MSE, magnitude=SIZE)
    with pytest.raises(DataError, match="other groups scored by magnitude than by output-mse; score them"):
        side_by_side(whole.drop(index=len(whole) - 2))


def test_scores_by_several_criteria_show_themselves_side_by_side() -> None:
    table = scores_table(scores(output_mse=MSE, magnitude=SIZE, random=RANDOM), "Importance", of="m")
    assert isinstance(table, ComparedScores)
    assert len(table) == len(table.frame()) == 3 * 7  # a row per criterion and group, as in criteria.csv
    lines = repr(table).splitlines()
    assert lines[1].split() == ["group", "output-mse", "magnitude", "random"]
    assert lines[2].split() == ["Dn1.R1", "0.3", "(3)", "9", "(5)", "0.6", "(6)"]
    assert "their ranks, not their numbers" in repr(table)
    assert f"{by_counting(MSE, RANDOM)[0]:.4g}" in repr(table)
    assert table._repr_html_().count("<table") == 2
    assert ">0.3 (3)<" in table._repr_html_()
    row = table.records()[7]
    assert (row["group"], row["criterion"], row["rank"]) == ("Dn1.R1", "magnitude", 5)
    assert [one["with"] for one in row["agreement"]] == ["output-mse", "random"]
    assert row["agreement"][0]["kendall"] == pytest.approx(by_counting(MSE, SIZE)[1])
    assert row["agreement"][0]["count"] == 6
    assert list(ranks_of(table.frame())[:2]) == [3, 1]
    alone = scores_table(scores(output_mse=MSE), "Importance")
    assert not isinstance(alone, ComparedScores)
    assert alone.title == "Importance"
    assert "rank" not in alone.records()[0]


def test_the_report_has_them_side_by_side_where_there_are_several() -> None:
    assert criteria_parts(None) == criteria_parts(scores(output_mse=MSE)) == ()
    words, agree, beside = criteria_parts(scores(output_mse=MSE, architecture_prior=SIZE, random=RANDOM))
    assert isinstance(agree, ReportTable)
    assert isinstance(beside, ReportTable)
    assert "`output-mse` leads" in str(words)
    spearman, kendall = by_counting(SIZE, RANDOM)
    assert agree.rows[2][:2] == ("architecture-prior", "random")
    assert agree.rows[2][2:] == (f"{spearman:.2f}", f"{kendall:.2f}", "blocks", "6")
    assert beside.header[2:] == ("output-mse", "architecture-prior", "random")
    assert beside.rows[0] == ("Dn1.R1", "block", "0.3 (3)", "9 (5)", "0.6 (6)")


def test_the_verb_prints_both_tables_and_json_has_all(monkeypatch: pytest.MonkeyPatch) -> None:
    found = scores_table(scores(output_mse=MSE, random=RANDOM), "Importance", of="m")
    monkeypatch.setattr("prune_lab.api.model.Model.score", lambda *_, **__: found)
    arguments = ["score", "reference", "--criterion", "output-mse", "--criterion", "random"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "Scores by 2 criteria, m; in brackets the rank" in " ".join(shown.stdout.split())
    assert re.search(r"Dn1\.R1 +│ +0\.3 \(3\) │ +0\.6 \(6\) │", shown.stdout)
    assert re.search(rf"output-mse +│ random +│ +{by_counting(MSE, RANDOM)[0]:.4g} │", shown.stdout)
    assert "3 of 8 columns; --wide shows all" in shown.stdout
    assert "their ranks, not their numbers" in shown.stderr
    rows = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert rows == json.loads(json.dumps(found.records()))
