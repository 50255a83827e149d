"""The benchmark for a GPU: each section stands alone, and all of them run, here on the CPU with a small model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from prune_lab.blocks import architecture_of
from prune_lab.families import example_inputs
from prune_lab.profiling import measure_latency_table, random_model, random_native_plans
from prune_lab.profiling.latency_parts import pass_by_parts

NO_CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA card here")


def results(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "gpu.json").read_text())
    return values


def test_a_section_that_fails_is_noted_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(bench: gpu.Bench) -> list[gpu.Row]:
        raise RuntimeError("CUDA error: an illegal memory access\nand more")

    def fine(bench: gpu.Bench) -> list[gpu.Row]:
        return [{"way": "a", "seconds": 0.12345, "peak": None}, {"way": "b", "share": 0.5}]

    sections = (
        gpu.Section("broken", broken, 1),
        gpu.Section("fine", fine, 1),
        gpu.Section("long", fine, 1e9),
    )
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path), "--minutes", "1"]) == 1
    found = results(tmp_path)["sections"]
    assert found["broken"]["status"] == "failed"
    assert found["broken"]["reason"].startswith(
        "RuntimeError: CUDA error: an illegal memory access (test_gpu.py, line"
    )
    assert found["fine"]["rows"][1] == {"way": "b", "share": 0.5}
    assert found["long"]["status"] == "left out"
    assert "it needs 1000000000 s" in found["long"]["reason"]
    page = (tmp_path / "gpu.md").read_text()
    assert "| way | seconds | peak | share |" in page
    assert "| a | 0.1235 |  |  |" in page
    assert "**broken**: failed, RuntimeError" in page
    assert page in capsys.readouterr().out
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path), "--only", "fine"]) == 0
    assert list(results(tmp_path)["sections"]) == ["fine"]


def test_the_conditions_say_what_was_measured_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--out", str(tmp_path), "--only", "none"])
    monkeypatch.setattr(gpu, "SECTIONS", ())
    gpu.main(["--device", "cpu", "--out", str(tmp_path), "--seed", "7"])
    said = results(tmp_path)["conditions"]
    assert said["params"] == 859_520_964
    assert said["students"] == {"bk-base": 579_384_964, "bk-small": 482_346_884, "bk-tiny": 323_384_964}
    assert (said["latent"], said["tokens"], said["seed"], said["dtype"]) == ([64, 64], 77, 7, "float32")
    assert said["torch"] == torch.__version__


@pytest.mark.long
def test_every_section_runs_on_the_cpu(tmp_path: Path) -> None:
    assert gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 0
    values = results(tmp_path)
    found = {name: section["rows"] for name, section in values["sections"].items()}
    assert list(found) == [section.name for section in gpu.SECTIONS]
    assert [row["students"] for row in found["distillation"]] == [1, 2, 4]
    assert all(row["samples_per_s"] > 0 for row in found["distillation"])
    assert found["memory"] == [{"batch": 4, "samples_at_a_time": 1, "how": "made up: more than 1 fail"}]
    assert [row["plan"] for row in found["students"]] == ["teacher", *gpu.PLANS]
    ways = {row["way"]: row for row in found["scoring"]}
    assert ways["naive"]["gmacs"] > ways["shared"]["gmacs"]
    assert ways["naive"]["times_naive"] == 1
    assert ways["shared"]["of_matrix_rate"] > 0
    assert [row["processes"] for row in found["processes"]] == [1, 2]
    assert found["latency"][0]["median_error_percent"] is not None


# On a card -------------------------------------------------------------------------------------------------


@pytest.fixture
def on_card() -> Any:
    return random_model(
        {**gpu.resolve_model("sd-v1.4").config, **gpu.TINY}, device="cuda", dtype=torch.bfloat16
    )


@pytest.mark.gpu
@NO_CARD
def test_parts_timed_on_the_card_add_up_to_the_pass(on_card: Any) -> None:
    paths = {unit.name: unit.path for unit in architecture_of(on_card).units}
    inputs = example_inputs(on_card.config, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        for _ in range(3):
            start = time.perf_counter()
            whole, parts = pass_by_parts(on_card, paths, inputs)
            took = 1e3 * (time.perf_counter() - start)
    assert list(parts) == list(paths)
    assert 0 < sum(parts.values()) < whole < took


@pytest.mark.gpu
@NO_CARD
@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_a_latency_table_of_a_card(backend: Any, on_card: Any) -> None:
    plans = random_native_plans(architecture_of(on_card), 2)
    table = measure_latency_table(
        on_card, calibrate=plans[:1], held_out=plans[1:], rounds=10, backend=backend
    )
    assert table.environment.device.startswith("cuda")
    assert table.median_error_percent is not None


@pytest.mark.gpu
@NO_CARD
def test_every_section_runs_on_a_card(tmp_path: Path) -> None:
    assert gpu.main(["--device", "cuda", "--tiny", "--out", str(tmp_path)]) == 0
    assert all(section["status"] == "done" for section in results(tmp_path)["sections"].values())
