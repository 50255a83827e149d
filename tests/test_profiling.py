"""Profiling: subtraction against materialised models, clocks, and tables that agree with each other."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_counter import count_on_meta
from typer.testing import CliRunner

import prune_lab as pl
from prune_lab.blocks import Architecture, architecture_of
from prune_lab.cli import app
from prune_lab.config import RunConfig
from prune_lab.counting import ANALYTIC_EXTRAS, count_macs
from prune_lab.errors import ConfigError, DataError, ModelNotFoundError, PlanError, UnknownBlockError
from prune_lab.families import example_inputs, meta_model
from prune_lab.forms import layout_of
from prune_lab.models import load_pipeline, preset_config, resolve_model
from prune_lab.plans import native_choices, parse_plan, plan_of
from prune_lab.profiling import (
    cost_table,
    measure_latency,
    measure_memory_growth,
    profile,
    profile_blocks,
    profile_from_dict,
    profile_pipeline,
    random_model,
    reduction_table,
)
from prune_lab.session import Session
from prune_lab.surgery import bypassed, materialise
from prune_lab.tables import records
from prune_lab.workflow import start_run
from prune_lab.workflow.measuring import ensure_blocks, ensure_costs, ensure_reductions, ensure_shares

CONTROLS = ("bk-base", "bk-small", "bk-tiny")
MIB = 2**20


@pytest.fixture(scope="session")
def tiny_architecture(tiny_unet_shared: Any) -> Architecture:
    return architecture_of(tiny_unet_shared)


def hooks_of(unet: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in unet.modules())


# Costs -----------------------------------------------------------------------------------------------------


def test_the_papers_figures_by_subtraction() -> None:
    architecture = architecture_of(preset_config("sd-v1.4"))
    costs = cost_table(architecture)
    plans = [parse_plan(text, architecture) for text in ("teacher", *CONTROLS)]
    found = [costs.of(plan) for plan in plans]
    assert [round(cost.paper_macs / 1e9, 1) for cost in found] == [339.0, 223.9, 217.9, 205.2]
    assert [cost.params for cost in found] == [859_520_964, 579_384_964, 482_346_884, 323_384_964]
    assert [round(cost.macs / 1e9) for cost in found] == [402, 262, 256, 243]


@pytest.mark.parametrize("text", CONTROLS)
def test_subtraction_equals_the_materialised_model(
    text: str, tiny_unet: Any, tiny_architecture: Architecture
) -> None:
    plan = parse_plan(text, tiny_architecture)
    check_subtraction(tiny_unet, tiny_architecture, set(plan.removed))


@settings(max_examples=3)
@given(data=st.data())
def test_subtraction_equals_the_materialised_model_for_any_native_plan(
    data: st.DataObject, tiny_unet_shared: Any, tiny_architecture: Architecture
) -> None:
    options = [data.draw(st.sampled_from(level)) for level in native_choices(tiny_architecture)]
    check_subtraction(tiny_unet_shared, tiny_architecture, set().union(*options))


def check_subtraction(unet: Any, architecture: Architecture, removed: set[str]) -> None:
    plan = plan_of(architecture, removed)
    costs = cost_table(architecture, latent=8, tokens=5)
    cost, student = costs.of(plan), materialise(unet, plan)
    assert cost.params == sum(parameter.numel() for parameter in student.parameters())
    assert cost.weight_bytes == 4 * cost.params
    traced, dispatched = (count(student.config, latent=8, tokens=5) for count in (count_macs, count_on_meta))
    assert (cost.macs, cost.attention_macs) == (traced.total, traced.attention)
    assert costs.uncounted(plan) == traced.uncounted
    extras = sum(traced.by_operator[operator] for operator in ANALYTIC_EXTRAS)
    assert (cost.macs - extras, cost.attention_macs) == (dispatched.total, dispatched.attention)


def test_subtraction_equals_a_bypassed_model_native_or_not(
    tiny_unet: Any, tiny_architecture: Architecture
) -> None:
    plan = parse_plan("-Dn1.A1 -Up4.R2 -Md.R2", tiny_architecture)
    cost = cost_table(tiny_architecture).of(plan)
    with bypassed(tiny_unet, plan):
        count = count_macs(tiny_unet)
    assert (cost.macs, cost.attention_macs) == (count.total, count.attention)


def test_the_parts_of_a_cost_table_add_up(tiny_architecture: Architecture, tiny_unet: Any) -> None:
    costs = cost_table(tiny_architecture)
    frame = costs.frame()
    columns = ["name", "kind", "params", "macs", "attention_macs", "paper_macs", "weight_bytes", "tokens"]
    assert list(frame.columns) == columns
    assert set(frame["tokens"]) == {77}
    assert list(frame["kind"]) == ["block"] * 38 + ["sampler"] * 6 + ["rest"]
    assert list(frame["name"][:38]) == [block.name for block in tiny_architecture.blocks]
    count = count_macs(dict(tiny_unet.config))
    assert frame["macs"].sum() == count.total == costs.total.macs
    assert frame["attention_macs"].sum() == count.attention
    assert frame["paper_macs"].sum() == count.without_attention
    assert frame["params"].sum() == tiny_architecture.total_params
    assert costs.part("Dn3.down").params == 32 * 32 * 9 + 32
    assert frame.dtypes[["params", "macs"]].eq("int64").all()


def test_wrong_names_and_plans_are_refused(tiny_architecture: Architecture) -> None:
    costs = cost_table(tiny_architecture)
    with pytest.raises(UnknownBlockError, match=r"Dn1\.R9.*nearest"):
        costs.part("Dn1.R9")
    other = architecture_of(preset_config("sd-v1.4"))
    with pytest.raises(PlanError, match="these costs are of"):
        costs.of(parse_plan("bk-base", other))


# Clocks and memory -----------------------------------------------------------------------------------------


class Clock:
    """A clock that only a call advances, by the durations it was given in turn."""

    def __init__(self, seconds: list[float]) -> None:
        self.now = 0.0
        self.seconds = seconds
        self.calls = 0
        self.gradients: set[bool] = set()

    def call(self) -> None:
        self.now += self.seconds[self.calls]
        self.calls += 1
        self.gradients.add(torch.is_grad_enabled())


def test_latency_leaves_the_warm_up_out(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = [0.002, 0.001, 0.004, 0.003, 0.005]
    clock = Clock([9.0, 7.0, *recorded])
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    latency = measure_latency(clock.call, warmup=2, runs=5)
    assert clock.calls == 7
    assert latency.median_ms == pytest.approx(3)
    assert latency.p10_ms == pytest.approx(1.4)  # inclusive deciles of 1, 2, 3, 4, 5
    assert latency.p90_ms == pytest.approx(4.6)
    assert (latency.runs, latency.warmup) == (5, 2)
    assert clock.gradients == {False}


def test_latency_of_a_sleep_is_the_sleep() -> None:
    latency = measure_latency(lambda: time.sleep(0.01), warmup=0, runs=3)
    assert 10 <= latency.p10_ms <= latency.median_ms <= latency.p90_ms


@pytest.mark.parametrize(("runs", "warmup"), [(1, 0), (0, 3), (5, -1)])
def test_too_few_runs_are_refused(runs: int, warmup: int) -> None:
    with pytest.raises(ConfigError, match="at least 2 runs"):
        measure_latency(lambda: None, warmup=warmup, runs=runs)


def test_memory_growth_is_what_a_call_holds_at_once() -> None:
    def hold(mebibytes: int) -> Callable[[], None]:
        def call() -> None:
            torch.ones(mebibytes * MIB // 4).sum()
            torch.ones(mebibytes * MIB // 8).sum()  # after the first was freed: not added to it

        return call

    growth = measure_memory_growth(hold(128))
    if growth is None:
        pytest.skip("this system does not tell the high-water mark of a process")
    assert 120 * MIB < growth < 160 * MIB
    again = measure_memory_growth(hold(64))
    assert again is not None
    # The mark was reset: it is below the first. The allocator may keep what was freed, which is then added.
    assert 56 * MIB < again < 112 * MIB


def test_blocks_are_timed_and_their_hooks_removed(tiny_unet: Any) -> None:
    frame = profile_blocks(tiny_unet, runs=2, warmup=1)
    columns = ["name", "kind", "params", "macs", "attention_macs", "paper_macs", "weight_bytes", "tokens"]
    assert list(frame.columns) == [*columns, "median_ms", "share"]
    assert frame["share"].sum() == pytest.approx(1)
    assert (frame["median_ms"] > 0).all()
    pd.testing.assert_frame_equal(frame[columns], cost_table(architecture_of(tiny_unet)).frame())
    assert hooks_of(tiny_unet) == 0


def test_a_slow_block_is_found(tiny_unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tiny_unet.up_blocks[2].resnets[1]
    forward = slow.forward

    def sleepy(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2)
        return forward(*args, **kwargs)

    monkeypatch.setattr(slow, "forward", sleepy)
    frame = profile_blocks(tiny_unet, runs=2, warmup=0).set_index("name")
    assert frame["median_ms"].drop("rest").idxmax() == "Up3.R2"
    assert frame.loc["Up3.R2", "median_ms"] >= 200


def test_hooks_are_removed_when_the_unet_fails(tiny_unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(tiny_unet.mid_block, "forward", broken)
    with pytest.raises(RuntimeError, match="no"):
        profile_blocks(tiny_unet, runs=2, warmup=0)
    assert hooks_of(tiny_unet) == 0


# Profiles --------------------------------------------------------------------------------------------------


def test_a_profile_says_what_was_measured_and_where(tiny_unet: Any, tmp_path: Path) -> None:
    found = profile(tiny_unet, batch=2, tokens=16, runs=3, warmup=1)
    assert found.params == sum(parameter.numel() for parameter in tiny_unet.parameters())
    assert found.macs == 2 * count_macs(dict(tiny_unet.config), tokens=16).total
    assert found.paper_macs == found.macs - found.attention_macs
    assert found.latency is not None
    assert found.latency.median_ms > 0
    assert found.peak_memory_bytes is None or found.peak_memory_bytes >= 4 * found.params
    assert (found.batch, found.latent, found.tokens, found.dtype) == (2, (16, 16), 16, "float32")
    assert found.environment.torch == torch.__version__
    tiny_unet.save_pretrained(tmp_path)
    saved = profile(tiny_unet.config, folder=tmp_path).disk_bytes
    assert found.disk_bytes == 4 * found.params
    assert 0 < saved - found.disk_bytes < 200_000  # the file's header
    assert profile_from_dict(json.loads(json.dumps(found.as_dict()))) == found


def test_half_precision_halves_the_bytes(tiny_unet: Any) -> None:
    found = profile(tiny_unet.to(torch.bfloat16), measured=False)
    assert (found.dtype, found.disk_bytes, found.latency) == ("bfloat16", 2 * found.params, None)


def test_a_config_is_counted_and_nothing_is_made_up(tiny_config: dict[str, Any]) -> None:
    found = profile(tiny_config)
    assert found.latency is None
    assert found.peak_memory_bytes is None
    assert found.macs == count_macs(tiny_config).total
    assert profile_from_dict(json.loads(json.dumps(found.as_dict()))) == found


def test_a_damaged_profile_and_an_empty_folder_are_refused(
    tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    values = profile(tiny_config).as_dict()
    del values["latency"]
    with pytest.raises(DataError, match="'latency'"):
        profile_from_dict(values)
    with pytest.raises(ModelNotFoundError, match=r"found no \.safetensors"):
        profile(tiny_config, folder=tmp_path)


@pytest.mark.long
def test_a_pipelines_parts_with_guidance_and_steps(tiny_pipeline_folder: Path) -> None:
    pipeline = load_pipeline(resolve_model(str(tiny_pipeline_folder)), device="cpu", dtype=torch.float32)
    frame = profile_pipeline(pipeline, steps=5, batch=2, runs=2, warmup=0)
    assert list(frame.columns) == ["part", "calls", "tokens", "params", "macs", "median_ms", "share"]
    assert list(frame["part"]) == ["text_encoder", "unet", "vae_decoder", "total"]
    assert list(frame["calls"]) == [2, 6, 1, 1]  # PNDM runs one step twice
    assert records(frame[["tokens"]]) == [{"tokens": length} for length in (16, 16, None, None)]
    rows = frame.set_index("part")
    assert rows.loc["unet", "macs"] == count_macs(pipeline.unet.config, batch=4, tokens=16).total
    assert rows.loc["text_encoder", "macs"] == 2 * text_encoder_by_hand()
    decoder = pipeline.vae.decoder, pipeline.vae.post_quant_conv
    assert rows.loc["vae_decoder", "params"] == sum(p.numel() for part in decoder for p in part.parameters())
    parts, total = frame[:-1], rows.loc["total"]
    assert parts["share"].sum() == pytest.approx(1) == total["share"]
    spent = parts["calls"] * parts["median_ms"]
    assert list(parts["share"]) == pytest.approx(list(spent / spent.sum()))
    assert total["median_ms"] == pytest.approx(spent.sum())
    assert total["macs"] == (parts["calls"] * parts["macs"]).sum()
    assert total["params"] == parts["params"].sum()
    plain = profile_pipeline(pipeline, steps=5, batch=2, guidance=1.0, runs=2, warmup=0).set_index("part")
    assert plain.loc["unet", "macs"] * 2 == rows.loc["unet", "macs"]
    assert list(plain["calls"]) == [1, 6, 1, 1]


def text_encoder_by_hand(layers: int = 2, n: int = 16, width: int = 16, inner: int = 32) -> int:
    """One caption through a CLIP text model: four projections, two products, two linear layers a layer; norms."""
    own = layers * (4 * n * width * width + 2 * n * n * width + 2 * n * width * inner)
    return own + (2 * layers + 1) * 5 * n * width


def test_a_pipeline_is_profiled_in_another_format_and_left_alone(tiny_pipeline_folder: Path) -> None:
    pipeline = load_pipeline(resolve_model(str(tiny_pipeline_folder)), device="cpu", dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    profile_pipeline(pipeline, steps=2, dtype="bfloat16", runs=2, warmup=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipeline.unet.state_dict().items())
    assert pipeline.vae.dtype == pipeline.text_encoder.dtype == torch.float32


@pytest.mark.long
def test_one_number_everywhere(
    tiny_pipeline_folder: Path, small_run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """MACs of every block and of the whole, wherever they are shown: files of a run, verbs, functions."""

    def shown(*arguments: object) -> list[dict[str, Any]]:
        answer = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        assert answer.exit_code == 0, answer.output
        rows: list[dict[str, Any]] = json.loads(answer.stdout)
        return rows

    folder, cpu = tiny_pipeline_folder, ("--runs", 2, "--device", "cpu")
    config = small_run_config(model=str(folder), evaluate={"guidance": 2.0})
    session = Session(start_run(config, tmp_path / "run"))
    for ensure in (ensure_blocks, ensure_costs, ensure_reductions, ensure_shares):
        ensure(session)
    run, costs = session.run, cost_table(resolve_model(str(folder)).architecture)
    blocks = pd.read_csv(run.blocks)
    wanted = dict(zip(blocks["name"], blocks["macs"], strict=True))
    assert len(wanted) == 38
    saved, timed = pd.read_csv(run.costs), shown("profile", folder, "--blocks", *cpu)
    assert set(blocks["tokens"]) == set(saved["tokens"]) == {costs.tokens} == {16}  # the text encoder's own
    for rows in (
        shown("blocks", folder),
        shown("profile", folder, "--blocks", "--no-latency"),
        timed,
        saved.to_dict("records"),
        costs.frame().to_dict("records"),
    ):
        assert {row["name"]: row["macs"] for row in rows if row["name"] in wanted} == wanted
        assert {row["tokens"] for row in rows} == {16}
    total = costs.total.macs
    (plan,) = shown("profile", folder, "--no-latency")
    reduction, parts = (
        pd.read_csv(run.reductions).iloc[0],
        pd.read_csv(run.pipeline_profile).set_index("part"),
    )
    by_part = {row["part"]: row for row in shown("profile", folder, "--pipeline", *cpu)}
    assert (
        saved["macs"].sum() == sum(row["macs"] for row in timed) == plan["macs"] == reduction["macs"] == total
    )
    assert by_part["unet"]["macs"] == parts.loc["unet", "macs"] == 2 * total  # guidance takes two samples
    assert (
        plan["tokens"]
        == reduction["tokens"]
        == by_part["unet"]["tokens"]
        == parts.loc["unet", "tokens"]
        == 16
    )


@pytest.mark.long
def test_profile_at_another_size(tiny_pipeline_folder: Path, tiny_config: dict[str, Any]) -> None:
    """Pictures of 48 pixels are latents of 24 here: the VAE halves once."""

    def shown(*arguments: object) -> list[dict[str, Any]]:
        words = ("profile", tiny_pipeline_folder, "--device", "cpu", "--json", *arguments)
        answer = CliRunner().invoke(app, list(map(str, words)))
        assert answer.exit_code == 0, answer.output
        rows: list[dict[str, Any]] = json.loads(answer.stdout)
        return rows

    asked = ("--resolution", 48, "--tokens", 7, "--batch", 2)
    counted = count_macs(tiny_config, batch=2, latent=24, tokens=7)
    extras = sum(counted.by_operator[operator] for operator in ANALYTIC_EXTRAS)
    assert counted.total - extras == 2 * count_on_meta(tiny_config, latent=24, tokens=7).total
    teacher, student = shown("--plan", "bk-tiny", "--rounds", 2, *asked)
    blocks = shown("--blocks", "--no-latency", *asked)
    parts = {row["part"]: row for row in shown("--pipeline", "--rounds", 2, "--steps", 2, *asked)}
    assert teacher["macs"] == sum(row["macs"] for row in blocks) == counted.total
    assert parts["unet"]["macs"] == 2 * counted.total  # guidance
    assert student["timed"] == "in turns, one process"
    for row in (teacher, student, *blocks, *parts.values()):
        assert (row["resolution"], row["batch"]) == ("48 x 48", 2)
        assert row["tokens"] in ((None,) if row.get("part") in ("vae_decoder", "total") else (7,))
    assert shown("--no-latency")[0]["resolution"] == "32 x 32"
    for wrong, words in (
        (("--resolution", 47), "multiple of 2"),
        (("--pipeline", "--tokens", 17), "takes 16"),
    ):
        answer = CliRunner().invoke(app, ["profile", str(tiny_pipeline_folder), *map(str, wrong)])
        assert answer.exit_code == 2, answer.output
        assert words in " ".join(answer.output.split())


@pytest.mark.long
@pytest.mark.parametrize("missing", [True, False])
def test_a_config_without_a_size_asks_for_one(
    missing: bool, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    config = {name: value for name, value in tiny_config.items() if not (missing and name == "sample_size")}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config if missing else {**config, "sample_size": None}))

    def invoked(*arguments: str) -> Any:
        return CliRunner().invoke(app, list(arguments))

    refused = invoked("profile", str(path))
    assert refused.exit_code == 2, refused.output
    assert "--resolution 512" in " ".join(refused.output.split())
    (row,) = json.loads(invoked("profile", str(path), "--resolution", "128", "--json").stdout)
    assert row["macs"] == count_macs(tiny_config, latent=16).total
    listed = json.loads(invoked("blocks", str(path), "--json").stdout)
    unet = UNet2DConditionModel.from_config(tiny_config)
    resnet = unet.down_blocks[0].resnets[0]
    assert listed[0]["params"] == sum(parameter.numel() for parameter in resnet.parameters())
    assert "64 x 64 latent" in invoked("blocks", str(path)).stdout


# Reductions ------------------------------------------------------------------------------------------------


def test_the_reduction_table_of_a_preset_needs_no_weights() -> None:
    architecture = architecture_of(preset_config("sd-v1.4"))
    plans = [parse_plan(text, architecture) for text in CONTROLS]
    frame = reduction_table(architecture, plans, model="sd-v1.4")
    columns = [
        "model",
        "plan",
        "params",
        "params_change",
        "macs",
        "macs_change",
        "paper_macs",
        "paper_macs_change",
    ]
    assert list(frame.columns) == [*columns, "blocks_removed", "tokens", "native", "uncounted"]
    assert list(frame["plan"]) == ["teacher", *CONTROLS]
    # The paper's changes: parameters -32.6, -43.9, -62.4 %, MACs -33.9, -35.7, -39.5 %.
    assert list((100 * frame["params_change"]).round(1)) == [0.0, -32.6, -43.9, -62.4]
    assert list((100 * frame["paper_macs_change"]).round(1)) == [0.0, -33.9, -35.7, -39.5]
    assert list(frame["blocks_removed"]) == [0, 14, 17, 20]
    assert frame["native"].all()
    assert frame["params"].dtype == "int64"
    assert "gelu:16" in frame.loc[0, "uncounted"]


def test_latency_joins_the_table_and_stays_empty_where_nothing_can_run(
    tiny_architecture: Architecture,
) -> None:
    plans = [parse_plan("bk-tiny", tiny_architecture), parse_plan("-Dn1.A1", tiny_architecture)]
    frame = reduction_table(tiny_architecture, plans, latency=True, runs=2, warmup=1)
    wanted = ["median_ms", "p10_ms", "p90_ms", "runs", "latency_change", "latency_low", "latency_high"]
    assert list(frame.columns[-10:]) == [*wanted, "latency_verdict", "timed", "service"]
    assert frame.loc[0, "service"] == "cpu float32, 128 x 128, batch 1, 77 tokens"
    assert list(frame["native"]) == [True, True, False]
    assert (frame["median_ms"][:2] > 0).all()
    assert frame.loc[0, "latency_change"] == 0
    assert list(frame["timed"][:2]) == ["in turns, one process"] * 2
    assert frame.loc[1, "latency_verdict"] == "undecided"  # two rounds are too few for an interval
    assert pd.isna(frame.loc[0, "latency_verdict"])
    assert pd.isna(frame.loc[1, "latency_low"])
    assert pd.isna(frame.loc[2, "median_ms"])
    assert pd.isna(frame.loc[2, "latency_change"])
    assert frame.loc[2, "plan"] == plans[1].id


def test_a_random_unet_runs_and_gives_finite_numbers(tiny_config: dict[str, Any]) -> None:
    unet = random_model(tiny_config, dtype=torch.float32)
    with torch.inference_mode():
        output = unet(**example_inputs(tiny_config), return_dict=False)[0]
    assert torch.isfinite(output).all()
    weights = torch.cat([parameter.detach().flatten() for parameter in unet.parameters()])
    assert weights.mean().item() == pytest.approx(0, abs=0.002)
    assert weights.std().item() == pytest.approx(0.02, rel=0.1)


def test_plans_are_profiled_in_the_form_that_prune_gives_them(tiny_pipeline_folder: Path) -> None:
    model = pl.load(str(tiny_pipeline_folder))
    frame = model.profile("-Dn1.R2 -Md.A1", "bk-small", latency=True, rounds=2).frame()
    assert list(frame["form"]) == ["", "own", "native"]
    plan = parse_plan("-Dn1.R2 -Md.A1", model.architecture).built("own")
    student = meta_model(layout_of(model.architecture, plan).config)
    assert frame["params"][1] == sum(parameter.numel() for parameter in student.parameters())
    assert frame["latency_change"].notna().all()
    assert "form" not in model.profile("bk-small", latency=False).frame()
