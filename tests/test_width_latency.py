"""What narrower blocks save in time: measured, added up, searched with, and corrected by what is timed in turns."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from prune_lab.blocks import Architecture, architecture_of
from prune_lab.cli import app
from prune_lab.errors import BudgetError, DataError, PlanError
from prune_lab.plans import PruningPlan, parse_plan, plan_of
from prune_lab.profiling import (
    TEACHER,
    CostTable,
    Latency,
    LatencyTable,
    Saving,
    Turns,
    UnitSaving,
    WidthSavings,
    change_of,
    cost_table,
    latency_table_from_dict,
    measure_width_savings,
)
from prune_lab.profiling.latency import saving_names
from prune_lab.profiling.width_costs import unit_costs
from prune_lab.runs import Run
from prune_lab.runtime import Environment
from prune_lab.search import (
    Budget,
    Effects,
    depth_and_width,
    narrowed_to,
    predicted_impact,
    predicted_loss,
    search_plans,
)
from prune_lab.width import width_of
from prune_lab.workflow import timed_search
from prune_lab.workflow.timed_search import timing_note, within_time

REST_MS, MS_PER_PARAM, WHOLE_MS = 20.0, 1e-3, 100.0


def parts_by_params(
    model: Any, paths: Mapping[str, str], inputs: Mapping[str, Any]
) -> tuple[float, dict[str, float]]:
    """A clock wound by hand: each part takes so long per parameter."""
    parts = {
        name: MS_PER_PARAM * sum(one.numel() for one in model.get_submodule(path).parameters())
        for name, path in paths.items()
    }
    return REST_MS + sum(parts.values()), parts


def table_of(architecture: Architecture, shares: Mapping[str, float], scale: float = 1.0) -> LatencyTable:
    """Every block takes 2 of 100 ms, and a unit of a site the share of them that ``shares`` says, or none."""
    names, costs = saving_names(architecture), cost_table(architecture)
    units = tuple(UnitSaving(site.name, shares.get(site.name, 0.0)) for site in architecture.sites)
    return LatencyTable(
        architecture,
        Latency(WHOLE_MS, WHOLE_MS, WHOLE_MS, 10, 1),
        tuple(Saving(name, "samplers" if "+" in name else "block", 2.0, 2.0, 2.0) for name in names),
        1.0,
        (),
        1,
        costs.latent,
        costs.tokens,
        0,
        Environment.capture("cpu", "float32"),
        widths=WidthSavings(units, scale, 0.1, 0.1, 10),
    )


@pytest.fixture(scope="module")
def tiny(tiny_unet_shared: Any) -> Architecture:
    return architecture_of(tiny_unet_shared)


# Measured ------------------------------------------------------------------------------------------------------------


def test_units_save_what_their_parameters_take_on_a_clock_of_parameters(
    tiny_unet: Any, tiny: Architecture
) -> None:
    """A line through the whole and half the width is exact where time is linear, and needs no scale."""
    found = measure_width_savings(tiny_unet, rounds=3, warmup=1, parts_timer=parts_by_params)
    count = cost_table(tiny).count
    assert count is not None
    by_hand = unit_costs(tiny, count)
    blocks = (*tiny.blocks, *tiny.samplers)
    whole = REST_MS + MS_PER_PARAM * sum(block.params for block in blocks)
    assert [unit.site for unit in found.units] == [site.name for site in tiny.sites]
    for site, unit in zip(tiny.sites, found.units, strict=True):
        assert unit.share == pytest.approx(MS_PER_PARAM * by_hand[site].params / whole, rel=1e-6), site.name
    assert found.scale == pytest.approx(1)
    assert found.added_up == pytest.approx(found.measured)


def test_what_narrow_saves_beyond_the_sum_is_in_the_scale(tiny_unet: Any) -> None:
    """Where everything narrow takes half of what its parts foretell, so does every unit of a plan."""
    passes = itertools.count()

    def timer(model: Any, paths: Mapping[str, str], inputs: Any) -> tuple[float, dict[str, float]]:
        next(passes)
        _, parts = parts_by_params(tiny_unet, paths, inputs)
        _, left = parts_by_params(model, paths, inputs)
        narrow = sum(left[name] < parts[name] for name in parts)
        if narrow > len(paths) / 2:  # of all kinds
            left = {name: (left[name] + parts[name]) / 2 for name in parts}
        return REST_MS + sum(left.values()), left

    found = measure_width_savings(tiny_unet, rounds=2, warmup=0, parts_timer=timer)
    assert found.scale == pytest.approx(0.5)
    assert found.measured == pytest.approx(found.added_up / 2)
    assert sum(found.unit_shares().values()) == pytest.approx(0.5 * sum(unit.share for unit in found.units))
    assert next(passes) == 5 * 2 * 2  # four kinds and one that is narrow everywhere, in turns with the whole


def test_in_a_runtime_each_kind_shares_its_saving_out_by_multiply_adds(
    tiny_unet: Any, tiny: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = cost_table(tiny)

    def times(_: Any, plans: Mapping[str, PruningPlan], service: Any, **__: Any) -> Turns:
        assert service.backend == "openvino"
        row = (1.0, *(costs.of(plan).macs / costs.total.macs for plan in plans.values()))
        return Turns((TEACHER, *plans), (row,) * 6, 0, "own processes")

    monkeypatch.setattr("prune_lab.profiling.width_latency.time_plans", times)
    found = measure_width_savings(tiny_unet, rounds=6, backend="openvino")
    assert costs.count is not None
    by_hand = unit_costs(tiny, costs.count)
    for site, unit in zip(tiny.sites, found.units, strict=True):
        assert unit.share == pytest.approx(by_hand[site].macs / costs.total.macs, rel=1e-3), site.name
    assert found.scale == pytest.approx(1, rel=1e-3)


# Added up ------------------------------------------------------------------------------------------------------------


def test_the_time_of_a_plan_with_widths_is_a_sum_by_hand(tiny: Architecture) -> None:
    table = table_of(tiny, {"Dn3.R1.hidden": 0.002, "Dn3.A1.ff": 0.001, "Dn3.A1.heads": -0.5}, scale=0.5)
    costs = cost_table(tiny, latency=table)
    plan = parse_plan("-Dn1.A1 ~Dn3.R1.hidden=1@0 ~Dn3.A1.heads=1@0", tiny).built("own")
    # a block of 2 ms, three groups of 0.1 ms each, and heads, without which it was slower: these save nothing
    assert costs.of(plan).latency_ms == pytest.approx(100 - 2 - 3 * 0.1)
    assert table.predict(plan) == pytest.approx(100 - 2 - 3 * 0.1)
    assert cost_table(tiny).of(plan).latency_ms is None
    without = dataclasses.replace(table, widths=None)
    assert cost_table(tiny, latency=without).of(plan).latency_ms is None
    with pytest.raises(PlanError, match="without what that saves"):
        without.predict(plan)


def test_units_of_a_block_save_no_more_than_the_block(tiny: Architecture) -> None:
    table = table_of(tiny, {"Dn3.R2.hidden": 0.01, "Up2.R2.hidden": 0.004, "Dn3.R1.hidden": 0.01})
    saves = table.unit_ms()
    assert saves is not None
    assert {site.name: site.count for site in tiny.sites}["Dn3.R2.hidden"] == 4
    assert cost_table(tiny, latency=table).part("Dn3.R2").latency_ms == 2.0
    assert saves["Dn3.R2.hidden"] == pytest.approx(2.0 / 4)  # and not 100 ms * 0.01
    assert saves["Up2.R2.hidden"] == pytest.approx(0.4)
    assert not tiny.block("Dn3.R1").removable  # of which nobody knows what it takes
    assert saves["Dn3.R1.hidden"] == pytest.approx(1.0)


def test_a_table_with_widths_is_the_same_after_a_file_and_one_of_before_is_read(tiny: Architecture) -> None:
    table = table_of(tiny, {"Dn3.R1.hidden": 0.002})
    values = json.loads(json.dumps(table.as_dict()))
    assert latency_table_from_dict(values, tiny) == table
    before = {name: value for name, value in values.items() if name != "widths"}
    assert latency_table_from_dict(before, tiny) == dataclasses.replace(table, widths=None)
    hole = {**values["widths"], "units": values["widths"]["units"][1:]}
    for widths in (hole, {}, {**values["widths"], "scale": "1"}):
        with pytest.raises(DataError, match="measure the model again"):
            latency_table_from_dict({**values, "widths": widths}, tiny)


# Searched with -------------------------------------------------------------------------------------------------------


def at_most(share: float) -> Budget:
    return Budget("latency_ms", share * WHOLE_MS, f"latency<={share}x")


@pytest.mark.long
def test_within_a_budget_on_latency_the_program_finds_the_best_of_all_plans(tiny: Architecture) -> None:
    shares = {"Dn3.R2.hidden": 0.003, "Up2.R2.hidden": 0.0041}
    costs = cost_table(tiny, latency=table_of(tiny, shares))
    chance = np.random.default_rng(1)
    impacts = {site: 0.1 * chance.random(site.count) for site in tiny.sites if site.name in shares}
    blocks = {"Dn3.R2": 0.25, "Dn3.A2": 0.2}
    plans = []
    for removed in itertools.chain.from_iterable(itertools.combinations(blocks, size) for size in range(3)):
        left = {site: values for site, values in impacts.items() if site.block not in removed}
        for kept in itertools.product(*(range(1, site.count + 1) for site in left)):
            widths = [
                width_of(site, sorted(int(unit) for unit in np.argsort(-values)[:count]))
                for (site, values), count in zip(left.items(), kept, strict=True)
            ]
            plan = plan_of(tiny, removed, widths=widths)
            loss = sum(blocks[name] for name in removed) + predicted_loss(plan, impacts)
            plans.append((loss, costs.of(plan.built("own")).amount("latency_ms")))
    for share in (0.99, 0.975, 0.96):
        best = min(loss for loss, took in plans if took <= share * WHOLE_MS)
        plan = depth_and_width(costs, blocks, impacts, [at_most(share)])
        found = sum(blocks[name] for name in plan.removed) + predicted_loss(plan, impacts)
        assert costs.of(plan).amount("latency_ms") <= share * WHOLE_MS
        assert found == pytest.approx(best, rel=1e-5)
    with pytest.raises(BudgetError, match=r"smallest plan of blocks and widths has latency_ms") as error:
        depth_and_width(costs, blocks, impacts, [at_most(0.5)])
    least = min(took for _, took in plans)
    assert f"has latency_ms {least:,.3f} of 100.000" in str(error.value)
    offered = float(str(error.value).rsplit("<=", 1)[1].rstrip("%")) / 100
    assert costs.of(depth_and_width(costs, blocks, impacts, [at_most(offered)])).amount("latency_ms") == least
    plan = narrowed_to(costs, plan_of(tiny, ()), impacts, "latency_ms", 98.8)
    assert 98.8 - 0.41 <= costs.of(plan).amount("latency_ms") <= 98.8


def test_memory_and_times_that_were_not_measured_are_refused(tiny: Architecture) -> None:
    impacts = {site: np.ones(site.count) for site in tiny.sites[:2]}
    timed = cost_table(tiny, latency=dataclasses.replace(table_of(tiny, {}), widths=None))
    for budget, said in (
        (at_most(0.9), "width savings"),
        (Budget("memory", 1, "memory<=1"), "no sum of parts"),
    ):
        with pytest.raises(BudgetError, match=said) as error:
            depth_and_width(timed, {}, impacts, [budget])
        assert "\n" not in str(error.value)


class Bench:
    """A device on which a plan saves ``share`` of what ``saved`` makes of what is predicted; what is said, and what is
    timed, is kept.
    """

    def __init__(
        self,
        costs: CostTable,
        share: float,
        monkeypatch: pytest.MonkeyPatch,
        saved: Callable[[float], float] = lambda predicted: predicted,
    ) -> None:
        self.costs, self.share, self.saved = costs, share, saved
        self.said: list[str] = []
        self.timed: list[float] = []
        monkeypatch.setattr(timed_search, "ensure_turns", self.turns)
        monkeypatch.setattr(timed_search, "note", self.said.append)

    def turns(self, _: Any, plans: Sequence[PruningPlan]) -> dict[str, Any]:
        found = {}
        for plan in plans:
            took = self.costs.of(plan).amount("latency_ms") / WHOLE_MS
            self.timed.append(1 - self.share * self.saved(1 - took))
            found[plan.id] = SimpleNamespace(change=change_of([self.timed[-1]] * 6, [1.0] * 6))
        return found

    def search(self, share: float) -> PruningPlan:
        impacts = {site: np.linspace(0.1, 0.2, site.count) for site in self.costs.architecture.sites}

        def solve(budgets: Sequence[Budget]) -> tuple[PruningPlan, ...]:
            return (depth_and_width(self.costs, {}, impacts, budgets),)

        (plan,) = within_time(
            None,  # type: ignore[arg-type]
            self.costs,
            [at_most(share)],
            solve,
            lambda plan: predicted_loss(plan, impacts),
        )
        return plan


def test_a_plan_that_is_slower_than_asked_is_searched_again(
    tiny: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = cost_table(tiny, latency=table_of(tiny, {site.name: 0.0017 for site in tiny.sites}))
    slow = Bench(costs, 0.8, monkeypatch)
    plan = slow.search(0.9)
    assert slow.timed[0] > 0.9  # as predicted it would have been
    assert 0.9 - timed_search.NEAR <= slow.timed[-1] <= 0.9
    assert costs.of(plan).amount("latency_ms") == pytest.approx(100 * (1 - (1 - slow.timed[-1]) / 0.8))
    assert len(slow.timed) == 2
    first, second, last = slow.said
    assert f"timed 1 of at most {timed_search.TRIES}: predicted 0.899x" in first
    assert (
        f"measured {slow.timed[0]:.3f}x of the teacher's time, slower than asked; predicted impact" in first
    )
    assert "timed 2 of at most" in second
    assert f"measured {slow.timed[1]:.3f}x of the teacher's time, within it" in second
    assert "1 plan is within it of 2 timed; kept is number 2: predicted" in last
    fast = Bench(costs, 1.5, monkeypatch)
    fast.search(0.9)
    assert fast.timed[0] < 0.9 - timed_search.NEAR  # it would have lost more than it needs to
    assert 0.9 - timed_search.NEAR <= fast.timed[-1] <= 0.9


@pytest.mark.long
def test_a_plan_that_stays_slower_than_asked_is_said_to_be_so(
    tiny: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = cost_table(tiny, latency=table_of(tiny, {site.name: 0.0017 for site in tiny.sites}))
    for share in (0.1, -0.5):
        bench = Bench(costs, share, monkeypatch)
        bench.search(0.9)
        assert 1 < len(bench.timed) <= timed_search.TRIES
        assert min(bench.timed) > 0.9
        assert f"measured {min(bench.timed):.3f}x" in bench.said[-1]
        assert "none of them within it" in bench.said[-1]
        assert "SLOWER than asked" in bench.said[-1]


def ramp(saved: float) -> float:
    """What is saved where ``saved`` is predicted: little at first, then nearly a quarter with a few units more."""
    return float(np.interp(saved, [0, 0.1, 0.13, 1], [0, 0.08, 0.3, 1]))


def cliff(saved: float) -> float:
    """What is saved where ``saved`` is predicted: nothing between a tenth less and a fifth more than that."""
    return 0.8 * saved if saved < 0.12 else 1.8 * saved


def test_after_a_plan_that_is_far_below_the_time_plans_nearer_to_it_are_tried(
    tiny: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the last plan saved alone the search would leap to and fro over the budget, and keep 0.72x for 0.9x."""
    costs = cost_table(tiny, latency=table_of(tiny, {site.name: 0.0017 for site in tiny.sites}))
    bench = Bench(costs, 1.0, monkeypatch, saved=ramp)
    bench.search(0.9)
    assert bench.timed[0] > 0.9
    assert bench.timed[1] < 0.8
    assert 0.9 - timed_search.NEAR <= bench.timed[-1] <= 0.9
    assert f"measured {bench.timed[-1]:.3f}x" in bench.said[-1]
    assert "of these the one with the least predicted impact" in bench.said[-1]
    assert len(bench.said) == len(bench.timed) + 1


def test_where_no_plan_is_near_the_time_that_is_said(
    tiny: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = cost_table(tiny, latency=table_of(tiny, {site.name: 0.0017 for site in tiny.sites}))
    bench = Bench(costs, 1.0, monkeypatch, saved=cliff)
    plan = bench.search(0.9)
    within = [took for took in bench.timed if took <= 0.9]
    assert 1 - cliff(1 - costs.of(plan).amount("latency_ms") / WHOLE_MS) == max(within) < 0.8
    assert len(set(bench.timed)) == len(bench.timed) <= timed_search.TRIES  # no plan twice
    assert "no plan nearer to it was found" in bench.said[-1]


def test_how_many_plans_are_going_to_be_timed_is_said_before(tiny: Architecture) -> None:
    assert timing_note(["macs<=65%"], 6) == ""
    assert "up to 6 plans are built and timed in turns" in timing_note(["latency<=0.7x@openvino"], 6)
    assert "minutes" in timing_note(["latency<=0.7x"], 1)
    assert "for each of 2 budgets" in timing_note(["latency<=0.7x", "latency<=0.5x,macs<=65%"], 6)


def test_several_plans_are_within_the_time_by_the_slowest_of_them(
    tiny: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = cost_table(tiny, latency=table_of(tiny, {}))
    bench = Bench(costs, 0.8, monkeypatch)
    scores = {block.name: float(place) for place, block in enumerate(tiny.blocks, 1)}

    def solve(budgets: Sequence[Budget]) -> tuple[PruningPlan, ...]:
        return search_plans(tiny, Effects(scores), costs, budgets, count=3)

    plans = within_time(
        None,  # type: ignore[arg-type]
        costs,
        [at_most(0.9)],
        solve,
        lambda plan: predicted_impact(plan, Effects(scores)),
    )
    assert len(plans) == 3
    saved = [1 - costs.of(plan).amount("latency_ms") / WHOLE_MS for plan in plans]
    assert min(saved) * 0.8 >= 0.1
    assert len(bench.timed) > 3  # 10 % saved as predicted are 8 % as timed


def test_what_a_solver_that_measures_finds_is_timed_once(
    tiny: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = cost_table(tiny, latency=table_of(tiny, {}))
    bench = Bench(costs, 0.8, monkeypatch)
    scores = Effects({block.name: 1.0 for block in tiny.blocks})
    plans = within_time(
        None,  # type: ignore[arg-type]
        costs,
        [at_most(0.9)],
        lambda budgets: search_plans(tiny, scores, costs, budgets),
        lambda plan: 0.0,
        tries=1,
    )
    assert len(plans) == len(bench.timed) == 1
    assert "SLOWER than asked" in bench.said[0]
    assert "leave --solver out" in bench.said[0]


# On the command line -------------------------------------------------------------------------------------------------


def searched(folder: Path, run: Path, latency: str) -> dict[str, Any]:
    words = ("--axes", "depth,width", "--latency", latency, "--set", "search.controls=[]", "--run", str(run))
    quick = ("probe.samples=4", "score.groups=block", "score.bootstrap=1", "profile.runs=6")
    sets = [word for one in quick for word in ("--set", one)]
    found = CliRunner().invoke(app, ["search", str(folder), *words, *sets, "--json"])
    assert found.exit_code == 0, found.output
    (row,) = json.loads(found.stdout)
    return {"said": found.stderr, **row}


@pytest.mark.long
def test_widths_are_searched_within_a_time_from_the_command_line(
    tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In torch itself; notebook 05 does it in OpenVINO."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    row = searched(tiny_pipeline_folder, tmp_path / "run", "0.8x")
    table = json.loads(Run(tmp_path / "run").latency.read_text())
    assert table["backend"] == "eager"
    assert len(table["widths"]["units"]) > 0
    assert row["form"] == "own"
    assert row["latency_ms"] is not None
    assert row["measured_change"] is not None
    within = row["measured_change"] <= -0.2
    assert ("within it of" in row["said"]) == within
    assert ("SLOWER than asked" in row["said"]) == (not within)
    shown = CliRunner().invoke(app, ["search", "--run", str(tmp_path / "run")])
    assert shown.exit_code == 0, shown.output
    assert ("SLOWER than the 0.800x" in shown.output) == (not within)
    assert f"measured in turns {1 + row['measured_change']:.3f}x" in shown.output
