"""From captions to what a model reads: text embeddings; noise and its target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from prune_lab.errors import UnsupportedModelError
from prune_lab.families.drawing import reads_text
from prune_lab.models.silence import quiet
from prune_lab.probes.latents import finite
from prune_lab.runtime import note_once
from prune_lab.text_tables import one_line, whole_characters

# Captions --------------------------------------------------------------------------------------------------------

MOST_CHARACTERS = (
    8192  # of a text that a tokenizer is given: a hundred times the tokens that a text encoder reads
)


def cut_texts(texts: Sequence[str]) -> list[str]:
    """``texts`` as a tokenizer takes them: whole characters only, and at most ``MOST_CHARACTERS`` of them.

    The tokens that a text encoder reads are the same; a text of millions of characters would keep the tokenizer busy
    for minutes.
    """
    return [
        whole_characters(text if len(text) <= MOST_CHARACTERS else " ".join(text.split())[:MOST_CHARACTERS])
        for text in texts
    ]


def _encoded(pipeline: Any, captions: list[str]) -> tuple[Any, ...]:
    """What the pipeline makes of captions: embeddings (N, L, D) first, without those of an empty caption."""
    encoders = [getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]
    device = next((encoder.device for encoder in encoders if encoder is not None), None)
    # instruct-pix2pix has only the older method, which gives a tensor
    encode = getattr(pipeline, "encode_prompt", None) or getattr(pipeline, "_encode_prompt", None)
    if device is None or encode is None:
        raise UnsupportedModelError(
            f"asked for the text embeddings of a {type(pipeline).__name__}, found no text encoder that it reads "
            "captions with; give a pipeline that draws from captions"
        )
    answer = encode(captions, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False)
    return (answer,) if isinstance(answer, Tensor) else answer


def note_cut(pipeline: Any, texts: Sequence[str], what: str) -> None:
    """Say once how many of ``texts``, called ``what``, are longer than the text encoder reads; and the first."""
    tokenizer = getattr(pipeline, "tokenizer", None) or getattr(pipeline, "tokenizer_2", None)
    if tokenizer is None:
        return
    most = tokenizer.model_max_length
    # Few tokens are added, such as that of the end, and no other is less than a byte: most texts need no look.
    long = [text for text in texts if len(text) + 4 > most or not text.isascii()]
    cut, first = 0, ""
    with quiet():
        for start in range(0, len(long), 1024):  # millions of captions at once would fill the memory
            part = long[start : start + 1024]
            found = tokenizer(cut_texts(part)).input_ids
            over = [text for text, ids in zip(part, found, strict=True) if len(ids) > most]
            cut, first = cut + len(over), first or next(iter(over), "")
    if cut:
        note_once(
            f"{cut:,} of {len(texts):,} {what} are cut off after the {most} tokens that the text encoder reads; the "
            f"first: {one_line(first[:60])}..."
        )


def encode_captions(
    pipeline: Any, captions: Sequence[str], *, batch: int = 32
) -> tuple[Tensor, dict[str, Tensor]]:
    """Text embeddings (N, L, D) and, for SDXL, ``{"text_embeds": (N, P)}``, float32 on the CPU.

    (N, 0, 0) of a model that reads no text.
    """
    if not reads_text(pipeline):
        return torch.zeros(len(captions), 0, 0), {}
    pooled: list[Tensor] = []
    embeddings: list[Tensor] = []
    with torch.no_grad(), quiet():  # of captions that are too long ``note_cut`` speaks, once
        for start in range(0, len(captions), batch):
            answer = _encoded(pipeline, cut_texts(captions[start : start + batch]))
            embeddings.append(answer[0].float().cpu())
            if len(answer) == 4:  # SDXL: prompt, negative, pooled prompt, pooled negative
                pooled.append(answer[2].float().cpu())
    added = {"text_embeds": finite(torch.cat(pooled), "pooled text embeddings")} if pooled else {}
    return finite(torch.cat(embeddings), "text embeddings"), added


def noise_schedule(scheduler_config: Mapping[str, Any]) -> DDPMScheduler:
    """The training-time noise schedule (DDPM) behind any scheduler's config."""
    return DDPMScheduler.from_config(dict(scheduler_config))


def training_target(schedule: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the U-Net was trained to predict, (N, C, H, W): the noise, or the velocity of arXiv:2202.00512.

    Raises UnsupportedModelError for any other prediction type.
    """
    kind = schedule.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        velocity: Tensor = schedule.get_velocity(latents, noise, timesteps)
        return velocity
    raise UnsupportedModelError(
        f"the scheduler says the U-Net predicts {kind!r}; known are 'epsilon' and 'v_prediction'"
    )
