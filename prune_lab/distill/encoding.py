"""From a picture file to what the U-Net sees: variants, the VAE's distribution; and data encoded when asked for."""

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
from prune_lab.distill.data import EncodedBatch, encoder_weights, size_ids, stream
from prune_lab.distill.sources import PictureSource
from prune_lab.errors import DataError
from prune_lab.probes import encode_captions
from prune_lab.runtime import tensors_digest

# What Pillow raises for files that are damaged, cut off, of no known format, or bombs.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


# Pictures --------------------------------------------------------------------------------------------------------


def picture_side(pipeline: Any) -> int:
    """Pixels per side at which the pipeline works."""
    return int(pipeline.unet.config.sample_size) * int(pipeline.vae_scale_factor)


def decoded(content: bytes) -> Image.Image:
    """The picture in a file: upright, RGB, on white where it is transparent. Raises one of BROKEN."""
    with Image.open(io.BytesIO(content)) as file:
        picture = ImageOps.exif_transpose(file)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")


def framed(
    picture: Image.Image, side: int, settings: DataConfig, row: int, variants: Sequence[int]
) -> Tensor:
    """The ``variants`` of the picture of ``row``, (V, 3, side, side) uint8.

    The short side is scaled to ``side`` (bilinear, as BK-SDM does), then a square is cut out: variant 0 in the middle,
    the others where ``settings.seed``, ``row`` and their number say. With flips, odd variants are mirrored.
    """
    width, height = picture.size
    short = min(width, height)
    size = (side * width // short, side * height // short)
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    room = (size[1] - side, size[0] - side)
    cuts = []
    for variant in variants:
        top, left = (round(space / 2) for space in room)
        if variant and settings.crop == "random":
            draws = torch.rand(2, generator=stream(settings.seed, f"crop {row}", variant)).tolist()
            top, left = (int(draw * (space + 1)) for draw, space in zip(draws, room, strict=True))
        cut = pixels[:, top : top + side, left : left + side]
        cuts.append(cut.flip(-1) if settings.flip and variant % 2 else cut)
    return torch.stack(cuts)


# Encoders --------------------------------------------------------------------------------------------------------


def encode_distributions(pipeline: Any, pictures: Tensor, *, batch: int = 16) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the scaled latents of ``pictures`` (N, 3, H, W) in uint8; (N, C, h, w) float32 each.

    Latents are drawn as mean + exp(log_variance / 2) * noise. Raises DataError for values that are not finite.
    """
    vae = pipeline.vae
    scale, shift = float(vae.config.scaling_factor), float(getattr(vae.config, "shift_factor", None) or 0.0)
    means, log_variances = [], []
    with torch.no_grad():
        for chunk in torch.split(pictures, batch):
            pixels = chunk.to(vae.device).to(vae.dtype) / 127.5 - 1
            found = vae.encode(pixels).latent_dist
            means.append((found.mean.float().cpu() - shift) * scale)
            log_variances.append(found.logvar.float().cpu() + 2 * math.log(scale))
    mean, log_variance = torch.cat(means), torch.cat(log_variances)
    if not (mean.isfinite().all() and log_variance.isfinite().all()):
        raise DataError(
            "asked for latents of pictures, found values that are not finite; load the pipeline in float32"
        )
    return mean, log_variance


def encode_texts(
    pipeline: Any, captions: Sequence[str], *, batch: int = 32
) -> tuple[Tensor, dict[str, Tensor]]:
    """Text embeddings (N, L, D) and, for SDXL, text_embeds (N, P) and time_ids (N, 6).

    SDXL is told of every picture that it was taken whole: students should not learn to draw cut-off pictures.
    """
    embeddings, added = encode_captions(pipeline, captions, batch=batch)
    if added:
        side = picture_side(pipeline)
        added = added | {"time_ids": size_ids(side, side, len(captions))}
    return embeddings, added


def encode_nothing(pipeline: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Embedding (L, D) and, for SDXL, text_embeds (P,) of the empty caption."""
    embeddings, added = encode_captions(pipeline, [""])
    return embeddings[0], {name: tensor[0] for name, tensor in added.items()}


def encoders_digest(pipeline: Any) -> str:
    """16 hexadecimal digits of the weights of VAE and text encoders, rounded to bfloat16, and of the scaling.

    Rounded, so that the same encoders are known again when they were loaded in another format. In any training, however
    short, some of a hundred million weights cross a rounding step.
    """
    rounded = {name: tensor.bfloat16() for name, tensor in encoder_weights(pipeline).items()}
    config = pipeline.vae.config
    more = (config.scaling_factor, getattr(config, "shift_factor", None), pipeline.tokenizer.model_max_length)
    return hashlib.sha256(f"{tensors_digest(rounded)} {more}".encode()).hexdigest()[:16]


def recipe_of(pipeline: Any, source: PictureSource, settings: DataConfig) -> dict[str, str | int]:
    """Everything that decides the numbers of a cache, and its division into files."""
    return {
        "encoders": encoders_digest(pipeline),
        "precision": str(pipeline.vae.dtype).removeprefix("torch."),
        "data": source.digest,
        "side": picture_side(pipeline),
        "crop": settings.crop,
        "flip": settings.flip,
        "variants": settings.each,
        "seed": settings.seed if settings.crop == "random" else 0,
        "format": settings.format,
        "shard": settings.shard,
    }


def key_of(recipe: Mapping[str, str | int]) -> str:
    """16 hexadecimal digits that change with anything in ``recipe``."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


# Without a cache -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class LiveData:
    """Training data that are encoded whenever they are asked for; what a float32 cache holds, up to rounding."""

    pipeline: Any
    source: PictureSource
    settings: DataConfig
    key: str
    empty_embedding: Tensor
    empty_added: Mapping[str, Tensor]

    @classmethod
    def of(cls, pipeline: Any, source: PictureSource, settings: DataConfig) -> LiveData:
        """The pictures of ``source`` by the encoders of ``pipeline``."""
        key = key_of(recipe_of(pipeline, source, settings) | {"format": "none", "shard": 0})
        return cls(pipeline, source, settings, key, *encode_nothing(pipeline))

    def __len__(self) -> int:
        return len(self.source)

    @property
    def variants(self) -> int:
        """Different crops and flips of each picture."""
        return self.settings.each

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
        """The key: nothing is encoded yet that could be looked at."""
        return self.key

    def _pixels(self, row: int, variant: int) -> Tensor:
        try:
            picture = decoded(self.source.content(row))
        except BROKEN as error:
            raise DataError(
                f"asked to encode {self.source.name(row)}, found no readable picture ({error}); remove it, or set "
                "data.cached = true, which leaves out what is broken and counts it"
            ) from None
        return framed(picture, picture_side(self.pipeline), self.settings, row, (variant,))

    def rows(self, chosen: Tensor, variants: Tensor) -> EncodedBatch:
        """These pictures in these variants. Raises DataError that names a picture which cannot be read."""
        pairs = zip(chosen.tolist(), variants.tolist(), strict=True)
        pixels = torch.cat([self._pixels(row, variant) for row, variant in pairs])
        captions = [self.source.captions[row] for row in chosen.tolist()]
        size = self.settings.batch
        return EncodedBatch(
            *encode_distributions(self.pipeline, pixels, batch=size),
            *encode_texts(self.pipeline, captions, batch=size),
        )
