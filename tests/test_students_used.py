"""A student of Stable Diffusion's shape used for real, in plain diffusers, beside the teacher without these blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BuiltOnce
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from prune_lab.models import resolve_model
from prune_lab.plans import PruningPlan, parse_plan
from prune_lab.surgery import bypassed, prune_pipeline

Draw = Callable[[Any], Any]
PROMPT = "a red cat"


@pytest.fixture(scope="module")
def plan(tiny_unet_shared: Any) -> PruningPlan:
    from prune_lab.blocks import architecture_of

    return parse_plan("bk-small", architecture_of(tiny_unet_shared))


@pytest.fixture(scope="module")
def student_folder(built_once: BuiltOnce, tiny_pipeline_folder: Path, plan: PruningPlan) -> Path:
    source = resolve_model(str(tiny_pipeline_folder))
    return built_once("student", lambda folder: prune_pipeline(source, plan, folder))


def loaded(folder: Path) -> Any:
    """The pipeline in ``folder`` as a user loads it."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def student(student_folder: Path) -> Any:
    return loaded(student_folder)


@pytest.fixture
def teacher(tiny_pipeline_folder: Path) -> Any:
    return loaded(tiny_pipeline_folder)


def drawn(pipeline: Any, **arguments: Any) -> torch.Tensor:
    """Two steps of ``pipeline``, (H, W, 3): finite and not of one colour."""
    generator = torch.Generator().manual_seed(0)
    given = {"num_inference_steps": 2, "output_type": "np", "generator": generator} | arguments
    found = torch.from_numpy(pipeline(PROMPT, **given).images[0])
    assert found.isfinite().all()
    assert found.std() > 1e-3
    return found


def sketch() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def with_scheduler(kind: Any, **settings: Any) -> Draw:
    def draw(pipeline: Any) -> torch.Tensor:
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **settings)
        return drawn(pipeline)

    return draw


def image_to_image(pipeline: Any) -> torch.Tensor:
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    other.set_progress_bar_config(disable=True)
    return drawn(other, image=sketch(), strength=0.9)


def inpainted(pipeline: Any) -> torch.Tensor:
    other = StableDiffusionInpaintPipeline.from_pipe(pipeline)
    other.set_progress_bar_config(disable=True)
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (8, 8, 24, 24))
    return drawn(other, image=sketch(), mask_image=mask, height=32, width=32, strength=1.0)


def sliced(pipeline: Any) -> torch.Tensor:
    pipeline.enable_attention_slicing(1)
    pipeline.vae.enable_slicing()
    return drawn(pipeline)


WAYS: dict[str, Draw] = {
    "text to image": drawn,
    "PNDM": with_scheduler(PNDMScheduler),
    "DDIM": with_scheduler(DDIMScheduler),
    "DPM-Solver": with_scheduler(DPMSolverMultistepScheduler),
    "Euler a": with_scheduler(EulerAncestralDiscreteScheduler),
    "LCM": with_scheduler(LCMScheduler),
    "image to image": image_to_image,
    "inpainting": inpainted,
    "attention slicing": sliced,
}


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # NumPy 2 about torch and diffusers
@pytest.mark.parametrize("way", WAYS)
def test_a_student_draws_what_the_teacher_draws_without_these_blocks(
    way: str, student: Any, teacher: Any, plan: PruningPlan
) -> None:
    found = WAYS[way](student)
    with bypassed(teacher.unet, plan):
        expected = WAYS[way](teacher)
    # weights of the one lie aligned in memory, of the other as in the file: products may round otherwise
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, WAYS[way](teacher), atol=1e-3)


def test_a_student_draws_with_its_weights_offloaded(student: Any) -> None:
    import accelerate

    expected = drawn(student)
    for part in (student.unet, student.vae, student.text_encoder):
        accelerate.cpu_offload(part, execution_device=torch.device("cpu"))
    assert student.unet.conv_in.weight.device.type == "meta"
    assert torch.allclose(drawn(student), expected, atol=1e-5)


def test_a_student_is_saved_and_loaded_again(student: Any, tmp_path: Path) -> None:
    student.save_pretrained(tmp_path / "again", safe_serialization=True)
    again = loaded(tmp_path / "again")
    assert torch.allclose(drawn(again), drawn(student), atol=1e-5)
    from prune_lab.blocks import architecture_of

    parameters = sum(parameter.numel() for parameter in student.unet.parameters())
    assert architecture_of(again.unet).total_params == parameters


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_student_draws_compiled(student: Any) -> None:
    expected = drawn(student)
    student.unet.compile_repeated_blocks()
    assert torch.allclose(drawn(student), expected, atol=1e-3)
