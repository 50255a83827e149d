"""From an image file to latents and embeddings: decoding, crops and flips, the encoders; and data encoded on demand."""

from __future__ import annotations

import hashlib
import io
import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from prune_lab.config import DataConfig
from prune_lab.distill.batches import generator_for
from prune_lab.distill.data import EncodedBatch, encoder_weights, size_ids
from prune_lab.distill.sources import ImageSource
from prune_lab.errors import DataError
from prune_lab.probes import encode_captions
from prune_lab.runtime import tensors_digest

# What Pillow raises for files that are damaged, cut off, of no known format, or decompression bombs.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


# Images ----------------------------------------------------------------------------------------------------------


def image_side(pipeline: Any) -> int:
    """Pixels per side of the images that the pipeline is made for."""
    return int(pipeline.unet.config.sample_size) * int(pipeline.vae_scale_factor)


def decode_image(content: bytes) -> Image.Image:
    """The image in a file: upright, RGB, on white where it is transparent. Raises one of UNREADABLE."""
    with Image.open(io.BytesIO(content)) as file:
        image = ImageOps.exif_transpose(file)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def crop_variants(
    image: Image.Image, side: int, settings: DataConfig, row: int, variants: Sequence[int]
) -> Tensor:
    """The ``variants`` of the image of ``row``, (V, 3, side, side) uint8.

    The short side is scaled to ``side`` pixels (bilinear, as BK-SDM does), then a square is cropped: variant 0 in the
    middle; the others, with random crops, at a place drawn by ``settings.seed``, ``row`` and their number. With flips,
    odd variants are mirrored.
    """
    width, height = image.size
    short = min(width, height)
    size = (side * width // short, side * height // short)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    margins = (size[1] - side, size[0] - side)
    crops = []
    for variant in variants:
        top, left = (round(margin / 2) for margin in margins)
        if variant and settings.crop == "random":
            draws = torch.rand(2, generator=generator_for(settings.seed, f"crop {row}", variant)).tolist()
            top, left = (int(draw * (margin + 1)) for draw, margin in zip(draws, margins, strict=True))
        crop = pixels[:, top : top + side, left : left + side]
        crops.append(crop.flip(-1) if settings.flip and variant % 2 else crop)
    return torch.stack(crops)


# Encoders --------------------------------------------------------------------------------------------------------


def encode_distributions(pipeline: Any, images: Tensor, *, batch: int = 16) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the scaled latents of ``images`` (N, 3, H, W) in uint8; (N, C, h, w) float32 each.

    Latents are drawn as mean + exp(log_variance / 2) * noise. Raises DataError for values that are not finite.
    """
    vae = pipeline.vae
    scale, shift = float(vae.config.scaling_factor), float(getattr(vae.config, "shift_factor", None) or 0.0)
    means, log_variances = [], []
    with torch.no_grad():
        for chunk in torch.split(images, batch):
            pixels = chunk.to(vae.device).to(vae.dtype) / 127.5 - 1
            latents = vae.encode(pixels).latent_dist
            means.append((latents.mean.float().cpu() - shift) * scale)
            log_variances.append(latents.logvar.float().cpu() + 2 * math.log(scale))
    mean, log_variance = torch.cat(means), torch.cat(log_variances)
    if not (mean.isfinite().all() and log_variance.isfinite().all()):
        raise DataError(
            "asked for latents of images, found values that are not finite; load the pipeline in float32"
        )
    return mean, log_variance


def encode_texts(
    pipeline: Any, captions: Sequence[str], *, batch: int = 32
) -> tuple[Tensor, dict[str, Tensor]]:
    """Text embeddings (N, L, D) and, for SDXL, text_embeds (N, P) and time_ids (N, 6).

    The time_ids of SDXL say that no image was cropped: students should not learn to draw cropped images.
    """
    embeddings, added = encode_captions(pipeline, captions, batch=batch)
    if added:
        side = image_side(pipeline)
        added = added | {"time_ids": size_ids(side, side, len(captions))}
    return embeddings, added


def encode_empty_caption(pipeline: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Embedding (L, D) and, for SDXL, text_embeds (P,) of the empty caption."""
    embeddings, added = encode_captions(pipeline, [""])
    return embeddings[0], {name: tensor[0] for name, tensor in added.items()}


def encoders_digest(pipeline: Any) -> str:
    """16 hexadecimal digits of the weights of VAE and text encoders, rounded to bfloat16, and of the scaling.

    Rounded, so that the digest is the same when the encoders were loaded in another number format. It still changes
    with any training, however short: some of a hundred million weights cross a rounding step.
    """
    rounded = {name: tensor.bfloat16() for name, tensor in encoder_weights(pipeline).items()}
    config = pipeline.vae.config
    more = (config.scaling_factor, getattr(config, "shift_factor", None), pipeline.tokenizer.model_max_length)
    return hashlib.sha256(f"{tensors_digest(rounded)} {more}".encode()).hexdigest()[:16]


def provenance_of(pipeline: Any, source: ImageSource, settings: DataConfig) -> dict[str, str | int]:
    """Everything that decides the numbers in a cache and their division into files, by name."""
    return {
        "encoders": encoders_digest(pipeline),
        "precision": str(pipeline.vae.dtype).removeprefix("torch."),
        "data": source.digest,
        "side": image_side(pipeline),
        "crop": settings.crop,
        "flip": settings.flip,
        "variants": settings.num_variants,
        "seed": settings.seed if settings.crop == "random" else 0,
        "format": settings.format,
        "shard": settings.shard,
    }


def key_of(provenance: Mapping[str, str | int]) -> str:
    """16 hexadecimal digits that change with anything in ``provenance``."""
    return hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()[:16]


# Without a cache -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class LiveData:
    """Training data that are encoded whenever they are asked for; equal to a float32 cache up to rounding."""

    pipeline: Any
    source: ImageSource
    settings: DataConfig
    key: str
    empty_embedding: Tensor
    empty_added: Mapping[str, Tensor]

    @classmethod
    def of(cls, pipeline: Any, source: ImageSource, settings: DataConfig) -> LiveData:
        """The images of ``source``, to be encoded by ``pipeline``."""
        key = key_of(provenance_of(pipeline, source, settings) | {"format": "none", "shard": 0})
        return cls(pipeline, source, settings, key, *encode_empty_caption(pipeline))

    def __len__(self) -> int:
        return len(self.source)

    @property
    def variants(self) -> int:
        """Number of crops and flips of each image."""
        return self.settings.num_variants

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return int(self.pipeline.vae.config.latent_channels)

    @property
    def width(self) -> int:
        """Width of the text embeddings."""
        return self.empty_embedding.shape[-1]

    @property
    def digest(self) -> str:
        """The key, because no numbers exist before they are asked for."""
        return self.key

    def _pixels(self, row: int, variant: int) -> Tensor:
        try:
            image = decode_image(self.source.content(row))
        except UNREADABLE as error:
            raise DataError(
                f"asked to encode {self.source.name(row)}, found no readable image ({error}); remove it, or set "
                "data.cached = true, which leaves out unreadable images and counts them"
            ) from None
        return crop_variants(image, image_side(self.pipeline), self.settings, row, (variant,))

    def rows(self, indices: Tensor, variants: Tensor) -> EncodedBatch:
        """The rows ``indices`` (B,) in ``variants`` (B,). Raises DataError that names an image that cannot be read."""
        pairs = zip(indices.tolist(), variants.tolist(), strict=True)
        pixels = torch.cat([self._pixels(row, variant) for row, variant in pairs])
        captions = [self.source.captions[row] for row in indices.tolist()]
        size = self.settings.batch
        return EncodedBatch(
            *encode_distributions(self.pipeline, pixels, batch=size),
            *encode_texts(self.pipeline, captions, batch=size),
        )
