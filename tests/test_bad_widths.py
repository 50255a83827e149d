"""Plans with widths, and searches for them, that make no sense: one line before anything is scored or written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from prune_lab.blocks import architecture_of
from prune_lab.cli import app
from prune_lab.errors import PlanError, PruneLabError
from prune_lab.plans import parse_plan, plan_from_json, read_one_plan


def refused(*arguments: object) -> str:
    """The one line that ``prune-lab arguments`` answers with: so nothing was scored, which has lines of its own."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--macs", "0x"], "macs<=0x"),
        (["--macs", "1%"], "macs<=9.7%"),
        (["--macs", "65%", "--params", "0%"], "params"),
        (["--macs", "65%", "--set", "search.keep=Nothing"], "Nothing"),
        (["--macs", "65%", "--set", "search.remove=Dn1.R1.hidden"], "Dn1.R1.hidden"),
        (["--macs", "65%", "--set", "search.quotas=Zz<=1"], "'Zz'"),
        (["--macs", "65%", "--macs", "50%"], "search.budgets"),
        (["--macs", ""], "without an amount"),
        (["--macs", " ", "--params", "65%"], "without an amount"),
    ],
)
def test_a_search_of_widths_is_refused_before_anything_is_scored(
    tiny_pipeline_folder: Path, arguments: list[str], named: str
) -> None:
    few = ("--axes", "depth,width", "--set", "probe.samples=2")
    assert named in refused("search", tiny_pipeline_folder, *few, *arguments)


@pytest.mark.parametrize("option", [["--round-to", "8"], ["--widths", "taylor"]])
def test_options_of_widths_alone_are_not_passed_over(tiny_pipeline_folder: Path, option: list[str]) -> None:
    line = refused("search", tiny_pipeline_folder, "--macs", "65%", *option)
    assert "--axes depth,width" in line
    assert option[0] in line


def test_two_widths_of_one_site(tiny_config: dict[str, Any]) -> None:
    architecture = architecture_of(tiny_config)
    with pytest.raises(PlanError, match=r"Dn1\.R1\.hidden=2/4.*Dn1\.R1\.hidden=3/4"):
        parse_plan("~Dn1.R1.hidden=2 -Dn1.A1 ~Dn1.R1.hidden=3", architecture)
    assert parse_plan("~Dn1.R1.hidden=2 ~Dn1.R1.hidden=2/4", architecture).widths[0].count == 2


def test_a_file_with_two_widths_of_one_site(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    architecture, path = architecture_of(tiny_config), tmp_path / "plans.json"
    said = {"architecture": architecture.signature, "removed": [], "widths": {"Dn1.R1.hidden": 2}}
    path.write_text(json.dumps(said).replace('"Dn1.R1.hidden": 2', '"Dn1.R1.hidden": 2, "Dn1.R1.hidden": 3'))
    with pytest.raises(PruneLabError, match="twice"):
        read_one_plan(str(path), architecture)


def test_a_file_counts_a_feed_forward_in_units(tiny_config: dict[str, Any]) -> None:
    architecture = architecture_of(tiny_config)
    said = {"architecture": architecture.signature, "removed": [], "widths": {"Dn1.A1.ff": 24}}
    with pytest.raises(PlanError, match=r"found 24 .* units of 8 channels; give 1 to 4"):
        plan_from_json(said, architecture)
