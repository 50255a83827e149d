"""The search step of a run: every solver, joint budgets, controls at a budget, repair, and plans compared."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SHAPES, BuiltOnce, build_unet
from matplotlib.figure import Figure
from typer.testing import CliRunner

from prune_lab.api.results import open_run
from prune_lab.blocks import BlockGroup, architecture_of
from prune_lab.candidates import load_student
from prune_lab.cli import app
from prune_lab.config import (
    RepairConfig,
    RunConfig,
    SearchConfig,
)
from prune_lab.errors import BackendError, BudgetError, ConfigError, PruneLabError
from prune_lab.evaluation import heldout_loss
from prune_lab.importance import score
from prune_lab.plans import is_native, parse_plan
from prune_lab.probes import Probe, load_probe, predict
from prune_lab.profiling import cost_table
from prune_lab.runs import Run
from prune_lab.runtime import write_json
from prune_lab.runtimes import RUNTIMES
from prune_lab.session import deciding_probe
from prune_lab.surgery import materialise
from prune_lab.workflow import (
    Session,
    compared_plans,
    ensure_candidates,
    ensure_distilled,
    ensure_plans,
    ensure_repaired,
    ensure_scores,
    plan_notes,
    plans_frame,
    start_run,
)
from prune_lab.workflow.comparing import block_maps
from prune_lab.workflow.measuring import ensure_latency, ensure_turns, run_scoring_context
from prune_lab.workflow.targets import budgets_of, check_budgets, controls_among

JOINT = "macs<=as:bk-base, params<=80%"


Searching = Callable[..., Session]


@pytest.fixture(scope="session")
def config(small_run_config: Callable[..., RunConfig]) -> RunConfig:
    return small_run_config(
        probe={"samples": 6, "timesteps": 3},
        score={"groups": ("block",)},
        search={"budgets": (JOINT,), "controls": ("bk-base",), "samples": 24, "trials": 40},
        distill={"steps": 1},
        evaluate={"prompts": ("a",)},
    )


@pytest.fixture(scope="session")
def searching(built_once: BuiltOnce, config: RunConfig) -> Searching:
    """``searching(folder, **search)``: a run in ``folder`` with the scores of ``config``, other settings of search."""
    scored = built_once("scored", lambda folder: ensure_scores(Session(start_run(config, folder))))

    def start(folder: Path, **search: Any) -> Session:
        shutil.copytree(scored, folder)
        asked = dataclasses.replace(config, search=dataclasses.replace(config.search, **search))
        return Session(start_run(asked, folder))

    return start


def test_where_few_plans_exist_all_are_measured_instead_of_learned_from(
    searching: Searching, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr("prune_lab.workflow.solving.note", lines.append)
    keep = tuple(f"{stage}{number}" for stage in ("Dn", "Up") for number in range(1, 5))
    settings = {"solver": "interactions", "budgets": ("macs<=99%",), "keep": keep, "samples": 20}
    session = searching(tmp_path / "run", **settings)
    assert [plan.text for plan in ensure_plans(session) if plan.origin == "search"] == [
        "-Md.R1 -Md.A1 -Md.R2"
    ]
    assert any("1 plan is all that there is, too few to learn" in line for line in lines)
    assert list(pd.read_csv(session.run.searches)["sets_measured"]) == [1]


@pytest.mark.parametrize(
    ("solver", "objective"),
    [
        ("exact", "impact"),
        ("interactions", "impact"),
        ("greedy", "impact"),
        ("evolution", "impact"),
        pytest.param("descent", "impact", marks=pytest.mark.long),
        pytest.param("greedy", "repaired", marks=pytest.mark.long),
        pytest.param("interactions", "repaired", marks=pytest.mark.long),
        pytest.param("learned-gates", "impact", marks=pytest.mark.long),
    ],
)
def test_every_solver_keeps_all_budgets_and_says_what_it_spent(
    solver: str, objective: str, searching: Searching, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    for module in ("solving", "searching"):
        monkeypatch.setattr(f"prune_lab.workflow.{module}.note", lines.append)
    few = {"gate_steps": 4, "repair": "shift", "count": 2 if solver == "greedy" else 1}
    session = searching(tmp_path / "run", solver=solver, objective=objective, **few)
    plans = ensure_plans(session)
    architecture = session.architecture
    costs = cost_table(architecture)
    base = costs.of(parse_plan("bk-base", architecture))
    found = [plan for plan in plans if plan.name.split(" = ")[0] != "bk-base"]
    assert found
    for plan in found:
        assert costs.of(plan).macs <= base.macs
        assert costs.of(plan).params <= 0.8 * costs.total.params
        assert is_native(architecture, plan)
    assert session.run.gates.is_file() == session.run.gate_steps.is_file() == (solver == "learned-gates")
    if solver == "learned-gates":
        gates = open_run(session.run.folder).gates
        assert set(gates.frame()["budget"]) == {"macs<=as:bk-base, params<=80%".replace("as:", "")}
        assert any(
            line.startswith("learned gates, macs") for line in plan_notes(session, plans_frame(session))
        )
        assert isinstance(gates.plot().figure(), Figure)
    (row,) = pd.read_csv(session.run.searches).to_dict("records")
    assert row["solver"] == solver
    said = "greedy found 1 of 2 plans asked for; this solver gives one"
    assert any(said in line for line in lines) == (solver == "greedy")
    assert any("after its repair, which was searched for" in line for line in lines) == (
        objective == "repaired"
    )
    assert row["budget"] == "macs<=bk-base, params<=80%"
    assert (row["sets_measured"] == 0) == (solver in ("exact", "learned-gates"))
    assert (row["forwards"] == 0) == (solver == "exact")
    assert row["objective"] == objective
    assert np.isfinite(row["r2"]) == (solver == "interactions")
    prefix = "search" if solver == "exact" else solver
    assert pd.read_csv(session.run.searched)["name"].iloc[-1] == f"{prefix}-macs-bk-base-params-80pct-1"


@pytest.mark.long
def test_a_search_that_measures_ends_no_worse_than_the_additive_one(
    searching: Searching, tmp_path: Path
) -> None:
    measured = {}
    for solver in ("exact", "interactions"):
        session = searching(tmp_path / solver, solver=solver, controls=())
        plan = ensure_plans(session)[0]
        group = BlockGroup("plan", "plan", plan.removed)
        measured[solver] = score(run_scoring_context(session), [group], bootstrap=0).entries[0].impact
    assert measured["interactions"] <= measured["exact"] * (1 + 1e-4)


def test_rules_of_the_settings_reach_the_solver(searching: Searching, tmp_path: Path) -> None:
    session = searching(
        tmp_path / "run",
        controls=(),
        keep=("Up1",),
        quotas=("Dn1<=1",),
        form="own",
        count=3,
        diverse=4,
        longest_run=6,
        budgets=("macs<=70%",),
    )
    plans = ensure_plans(session)
    assert len(plans) == 3
    sets = [set(plan.removed) for plan in plans]
    assert all(not any(name.startswith("Up1") for name in removed) for removed in sets)
    assert all(sum(name.startswith("Dn1") for name in removed) <= 1 for removed in sets)
    assert min(len(one ^ other) for one in sets for other in sets if one is not other) >= 4
    with pytest.raises(ConfigError, match="write STAGE<=2 for at most two"):
        ensure_plans(searching(tmp_path / "wrong", quotas=("Dn1-two",)))
    with pytest.raises(BudgetError, match="keep Up4 binds"):
        ensure_plans(searching(tmp_path / "none", keep=("Up4",), budgets=("macs<=30%",)))


def test_controls_are_found_for_the_budget(searching: Searching, tmp_path: Path) -> None:
    names = ("bk-base", "uniform", "random-median", "lowest-one-shot", "similarity")
    session = searching(tmp_path / "run", controls=names)
    ensure_plans(session)
    rows = pd.read_csv(session.run.searched)
    controls = rows[rows["origin"] == "control"]
    assert [name.split(" ")[0] for name in controls["name"]] == list(names)
    assert controls["budget"].fillna("").tolist() == ["", *["macs<=bk-base, params<=80%"] * 4]


@pytest.mark.long
def test_a_budget_on_latency_measures_a_table_once(searching: Searching, tmp_path: Path) -> None:
    session = searching(tmp_path / "run", budgets=("latency<=0.8x, memory<=95%",))
    frame = plans_frame(session)
    ensure_latency(session)
    assert session.run.latency.is_file()
    before = session.run.latency.read_bytes()
    ensure_latency(Session(session.run))
    assert session.run.latency.read_bytes() == before
    # what is promised is measured: of the plan, in turns with the teacher
    searched = frame[frame["budgets"] != ""]
    change = ensure_turns(Session(session.run), ())[searched["plan_id"].item()].change.change
    assert searched["measured_change"].item() == pytest.approx(change)
    (line,) = plan_notes(session, frame)
    assert ("SLOWER than the 0.800x" in line) == (change > -0.2)
    assert f"measured in turns {1 + change:.3f}x" in line


@pytest.mark.parametrize(
    ("service", "settings", "error", "said"),
    [
        ("onnx", {"packages": ("no_such_package",)}, BackendError, "pip install"),
        ("onnx,bfloat16", {}, BackendError, "in bfloat16; give one of float32"),
        ("nowhere", {}, BudgetError, "cannot read 'nowhere'"),
    ],
)
def test_a_service_that_is_not_to_be_had_is_refused_before_any_work(
    config: RunConfig,
    service: str,
    settings: dict[str, Any],
    error: type[PruneLabError],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = dataclasses.replace(RUNTIMES["onnx"], **({"packages": ()} | settings))
    monkeypatch.setitem(RUNTIMES, "onnx", here)
    search = dataclasses.replace(config.search, budgets=(f"macs<=90%, latency<=0.8x@{service}",))
    with pytest.raises(error, match=said) as caught:
        check_budgets(dataclasses.replace(config, search=search))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("axes", [("depth",), pytest.param(("depth", "width"), marks=pytest.mark.long)])
def test_a_latency_that_no_plan_reaches_is_said_before_the_scoring(
    config: RunConfig, axes: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prune_lab.workflow.searching.ensure_scores", lambda _: pytest.fail("scored"))
    # a few runs on a busy machine may say of all parts together that they save nearly everything
    rules: dict[str, Any] = {"axes": axes, "controls": (), "keep": ("Dn1", "Dn2", "Up3", "Up4")}
    search = dataclasses.replace(config.search, budgets=("latency<=0.01%",), **rules)
    quick = dataclasses.replace(config.profile, runs=4, warmup=1)
    session = Session(start_run(dataclasses.replace(config, search=search, profile=quick), tmp_path / "run"))
    with pytest.raises(
        BudgetError, match=r"the smallest .*plan.* has latency_ms .* give latency_ms<="
    ) as caught:
        ensure_plans(session)
    again = float(str(caught.value).rsplit("<=", 1)[1].rstrip("%"))
    assert 0.01 < again < 100
    assert session.run.latency.is_file()


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was said while progress is shown."""
    said: list[str] = []
    for module in ("workflow.measuring", "profiling.latency_cache"):
        monkeypatch.setattr(f"prune_lab.{module}.note", said.append)
    return said


@pytest.mark.long
def test_a_latency_table_is_kept_for_every_run_of_the_same_structure_and_service(
    searching: Searching, tmp_path: Path, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    budget = "latency<=0.9x@bfloat16,48,batch=2,tokens=5"
    session = searching(tmp_path / "run", budgets=(budget,), controls=())
    frame = plans_frame(session)
    table = ensure_latency(session)
    assert (table.environment.dtype, table.batch, table.latent, table.tokens) == ("bfloat16", 2, (24, 24), 5)
    # what is predicted may lie on either side of the budget: what is kept is kept by what is measured in turns
    assert (frame["latency_ms"] < table.whole.median_ms).all()
    assert (
        frame["macs"].iloc[0] < cost_table(session.architecture).total.macs
    )  # counted at the model's own size
    first, second = [one for one in notes if one.startswith("latency")]  # others say where MACs mislead
    assert "latency at cpu bfloat16, 48 x 48, batch 2, 5 tokens: measured 20" in first
    assert f"in {table.whole.runs} passes, median error" in first
    (kept,) = (tmp_path / "cache").rglob("*.json")
    assert f"it lies in {kept}; --set profile.anew=true measures it anew" in second
    passes: list[str] = []
    monkeypatch.setattr(
        type(session.model), "forward", lambda *_, **__: passes.append("a pass") or pytest.fail("a pass")
    )
    again = ensure_latency(searching(tmp_path / "again", budgets=(f"{budget}, macs<=90%",), controls=()))
    assert again == table
    assert sum("kept table, measured 20" in one for one in notes) == 1
    assert f"it lies in {kept}" in notes[-1]
    assert not passes
    monkeypatch.undo()


@pytest.mark.long
def test_a_kept_table_that_is_no_good_is_measured_anew_with_a_word(
    searching: Searching, tmp_path: Path, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    session = searching(tmp_path / "run", budgets=("latency<=0.9x@16",))
    table = ensure_latency(session)
    (kept,) = (tmp_path / "cache").rglob("*.json")
    good = json.loads(kept.read_text())
    measured: list[str] = []
    monkeypatch.setattr(
        "prune_lab.workflow.measuring._measured_latency", lambda *_: measured.append("again") or table
    )
    foreign = {**good, "key": {**good["key"], "structure": "0" * 16}}
    hole = {**good, "savings": good["savings"][1:]}
    for number, text in enumerate(("{", json.dumps(foreign), json.dumps(hole), "[]"), 1):
        kept.write_text(text)
        session.run.latency.unlink()
        assert ensure_latency(session) == table
        assert sum(f"the latency table in {kept} cannot be used" in one for one in notes) == number
        assert len(measured) == number
        assert json.loads(kept.read_text()) == good
    session.run.latency.unlink()
    assert ensure_latency(session) == table
    assert len(measured) == 4
    anew = searching(tmp_path / "anew", budgets=("latency<=0.9x@16",))
    timing = dataclasses.replace(anew.config.profile, anew=True)
    vars(anew)["config"] = dataclasses.replace(anew.config, profile=timing)
    ensure_latency(anew)
    assert len(measured) == 5


@pytest.mark.long
def test_candidates_are_timed_in_turns_with_the_teacher_and_later_ones_with_it_again(
    searching: Searching, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = searching(tmp_path / "run", budgets=(), controls=("bk-base",))
    architecture = session.architecture
    names = {parse_plan(text, architecture).id: text for text in ("bk-base", "bk-tiny")}
    monkeypatch.setattr("prune_lab.profiling.timed_plans.call_ms", scripted())
    first = {one.plan.id: one.profile for one in ensure_candidates(session)}
    rounds = pd.read_csv(session.run.latency_rounds, dtype={"name": str})
    assert set(rounds["name"]) == {"teacher", *(name for name in names if names[name] != "bk-tiny")}
    assert set(rounds["timing"]) == {1}
    for profile in first.values():
        assert (profile.timed, profile.latency.runs) == ("in turns, one process", 2)
    # The second timing is in a minute that is ten times as slow.
    write_json(
        session.run.plan(parse_plan("bk-tiny", architecture).id),
        parse_plan("bk-tiny", architecture).to_json(),
    )
    monkeypatch.setattr("prune_lab.profiling.timed_plans.call_ms", scripted(slowness=10))
    again = {one.plan.id: one.profile for one in ensure_candidates(session)}
    assert {name: again[name] for name in first} == first
    rounds = pd.read_csv(session.run.latency_rounds, dtype={"name": str})
    second = rounds[rounds["timing"] == 2]
    assert {names.get(name, name) for name in second["name"]} == {"teacher", "bk-tiny"}
    costs = cost_table(architecture)
    for name, profile in again.items():
        share = costs.of(parse_plan(names[name], architecture)).params / costs.total.params
        assert profile.change.change == pytest.approx(share - 1)
    times = ensure_turns(session, ())
    assert times["teacher"].latency.median_ms == pytest.approx(costs.total.params)


def scripted(slowness: float = 1) -> Any:
    """In place of ``call_ms``: a pass takes as many milliseconds as the model has parameters."""

    def call_ms(call: Callable[[], Any], device: torch.device) -> float:
        (model,) = (
            cell.cell_contents for cell in call.__closure__ if isinstance(cell.cell_contents, torch.nn.Module)
        )
        return slowness * float(sum(parameter.numel() for parameter in model.parameters()))

    return call_ms


def test_plans_are_compared_with_their_impacts_and_maps(
    searching: Searching, config: RunConfig, tmp_path: Path
) -> None:
    session = searching(tmp_path / "run")
    ensure_plans(session)
    texts = ["bk-small", "search-macs-bk-base-params-80pct-1", "-Dn1.R2 -Dn1.A2"]
    frame, plans = compared_plans(session, texts)
    maps = block_maps(session.architecture, plans)
    assert frame["name"].tolist() == [str(config.model), *texts]
    groups = [
        BlockGroup(str(place), "plan", plan.removed)
        for place, plan in enumerate(
            [parse_plan(texts[0], session.architecture), parse_plan(texts[2], session.architecture)]
        )
    ]
    wanted = score(run_scoring_context(session), groups, bootstrap=0).impacts
    assert frame["impact"].tolist()[1::2] == pytest.approx(wanted.tolist(), rel=1e-4)
    assert np.isnan(frame["impact"].iloc[0])
    assert len(maps) == 1 + len(session.architecture.stages)
    told = CliRunner().invoke(app, ["compare", str(session.run.folder), *texts[:2]])
    assert told.exit_code == 0
    assert maps[1].split("  ")[1].strip() in told.output


def test_a_run_lends_its_scores_and_stays_as_it_is(searching: Searching, tmp_path: Path) -> None:
    session = searching(tmp_path / "run")
    ensure_plans(session)
    before = {path: path.read_bytes() for path in session.run.folder.rglob("*") if path.is_file()}
    command = [
        "search",
        str(session.run.folder),
        "--macs",
        "75%",
        "--params",
        "as:bk-base",
        "--plans",
        "2",
        "--json",
    ]
    told = CliRunner().invoke(app, [*command, "--set", "search.diverse=3", "--set", "search.keep=Up4"])
    assert told.exit_code == 0, told.output
    rows = [row for row in json.loads(told.stdout) if row["origin"] == "search"]
    assert len(rows) == 2
    assert not any("Up4" in row["removed"] for row in rows)
    impacts = pd.read_csv(session.run.importance).set_index("group")["impact"]
    assert rows[0]["predicted_impact"] == pytest.approx(impacts[rows[0]["removed"].split()].sum())
    assert {path: path.read_bytes() for path in session.run.folder.rglob("*") if path.is_file()} == before


def test_a_map_shows_what_is_gone(tiny_config: dict[str, Any]) -> None:
    architecture = architecture_of(tiny_config)
    plans = [parse_plan("-Dn1.R2 -Dn1.A2", architecture), parse_plan("bk-tiny", architecture)]
    lines = block_maps(architecture, plans)
    assert lines[0].split() == ["-Dn1.R2", "-Dn1.A2", "bk-tiny"]
    by_stage = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert by_stage["Dn1"] == ["RA..", "RA.."]
    assert by_stage["Md"] == ["RAR", "..."]
    assert by_stage["Dn4"] == ["RR", ".."]
    assert by_stage["Up4"] == ["RARARA", "RA..RA"]


@pytest.mark.long
def test_a_repair_comes_before_the_distillation(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prune_lab.workflow import students

    falling = iter((1.0, 0.5))  # a teacher of random weights is no better than what is cut from it
    monkeypatch.setattr(students, "heldout_loss", lambda _model, _rows: torch.tensor([next(falling)]))
    wanted = dataclasses.replace(
        config, repair=RepairConfig(kind="refit"), search=SearchConfig(budgets=(), controls=("bk-small",))
    )
    run = start_run(wanted, tmp_path / "run")
    session = Session(run)
    (row,) = ensure_repaired(session).to_dict("records")
    assert row["impact_after"] < row["impact_before"]
    assert row["applied"] >= 1
    (candidate,) = ensure_candidates(session)
    assert not (candidate.paths.distilled).exists()
    probe = load_probe(run.probe)
    pruned, repaired = (predict(load_student(candidate, state), probe) for state in ("pruned", "repaired"))
    teacher_says = predict(session.model, probe)
    assert float((repaired - teacher_says).square().sum()) < float((pruned - teacher_says).square().sum())
    assert json.loads((candidate.paths.repaired / "provenance.json").read_text())["repair"] == "refit"
    stamp = candidate.paths.repair.stat().st_mtime_ns
    (recovery,) = ensure_distilled(session)
    assert candidate.paths.repair.stat().st_mtime_ns == stamp
    plain = start_run(dataclasses.replace(wanted, repair=RepairConfig(kind="none")), tmp_path / "plain")
    assert ensure_repaired(Session(plain)).empty
    (other,) = ensure_distilled(Session(plain))
    assert recovery.before != other.before  # it began where the repair ended
    assert not torch.equal(pruned, repaired)


@pytest.mark.long
def test_a_repair_is_kept_only_where_the_loss_falls_on_rows_of_its_own(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two plans the one whose loss would rise starts from what was cut; a second call repairs nothing."""
    from prune_lab.workflow import students

    wanted = dataclasses.replace(
        config,
        repair=RepairConfig(kind="shift"),
        search=SearchConfig(budgets=(), controls=("bk-small", "bk-tiny")),
    )
    session = Session(start_run(wanted, tmp_path / "run"))
    told = [1.0, 0.5, 1.0, 1.5]  # before and after of the first plan, then of the second

    def loss(model: Any, rows: Probe) -> torch.Tensor:
        assert len(heldout_loss(model, rows)) == len(rows)
        return torch.tensor([told.pop(0)])

    monkeypatch.setattr(students, "heldout_loss", loss)
    frame = ensure_repaired(session)
    assert frame["kept"].tolist() == [True, False]
    assert (frame["loss_after"] < frame["loss_before"]).tolist() == [True, False]
    assert (frame["impact_after"] < frame["impact_before"]).all()
    read = pd.read_csv(session.run.repairs)
    assert read["kept"].tolist() == [True, False]
    assert read["loss_after"].tolist() == pytest.approx(frame["loss_after"].tolist())
    probe = load_probe(session.run.probe)
    for candidate, kept in zip(ensure_candidates(session), (True, False), strict=True):
        both = [predict(load_student(candidate, state), probe) for state in ("pruned", "repaired")]
        assert torch.equal(*both) is not kept
        provenance = json.loads((candidate.paths.repaired / "provenance.json").read_text())
        assert provenance["repair"] == ("shift" if kept else "none")
    pd.testing.assert_frame_equal(ensure_repaired(Session(session.run)), frame)
    assert not told


def test_the_rows_that_decide_are_neither_fitted_nor_judged_by(finished: Run) -> None:
    session = Session(finished)
    rows = deciding_probe(session)
    others = [*load_probe(finished.probe).captions, *session.validation.captions]
    assert len(rows)
    assert set(rows.captions).isdisjoint(others)
    assert deciding_probe(session).digest == rows.digest


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (SearchConfig, {"solver": "best"}),
        (SearchConfig, {"objective": "repaired"}),  # the exact solver measures nothing
        (SearchConfig, {"objective": "repaired", "solver": "learned-gates"}),
        (SearchConfig, {"gate_rate": 0.0}),
        (SearchConfig, {"diverse": 0}),
        (SearchConfig, {"samples": 5}),
        (RepairConfig, {"kind": "all"}),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: Any, wanted: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wanted))):
        settings(**wanted)


# A model for which BK-SDM's plans are not defined ----------------------------------------------------------------


@pytest.fixture(scope="session", params=["sdxl", "student"])
def without_named_plans(request: Any, built_once: BuiltOnce, tiny_unet_shared: Any) -> Path:
    """A U-Net folder of SDXL's shape, or of a student that was pruned already."""

    def build(folder: Path) -> None:
        if request.param == "sdxl":
            build_unet(SHAPES["sdxl"]).save_pretrained(folder)
        else:
            plan = parse_plan("bk-base", architecture_of(tiny_unet_shared))
            materialise(tiny_unet_shared, plan).save_pretrained(folder)

    return built_once(f"unnamed-{request.param}", build)


QUICK = ("--set", "probe.samples=2", "--set", "score.groups=block", "--set", "score.bootstrap=1")


@pytest.mark.long
def test_a_model_without_named_plans_is_searched_under_shares_of_it(without_named_plans: Path) -> None:
    found = CliRunner().invoke(app, ["search", str(without_named_plans), *QUICK, "--json"])
    assert found.exit_code == 0, found.output
    rows = json.loads(found.stdout)
    assert {row["origin"] for row in rows} == {"search"}
    asked = [row["budgets"] for row in rows]
    assert asked
    for row in rows:
        shares = [int(one.removeprefix("params<=").removesuffix("%")) for one in row["budgets"].split()]
        assert 1 + row["params_change"] <= min(shares) / 100
    assert "controls left out: bk-base, bk-small, bk-tiny" in found.stderr
    asked_for = CliRunner().invoke(
        app, ["search", str(without_named_plans), "--macs", "85%", *QUICK, "--json"]
    )
    assert asked_for.exit_code == 0, asked_for.output
    (row,) = json.loads(asked_for.stdout)
    assert row["macs_change"] <= -0.15


def test_a_control_that_is_named_and_not_defined_is_refused_before_the_scoring(
    without_named_plans: Path, tmp_path: Path
) -> None:
    asked = ["search", str(without_named_plans), "--run", str(tmp_path / "run"), "--set"]
    for setting in ("search.controls=bk-base", "search.budgets=params<=bk-base"):
        found = CliRunner().invoke(app, [*asked, setting])
        assert found.exit_code == 2
        assert "defined for four stages" in found.stderr
        assert not (tmp_path / "run").exists()


def test_named_plans_are_the_default_where_they_are_defined(
    tiny_pipeline_folder: Path, tiny_unet_shared: Any
) -> None:
    architecture = architecture_of(tiny_unet_shared)
    settings = RunConfig(model=str(tiny_pipeline_folder))
    assert [plan.name for plan in controls_among(settings.search, architecture)] == [
        "bk-base",
        "bk-small",
        "bk-tiny",
    ]
    assert budgets_of(settings, architecture) == (
        "params<=bk-base",
        "params<=bk-small",
        "params<=bk-tiny",
    )
