"""How good a U-Net is: its held-out loss, the pictures it draws, and what a CLIP model says about them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from prune_lab.errors import DataError
from prune_lab.models import ScorerInputs
from prune_lab.probes import Probe, predict
from prune_lab.runtime import atomic_write, seeded, track


def heldout_loss(
    unet: Any,
    probe: Probe,
    *,
    batch: int = 32,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Mean squared error of the prediction against the probe's target, one value per row, (N,) float32 on the CPU.

    Reads as: the training loss on pictures that were never trained on. Misleads when: compared between probes, since
    late timesteps have larger losses. ``device`` and ``dtype`` are those of the inputs; None means the U-Net's.
    """
    predictions = predict(unet, probe, batch=batch, device=device, dtype=dtype)
    return (predictions - probe.target).square().flatten(1).mean(dim=1)


@contextlib.contextmanager
def _drawing_with(pipeline: Any, unet: Any) -> Iterator[Any]:
    """``pipeline`` with ``unet``, a scheduler of its own and no progress bar; all three return on exit."""
    original = pipeline.unet, pipeline.scheduler, getattr(pipeline, "_progress_bar_config", {})
    try:
        pipeline.unet = pipeline.unet if unet is None else unet
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        yield pipeline
    finally:
        pipeline.unet, pipeline.scheduler, bar = original
        pipeline.set_progress_bar_config(**bar)


def _drawn(
    pipeline: Any,
    wanted: Sequence[tuple[str, int]],
    *,
    steps: int,
    guidance: float,
    unet: Any,
    batch: int,
    output: str,
) -> Iterator[Tensor]:
    """What the pipeline gives for each (prompt, seed), chunk by chunk; DataError when it is not finite."""
    with _drawing_with(pipeline, unet) as drawing:
        for start in track(range(0, len(wanted), batch), "drawing", math.ceil(len(wanted) / batch)):
            chunk = wanted[start : start + batch]
            drawn = drawing(
                prompt=[prompt for prompt, _ in chunk],
                generator=[seeded(seed) for _, seed in chunk],
                num_inference_steps=steps,
                guidance_scale=guidance,
                output_type=output,
            ).images
            if not drawn.isfinite().all():
                raise DataError(
                    "asked for pictures, found values that are not finite; use float32 or another U-Net"
                )
            yield drawn.float()


def _every(prompts: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    if not prompts or not seeds:
        raise DataError(
            f"asked to draw {len(prompts)} prompts with {len(seeds)} seeds; give at least one of each"
        )
    return [(prompt, seed) for prompt in prompts for seed in seeds]


def _bytes(pictures: Tensor) -> Tensor:
    return (pictures * 255).round().clamp(0, 255).to("cpu", torch.uint8)


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    unet: Any = None,
    batch: int = 8,
) -> Tensor:
    """Pictures uint8 (prompts x seeds, 3, H, W) on the CPU: every prompt with every seed, prompt by prompt.

    Each picture starts from noise of its own seed, drawn on the CPU: the same for teacher and students, whatever the
    batch and the device. ``unet`` draws in place of the pipeline's own, which is back afterwards. ``guidance`` is the
    scale of classifier-free guidance; 1 turns it off. Raises DataError when there is nothing to draw, or when the
    pictures are not finite.
    """
    wanted, how = _every(prompts, seeds), {"steps": steps, "guidance": guidance, "unet": unet, "batch": batch}
    return torch.cat([_bytes(drawn) for drawn in _drawn(pipeline, wanted, output="pt", **how)])


def generate_latents(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    unet: Any = None,
    batch: int = 8,
) -> Tensor:
    """The final latents (prompts x seeds, C, h, w), float32 on the CPU, of the pictures that ``generate`` draws."""
    wanted, how = _every(prompts, seeds), {"steps": steps, "guidance": guidance, "unet": unet, "batch": batch}
    return torch.cat([drawn.cpu() for drawn in _drawn(pipeline, wanted, output="latent", **how)])


@torch.inference_mode()
def decode_latents(pipeline: Any, latents: Tensor, *, batch: int = 8) -> Tensor:
    """Pictures uint8 (N, 3, H, W) on the CPU of final latents (N, C, h, w), as the pipeline decodes them."""
    vae = pipeline.vae
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    pictures = []
    for chunk in torch.split(latents, batch):
        scaled = chunk.to(vae.device, vae.dtype) / vae.config.scaling_factor + shift
        pictures.append(_bytes((vae.decode(scaled).sample.float() / 2 + 0.5).clamp(0, 1)))
    return torch.cat(pictures)


def clip_scores(
    scorer: tuple[Any, ScorerInputs], pictures: Tensor, prompts: Sequence[str], *, batch: int = 64
) -> Tensor:
    """Cosine between the CLIP embeddings of each picture and its prompt, (N,) float32 on the CPU.

    ``scorer`` is what ``models.load_scorer`` returns, ``pictures`` uint8 (N, 3, H, W). The cosine itself, as the
    authors of BK-SDM report it: neither multiplied by 100 nor cut at zero. Misleads when: compared between scorers.
    Raises DataError when the numbers of pictures and prompts differ.
    """
    if len(pictures) != len(prompts):
        raise DataError(
            f"asked to score {len(pictures)} pictures against {len(prompts)} prompts; give one for each"
        )
    model, inputs = scorer
    scores = [torch.empty(0)]
    with torch.inference_mode():
        for start in range(0, len(prompts), batch):
            rows = slice(start, start + batch)
            embedded = model(
                pixel_values=inputs.pictures(pictures[rows], model.device),
                **inputs.captions(prompts[rows], model.device),
            )
            # both embeddings come normalised
            scores.append((embedded.image_embeds * embedded.text_embeds).sum(dim=-1).float().cpu())
    return torch.cat(scores)


def save_grid(path: Path, pictures: Tensor, *, columns: int = 4, gap: int = 2) -> None:
    """Write ``pictures`` (N, 3, H, W) uint8 as one PNG of ``columns`` columns, filled row by row.

    ``gap`` white pixels lie between two pictures. The file appears whole or not at all. Raises DataError when there are
    no pictures, StorageError when the file cannot be written.
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3 or not len(pictures):
        raise DataError(
            f"asked for a grid of pictures of shape {tuple(pictures.shape)}; give uint8 (N, 3, H, W)"
        )
    count, _, height, width = pictures.shape
    columns = max(1, min(columns, count))
    rows = math.ceil(count / columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        cell = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
        sheet.paste(cell, ((i % columns) * (width + gap), (i // columns) * (height + gap)))
    with atomic_write(path) as temporary:
        sheet.save(temporary, format="PNG")
