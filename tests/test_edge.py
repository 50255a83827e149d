"""Pipelines written for runtimes without torch: samplers as diffusers', parts as torch's, pictures as diffusers'."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st
from narrow_pipelines import narrow
from PIL import Image
from tiny_pipelines import tiny_pipeline
from tokenizers import Tokenizer
from typer.testing import CliRunner

from prune_lab.blocks import architecture_of
from prune_lab.cli import app
from prune_lab.errors import BackendError, ProofError, UnsupportedModelError
from prune_lab.export import EXPORT_TARGETS
from prune_lab.export.edge import export_for, proof, sampler, writing
from prune_lab.export.edge.parts import drawing_of
from prune_lab.export.edge.readme import readme_text
from prune_lab.families import FAMILIES
from prune_lab.forms import in_form
from prune_lab.models import load_pipeline, resolve_model
from prune_lab.plans import parse_plan
from prune_lab.runtimes import RUNTIMES, Writing
from prune_lab.surgery import prune_pipeline, with_first_units

# Samplers ----------------------------------------------------------------------------------------------------------

_STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
_ZERO_SNR = {**_STABLE, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
SCHEDULES: list[tuple[str, dict[str, Any]]] = [
    ("DDIMScheduler", {**_STABLE, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    ("DDIMScheduler", {"prediction_type": "sample", "timestep_spacing": "linspace"}),
    ("DDIMScheduler", {**_ZERO_SNR, "clip_sample": False, "timestep_spacing": "trailing"}),
    ("EulerDiscreteScheduler", {**_STABLE, "timestep_spacing": "leading", "steps_offset": 1}),
    ("EulerDiscreteScheduler", {**_STABLE, "timestep_spacing": "linspace"}),
    ("EulerDiscreteScheduler", {**_ZERO_SNR, "timestep_spacing": "trailing"}),
    ("PNDMScheduler", {**_STABLE, "skip_prk_steps": True, "steps_offset": 1}),
    ("PNDMScheduler", {**_STABLE, "skip_prk_steps": True, "prediction_type": "v_prediction"}),
    ("DPMSolverMultistepScheduler", {"beta_start": 0.0001, "beta_end": 0.02}),
    ("DPMSolverMultistepScheduler", {**_STABLE, "solver_order": 1, "timestep_spacing": "trailing"}),
    ("DPMSolverMultistepScheduler", {**_ZERO_SNR, "timestep_spacing": "leading", "steps_offset": 1}),
]


def scheduler_of(name: str, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    import diffusers

    scheduler = getattr(diffusers, name)(**settings)
    return scheduler, {**scheduler.config, "_class_name": name}


@pytest.mark.parametrize("steps", [2, 7, 20])
@pytest.mark.parametrize(("name", "settings"), SCHEDULES)
def test_samplers_go_where_those_of_diffusers_go(name: str, settings: dict[str, Any], steps: int) -> None:
    scheduler, config = scheduler_of(name, settings)
    scheduler.set_timesteps(steps)
    noise = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(steps))
    asked: list[float] = []

    def predict(latents: Any, timestep: float) -> Any:
        asked.append(float(timestep))
        return np.float32(0.3) * np.roll(latents, 1, axis=-1) + np.float32(timestep / 2000)

    latents = noise * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        shown = scheduler.scale_model_input(latents, time)
        told = 0.3 * shown.roll(1, dims=-1) + float(time) / 2000
        latents = scheduler.step(told, time, latents).prev_sample
    found = sampler.sampler_of(config)(config, steps, noise.numpy(), predict)
    assert asked == pytest.approx([float(time) for time in scheduler.timesteps], abs=1e-3)
    assert found.dtype == np.float32
    # Euler's latents begin as large as their noise, thousands without a signal: single precision rounds them so
    rounding = 1e-4 * float(latents.abs().max()) + 2e-7 * float(scheduler.init_noise_sigma)
    assert np.abs(found - latents.numpy()).max() < rounding


def asked_of_scheduler(config: Mapping[str, Any], steps: int, noise: torch.Tensor) -> dict[str, Any]:
    """What the pipelines of FLUX (``evenly_from_one``) and of SD3 tell their scheduler, by the code of diffusers."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    each = config["latents_per_patch"]
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    tokens = (noise.shape[-2] // each) * (noise.shape[-1] // each)
    found: dict[str, Any] = {}
    if config["use_dynamic_shifting"]:
        found["mu"] = calculate_shift(tokens, *(config[name] for name in names))
    if config["evenly_from_one"]:
        return {**found, "sigmas": np.linspace(1.0, 1 / steps, steps)}
    return {**found, "num_inference_steps": steps}


@trials(max_examples=60)
@given(
    shift=st.floats(0.2, 12),
    dynamic=st.booleans(),
    kind=st.sampled_from(["exponential", "linear"]),
    base=st.floats(0.1, 1),
    most=st.floats(0.5, 2),
    sizes=st.tuples(st.integers(1, 300), st.integers(400, 5000)),
    total=st.sampled_from([1000, 500]),
    steps=st.integers(1, 40),
    shape=st.sampled_from([(4, 4), (4, 12), (16, 8)]),
    each=st.sampled_from([1, 2]),
    evenly=st.booleans(),
)
def test_steps_of_flow_matching_go_where_those_of_diffusers_go(
    shift: float,
    dynamic: bool,
    kind: str,
    base: float,
    most: float,
    sizes: tuple[int, int],
    total: int,
    steps: int,
    shape: tuple[int, int],
    each: int,
    evenly: bool,
) -> None:
    """Static shift, dynamic shifting with the size of the picture, and the shares of noise that pipelines ask for."""
    scheduler, config = scheduler_of(
        "FlowMatchEulerDiscreteScheduler",
        {
            "shift": shift,
            "num_train_timesteps": total,
            "use_dynamic_shifting": dynamic,
            "time_shift_type": kind,
            "base_shift": base,
            "max_shift": most,
            "base_image_seq_len": sizes[0],
            "max_image_seq_len": sizes[1],
        },
    )
    config |= {"latents_per_patch": each, "evenly_from_one": evenly}
    noise = torch.randn(1, 2, *shape, generator=torch.Generator().manual_seed(steps))
    scheduler.set_timesteps(**asked_of_scheduler(config, steps, noise))
    asked: list[float] = []

    def predict(latents: Any, timestep: float) -> Any:
        asked.append(float(timestep))
        return np.float32(0.3) * np.roll(latents, 1, axis=-1) + np.float32(timestep / 2000)

    latents = noise
    for time in scheduler.timesteps:
        told = 0.3 * latents.roll(1, dims=-1) + float(time) / 2000
        latents = scheduler.step(told, time, latents).prev_sample
    found = sampler.sampler_of(config)(config, steps, noise.numpy(), predict)
    assert asked == pytest.approx([float(time) for time in scheduler.timesteps], rel=1e-6)
    assert found.dtype == np.float32
    assert np.abs(found - latents.numpy()).max() < 1e-6 * float(latents.abs().max())


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        (
            "FlowMatchEulerDiscreteScheduler",
            {"use_karras_sigmas": True},
            "use_karras_sigmas True; known is False",
        ),
        ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1}, "shift_terminal 0.1; known is None"),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "stochastic_sampling True"),
        ("FlowMatchHeunDiscreteScheduler", {}, "the scheduler FlowMatchHeunDiscreteScheduler; known are"),
        ("DDPMScheduler", {}, "the scheduler DDPMScheduler; known are DDIMScheduler"),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas True; known is False"),
        ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule squaredcos_cap_v2"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "of order 3; known are 1 and 2"),
        ("PNDMScheduler", {}, "skip_prk_steps False; known is True"),
    ],
)
def test_samplers_refuse_what_they_do_not_do(name: str, settings: dict[str, Any], said: str) -> None:
    _, config = scheduler_of(name, settings)
    with pytest.raises(ValueError, match=said):
        sampler.sampler_of(config)


# What is refused ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline("sd", tmp_path_factory.mktemp("edge") / "sd")


def test_a_runtime_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lacking = dataclasses.replace(RUNTIMES["onnx"], packages=("no_such_package",))
    monkeypatch.setitem(RUNTIMES, "onnx", lacking)
    monkeypatch.setitem(EXPORT_TARGETS, "onnx", export_for("onnx"))
    done = CliRunner().invoke(app, ["export", "reference", "--to", "onnx", "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    said = " ".join(done.output.split())
    assert (
        "found that no_such_package is not installed; install it with: pip install 'prune-lab[edge]'" in said
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["dit", "wan", "ddpm"])
def test_pipelines_that_draw_otherwise_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    pipeline = load_pipeline(resolve_model(str(tiny_pipeline(kind, tmp_path / kind))))
    with pytest.raises(BackendError, match=f"a {type(pipeline).__name__} .*known are pipelines that draw"):
        drawing_of(pipeline)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("image-to-image", "begins with a picture"),
        ("inpainting", "begins with a picture"),
        ("controlnet", "begins with a picture"),
        ("refiner", "begins with a picture"),
        ("lcm", "takes guidance beside the text"),
    ],
)
def test_pipelines_that_need_more_than_a_text_are_refused_by_name(kind: str, said: str, tiny: Path) -> None:
    pipeline = narrow(kind, load_pipeline(resolve_model(str(tiny))))
    with pytest.raises(BackendError, match=f"a {type(pipeline).__name__} .*{said}"):
        drawing_of(pipeline)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"dtype": torch.bfloat16}, "weights in bfloat16; give one of float32, int8"),
        ({"dtype": torch.float16, "weights": "int8"}, "int8 and --dtype float16"),
        ({"form": "neutral"}, "which is for single files"),
    ],
)
def test_formats_that_are_not_written_are_refused(
    more: dict[str, Any], said: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(RUNTIMES["onnx"]), "check_installed", lambda self: None)
    with pytest.raises(UnsupportedModelError, match=said):
        EXPORT_TARGETS["onnx"](resolve_model(str(tiny)), tmp_path / "out", **more)


def test_text_encoders_that_are_put_together_otherwise_are_refused_by_name(tmp_path: Path) -> None:
    pipeline = load_pipeline(resolve_model(str(tiny_pipeline("flux", tmp_path / "flux"))))
    pipeline.register_modules(text_encoder=None, tokenizer=None)
    with pytest.raises(BackendError, match=r"a FluxPipeline .*found 1 text encoders"):
        drawing_of(pipeline)


# Texts -------------------------------------------------------------------------------------------------------------


def without_t5(pipeline: Any) -> Any:
    """``pipeline`` of SD3, as those are kept whose T5 was left out."""
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    return pipeline


@pytest.mark.parametrize("kind", ["sd3", "sd3 without T5", "flux"])
def test_texts_are_put_together_as_pipelines_do_it(kind: str, tmp_path: Path) -> None:
    """Numbers of words as the tokenizers library gives them -> the text and the pooled text of ``encode_prompt``."""
    pipeline = load_pipeline(
        resolve_model(str(tiny_pipeline(kind.removesuffix(" without T5"), tmp_path / "pipeline")))
    )
    if "without" in kind:
        pipeline = without_t5(pipeline)
    drawing = drawing_of(pipeline)
    prompt, inputs = "a red apple on a table", {}
    for words in drawing.told["tokenizers"]:
        tokenizer = Tokenizer.from_str(drawing.tokenizers[words["file"]].to_str())
        tokenizer.enable_truncation(words["length"])
        tokenizer.enable_padding(length=words["length"], pad_id=words["pad_id"], pad_token=words["pad_token"])
        inputs[words["ids"]] = torch.tensor([tokenizer.encode(prompt).ids])
    text, pooled = drawing.parts[0].answers(inputs)
    more = {"prompt_2": None} | ({"prompt_3": None} if kind.startswith("sd3") else {})
    length = {"max_sequence_length": 16} if "without" not in kind else {}
    with torch.no_grad():
        wanted = pipeline.encode_prompt(prompt, **more, **length)
    assert torch.equal(text, wanted[0])
    assert torch.equal(pooled, wanted[1 if kind == "flux" else 2])
    shown = drawing.parts[1].examples(1, 8)
    assert shown["text"].shape == text.shape
    assert shown["pooled_projections"].shape == pooled.shape
    assert ("guidance" in shown) == (kind == "flux")


def test_encoders_that_are_stored_in_half_precision_compute_in_single(tiny: Path) -> None:
    pipeline = load_pipeline(resolve_model(str(tiny)), dtype=torch.float16)
    for part in drawing_of(pipeline).parts:
        assert {tensor.dtype for tensor in part.module.parameters()} == {torch.float32}
        assert all(answer.dtype == torch.float32 for answer in part.answers(part.examples(1, None)))


def test_the_texts_of_the_shipped_model_have_its_24_tokens() -> None:
    drawing = drawing_of(load_pipeline(resolve_model("reference")))
    assert [words["length"] for words in drawing.told["tokenizers"]] == [24]
    assert drawing.parts[0].examples(2, None)["input_ids"].shape == (2, 24)
    assert drawing.parts[1].examples(2, None)["text"].shape[:2] == (2, 24)


# What is written ---------------------------------------------------------------------------------------------------


def needs(name: str) -> None:
    """Skip the test where the runtime called ``name`` is not installed."""
    try:
        RUNTIMES[name].check_installed()
    except BackendError as error:
        pytest.skip(str(error))


def draw(folder: Path, out: Path, *options: str) -> np.ndarray[Any, Any]:
    done = subprocess.run(
        [sys.executable, "-B", str(folder / "generate.py"), "a red apple", "--out", str(out), *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    with Image.open(out) as picture:
        return np.asarray(picture)


def exported(name: str, kind: str, folder: Path) -> Path:
    """``folder``, with a pipeline of this ``kind`` and beside it what was written of it for the runtime ``name``."""
    needs(name)
    pipeline = tiny_pipeline("sd" if kind == "sdxl" else kind, folder / "pipeline")
    if kind == "sdxl":
        narrow(kind, load_pipeline(resolve_model(str(pipeline)))).save_pretrained(folder / "pipeline-xl")
        pipeline = folder / "pipeline-xl"
    written = EXPORT_TARGETS[name](resolve_model(str(pipeline)), folder / "out")
    assert any("without torch" in note for note in written.notes)
    return folder


@pytest.fixture(scope="session")
def in_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported("onnx", "sdxl", tmp_path_factory.mktemp("onnx"))


def check_folder_draws(folder: Path, moved: Path) -> None:
    """That what lies in ``folder`` draws, from another place, and was seen to be what diffusers draws."""
    shutil.copytree(folder, moved)
    told = json.loads((moved / "export.json").read_text())
    assert told["proof"]["psnr"] >= 40
    assert max(told["proof"]["differences"].values()) <= 1e-5
    picture = draw(moved, moved / "a.png", "--steps", "2")
    assert (picture == draw(moved, moved / "b.png", "--steps", "2")).all()
    assert picture.shape[:2] == tuple(told["pixels"] * side for side in told["latent"][1:])
    here = str(Path(__file__).resolve().parent.parent)
    for path in moved.rglob("*"):
        assert path.is_dir() or here.encode() not in path.read_bytes(), (
            f"{path} names a folder of this machine"
        )


@pytest.mark.long
def test_a_folder_for_onnxruntime_draws_without_torch_what_diffusers_draws(
    in_onnx: Path, tmp_path: Path
) -> None:
    check_folder_draws(in_onnx / "out", tmp_path / "elsewhere")


@pytest.mark.long
def test_a_folder_for_openvino_draws_without_torch_what_diffusers_draws(tmp_path: Path) -> None:
    check_folder_draws(exported("openvino", "sd", tmp_path) / "out", tmp_path / "elsewhere")


@pytest.mark.long
@pytest.mark.parametrize(("name", "kind"), [("onnx", "sd3"), ("openvino", "flux"), ("openvino", "pixart")])
def test_pipelines_of_transformers_draw_without_torch_what_diffusers_draws(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flux = "FluxTransformer2DModel"  # whose config says no size: pictures of 1024 pixels, were it not for the test
    monkeypatch.setitem(FAMILIES, flux, dataclasses.replace(FAMILIES[flux], size=lambda config: (8, 8)))
    folder = exported(name, kind, tmp_path) / "out"
    check_folder_draws(folder, tmp_path / "elsewhere")
    negative = [str(folder / "generate.py"), "a red apple", "--negative", "a cat"]
    done = subprocess.run(
        [sys.executable, "-B", *negative, "--out", str(tmp_path / "n.png")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 2 and "no second text" in done.stderr) == (kind == "flux")


@pytest.mark.long
def test_a_student_with_code_of_its_own_and_widths_draws_what_it_draws_in_diffusers(tmp_path: Path) -> None:
    needs("openvino")
    source = resolve_model(str(tiny_pipeline("sd", tmp_path / "pipeline")))
    architecture = architecture_of(source.config)
    plan = with_first_units(parse_plan("bk-small ~Dn1.R1.hidden=2 ~Dn1.A1.heads=1", architecture))
    prune_pipeline(source, in_form(architecture, plan, "own"), tmp_path / "student")
    folder = tmp_path / "out"
    EXPORT_TARGETS["openvino"](resolve_model(str(tmp_path / "student")), folder)
    check_folder_draws(folder, tmp_path / "elsewhere")
    assert json.loads((folder / "plan.json").read_text())["widths"]


@pytest.mark.long
def test_large_weights_lie_beside_the_graph_and_move_with_it(tiny: Path, tmp_path: Path) -> None:
    needs("onnx")
    part = drawing_of(load_pipeline(resolve_model(str(tiny)))).parts[0]
    runtime, folder = RUNTIMES["onnx"], tmp_path / "first"
    folder.mkdir()
    runtime.write(part, folder, Writing(most_inside=1000))
    assert sorted(path.name for path in folder.iterdir()) == [f"{part.name}.onnx", f"{part.name}.onnx.data"]
    beside = (folder / f"{part.name}.onnx.data").stat().st_size
    assert beside > 0.9 * part.num_bytes  # vectors of a few numbers stay inside
    moved = folder.rename(tmp_path / "second")
    assert proof.difference(part, runtime.load(runtime.file(moved, part)), part.examples(2, None)) < 1e-5


@pytest.mark.long
def test_a_part_that_answers_otherwise_is_not_written(
    in_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are a thousandth larger than those that the runtime was given are seen, and nothing stays."""

    def damaged(part: Any, folder: Path, writing: Writing) -> Any:
        shutil.copy2(in_onnx / "out" / f"{part.name}.onnx", folder)
        if part.name == "model":
            with torch.no_grad():
                for tensor in part.module.parameters():
                    tensor.mul_(1.001)
        return part

    monkeypatch.setitem(RUNTIMES, "onnx", dataclasses.replace(RUNTIMES["onnx"], write=damaged))
    with pytest.raises(ProofError, match="its model answers otherwise than torch"):
        export_for("onnx")(resolve_model(str(in_onnx / "pipeline-xl")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# generate.py on the command line, with parts that answer at once: what it is told is looked at before any is loaded.

_QUICK_ENGINE = """
import json
from pathlib import Path

import numpy as np

ENDING = ".npy"
told = json.loads((Path(__file__).parent / "export.json").read_text("utf-8"))


def load(path, threads=0, precision="f32"):
    name = Path(path).stem
    if name == told["parts"][0]:
        return lambda given: [np.zeros((2, 4, 4), np.float32) for _ in told["texts"]]
    if name == told["parts"][1]:
        return lambda given: [np.zeros_like(given["sample"])]
    return lambda given: [np.zeros((1, 3, *(told["pixels"] * side for side in given["latents"].shape[2:])))]
"""


@pytest.fixture(scope="module")
def generating(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generating")
    source = resolve_model(str(tiny))
    pipeline = load_pipeline(source)
    drawing, parts = drawing_of(pipeline), {part.name: part for part in drawing_of(pipeline).parts}
    told = writing._write_texts(folder, RUNTIMES["onnx"], source, drawing, parts, writing._schedule(pipeline))
    seen = proof.Proof(dict.fromkeys(parts, 1e-6), 97.0, 4)
    text = readme_text(RUNTIMES["onnx"], source, told, "float32", seen)
    (folder / "README.md").write_text(text, "utf-8")
    (folder / "engine.py").write_text(_QUICK_ENGINE, "utf-8")
    return folder


def told_on_the_command_line(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-B", str(folder / "generate.py"), "a red apple", *options]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60, cwd=folder)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", "0"], "--steps 0: give 1 to 1000"),
        (["--steps", "x"], "invalid int value"),
        (["--noise", "none.npy"], "none.npy: cannot be read"),
        (["--noise", "export.json"], "export.json: cannot be read"),
        (["--noise", "small.npy"], "small.npy: holds float64 of (1, 4, 2, 2); --size"),
        (["--size", "0", "0"], "--size 0 0: give multiples of"),
        (["--size", "33", "32"], "--size 33 32: give multiples of"),
        (["--size", "36", "32"], "--size 36 32: give multiples of 16"),  # a stage could not be halved
        (
            ["--noise", "large.npy"],
            "large.npy: holds float64 of (1, 4, 16, 16); --size",
        ),  # infinite in float32
        (["--noise", "half.npy"], "half.npy: cannot be read"),
        (["--size", "8000000", "8000000"], "--size 8000000 8000000: "),
        (["--guidance", "1e300"], "--guidance is a number up to 1000"),
        (["--seed", "-1"], "--seed and --threads are 0 or more"),
        (["--out", "none/a.png"], "in a folder that is there"),
        (["--out", "a.txt"], "ends in .png"),
        (["--out", "a.psd"], "ends in .png"),  # which Pillow only reads
    ],
)
def test_generate_says_in_one_line_what_it_cannot_do(generating: Path, options: list[str], said: str) -> None:
    np.save(generating / "small.npy", np.zeros((1, 4, 2, 2)))
    np.save(generating / "large.npy", np.full((1, 4, 16, 16), 1e39))
    (generating / "half.npy").write_bytes(b"PK\x03\x04half")
    done = told_on_the_command_line(generating, *options)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_generate_says_what_it_wrote_and_its_defaults(generating: Path, tmp_path: Path) -> None:
    told = json.loads((generating / "export.json").read_text())
    high, wide = (told["pixels"] * side for side in told["latent"][1:])
    done = told_on_the_command_line(generating, "--steps", "2", "--out", str(tmp_path / "a.png"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote {tmp_path / 'a.png'} ({high} high, {wide} wide, 2 steps, seed 0)\n"
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (wide, high)
    shown = told_on_the_command_line(generating, "--help").stdout
    assert all(f"(default: {told[name]})" in " ".join(shown.split()) for name in ("steps", "guidance"))
    assert f"(default: [{high}, {wide}])" in " ".join(shown.split())


def test_the_readme_of_an_exported_folder_says_what_is_needed(generating: Path) -> None:
    text = (generating / "README.md").read_text("utf-8")
    told = json.loads((generating / "export.json").read_text())
    for words in (
        "pip install onnxruntime numpy tokenizers Pillow",
        'python generate.py "a red apple"',
        f"multiples of {told['multiple']}",
        "97 dB",
        "Licence",
        "Not known",
    ):
        assert words in text
    assert all(f"| {part} | 1.0e-06 |" in text for part in told["parts"])
    assert str(generating.parent) not in text
