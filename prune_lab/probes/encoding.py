"""From pictures and captions to what a U-Net reads: latents, text embeddings, noise and its target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from prune_lab.errors import DataError, UnsupportedModelError
from prune_lab.models.silence import quiet
from prune_lab.runtime import note_once
from prune_lab.text_tables import one_line, whole_characters


def _finite(tensor: Tensor, what: str) -> Tensor:
    if not tensor.isfinite().all():
        raise DataError(f"asked for {what}, found values that are not finite; load the pipeline in float32")
    return tensor


def encode_pixels(pipeline: Any, pixels: Tensor, *, batch: int = 16, scaled: bool = True) -> Tensor:
    """Latents (N, C, h, w), float32 on the CPU, of ``pixels`` (N, 3, H, W): uint8, or floats from -1 to 1.

    The mode of the VAE's distribution, ``scaled`` by the VAE's factor or as it is. Raises DataError for latents that
    are not finite (an SDXL VAE in float16).
    """
    vae = pipeline.vae
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    latents = []
    with torch.no_grad():  # not inference_mode: a training loop may take gradients through these later
        for chunk in torch.split(pixels, batch):
            values = chunk.to(vae.device).to(vae.dtype)
            values = values / 127.5 - 1 if chunk.dtype == torch.uint8 else values
            mode = vae.encode(values).latent_dist.mode().float().cpu()
            latents.append((mode - shift) * vae.config.scaling_factor if scaled else mode)
    return _finite(torch.cat(latents), "latents of pictures")


def decode_latents(pipeline: Any, latents: Tensor, *, batch: int = 8) -> Tensor:
    """Pictures uint8 (N, 3, H, W) on the CPU of scaled latents (N, C, h, w), decoded as the pipeline does it."""
    vae = pipeline.vae
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    pictures = []
    with torch.inference_mode():
        for chunk in torch.split(latents, batch):
            values = chunk.to(vae.device, vae.dtype) / vae.config.scaling_factor + shift
            pictures.append(to_uint8((vae.decode(values).sample.float() / 2 + 0.5).clamp(0, 1)))
    return torch.cat(pictures)


def to_uint8(pictures: Tensor) -> Tensor:
    """Pictures of floats from 0 to 1 as uint8 on the CPU."""
    return (pictures * 255).round().clamp(0, 255).to("cpu", torch.uint8)


def encode_pictures(pipeline: Any, pictures: Tensor, *, batch: int = 16) -> Tensor:
    """Scaled latents (N, C, h, w), float32 on the CPU, of ``pictures`` (N, 3, H, W) in uint8.

    The mode of the VAE's distribution, not a draw from it, so the same picture always gives the same latent.
    Raises DataError for pictures of another form, or latents that are not finite (an SDXL VAE in float16).
    """
    if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
        raise DataError(
            f"asked to encode pictures, found {pictures.dtype} of shape {tuple(pictures.shape)}; "
            "give uint8 of shape (N, 3, height, width)"
        )
    return encode_pixels(pipeline, pictures, batch=batch)


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
    """Text embeddings (N, L, D) and, for SDXL, ``{"text_embeds": (N, P)}``, float32 on the CPU."""
    pooled: list[Tensor] = []
    embeddings: list[Tensor] = []
    with torch.no_grad(), quiet():  # of captions that are too long ``note_cut`` speaks, once
        for start in range(0, len(captions), batch):
            answer = _encoded(pipeline, cut_texts(captions[start : start + batch]))
            embeddings.append(answer[0].float().cpu())
            if len(answer) == 4:  # SDXL: prompt, negative, pooled prompt, pooled negative
                pooled.append(answer[2].float().cpu())
    added = {"text_embeds": _finite(torch.cat(pooled), "pooled text embeddings")} if pooled else {}
    return _finite(torch.cat(embeddings), "text embeddings"), added


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
