"""Maps of models of every shape: the U, a chain in rows, two lists of a chain, layers inside blocks."""

from __future__ import annotations

import dataclasses
import json
import random
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.colors import to_rgba
from matplotlib.patches import FancyBboxPatch, Rectangle
from synthetic_run import write_run
from tiny_models import tiny_config
from unet_kinds import KINDS

from prune_lab.blocks import Architecture, architecture_of, blocks_frame
from prune_lab.plans import choices_to_json, gone_with, native_choices, parse_plan, plan_of
from prune_lab.profiling import cost_table
from prune_lab.report.document import Chart, LiveMap, Text
from prune_lab.report.figures import DARK, LIGHT, plan_styles
from prune_lab.report.live_map import live_map
from prune_lab.report.maps import draw_block_map, draw_plan_maps, is_chain, map_bounds, map_cells
from prune_lab.report.sections import report_sections
from prune_lab.report.tables import (
    PlanRow,
    RunTables,
    block_map_frame,
    layer_map_frame,
    named_layers,
    read_run,
)
from prune_lab.runs import Run
from prune_lab.workflow import block_maps


def chain_of(**lists: int) -> pd.DataFrame:
    """Blocks of lists of these lengths, one list after the other."""
    rows = [(f"{letter}{i + 1}", letter, i) for letter, count in lists.items() for i in range(count)]
    frame = pd.DataFrame(rows, columns=["name", "stage", "position"])
    return frame.assign(kind="transformer", lane="middle", row=0, removable=True, impact=0.1)


def blocks_of(architecture: Architecture) -> pd.DataFrame:
    """The rows of ``blocks_frame`` as far as a map reads them: nothing is counted."""
    places = {stage.name: stage for stage in architecture.outline.stages}
    rows = [
        (b.name, b.stage, b.kind, places[b.stage].lane, places[b.stage].row, b.removable)
        for b in architecture.named
    ]
    return pd.DataFrame(rows, columns=["name", "stage", "kind", "lane", "row", "removable"])


def rows_of(frame: pd.DataFrame) -> list[list[str]]:
    """The names of the cells from the top to the bottom, from left to right."""
    cells, _ = map_cells(frame)
    heights = sorted({cell.y for cell in cells}, reverse=True)
    return [[c.name for c in sorted((c for c in cells if c.y == y), key=lambda c: c.x)] for y in heights]


@pytest.mark.parametrize(
    ("count", "lengths"), [(1, [1]), (12, [12]), (14, [14]), (28, [14, 14]), (38, [13, 13, 12])]
)
def test_a_chain_is_read_as_a_text_is(count: int, lengths: list[int]) -> None:
    frame = chain_of(B=count)
    assert is_chain(frame)
    rows = rows_of(frame)
    assert list(map(len, rows)) == lengths
    assert [name for row in rows for name in row] == list(frame["name"])
    assert [text for text, *_ in map_cells(frame)[1]] == ["B"]


def test_two_lists_are_two_lanes() -> None:
    frame = chain_of(D=19, S=38)
    assert list(map(len, rows_of(frame))) == [13, 6, 13, 13, 12]
    assert [name for row in rows_of(frame) for name in row] == list(frame["name"])
    cells, labels = map_cells(frame)
    heights = sorted({cell.y for cell in cells}, reverse=True)
    steps = [above - below for above, below in pairwise(heights)]
    assert steps[1] > max(steps[0], *steps[2:])  # more room between the lists than within one
    assert [(text, y) for text, _, y, _ in labels] == [
        ("D", heights[0] + 0.33),
        ("S", heights[2] + 0.33),
    ]
    for one, other in combinations(cells, 2):
        assert abs(one.x - other.x) >= 0.92 or abs(one.y - other.y) >= 0.66
    left, bottom, right, top = map_bounds(frame)
    assert all(left < cell.x < right and bottom < cell.y < top for cell in cells)


def test_lists_that_take_turns_have_their_rows_in_turns() -> None:
    frame = block_map_frame(blocks_of(architecture_of(tiny_config("LatteTransformer3DModel"))), None)
    assert rows_of(frame) == [["S1", "S2", "S3", "S4"], ["T1", "T2", "T3", "T4"]]
    frame = chain_of(S=20, T=20).sort_values("position", kind="stable", ignore_index=True)
    rows = rows_of(frame)
    assert [(row[0], row[-1]) for row in rows] == [
        ("S1", "S10"),
        ("T1", "T10"),
        ("S11", "S20"),
        ("T11", "T20"),
    ]


@pytest.mark.parametrize("kind", ["simple", "attention_only", "upscaler", "unet2d"])
def test_every_unet_is_a_u(kind: str) -> None:
    architecture = architecture_of(KINDS[kind](random.Random(4)))
    frame = block_map_frame(blocks_of(architecture), None)
    assert not is_chain(frame)
    cells, labels = map_cells(frame)
    for one, other in combinations(cells, 2):
        assert abs(one.x - other.x) >= 0.92 or abs(one.y - other.y) >= 0.66
    assert {text for text, *_ in labels} == set(frame["stage"])


def test_cells_of_a_small_model_are_no_larger_than_those_of_a_large_one() -> None:
    sizes = [draw_block_map(chain_of(B=count), LIGHT).get_size_inches()[1] for count in (2, 12, 28, 57)]
    assert sizes == sorted(sizes)
    assert sizes[0] < 2.6


# Layers inside blocks ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def xl() -> Architecture:
    config = {**KINDS["xl"](random.Random(0)), "layers_per_block": 1}
    return architecture_of({**config, "transformer_layers_per_block": [1, 2, 3]})


def importance_of(architecture: Architecture) -> pd.DataFrame:
    """A score of every block and layer but those of stage Dn2."""
    chance = random.Random(1)
    names = [b.name for b in architecture.named if not (b.inside and b.stage == "Dn2")]
    frame = pd.DataFrame({"group": names, "kind": "block", "starred": False})
    frame["impact"] = [10 ** chance.uniform(-3, 0) for _ in names]
    return frame.assign(low=frame["impact"] / 2, high=2 * frame["impact"])


def drawn(figure: Any, kind: type) -> list[Any]:
    return [patch for axes in figure.axes for patch in axes.patches if type(patch) is kind]


def test_layers_are_slices_of_their_blocks_where_they_are_named(xl: Architecture) -> None:
    blocks, importance = blocks_of(xl), importance_of(xl)
    frame, layers = block_map_frame(blocks, importance), layer_map_frame(blocks, importance)
    assert list(layers["name"]) == [layer.name for layer in xl.layers]
    assert list(layers["inside"]) == [layer.inside for layer in xl.layers]
    plan = PlanRow("0", "mine", "search", parse_plan("-Dn2.A1.T2 -Up1.A2.T1 -Up1.A2.T3", xl).removed)
    assert "Dn2" not in {str(name)[:3] for name in named_layers(layers, ())["name"]}
    named = named_layers(layers, [plan])
    assert list(named["name"]) == list(layers["name"])
    slices = drawn(draw_block_map(frame, DARK, layers), Rectangle)
    assert len(slices) == len(layers)
    unscored = [to_rgba(DARK.grid) == one.get_facecolor() for one in slices]
    assert unscored == list(layers["impact"].isna())
    styles = plan_styles([plan])
    figure = draw_plan_maps(frame, [plan], styles, LIGHT, named)
    slices = drawn(figure, Rectangle)
    opened = [layer.name for layer in xl.layers if layer.inside in ("Dn2.A1", "Up1.A2")]
    hollow = [to_rgba(styles["0"].color) == one.get_edgecolor() for one in slices]
    assert [name for name, gone in zip(opened, hollow, strict=True) if gone] == list(plan.removed)
    assert all(box.get_facecolor()[3] for box in drawn(figure, FancyBboxPatch))
    assert [axes.get_title("left") for axes in figure.axes] == ["mine  \u22123 layers"]


def test_a_map_shows_what_stays_of_narrower_blocks(xl: Architecture) -> None:
    """The header counts widths, a bar stands in each block, and a line says what bars and hatching mean."""
    frame = block_map_frame(blocks_of(xl), None)
    stays = (("Dn2.R1.hidden", 0.5), ("Dn2.A1.T1.heads", 0.25), ("Dn2.A1.T2.heads", 0.75))
    plan = PlanRow("0", "mine", "search", (), "own", stays=stays)
    figure = draw_plan_maps(frame, [plan], plan_styles([plan]), LIGHT)
    assert [axes.get_title("left") for axes in figure.axes] == ["mine  3 widths narrower"]
    bars = drawn(figure, Rectangle)
    whole, filled = [bar.get_width() for bar in bars[::2]], [bar.get_width() for bar in bars[1::2]]
    assert [part / full for part, full in zip(filled, whole, strict=True)] == pytest.approx([0.5, 0.5])
    legend = figure.get_supxlabel()
    assert legend == "bar: what stays of the inside of a narrower block; hatched: not scored"
    both = dataclasses.replace(plan, removed=("Dn2.R1",))
    figure = draw_plan_maps(frame, [both], plan_styles([both]), LIGHT)
    assert [axes.get_title("left") for axes in figure.axes] == ["mine  \u22121 block, 3 widths narrower"]
    assert len(drawn(figure, Rectangle)) == 2  # what is gone has no inside


def tables_of(architecture: Architecture, folder: Path) -> RunTables:
    """The tables of a run of the model, with made-up impacts and times."""
    run = Run(write_run(folder, upto="blocks"))
    blocks_frame(architecture).to_csv(run.blocks, index=False)
    cost_table(architecture).frame().to_csv(run.costs, index=False)
    run.choices.write_text(json.dumps(choices_to_json(architecture)))
    saved = [{"name": b.name, "measured_ms": 0.5} for b in architecture.blocks if b.removable]
    run.latency.write_text(json.dumps({"whole": {"median_ms": 40.0}, "savings": saved, "scale": 2.0}))
    frame = importance_of(architecture).assign(samples=4, criterion="output-mse", probe="0", model="m")
    frame["blocks"] = frame["group"]
    columns = ["group", "kind", "blocks", "starred", "impact", "low", "high", "samples", "criterion"]
    frame[[*columns, "probe", "model"]].to_csv(run.importance, index=False)
    run.plans_dir.mkdir()
    plan = parse_plan("-Up1.A2.T1" if architecture.layers else "-S2 -D1", architecture)
    value = {**plan.to_json(), "names": ["mine"], "origin": "search"}
    run.plan(plan.id).write_text(json.dumps(value))
    return read_run(run)


def live_of(tables: RunTables) -> LiveMap:
    found = live_map(tables)
    assert found is not None
    return found


def test_the_live_map_prices_layers_as_the_cost_table_does(xl: Architecture, tmp_path: Path) -> None:
    live = live_of(tables_of(xl, tmp_path / "run"))
    assert [name for _, inside in live.layers for name in inside if not name.removable] == []
    assert [one.name for _, inside in live.layers for one in inside] == [layer.name for layer in xl.layers]
    assert live.data["inside"] == {layer.name: layer.inside for layer in xl.layers}
    assert live.data["plans"]["mine"] == ["Up1.A2.T1"]
    table, draw = cost_table(xl), random.Random(2)
    for _ in range(20):
        chosen = [draw.choice(options) for options in native_choices(xl)]
        plan = plan_of(xl, frozenset[str]().union(*chosen))
        gone = {*gone_with(xl, plan.removed)}
        gone |= {name for name, block in live.data["inside"].items() if block in gone}
        left = [part for name, part in live.data["costs"].items() if name not in gone]
        wanted = table.of(plan)
        for metric in ("params", "macs", "paper_macs"):
            assert sum(part[metric] for part in left) == getattr(wanted, metric), (plan.text, metric)
        part = sum(
            xl.block(name).macs / xl.block(xl.block(name).inside).macs
            for name in plan.removed
            if ".T" in name
        )
        whole = sum(1 for name in plan.removed if ".T" not in name)
        assert sum(part["ms"] for part in left) == pytest.approx(40 - 1.0 * (whole + part))


@pytest.mark.parametrize("name", ["xl", "flux"])
def test_the_words_of_a_report_fit_the_model(name: str, xl: Architecture, tmp_path: Path) -> None:
    flux = architecture_of(tiny_config("FluxTransformer2DModel"))
    tables = tables_of(xl if name == "xl" else flux, tmp_path / "run")
    sections = {section.key: section.parts for section in report_sections(tables)}
    words = [part for parts in sections.values() for part in parts if isinstance(part, Text | Chart)]
    text = " ".join(
        " ".join(part.sentences) if isinstance(part, Text) else f"{part.alt} {part.caption}" for part in words
    )
    assert "U-Net" not in text
    if name == "xl":
        assert "18 blocks (11 residual, 7 attention)" in text
        assert "Inside them are 18 layers" in text
        assert "skip connections" in text
        assert "Hollow slices" in text
    else:
        assert "6 transformer blocks; 6 of them can be removed" in text
        assert "2 kinds of blocks" in text
        assert "skip" not in text
        assert "shape of a U" not in text
        live = live_of(tables)
        assert (live.shape, live.layers) == ("in order of execution, row by row", ())


def test_a_map_in_a_terminal_shows_blocks_that_lose_layers(xl: Architecture) -> None:
    lines = block_maps(xl, [parse_plan("-Up1.A2.T1 -Up1.R1 -Md", xl)])
    by_stage = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert by_stage["Up1"] == [".ARa"]
    assert by_stage["Md"] == ["..."]
    flux = architecture_of(tiny_config("FluxTransformer2DModel"))
    assert [line.split() for line in block_maps(flux, [parse_plan("-D2", flux)])[1:]] == [
        ["D", "T.T"],
        ["S", "TTT"],
    ]
