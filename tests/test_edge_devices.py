"""Pipelines written for devices: ExecuTorch's are run here as everywhere, Core ML's are converted and read back."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_edge import draw, needs
from tiny_models import tiny_config
from tiny_pipelines import tiny_pipeline
from torch import Tensor, nn

from prune_lab.api.making import read_backends
from prune_lab.blocks import architecture_of
from prune_lab.errors import BackendError, UnsupportedModelError
from prune_lab.export import EXPORT_TARGETS
from prune_lab.models import resolve_model
from prune_lab.plans import parse_plan
from prune_lab.profiling import TEACHER, Service, runtime_table, services_of
from prune_lab.runtimes import RUNTIMES, Part, Writing, coreml, engine_coreml
from prune_lab.runtimes.exported import exported

ELSEWHERE = pytest.mark.skipif(sys.platform == "darwin", reason="Core ML runs here")


class _Convolving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 3, 3, padding=1)

    def forward(self, *given: Tensor) -> Tensor:
        answer: Tensor = self.layer(given[0])
        return answer


@pytest.fixture
def small() -> Part:
    def examples(batch: int, side: int | None) -> dict[str, Tensor]:
        shape = (batch, 2, side or 8, side or 8)
        return {"sample": torch.randn(shape, generator=torch.Generator().manual_seed(0))}

    sizes = {0: "batch", 2: "height", 3: "width"}
    return Part("model", _Convolving().eval(), ("sample",), ("prediction",), examples, {"sample": sizes})


# Without a runtime -------------------------------------------------------------------------------------------------


def test_a_part_of_one_shape_is_shown_that_shape_alone_with_other_numbers(small: Part) -> None:
    only = small.of_one_shape(2, 4)
    shown = [only.examples(1, None), only.examples(7, 16), only.elsewhere()]
    assert {one["sample"].shape for one in shown} == {(2, 2, 4, 4)}
    assert not torch.equal(shown[0]["sample"], shown[2]["sample"])
    assert not only.varies_in_size


def test_times_in_core_ml_are_refused_with_the_reason() -> None:
    with pytest.raises(BackendError, match=r"runs on macOS alone.*give one of eager, .*executorch"):
        read_backends("eager,coreml")


@ELSEWHERE
def test_core_ml_is_not_run_anywhere_else(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="runs on macOS alone"):
        engine_coreml.load(tmp_path)


@pytest.mark.parametrize(("name", "known"), [("executorch", "float32"), ("coreml", "float32, float16")])
def test_weights_of_whole_numbers_are_refused_for_devices(
    name: str, known: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(RUNTIMES[name]), "check_installed", lambda self: None)
    with pytest.raises(UnsupportedModelError, match=f"weights in int8; give one of {known}$"):
        EXPORT_TARGETS[name](resolve_model("reference"), tmp_path / "out", weights="int8")


# ExecuTorch --------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_part_in_executorch_answers_as_torch_and_refuses_other_shapes(small: Part, tmp_path: Path) -> None:
    needs("executorch")
    runtime = RUNTIMES["executorch"]
    written = runtime.write(small, tmp_path, Writing(batch=2, side=4))
    runner = runtime.load(runtime.file(tmp_path, written))
    inputs = written.elsewhere()
    (found,) = runner({name: tensor.numpy() for name, tensor in inputs.items()} | {"other": None})
    assert torch.allclose(torch.from_numpy(found), written.answers(inputs)[0], atol=1e-6)
    with pytest.raises(
        ValueError, match=r"model.pte takes sample of the shape \(2, 2, 4, 4\) alone, got \(1,"
    ):
        runner({"sample": inputs["sample"][:1].numpy()})


class _Bending(nn.Module):
    def forward(self, *given: Tensor) -> Tensor:
        return nn.functional.gelu(given[0], approximate="tanh")


@pytest.mark.long
def test_a_gelu_by_tanh_is_no_gelu_by_erf_in_executorch(small: Part, tmp_path: Path) -> None:
    needs("executorch")
    runtime, part = RUNTIMES["executorch"], dataclasses.replace(small, module=_Bending().eval())
    written = runtime.write(part, tmp_path, Writing(batch=2, side=4))
    inputs = written.elsewhere()
    (found,) = runtime.load(runtime.file(tmp_path, written))(
        {name: tensor.numpy() for name, tensor in inputs.items()}
    )
    wanted = written.answers(inputs)[0]
    assert torch.allclose(torch.from_numpy(found), wanted, atol=1e-6)
    assert not torch.allclose(nn.functional.gelu(inputs["sample"]), wanted, atol=1e-6)


@pytest.mark.long
def test_a_folder_for_executorch_draws_what_diffusers_draws(tmp_path: Path) -> None:
    needs("executorch")
    source = resolve_model(str(tiny_pipeline("sd", tmp_path / "pipeline")))
    written = EXPORT_TARGETS["executorch"](source, tmp_path / "out")
    assert any("torch is in its Python process" in note for note in written.notes)
    assert any("alone, one at a time: it is written for one shape" in note for note in written.notes)
    moved = Path(shutil.copytree(tmp_path / "out", tmp_path / "elsewhere"))
    told = json.loads((moved / "export.json").read_text())
    assert told["proof"]["psnr"] >= 40
    assert max(told["proof"]["differences"].values()) <= 1e-5
    assert told["rows"] == {"text_encoder": 2, "model": 2, "vae_decoder": 1}
    assert "without torch" not in (moved / "generate.py").read_text().partition('"""\n')[0]
    picture = draw(moved, moved / "a.png", "--steps", "2")
    assert (picture == draw(moved, moved / "b.png", "--steps", "2", "--threads", "1")).all()
    height, width = picture.shape[:2]
    refused = subprocess.run(
        [sys.executable, "-B", str(moved / "generate.py"), "a", "--size", str(2 * height), str(width)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2
    assert f"give {height} {width}, the only size" in refused.stderr


@pytest.mark.long
def test_teacher_and_student_are_timed_in_executorch() -> None:
    needs("executorch")
    architecture = architecture_of(tiny_config("PixArtTransformer2DModel"), tokens=5)
    plan = parse_plan("-B2", architecture)
    services = services_of(Service(latent=8, tokens=5, batch=3), ("executorch",))
    frame = runtime_table(architecture, [plan], services, model="tiny", rounds=6, warmup=1)
    assert list(frame["plan"]) == [TEACHER, plan.label]
    assert all("batch 3" in words and words.endswith("executorch") for words in frame["service"])
    assert (frame["median_ms"] > 0).all()


# Core ML -----------------------------------------------------------------------------------------------------------


@ELSEWHERE
@pytest.mark.long
@pytest.mark.parametrize("weights", ["float32", "float16"])
def test_a_folder_for_core_ml_is_converted_and_says_that_it_was_not_run(weights: str, tmp_path: Path) -> None:
    needs("coreml")
    source = resolve_model(str(tiny_pipeline("pixart", tmp_path / "pipeline")))
    written = EXPORT_TARGETS["coreml"](source, tmp_path / "out", weights=weights)
    assert any(
        "not run here (Core ML runs on macOS alone)" in note and weights in note for note in written.notes
    )
    told = json.loads((tmp_path / "out" / "export.json").read_text())
    assert told["proof"] is None
    inputs, outputs = described(tmp_path / "out" / "model.mlpackage")
    height, width = told["latent"][1:]
    assert inputs["sample"] == [2, told["latent"][0], height, width]
    assert set(inputs) >= {"sample", "timestep", "text"}
    assert outputs == {"prediction": inputs["sample"]}
    inputs, outputs = described(tmp_path / "out" / "vae_decoder.mlpackage")
    assert inputs == {"latents": [1, *told["latent"]]}
    assert list(outputs) == ["pictures"]


def described(path: Path) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """The (inputs, outputs) of the package in ``path``: their shapes by name, all of single precision or int32."""
    import coremltools

    found = coremltools.models.utils.load_spec(str(path)).description
    kinds = coremltools.proto.FeatureTypes_pb2.ArrayFeatureType
    assert {one.type.multiArrayType.dataType for one in (*found.input, *found.output)} <= {
        kinds.FLOAT32,
        kinds.INT32,
    }

    def shapes(features: Any) -> dict[str, list[int]]:
        return {one.name: list(one.type.multiArrayType.shape) for one in features}

    return shapes(found.input), shapes(found.output)


@pytest.mark.long
def test_a_core_ml_package_with_other_weights_is_seen(small: Part, tmp_path: Path) -> None:
    needs("coreml")
    runtime = RUNTIMES["coreml"]
    written = runtime.write(small, tmp_path, Writing(batch=2, side=4))
    path = runtime.file(tmp_path, written)
    program, _ = exported(written)
    coreml._check_stored(written, program, path, "float32")
    with torch.no_grad():
        small.module.get_parameter("layer.weight").mul_(1.0001)
    program, _ = exported(written)
    with pytest.raises(BackendError, match=r"layer\.weight in the package is not what it is in torch"):
        coreml._check_stored(written, program, path, "float32")
