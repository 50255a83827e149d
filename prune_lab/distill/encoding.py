"""From an image to latents and embeddings: crops and flips, the encoders; and data encoded on demand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prune_lab.config import DataConfig
from prune_lab.distill.data import EncodedBatch, LatentData
from prune_lab.distill.decoding import UNREADABLE, decode_image
from prune_lab.distill.image_source import ImageSource
from prune_lab.errors import DataError
from prune_lab.families import model_of
from prune_lab.families.drawing import class_numbers, text_length
from prune_lab.probes import (
    channels_of,
    class_count,
    encode_captions,
    encode_distributions,
    encode_pictures,
    note_cut,
    picture_names,
    picture_rows,
    picture_side,
    pipeline_conditions,
    rows_of_size,
    vae_of,
)
from prune_lab.runtime import generator_for, tensors_digest

CLASSES = "class_labels"  # the condition that a class is told as

# Images ----------------------------------------------------------------------------------------------------------


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


def encode_texts(
    pipeline: Any, captions: Sequence[str], size: Sequence[int], *, batch: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Text embeddings (N, L, D) of images of one ``size``, and by name what else of them the model is told: SDXL's
    text_embeds (N, P) and time_ids (N, 6), masks, classes.

    The size is (height, width) in pixels; ``probes.rows_of_size`` says what the model is told of it. The caption of a
    model of classes names one, "class 7". Raises DataError for one that does not.
    """
    embeddings, added = encode_captions(pipeline, captions, batch=batch)
    model, classes = model_of(pipeline), class_count(pipeline)
    sizes = rows_of_size(model, added, len(captions), size)
    if classes:
        labels = class_numbers(captions, classes, getattr(pipeline, "labels", None))
        added = {**added, CLASSES: torch.tensor(labels)}
    return embeddings, added | sizes


def encode_empty_caption(pipeline: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Embedding (L, D) of the empty caption, and what else of it the model is told, such as SDXL's text_embeds (P,).

    Of a model of classes nothing: there is no picture of none of them.
    """
    embeddings, added = encode_captions(pipeline, [""])
    return embeddings[0], {name: tensor[0] for name, tensor in added.items()}


def encode_conditions(
    pipeline: Any, images: Tensor, pairs: Sequence[tuple[int, int]], seed: int, *, batch: int
) -> dict[str, Tensor]:
    """What the model is shown of each of ``images`` (N, 3, H, W) in uint8, such as a mask; empty for most models.

    ``pairs`` are the row and the variant of each image. With ``seed`` they decide what is drawn for it, so each has a
    mask of its own, the same whenever it is encoded.
    """
    draws = [generator_for(seed, f"mask {row}", variant) for row, variant in pairs]
    return picture_rows(pipeline, pipeline_conditions(pipeline), images, draws, batch=batch)


_ENCODERS = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")


def encoder_weights(pipeline: Any) -> dict[str, Tensor]:
    """The weights of the VAE and the text encoders of ``pipeline`` by name; none of a model of pixels without text."""
    return {
        f"{part}.{name}": tensor
        for part in _ENCODERS
        if getattr(pipeline, part, None) is not None
        for name, tensor in getattr(pipeline, part).state_dict().items()
    }


def encoders_digest(pipeline: Any) -> str:
    """16 hexadecimal digits of the weights of VAE and text encoders, rounded to bfloat16, and of the scaling.

    Rounded, so that the digest is the same when the encoders were loaded in another number format. It still changes
    with any training, however short: some of a hundred million weights cross a rounding step.
    """
    rounded = {name: tensor.bfloat16() for name, tensor in encoder_weights(pipeline).items()}
    config: Any = getattr(vae_of(pipeline), "config", None)
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    scale, shift, *statistics = (getattr(config, name, None) for name in names)
    tokenizers = (getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2"))
    tokenizer = next(filter(None, tokenizers), None)  # the refiner has the second alone
    told = [*statistics, text_length(pipeline)]
    more = (scale, shift, getattr(tokenizer, "model_max_length", None), *filter(None, told))
    return hashlib.sha256(f"{tensors_digest(rounded)} {more}".encode()).hexdigest()[:16]


def conditions_text(pipeline: Any) -> str:
    """What the model is shown of each picture, by name; empty for most models."""
    return ", ".join(picture_names(pipeline_conditions(pipeline)))


def provenance_of(pipeline: Any, source: ImageSource, settings: DataConfig) -> dict[str, str | int]:
    """Everything that decides the numbers in a cache and their division into files, by name."""
    shown = conditions_text(pipeline)
    return {
        "encoders": encoders_digest(pipeline),
        **({"conditions": shown} if shown else {}),
        "precision": str((vae_of(pipeline) or model_of(pipeline)).dtype).removeprefix("torch."),
        "data": source.digest,
        "side": picture_side(pipeline),
        "crop": settings.crop,
        "flip": settings.flip,
        "variants": settings.num_variants,
        "seed": settings.seed if settings.crop == "random" or shown else 0,
        "format": settings.format,
        "shard": settings.shard,
    }


def key_of(provenance: Mapping[str, str | int]) -> str:
    """16 hexadecimal digits that change with anything in ``provenance``."""
    return hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()[:16]


# All in memory -----------------------------------------------------------------------------------------------------


def data_key(pipeline: Any, images: Tensor, captions: Sequence[str]) -> str:
    """16 hexadecimal digits that change with the encoders' weights, the images or the captions."""
    tensors = encoder_weights(pipeline) | {"pictures": images}  # the name counts: another changes every key
    digest = hashlib.sha256(tensors_digest(tensors).encode())
    digest.update(json.dumps(list(captions)).encode())
    digest.update(conditions_text(pipeline).encode())
    return digest.hexdigest()[:16]


def encode_data(pipeline: Any, images: Tensor, captions: Sequence[str], *, batch: int = 32) -> LatentData:
    """Latents and text embeddings of ``images`` (N, 3, H, W) in uint8 with one caption each.

    Latents are the mode of the VAE's distribution times its scaling factor. Raises DataError when the numbers of images
    and captions differ, or for images of another shape or type.
    """
    if len(images) != len(captions) or not len(captions):
        raise DataError(
            f"asked to encode {len(images)} images with {len(captions)} captions; give one caption per image"
        )
    latents = encode_pictures(pipeline, images, batch=batch)
    embeddings, added = encode_texts(pipeline, captions, images.shape[-2:], batch=batch)
    pairs = [(row, 0) for row in range(len(images))]
    added |= encode_conditions(pipeline, images, pairs, 0, batch=batch)
    empty, empty_added = encode_empty_caption(pipeline)
    key = data_key(pipeline, images, captions)
    return LatentData(latents, embeddings, empty, tuple(captions), added, empty_added, key)


def cached_data(path: Path, pipeline: Any, images: Tensor, captions: Sequence[str]) -> LatentData:
    """The result of ``encode_data``, read from ``path`` where that file holds the same images by the same encoders.

    Otherwise the images are encoded and the file is written.
    """
    if path.exists():
        data = LatentData.load(path)
        if data.key == data_key(pipeline, images, captions):
            return data
    data = encode_data(pipeline, images, captions)
    data.save(path)
    return data


# Without a cache -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class LiveData:
    """Training data that are encoded whenever they are asked for; equal to a float32 cache up to rounding."""

    pipeline: Any
    source: ImageSource
    settings: DataConfig
    variants: int  # crops and flips of each image
    channels: int  # of the latents
    digest: str  # of what decides the numbers, because none exist before they are asked for
    empty_embedding: Tensor
    empty_added: Mapping[str, Tensor]

    @classmethod
    def of(cls, pipeline: Any, source: ImageSource, settings: DataConfig) -> LiveData:
        """The images of ``source``, to be encoded by ``pipeline``."""
        key = key_of(provenance_of(pipeline, source, settings) | {"format": "none", "shard": 0})
        note_cut(pipeline, source.captions, "captions")
        channels = channels_of(pipeline)
        empty = encode_empty_caption(pipeline)
        return cls(pipeline, source, settings, settings.num_variants, channels, key, *empty)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def captions(self) -> tuple[str, ...]:
        """Caption of each row."""
        return self.source.captions

    @property
    def pictures(self) -> tuple[str, ...]:
        """Name of the image of each row: that of its file, whose content is not read for it."""
        return tuple(map(self.source.name, range(len(self.source))))

    def _pixels(self, row: int, variant: int) -> Tensor:
        try:
            image = decode_image(self.source.content(row))
        except UNREADABLE as error:
            raise DataError(
                f"asked to encode {self.source.name(row)}, found no readable image ({error}); remove it, or set "
                "data.cached = true, which leaves out unreadable images and counts them"
            ) from None
        return crop_variants(image, picture_side(self.pipeline), self.settings, row, (variant,))

    def rows(self, indices: Tensor, variants: Tensor) -> EncodedBatch:
        """The rows ``indices`` (B,) in ``variants`` (B,). Raises DataError that names an image that cannot be read."""
        pairs = list(zip(indices.tolist(), variants.tolist(), strict=True))
        pixels = torch.cat([self._pixels(row, variant) for row, variant in pairs])
        captions = [self.source.captions[row] for row in indices.tolist()]
        batch, seed = self.settings.batch, self.settings.seed
        embeddings, added = encode_texts(self.pipeline, captions, pixels.shape[-2:], batch=batch)
        added |= encode_conditions(self.pipeline, pixels, pairs, seed, batch=batch)
        return EncodedBatch(*encode_distributions(self.pipeline, pixels, batch=batch), embeddings, added)
