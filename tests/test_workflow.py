"""The steps of a run: done once, resumed, redone when settings change, and what they leave behind."""

from __future__ import annotations

import ast
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from diffusers import UNet2DConditionModel
from families_seen import VERBS, Seen
from typer.testing import CliRunner

import prune_lab
from prune_lab.cli import app
from prune_lab.config import (
    EngineConfig,
    ReportConfig,
    RunConfig,
    ScoreConfig,
    SearchConfig,
    load_config,
)
from prune_lab.errors import (
    BudgetError,
    ConfigError,
    DataError,
    PlanError,
    RunError,
    UnknownBlockError,
    UnknownCriterionError,
)
from prune_lab.evaluation import clip_scores, generate, heldout_loss, read_pictures
from prune_lab.plans import parse_plan
from prune_lab.probes import load_probe, predict
from prune_lab.runs import Run
from prune_lab.session import ensure_probe
from prune_lab.session.parts import ranking_part, record
from prune_lab.surgery import bypassed
from prune_lab.workflow import (
    Session,
    comparison,
    ensure_candidates,
    ensure_distilled,
    ensure_plans,
    ensure_ranking,
    ensure_scores,
    forget,
    plan_named,
    plans_frame,
    quality_frame,
    run_all,
    start_run,
    steps_frame,
)
from prune_lab.workflow.measuring import ensure_blocks, ensure_costs
from prune_lab.workflow.ranking import ensure_report
from prune_lab.workflow.starting import first_affected
from prune_lab.workflow.steps import STEPS


@pytest.fixture(scope="module")
def config(finished_config: RunConfig) -> RunConfig:
    return finished_config


@pytest.fixture
def copied(finished: Run, tmp_path: Path) -> Run:
    return Run(Path(shutil.copytree(finished.folder, tmp_path / "run")))


def times(run: Run) -> dict[str, int]:
    """When each file of a run was written, in nanoseconds."""
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(run.folder)): path.stat().st_mtime_ns for path in files}


def removed_by(run: Run) -> dict[str, set[str]]:
    """Plan id -> the blocks it removes, read from the files alone."""
    return {path.stem: set(json.loads(path.read_text())["removed"]) for path in run.plans_dir.glob("*.json")}


# The whole job ---------------------------------------------------------------------------------------------------


def test_the_whole_job_leaves_every_file(finished: Run, seen: Seen) -> None:
    missing = {path for step in STEPS for path in step.products(finished) if not finished.done(path)}
    candidates = [finished.candidate(plan_id) for plan_id in finished.plan_ids()]
    of_each = {path for one in candidates for path in (one.repair, one.repaired, one.kept, one.grids)}
    # no budget on latency, no repair, no grids, no pictures or captions of the user's own, no tournament, no widths
    own = {finished.data_dir, finished.validation, finished.captions, finished.repairs}
    assert missing == of_each | own | {finished.latency, finished.tournament, finished.width_scores_dir}
    assert finished.done(finished.environment)
    for verb in VERBS:
        seen("UNet2DConditionModel", verb)


def test_doing_it_again_computes_nothing(copied: Run, finished: Run, config: RunConfig) -> None:
    before = times(copied)
    run_all(config, copied.folder)
    assert times(copied) == before
    # what a step took is what it took when it was done, not when it was only read
    seconds = [
        pd.read_csv(run.folder / "steps.csv").set_index("step")["seconds"] for run in (copied, finished)
    ]
    pd.testing.assert_series_equal(*seconds)


@pytest.mark.usefixtures("quick_report")
def test_a_report_is_drawn_anew_when_a_table_is(copied: Run) -> None:
    before = copied.report.stat().st_mtime_ns
    ensure_report(Session(copied))
    assert copied.report.stat().st_mtime_ns == before
    copied.ranking.write_text(copied.ranking.read_text().replace("control", "search"))
    with pytest.raises(DataError, match=r"ranking\.csv was changed"):
        ensure_report(Session(copied))
    session = Session(copied)
    record(session, ranking_part(session, ensure_plans(session)))  # as its own step changes it
    assert ensure_report(session).read_text() == "drawn"


@pytest.mark.long
@pytest.mark.usefixtures("quick_report")
def test_what_is_missing_is_made_again_and_equal(copied: Run, config: RunConfig) -> None:
    before = pd.read_csv(copied.ranking).set_index("plan_id")
    plan_id = copied.plan_ids()[0]
    paths = copied.candidate(plan_id)
    shutil.rmtree(paths.distilled)
    shutil.rmtree(paths.pictures_distilled)
    for path in (paths.recovery, paths.heldout, copied.ranking):
        path.unlink()
    made = {
        "report",
        "ranking",
        "distilled",
        "pictures_distilled",
        "steps",
    }  # the manifests of what is made again
    kept = {
        name: time
        for name, time in times(copied).items()
        if not name.startswith(("report/", "steps.csv"))
        and not ("manifests/" in name and Path(name).stem in made)
    }
    run_all(config, copied.folder)
    assert {name: times(copied)[name] for name in kept} == kept
    after = pd.read_csv(copied.ranking).set_index("plan_id")
    measured = ["rank", "loss_before", "loss_after", "clip_before", "clip_after", "impact_one_shot"]
    pd.testing.assert_frame_equal(after.loc[before.index, measured], before[measured], rtol=1e-5)


@pytest.mark.usefixtures("quick_report")
def test_an_interrupt_leaves_a_run_that_goes_on(
    config: RunConfig, copied: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(copied, "pictures")

    def interrupted(*_: Any, **__: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("prune_lab.engines.pictures.generate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_all(config, copied.folder)
    assert not copied.done(copied.ranking)
    before = times(copied)
    ranking = run_all(config, copied.folder)
    assert [entry.result.plan for entry in ranking.entries if entry.status == "failed"] == []
    anew = ("report/", "steps.csv", "manifests/steps.json")
    kept = {name: time for name, time in before.items() if not name.startswith(anew)}
    assert {name: times(copied)[name] for name in kept} == kept


# Settings --------------------------------------------------------------------------------------------------------


def test_other_settings_are_refused_by_name(copied: Run, config: RunConfig) -> None:
    distill = dataclasses.replace(config.distill, steps=3)
    with pytest.raises(RunError, match=r"distill\.steps.*--force.*'distilled'"):
        start_run(dataclasses.replace(config, distill=distill), copied.folder)
    assert load_config(copied.config) == config


def test_force_redoes_only_what_the_settings_touch(copied: Run, config: RunConfig) -> None:
    other = dataclasses.replace(config, distill=dataclasses.replace(config.distill, steps=3))
    run = start_run(other, copied.folder, force=True)
    assert load_config(run.config) == other
    candidate = run.candidate(run.plan_ids()[0])
    gone = [candidate.recovery, candidate.distilled, run.teacher_pictures, run.ranking, run.report]
    assert [path for path in gone if path.exists()] == []
    kept = (run.importance, candidate.pruned, candidate.profile, run.plans_dir, run.data)
    assert all(run.done(path) for path in kept)


def test_an_impossible_budget_removes_nothing(copied: Run, config: RunConfig) -> None:
    search = dataclasses.replace(config.search, budgets=("params<=bk-base", "params<=5%"))
    before = times(copied)
    with pytest.raises(BudgetError, match=r"params<=5%.*smallest native plan"):
        run_all(dataclasses.replace(config, search=search), copied.folder, force=True)
    asked = ["search", "--run", str(copied.folder), "--params", "5%", "--force"]
    assert CliRunner().invoke(app, asked).exit_code == 2
    assert times(copied) == before


def test_a_setting_that_no_step_has_read_may_change(copied: Run, config: RunConfig) -> None:
    forget(copied, "report")
    other = dataclasses.replace(config, report=ReportConfig(title="Another", also_presets=("sd-v1.4",)))
    assert load_config(start_run(other, copied.folder).config).report.title == "Another"
    assert copied.done(copied.ranking)


def test_where_something_is_computed_may_change_under_it(copied: Run, config: RunConfig) -> None:
    before = times(copied)
    distill = dataclasses.replace(config.distill, together=1, trackers=())
    engine = EngineConfig(address="ray-head:6379")
    start_run(dataclasses.replace(config, distill=distill, engine=engine), copied.folder)
    changed = {name for name, time in times(copied).items() if before[name] != time}
    assert changed == {"config.toml", "environment.json"}
    assert load_config(copied.config).engine.address == "ray-head:6379"


@pytest.mark.parametrize(
    ("changed", "step"),
    [
        (["report.title"], "report"),
        (["evaluate.prompts"], "pictures"),
        (["evaluate.guidance"], "shares"),
        (["report.also_presets"], "reductions"),
        (["distill.steps", "search.count"], "plans"),
        (["distill.steps", "rank.eta"], "distilled"),
        (["distill.pictures"], "data"),
        (["profile.runs"], "plans"),
        (["probe.seed"], "probe"),
        (["report.title", "model"], "blocks"),
    ],
)
def test_the_first_step_that_reads_a_setting(changed: list[str], step: str) -> None:
    assert first_affected(changed) == step


def test_every_setting_has_a_reader() -> None:
    from prune_lab.config import SETTINGS

    assert {first_affected([name]) for name in SETTINGS} <= {step.name for step in STEPS}


def test_other_weights_are_another_run(config: RunConfig, tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(tiny_pipeline_folder, tmp_path / "model"))
    config = dataclasses.replace(config, model=str(model))
    run = start_run(config, tmp_path / "run")
    ensure_blocks(Session(run))
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"other weights.*--force"):
        start_run(config, run.folder)
    assert run.done(run.blocks)
    start_run(config, run.folder, force=True)
    assert not run.blocks.exists()
    start_run(config, run.folder)


def test_a_folder_with_other_files_is_left_alone(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="other files"):
        start_run(config, tmp_path, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("table", "values", "error", "match"),
    [
        ("search", {"budgets": ("weight<=3",)}, BudgetError, "weight"),
        ("search", {"controls": ("-Dn9.R1",)}, UnknownBlockError, "Dn9"),
        ("score", {"criterion": "charm"}, UnknownCriterionError, "charm"),
        ("score", {"groups": ("stage",)}, ConfigError, r"score\.groups"),
        ("probe", {"samples": 100_000}, DataError, "100000|100,000"),
    ],
)
def test_settings_are_checked_before_the_work(
    config: RunConfig, tmp_path: Path, table: str, values: dict[str, Any], error: Any, match: str
) -> None:
    wrong = dataclasses.replace(config, **{table: dataclasses.replace(getattr(config, table), **values)})
    with pytest.raises(error, match=match):
        run_all(wrong, tmp_path / "run")
    assert not Run(tmp_path / "run").importance.exists()


def test_forgetting_one_candidate_spares_the_others(copied: Run) -> None:
    first, second, *_ = copied.plan_ids()
    forget(copied, "distilled", plan_ids=[first])
    assert not copied.candidate(first).distilled.exists()
    assert copied.done(copied.candidate(first).pruned)
    assert copied.done(copied.candidate(second).distilled_model)
    assert not copied.ranking.exists()


def test_the_steps_say_how_far_they_are(copied: Run, config: RunConfig, tmp_path: Path) -> None:
    new = steps_frame(config, tmp_path / "none").set_index("step")["state"]
    assert set(new) == {"to do", "not asked for"}  # nothing is to be repaired
    assert not (tmp_path / "none").exists()
    assert set(steps_frame(config, copied.folder)["state"]) == {"done", "not asked for"}
    shutil.rmtree(copied.candidate(copied.plan_ids()[0]).distilled)
    plans = len(copied.plan_ids())
    state = steps_frame(config, copied.folder).set_index("step")["state"]
    assert state["distilled"] == f"{plans - 1} of {plans}"
    other = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, seeds=(1,)))
    state = steps_frame(other, copied.folder).set_index("step")["state"]
    assert (state["shares"], state["pictures"], state["ranking"]) == ("done", "redo", "redo")


# What the tables say ---------------------------------------------------------------------------------------------


def test_the_scores_are_those_of_a_bypass(finished: Run) -> None:
    unet = Session(finished).model
    probe = load_probe(finished.probe)
    whole = predict(unet, probe)
    with bypassed(unet, ["Dn1.A1"]):
        without = predict(unet, probe)
    expected = float((without - whole).square().mean() / whole.square().mean())
    table = pd.read_csv(finished.importance).set_index(["kind", "group"])
    assert table.loc[("block", "Dn1.A1"), "impact"] == pytest.approx(expected, rel=1e-4)
    assert set(table.index.get_level_values("kind")) == {"block", "pair", "stage"}


def test_the_ranking_measures_what_the_folders_hold(finished: Run, config: RunConfig) -> None:
    session = Session(finished)
    table = pd.read_csv(finished.ranking).set_index("plan")
    plan = parse_plan("bk-base", session.architecture)
    row = table.loc[table["plan_id"] == plan.id].iloc[0]
    paths = finished.candidate(plan.id)
    student = UNet2DConditionModel.from_pretrained(paths.distilled_model).eval()
    assert row["params"] == sum(parameter.numel() for parameter in student.parameters())
    assert row["loss_after"] == pytest.approx(
        float(heldout_loss(student, session.validation).mean()), rel=1e-4
    )
    pruned = UNet2DConditionModel.from_pretrained(paths.pruned).eval()
    assert row["loss_before"] == pytest.approx(
        float(heldout_loss(pruned, session.validation).mean()), rel=1e-4
    )
    drawn = generate(session.pipeline, config.evaluate.prompts, (0,), steps=2, guidance=2.0, model=student)
    scores = clip_scores(session.scorer, drawn, config.evaluate.prompts)
    assert row["clip_after"] == pytest.approx(float(scores.mean()), abs=1e-4)
    assert table.loc["teacher", "rank"] == 0
    assert table.loc["teacher", "loss_after"] == pytest.approx(
        float(heldout_loss(session.model, session.validation).mean()), rel=1e-4
    )


def test_the_one_shot_impact_is_of_the_whole_plan(finished: Run) -> None:
    session = Session(finished)
    probe = load_probe(finished.probe)
    plan = parse_plan("bk-tiny", session.architecture)
    whole = predict(session.model, probe)
    student = UNet2DConditionModel.from_pretrained(finished.candidate(plan.id).pruned).eval()
    expected = float((predict(student, probe) - whole).square().mean() / whole.square().mean())
    table = pd.read_csv(finished.ranking).set_index("plan_id")
    assert table.loc[plan.id, "impact_one_shot"] == pytest.approx(expected, rel=1e-3)


def test_the_budgets_are_kept(finished: Run) -> None:
    frame = plans_frame(Session(finished)).set_index("plan_id")
    architecture = Session(finished).architecture
    base, tiny = (parse_plan(name, architecture).id for name in ("bk-base", "bk-tiny"))
    found = frame[frame["budgets"].str.contains("params<=bk-base")]
    assert len(found) == 1
    assert found["params"].iloc[0] <= frame.loc[base, "params"]
    # the control itself keeps the budget, so the best plan cannot be predicted to be worse
    assert found["predicted_impact"].iloc[0] <= frame.loc[base, "predicted_impact"] + 1e-9
    found = frame[frame["budgets"].str.contains("macs<=bk-tiny")]
    assert found["macs"].iloc[0] <= frame.loc[tiny, "macs"]
    assert set(frame["origin"]) <= {"control", "search"}
    assert (frame.loc[[base, tiny], "origin"] == "control").all()


def test_the_last_word_is_not_of_the_pictures_that_chose_the_plans(finished: Run) -> None:
    session = Session(finished)
    samples = session.config.probe.samples
    scored = session.pictures("heldout", samples, 0).pixels.flatten(1)
    judged = session.pictures("heldout", samples, 0, skip=samples).pixels.flatten(1)
    assert len(judged) == len(scored) == samples
    assert not any(torch.equal(one, other) for one in scored for other in judged)
    assert session.validation.digest != load_probe(finished.probe).digest


def test_reductions_hold_the_model_and_the_presets(finished: Run, config: RunConfig) -> None:
    frame = pd.read_csv(finished.reductions)
    sd = frame[frame["model"] == "sd-v1.4"].set_index("plan")
    # arXiv:2305.15798, table 1, and the published U-Nets
    assert dict(sd["params"]) == {"teacher": 859_520_964, "bk-base": 579_384_964, "bk-tiny": 323_384_964}
    assert sd["median_ms"].isna().all()
    own = frame[frame["model"] == Path(config.model).name]
    assert list(own["plan"]) == ["teacher", "bk-base", "bk-tiny"]
    assert (own["median_ms"] > 0).all()


# Plans -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def planned(copied: Run) -> Run:
    """A run that has its scores and no plan."""
    forget(copied, "plans")
    return copied


def test_one_plan_found_twice_is_one_candidate(planned: Run, config: RunConfig) -> None:
    search = SearchConfig(budgets=("params<=50%", "params<=50.0%"), controls=("bk-base", "bk-base +Md"))
    run = start_run(dataclasses.replace(config, search=search), planned.folder)
    plans = ensure_plans(Session(run))
    assert [len(removed_by(run)), len(plans)] == [2, 2]
    # "+Md" puts back what was never taken
    assert plans[0].names == ("bk-base", "-" + " -".join(plans[0].removed))
    assert len(plans[1].names) == 2
    assert [plan.origin for plan in plans] == ["control", "search"]
    assert plan_named(plans, "bk-base", Session(run)) == plans[0]
    assert plan_named(plans, plans[1].id, Session(run)) == plans[1]
    with pytest.raises(PlanError, match="bk-tiny"):
        plan_named(plans, "bk-tiny", Session(run))


@pytest.mark.long
def test_a_plan_put_there_by_hand_becomes_a_candidate(copied: Run) -> None:
    plan = parse_plan("-Md", Session(copied).architecture).named("mine")
    copied.plan(plan.id).write_text(json.dumps(plan.to_json()))
    assert ensure_plans(Session(copied))[-1] == plan
    candidates = ensure_candidates(Session(copied))
    assert copied.candidate(plan.id).folder in [candidate.folder for candidate in candidates]
    assert plans_frame(Session(copied)).set_index("plan").loc["mine", "origin"] == "control"


def test_a_plan_that_is_not_native_is_left_out_by_name(copied: Run) -> None:
    forget(copied, "ranking")
    plan = parse_plan("-Dn1.R2", Session(copied).architecture).named("odd")
    copied.plan(plan.id).write_text(json.dumps(plan.to_json()))
    frame = ensure_ranking(Session(copied)).frame().set_index("plan")
    assert frame.loc["odd", "status"] == "left out"
    assert "Dn1" in frame.loc["odd", "reason"]
    assert pd.isna(frame.loc["odd", "rank"])


def test_a_distillation_that_diverges_is_ranked_as_failed(copied: Run, config: RunConfig) -> None:
    distill = dataclasses.replace(config.distill, learning_rate=1e9, clip_norm=0.0, steps=6, warmup=0)
    run = start_run(dataclasses.replace(config, distill=distill), copied.folder, force=True)
    session = Session(run)
    (recovery,) = ensure_distilled(session, only=("bk-tiny",))
    assert recovery.status == "failed"
    frame = ensure_ranking(session).frame().set_index("plan_id")
    assert frame.loc[recovery.plan_id, "status"] == "failed"
    assert frame.loc[recovery.plan_id, "reason"] == recovery.reason
    others = frame.drop(index=["teacher", recovery.plan_id])
    assert set(others["status"]) == {"left out"}  # they were not distilled this time


# Steps alone -----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_bare_unet_can_be_scored_but_not_distilled(
    finished: Run, config: RunConfig, tmp_path: Path
) -> None:
    folder = finished.candidate(finished.plan_ids()[0]).pruned
    scored = ScoreConfig(groups=("stage",), bootstrap=10)
    given = dataclasses.replace(config, model=str(folder), score=scored)
    with pytest.raises(
        ConfigError, match="alone, without the parts"
    ):  # of a pipeline, which its pictures need
        start_run(given, tmp_path / "run")
    bare = dataclasses.replace(given, data=dataclasses.replace(config.data, source=""))
    run = start_run(bare, tmp_path / "run")
    assert ensure_probe(Session(run)).captions == ("",) * config.probe.samples
    assert len(ensure_scores(Session(run)).entries) > 0
    assert ensure_blocks(Session(run)).total_params == ensure_costs(Session(run)).total.params
    with pytest.raises(RunError, match="text encoder"):
        _ = Session(run).pipeline  # which distilling and drawing need


def test_quality_has_a_row_per_set_of_pictures(finished: Run) -> None:
    frame = quality_frame(Session(finished))
    plans = len(finished.plan_ids())
    assert list(frame["weights"]) == ["teacher", *(["pruned", "distilled"] * plans)]
    assert (frame["clip_low"] <= frame["clip"] + 1e-6).all()
    ranking = pd.read_csv(finished.ranking).set_index("plan_id")
    row = frame[frame["weights"] == "distilled"].iloc[0]
    assert row["clip"] == pytest.approx(ranking.loc[row["plan_id"], "clip_after"], abs=1e-6)


def test_every_picture_is_a_file_named_by_its_prompt(finished: Run) -> None:
    frame = pd.read_csv(finished.picture_prompts)
    assert frame["file"].tolist() == ["1-a-red-cat-seed-0.png", "2-a-dog-seed-0.png"]
    assert frame["prompt"].tolist() == ["a red cat", "a dog"]
    session = Session(finished)
    drawn = generate(session.pipeline, tuple(frame["prompt"]), (0,), steps=2, guidance=2.0)
    assert torch.equal(read_pictures(finished.teacher_pictures), drawn)
    for one in (finished.candidate(plan_id) for plan_id in finished.plan_ids()):
        for folder in (one.pictures_pruned, one.pictures_distilled):
            assert sorted(path.name for path in folder.iterdir()) == frame["file"].tolist()


def test_no_step_asks_for_one_that_comes_after_it() -> None:
    """The order of the steps is that of ``STEPS``; what a step asks for it names by its function."""
    order = [step.ensure.__name__ for step in STEPS]
    asked: dict[str, set[str]] = {}
    for module in ("workflow", "session", "engines"):
        for path in (Path(prune_lab.__file__).parent / module).glob("*.py"):
            for function in ast.walk(ast.parse(path.read_text())):
                if isinstance(function, ast.FunctionDef):
                    names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
                    asked.setdefault(function.name, set()).update(names - {function.name})
    asked["engine_of"] |= {"train", "score_groups", "draw"}  # the functions in its rows

    def reached(name: str, seen: frozenset[str] = frozenset()) -> set[str]:
        found = {other for other in asked.get(name, ()) if other in asked and other not in seen}
        return found.union(*(reached(other, seen | found | {name}) for other in found))

    for place, name in enumerate(order):
        assert reached(name).isdisjoint(order[place + 1 :]), name
    assert {"ensure_plans", "ensure_scores", "ensure_data"} <= reached("ensure_distilled")


def test_comparison_of_plans_folders_and_runs(finished: Run, config: RunConfig) -> None:
    architecture = Session(finished).architecture
    base = parse_plan("bk-base", architecture)
    folder = finished.candidate(base.id)
    frame = comparison(
        config.model, ["bk-base", str(folder.folder), str(folder.distilled_model), str(finished.folder)]
    )
    kept = sum(p.numel() for p in UNet2DConditionModel.from_pretrained(folder.pruned).parameters())
    assert list(frame["params"].iloc[:4]) == [architecture.total_params, kept, kept, kept]
    assert frame["params_change"].iloc[1] == pytest.approx(kept / architecture.total_params - 1)
    assert list(frame["kind"].iloc[:5]) == ["model", "plan", "candidate", "model", "teacher"]
    assert len(frame) == 4 + len(pd.read_csv(finished.ranking))
    assert frame["loss_after"].iloc[2] == pytest.approx(
        pd.read_csv(finished.ranking).set_index("plan_id").loc[base.id, "loss_after"]
    )
    with pytest.raises(PlanError, match="no run, candidate or model folder"):
        comparison(config.model, ["nonsense"])
