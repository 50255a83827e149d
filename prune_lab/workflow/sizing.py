"""Settings of a whole job without a TOML: sensible for the size of the model and of the device."""

from __future__ import annotations

import torch

from prune_lab.blocks import Architecture
from prune_lab.config import (
    AUTO,
    DataConfig,
    DistillConfig,
    EvaluateConfig,
    ProbeConfig,
    RankConfig,
    RunConfig,
    ScoreConfig,
    SearchConfig,
)
from prune_lab.distill import STATE_BYTES, TrainingMemory, pass_bytes

SMALL_MACS = 5e9  # of one pass: what any machine does in the blink of an eye
LARGE_PARAMS = 1.5e9
_SHARE = 0.85  # of the teacher's parameters: the largest student that is usually asked for


def memory_of(
    architecture: Architecture,
    *,
    dtype: torch.dtype,
    checkpointing: bool,
    free: int,
    share: float = _SHARE,
    latent: int | None = None,
) -> TrainingMemory:
    """The bytes that a distillation of students of ``share`` of the parameters needs; no weights are needed for it."""
    config, tokens = architecture.config, architecture.tokens
    return TrainingMemory(
        teacher=architecture.total_params * dtype.itemsize,
        student=int(architecture.total_params * share) * STATE_BYTES,
        teacher_sample=pass_bytes(config, tokens=tokens, training=False, latent=latent),
        student_sample=pass_bytes(
            config, tokens=tokens, training=True, checkpointing=checkpointing, latent=latent
        ),
        free=free,
    )


def settings_for(architecture: Architecture, device: torch.device, memory: int, data: str = "") -> RunConfig:
    """The settings of a whole job of ``architecture`` on ``device`` with ``memory`` bytes free, on pictures ``data``.

    =============================  =================  =====================  ==================
    setting                        small model        GPU (CUDA)             another device
                                   (under 5 GMAC)
    =============================  =================  =====================  ==================
    dtype, distill.precision       float32            bfloat16               float32
    probe.samples                  64                 64                     16
    probe.drawn, probe.steps       16, 10             16, 10                 4, 4
    score.channels_last            no                 yes                    no
    search.count                   2                  2                      1
    search.controls                auto               auto                   none
    data.count, data.steps         256, 25            2,000, 25              24, 8
    distill.steps                  200                2,000                  40
    distill.batch                  16                 64; 32 above 1.5e9     4
                                                      parameters
    distill.warmup                 10                 50                     4
    distill.validate_every         50                 250                    10
    rank.eta                       2                  3                      0
    evaluate.steps                 25                 25                     8
    =============================  =================  =====================  ==================

    ``distill.gradient_checkpointing`` is on where one student with four samples at a time does not fit into memory
    without. How many students and samples go at once is decided when training starts, from what is free then. The
    format is float32 wherever the GPU has no bfloat16. Misleads when: other programs use the device later.
    """
    small, cuda = architecture.total_macs < SMALL_MACS, device.type == "cuda"
    short = cuda and torch.cuda.is_bf16_supported() and not small
    dtype = torch.bfloat16 if short else torch.float32
    plain = memory_of(architecture, dtype=dtype, checkpointing=False, free=memory)
    tight = plain.fit(1, 4) != (1, 4)
    if small:
        probe, count, drawn, steps, batch, eta, shown = (64, 16, 10), 2, (256, 25), 200, 16, 2, 25
    elif cuda:
        batch = 32 if architecture.total_params > LARGE_PARAMS else 64
        probe, count, drawn, steps, eta, shown = (64, 16, 10), 2, (2_000, 25), 2_000, 3, 25
    else:
        probe, count, drawn, steps, batch, eta, shown = (16, 4, 4), 1, (24, 8), 40, 4, 0, 8
    samples, pictures, denoising = probe
    return RunConfig(
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        probe=ProbeConfig(samples=samples, drawn=pictures, steps=denoising),
        score=ScoreConfig(channels_last=cuda and not small),
        search=SearchConfig(count=count, controls=(AUTO,) if small or cuda else ()),
        data=DataConfig(source=data, count=drawn[0], steps=drawn[1]),
        distill=DistillConfig(
            steps=steps,
            batch=batch,
            warmup=min(50, max(4, steps // 20)),
            validate_every=max(10, steps // 8),
            checkpoint_every=max(10, steps // 8),
            gradient_checkpointing=tight,
        ),
        rank=RankConfig(eta=eta),
        evaluate=EvaluateConfig(steps=shown),
    )
