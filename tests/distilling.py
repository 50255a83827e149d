"""What the tests of distillation share, and what their subprocesses run: made-up data, settings, students."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from conftest import TINY_UNET
from diffusers import PNDMScheduler, UNet2DConditionModel

from prune_lab.blocks import architecture_of
from prune_lab.config import DistillConfig
from prune_lab.distill import DistillSetup, LatentData, Recovery, Student, distill_together, feature_pairs
from prune_lab.distill.batches import Batch
from prune_lab.distill.features import FeaturePair
from prune_lab.distill.losses import Losses, student_losses, teacher_output
from prune_lab.plans import parse_plan
from prune_lab.probes import Probe, random_probe
from prune_lab.surgery import materialise

SCHEDULER = PNDMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
)
SETTINGS = DistillConfig(
    steps=6,
    batch=2,
    learning_rate=1e-3,
    warmup=3,
    ema_decay=0.9,
    caption_dropout=0.3,
    checkpoint_every=2,
    validate_every=3,
    pictures=5,
    trackers=(),
)


def made_up_data(rows: int = 5, seed: int = 1) -> LatentData:
    generator = torch.Generator().manual_seed(seed)
    return LatentData(
        latents=torch.randn(rows, 4, 16, 16, generator=generator),
        embeddings=torch.randn(rows, 7, 16, generator=generator),
        empty_embedding=torch.randn(7, 16, generator=generator),
        captions=tuple(f"picture {row}" for row in range(rows)),
    )


def student_of(unet: UNet2DConditionModel, plan: str) -> tuple[UNet2DConditionModel, tuple[FeaturePair, ...]]:
    architecture = architecture_of(unet)
    parsed = parse_plan(plan, architecture)
    return materialise(unet, parsed), feature_pairs(architecture, parsed)


def weights(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in unet.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def validation_probe() -> Probe:
    """Made-up held-out rows for the tiny U-Net."""
    return random_probe(TINY_UNET, samples=2, seed=5)


def setup_for(
    unet: UNet2DConditionModel, validation: Probe, settings: DistillConfig = SETTINGS
) -> DistillSetup:
    """What students of ``unet`` are trained with on made-up data."""
    return DistillSetup(unet, made_up_data(), SCHEDULER, settings, validation)


def students_of(unet: UNet2DConditionModel, folder: Path, plans: Sequence[str]) -> list[Student]:
    """A student for each of ``plans``, in folders named after them."""
    architecture = architecture_of(unet)
    parsed = {plan: parse_plan(plan, architecture) for plan in plans}
    return [
        Student(partial(materialise, unet, plan), feature_pairs(architecture, plan), folder / name)
        for name, plan in parsed.items()
    ]


def distill(
    teacher: Any,
    student: Any,
    pairs: Sequence[FeaturePair],
    data: LatentData,
    settings: DistillConfig,
    folder: Path,
    validation: Probe,
    **more: Any,
) -> Recovery:
    """The recovery of one ``student``, which is trained in place."""
    setup = DistillSetup(teacher, data, SCHEDULER, settings, validation)
    one = Student(lambda: student, tuple(pairs), folder)
    (recovery,) = distill_together(setup, [one], **more)
    return recovery


def batch_losses(
    teacher: Any, student: Any, pairs: Sequence[FeaturePair], batch: Batch, *, variant: str = "raw"
) -> Losses:
    """The losses of one student on ``batch``; a teacher in bfloat16 puts the student under autocast."""
    output = teacher_output(teacher, [pair.teacher_path for pair in pairs], batch, torch.float32)
    precision = next(teacher.parameters()).dtype
    return student_losses(
        student, output, pairs, batch, variant=variant, precision=precision, forward=student
    )


def distil_alone(unet: UNet2DConditionModel, folder: Path) -> None:
    """BK-SDM's three students of ``unet``, trained one after the other."""
    setup = setup_for(unet, validation_probe())
    for plan in ("bk-base", "bk-small", "bk-tiny"):
        distill_together(setup, students_of(unet, folder, (plan,)))
