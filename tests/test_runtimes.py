"""Times in other runtimes: processes without torch, one table, budgets in any of them, and where MACs mislead."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY_UNET
from diffusers.models.embeddings import Timesteps
from safetensors.numpy import save_file
from test_edge import needs
from tiny_models import tiny_config
from torch import Tensor, nn

from prune_lab.api.making import read_backends
from prune_lab.blocks import architecture_of
from prune_lab.errors import BackendError
from prune_lab.forms import why_not
from prune_lab.models import resolve_model
from prune_lab.plans import parse_plan, plan_of
from prune_lab.profiling import (
    TEACHER,
    Service,
    Turns,
    measure_latency_table,
    part_disagreements,
    plan_disagreements,
    random_model,
    read_service,
    runtime_table,
    services_of,
)
from prune_lab.profiling.own_process import Usage
from prune_lab.profiling.runtime_process import check_runtime
from prune_lab.runtimes import RUNTIMES, Part, serving
from prune_lab.runtimes.exported import exported
from prune_lab.schemas import RUNTIME_COLUMNS
from prune_lab.width import width_of

# Asked for ---------------------------------------------------------------------------------------------------------


def test_backends_are_read_once_each_and_others_are_named() -> None:
    assert read_backends("eager, openvino,eager,compile") == ("eager", "openvino", "compiled")
    assert read_backends("") == ()
    with pytest.raises(
        BackendError, match="the backend tensorrt; give one of eager, compile, onnx, openvino"
    ):
        read_backends("eager,tensorrt")


def test_a_budget_names_its_backend() -> None:
    source = resolve_model("reference")
    asked = read_service("openvino,128,batch=2", Service(), source)
    assert (asked.backend, asked.latent, asked.batch) == ("openvino", 32, 2)
    assert asked.text(source.config, 4).endswith("batch 2, openvino")


@pytest.mark.parametrize(
    ("service", "config", "said"),
    [
        (
            Service(backend="onnx", dtype="bfloat16"),
            TINY_UNET,
            "onnxruntime in bfloat16; give one of float32",
        ),
        (Service(backend="openvino", device="cuda"), TINY_UNET, "OpenVINO on cuda; it runs on the cpu here"),
        (
            Service(backend="onnx"),
            {"_class_name": "WanTransformer3DModel"},
            "a model of films in onnxruntime",
        ),
    ],
)
def test_a_service_that_a_runtime_does_not_do_is_refused(
    service: Service, config: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(RUNTIMES["onnx"]), "check_installed", lambda self: None)
    with pytest.raises(BackendError, match=said):
        check_runtime(service, config)


# Where MACs mislead ------------------------------------------------------------------------------------------------


def test_plans_are_named_whose_time_is_a_tenth_from_what_macs_say() -> None:
    frame = pd.DataFrame(
        {
            "plan": ["teacher", "near", "far", "not timed"],
            "macs_change": [0.0, -0.37, -0.37, -0.5],
            "latency_change": [0.0, -0.29, -0.25, float("nan")],
        }
    )
    (line,) = plan_disagreements(frame)
    assert "far badly: -37% MACs, -25% time" in line
    assert "in onnx" in plan_disagreements(frame.assign(backend="onnx"))[0]


def test_parts_are_named_whose_share_is_a_tenth_from_that_of_macs() -> None:
    architecture = architecture_of(TINY_UNET)
    shares = {"Dn1.R1": (0.3, 0.36), "Dn1.A1": (0.2, 0.14), "Dn1.R2": (0.3, 0.36), "rest": (0.2, 0.14)}
    (line,) = part_disagreements(architecture, shares)  # each alone is near enough
    assert "all resnet blocks badly: 60% of the MACs, 72% of the time" in line
    (line,) = part_disagreements(architecture, {"rest": (0.1, 0.25), "Dn1.A1": (0.9, 0.81)})
    assert "the time of rest badly" in line


# Processes ---------------------------------------------------------------------------------------------------------

_ENGINE = """
def load(path, threads, precision):
    factor = float(path.read_text())
    if factor < 0:
        raise RuntimeError("no such\\nfactor")
    return lambda given: [factor * given["sample"]]
"""


def answers(folder: Path, content: str, *, keep: bool, turns: int) -> list[dict[str, Any]]:
    (folder / "engine.py").write_text(_ENGINE)
    (folder / "part").write_text(content)
    save_file({"sample": np.zeros(3, np.float32)}, folder / "inputs.safetensors")
    job = {
        **{name: str(folder / file) for name, file in (("engine", "engine.py"), ("file", "part"))},
        "inputs": str(folder / "inputs.safetensors"),
        "threads": 1,
        "precision": "f32",
        "warmup": 1,
        "calls": 3,
        "keep": keep,
    }
    done = subprocess.run(
        [sys.executable, "-B", str(Path(serving.__file__))],
        input="\n".join([json.dumps(job), *["turn"] * turns, ""]),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("keep", [True, False])
def test_a_process_answers_each_turn_with_time_and_memory(keep: bool, tmp_path: Path) -> None:
    found = answers(tmp_path, "2", keep=keep, turns=2)
    assert [sorted(one) for one in found] == [["cpu_milliseconds", "milliseconds", "peak_bytes"]] * 2
    assert all(0 <= one["milliseconds"] < 1000 for one in found)
    if Path("/proc/self/status").is_file():  # Python and numpy alone: less than anything that holds torch
        assert 2**20 < found[0]["peak_bytes"] < 150 * 2**20


def test_a_process_says_in_one_line_what_the_runtime_refuses(tmp_path: Path) -> None:
    assert answers(tmp_path, "-1", keep=True, turns=1) == [{"error": "RuntimeError: no such"}]


# Graphs ------------------------------------------------------------------------------------------------------------


class _Squeezing(nn.Module):
    """Takes out the dimension of the tokens where there is one alone, as PixArt does: with more, nothing."""

    def forward(self, *given: Tensor) -> Tensor:
        tokens = given[0].flatten(2).transpose(1, 2)
        return tokens.squeeze(1) * 2


class _Computing(nn.Module):
    """Computes with its size in Python, as tables of positions do where a picture is not of the usual one."""

    def forward(self, *given: Tensor) -> Tensor:
        [sample] = given
        if sample.shape[-2] // 2 != 4:
            sample = sample * sample.shape[-2]
        return sample * 2


@pytest.mark.parametrize(("module", "varies"), [(_Squeezing(), True), (_Computing(), False)])
def test_a_graph_answers_at_the_sizes_that_it_is_said_to_take(module: nn.Module, varies: bool) -> None:
    def examples(batch: int, side: int | None) -> dict[str, Tensor]:
        shape = (batch, 2, side or 8, side or 8)
        return {"sample": torch.randn(shape, generator=torch.Generator().manual_seed(0))}

    sizes = {0: "batch", 2: "height", 3: "width"}
    part = Part("model", module, ("sample",), ("prediction",), examples, {"sample": sizes})
    program, written = exported(part)
    assert written.varies_in_size == varies
    assert not program.graph.find_nodes(op="call_function", target=torch.ops.aten.squeeze.dim)
    inputs = written.elsewhere()
    assert inputs["sample"].shape == (3, 2, *((16, 8) if varies else (8, 8)))
    assert torch.equal(program.module()(inputs["sample"]), written.answers(inputs)[0])


class _Timed(nn.Module):
    """Embeds a timestep, as models of all classes do."""

    def __init__(self, embedding: Timesteps) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, *given: Tensor) -> Tensor:
        found: Tensor = self.embedding(given[0])
        return found * 2


@pytest.mark.parametrize(
    ("channels", "flips", "shift", "scale"), [(16, True, 0.0, 1), (9, False, 1.0, 1), (8, True, 1.0, 1000)]
)
def test_frequencies_of_timesteps_are_numbers_in_a_graph(
    channels: int, flips: bool, shift: float, scale: int
) -> None:
    """Those of torch, to the last digit: runtimes have exponentials of their own, and sines of large angles show it."""
    plain = Timesteps(channels, flips, shift, scale)
    module = _Timed(plain)

    def examples(batch: int, side: int | None) -> dict[str, Tensor]:
        return {"timestep": torch.linspace(1, 999, batch)}

    part = Part("model", module, ("timestep",), ("prediction",), examples, {"timestep": {0: "batch"}})
    program, _ = exported(part)
    assert module.embedding is plain
    assert not program.graph.find_nodes(op="call_function", target=torch.ops.aten.exp.default)
    given = torch.linspace(0, 1000, 101)
    assert torch.equal(program.module()(given), module(given))


# Timed -------------------------------------------------------------------------------------------------------------


def test_a_plan_that_cannot_be_built_has_a_row_without_times(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = architecture_of(TINY_UNET, tokens=5)
    built, other = parse_plan("bk-small", architecture), parse_plan("-Dn1.R1", architecture)
    assert why_not(architecture, other)
    turns = Turns((TEACHER, built.id), ((10.0, 5.0),) * 6, 0, "own processes")
    usage = Usage([8.0, 9.0], 2**20)

    def times(*given: Any, **more: Any) -> Turns:
        more["usage"].update({TEACHER: usage, built.id: usage})
        return turns

    monkeypatch.setattr("prune_lab.profiling.runtime_tables.time_plans", times)
    nothing = plan_of(architecture, ())
    frame = runtime_table(architecture, [built, other, nothing], [Service(latent=8, tokens=5)])
    assert list(frame["plan"]) == [TEACHER, built.label, other.label]
    assert list(frame["median_ms"].isna()) == [False, False, True]
    assert list(frame["cpu_ms"].fillna(-1)) == [8.5, 8.5, -1]
    assert frame["latency_change"].iloc[1] == pytest.approx(-0.5)
    assert (frame["macs_change"].iloc[1:] < 0).all()
    assert not any(other.label in line for line in plan_disagreements(frame))


def test_a_plan_that_only_narrows_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = architecture_of(TINY_UNET, tokens=5)
    site = architecture.sites[0]
    narrow = plan_of(architecture, (), widths=[width_of(site, [0])]).built("own")
    asked: list[str] = []

    def times(_architecture: Any, plans: dict[str, Any], *_given: Any, **_more: Any) -> Turns:
        asked.extend(plans)
        return Turns((TEACHER, *plans), ((10.0, 9.0),) * 6, 0, "own processes")

    monkeypatch.setattr("prune_lab.profiling.runtime_tables.time_plans", times)
    frame = runtime_table(architecture, [narrow], [Service(latent=8, tokens=5)])
    assert asked == [narrow.id]
    assert list(frame["latency_change"]) == pytest.approx([0, -0.1])
    assert frame["macs_change"].iloc[1] < 0


@pytest.mark.long
def test_one_table_holds_teacher_and_students_in_every_runtime() -> None:
    needs("onnx")
    needs("openvino")
    architecture = architecture_of(tiny_config("PixArtTransformer2DModel"), tokens=5)
    plan = parse_plan("-B2", architecture)
    backends = ("eager", "compiled", "onnx", "openvino")
    services = services_of(Service(latent=8, tokens=5), backends)
    frame = runtime_table(architecture, [plan], services, model="tiny", rounds=6, warmup=1)
    assert list(frame.columns) == list(RUNTIME_COLUMNS)
    assert list(zip(frame["backend"], frame["plan"], strict=True)) == [
        (backend, name) for backend in backends for name in (TEACHER, plan.label)
    ]
    students = frame[frame["plan"] != TEACHER]
    assert (frame["median_ms"] > 0).all()
    assert (frame["cpu_ms"] > 0).all()
    assert students["latency_low"].notna().all()
    assert (students["macs_change"] < 0).all()
    peaks = frame.groupby("backend")["peak_bytes"].max()
    assert peaks["onnx"] < peaks["eager"]  # torch is not in its process


def test_a_latency_table_is_calibrated_in_the_runtime_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shares of the parts come from torch, the time of the whole and the scale from the runtime."""
    architecture = architecture_of(TINY_UNET, tokens=5)
    first, second = (parse_plan(name, architecture) for name in ("bk-base", "bk-small"))
    asked: list[Service] = []

    def times(_: Any, plans: Any, service: Service, **more: Any) -> Turns:
        asked.append(service)
        assert plans == {first.id: first, second.id: second}
        return Turns((TEACHER, first.id, second.id), ((40.0, 30.0, 20.0),) * 6, 0, "own processes")

    monkeypatch.setattr("prune_lab.profiling.latency_parts.time_plans", times)
    table = measure_latency_table(
        random_model(architecture.config),
        calibrate=[first],
        held_out=[second],
        rounds=6,
        warmup=1,
        latent=8,
        tokens=5,
        backend="openvino",
    )
    assert [(one.backend, one.latent, one.tokens, one.dtype) for one in asked] == [
        ("openvino", 8, 5, "float32")
    ]
    assert table.backend == "openvino"
    assert table.whole.median_ms == 40
    assert table.predict(first) == pytest.approx(30)
    assert [check.measured_ms for check in table.checks] == pytest.approx([30, 20])
    assert table.median_error_percent is not None
