"""Rows of what a model takes beside noisy latents, timestep and text: guidance, masks, pictures and sizes.

They are those that the pipeline gives it while it draws. Rows that hang on a picture are made once for each picture;
the guidance is drawn anew for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prune_lab.errors import UnsupportedModelError
from prune_lab.families import REFINER_TIME_IDS, SDXL_TIME_IDS, STEPS, Condition, known_conditions, model_of
from prune_lab.probes.latents import encode_pixels

# Guidance scales less one that LCM was trained with: uniform between these (arXiv:2310.04378, section 5.1).
GUIDANCE = (2.0, 14.0)
_AESTHETIC_SCORE = 6.0  # what SDXL's refiner is told by default
_ALL_MASKED = 0.25  # share of the pictures that Stable Diffusion's inpainting models were shown nothing of
_BOXES = 4  # in one mask, at most


def pipeline_conditions(pipeline: Any) -> tuple[Condition, ...]:
    """What the model of ``pipeline`` takes beside noisy latents, timestep and text.

    Raises UnsupportedModelError where no rows of it are made here, or where the pipeline cannot give it to the model.
    """
    found = known_conditions(model_of(pipeline))
    for condition in found:
        if condition.giver and not hasattr(pipeline, condition.giver):
            raise UnsupportedModelError(
                f"asked for the inputs of the model of a {type(pipeline).__name__}, found that it takes "
                f"{condition.name.replace('_', ' ')}, which a pipeline of this class does not give it; "
                "name the class that the model was made for in model_index.json"
            )
    return found


# Without a picture -----------------------------------------------------------------------------------------------


def guidance_embedding(scales: Tensor, width: int) -> Tensor:
    """(N, width) float32: sines and cosines of the guidance ``scales`` (N,), which are those of a sampler less one.

    As LCM's pipelines and diffusers' ``get_guidance_scale_embedding`` compute them.
    """
    half = width // 2
    rates = torch.exp(
        torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1))
    )
    angles = (scales.float() * 1000.0)[:, None] * rates[None, :]
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


def drawn_rows(
    conditions: Sequence[Condition], count: int, generator: torch.Generator, *, length: int = STEPS
) -> dict[str, Tensor]:
    """``count`` rows of each condition that needs no picture and is made anew for each row.

    Embedded guidance is uniform over the range that LCM was trained with, a class any of all; a number that a pipeline
    gives by default is that, and the number of timesteps ``length``. Nothing is drawn for a model without any.
    """
    rows = {}
    for condition in conditions:
        if condition.place == "schedule":
            rows[condition.name] = torch.full((count, *condition.shape), length)
        elif condition.value is not None:
            form = torch.int64 if condition.whole else torch.float32
            rows[condition.name] = torch.full((count, *condition.shape), condition.value, dtype=form)
        elif condition.classes:
            rows[condition.name] = torch.randint(condition.classes, (count,), generator=generator)
        elif condition.place == "timestep_cond":
            low, high = GUIDANCE
            scales = low + (high - low) * torch.rand(count, generator=generator)
            rows[condition.name] = guidance_embedding(scales, condition.shape[0])
    return rows


def size_rows(config: Mapping[str, Any], pooled: Tensor, size: Sequence[int]) -> Tensor:
    """(N, 6) of SDXL for N pooled texts (N, P): original size, crop corner and target size of pictures of one ``size``.

    (N, 5) for its refiner: an aesthetic score in place of the target size. The size is (height, width) in pixels, and
    the corner says that nothing was cropped: students should not learn to draw cropped pictures.
    Raises UnsupportedModelError for any other number.
    """
    height, width = size
    left = int(config["projection_class_embeddings_input_dim"]) - pooled.shape[-1]
    count, rest = divmod(left, int(config["addition_time_embed_dim"]))
    known = {
        SDXL_TIME_IDS: (height, width, 0, 0, height, width),
        REFINER_TIME_IDS: (height, width, 0, 0, _AESTHETIC_SCORE),
    }
    if rest or count not in known:
        raise UnsupportedModelError(
            f"asked for the size conditioning of a model, found {left} channels for it beside pooled texts of width "
            f"{pooled.shape[-1]}; known are six numbers (SDXL) and five (its refiner)"
        )
    return torch.tensor([known[count]] * len(pooled), dtype=torch.float32)


# What a condition says of a picture of so many pixels in height and width.
_OF_SIZE: Mapping[str, Callable[[int, int], tuple[float, ...]]] = {
    "resolution": lambda height, width: (height, width),
    "aspect_ratio": lambda height, width: (height / width,),
    "original_size": lambda height, width: (height, width),
    "target_size": lambda height, width: (height, width),
    "crop_coords": lambda height, width: (0, 0),
    "image_meta_size": lambda height, width: (height, width, height, width, 0, 0),
}


def rows_of_size(
    source: Any, given: Mapping[str, Tensor], count: int, size: Sequence[int]
) -> dict[str, Tensor]:
    """``count`` rows of each condition of ``source``, a model or a config, that tells the size of the picture.

    ``given`` holds the conditions that come with the text, ``size`` is (height, width) in pixels. Empty for a model
    that is not told. Raises UnsupportedModelError for numbers that are not known.
    """
    rows = {}
    for condition in known_conditions(source):
        if not condition.of_size:
            continue
        if condition.name == "time_ids":
            config = source if isinstance(source, Mapping) else source.config
            rows[condition.name] = size_rows(config, given["text_embeds"], size)
        else:
            numbers = _OF_SIZE[condition.name](*size)
            rows[condition.name] = torch.tensor([numbers] * count, dtype=torch.float32)
    return rows


# Of pictures -----------------------------------------------------------------------------------------------------


def draw_mask(size: Sequence[int], generator: torch.Generator) -> Tensor:
    """(1, height, width) of ones, where a picture of this ``size`` is hidden, and zeros: one to four boxes, or all.

    Each side of a box is an eighth to a half of the picture's; one mask of four hides everything. Both are drawn, as
    Stable Diffusion's inpainting models were trained on drawn masks with a quarter that hide everything.
    """
    mask = torch.zeros(1, *size)
    if float(torch.rand((), generator=generator)) < _ALL_MASKED:
        return mask + 1
    for _ in range(int(torch.randint(1, _BOXES + 1, (), generator=generator))):
        part = []
        for side in size:
            draws = torch.rand(2, generator=generator).tolist()
            length = max(1, round(side * (1 / 8 + draws[0] * 3 / 8)))
            start = int(draws[1] * (side - length + 1))
            part.append(slice(start, start + length))
        mask[:, part[0], part[1]] = 1
    return mask


def _masked(
    pipeline: Any, pixels: Tensor, generators: Sequence[torch.Generator], batch: int
) -> dict[str, Tensor]:
    """Rows mask (N, 1, h, w) and masked_latents (N, C, h, w), scaled, of pixels (N, 3, H, W) from -1 to 1.

    As inpainting pipelines make them, with grey where the mask is; they draw from the VAE's distribution, and here it
    is its mode, so that one picture always gives one row.
    """
    masks = torch.stack([draw_mask(pixels.shape[-2:], generator) for generator in generators])
    latents = encode_pixels(pipeline, pixels * (masks < 0.5), batch=batch)
    return {"mask": F.interpolate(masks, size=latents.shape[-2:]), "masked_latents": latents}


def _shown(
    pipeline: Any, pixels: Tensor, generators: Sequence[torch.Generator], batch: int
) -> dict[str, Tensor]:
    """Rows picture_latents (N, C, h, w) of pixels (N, 3, H, W) from -1 to 1: the picture itself is what is edited.

    Not scaled, as instruct-pix2pix takes them; a CosXL-Edit pipeline scales them.
    """
    scaled = bool(getattr(pipeline, "is_cosxl_edit", False))
    return {"picture_latents": encode_pixels(pipeline, pixels, batch=batch, scaled=scaled)}


# By the first name of what is made together.
_MAKERS: Mapping[str, Callable[[Any, Tensor, Sequence[torch.Generator], int], dict[str, Tensor]]] = {
    "mask": _masked,
    "picture_latents": _shown,
}


def picture_names(conditions: Sequence[Condition]) -> tuple[str, ...]:
    """Names of the conditions of which a row is made of each picture."""
    return tuple(condition.name for condition in conditions if condition.of_picture)


def picture_rows(
    pipeline: Any,
    conditions: Sequence[Condition],
    pictures: Tensor,
    generators: Sequence[torch.Generator],
    *,
    batch: int = 16,
) -> dict[str, Tensor]:
    """A row of each picture condition for each of ``pictures`` (N, 3, H, W) uint8; masks are drawn by ``generators``.

    Empty for a model that is shown nothing of the picture. Raises DataError for values that are not finite.
    """
    rows: dict[str, Tensor] = {}
    for name in picture_names(conditions):
        if name in _MAKERS:
            rows |= _MAKERS[name](pipeline, pictures.float() / 127.5 - 1, generators, batch)
    return rows


# Of noise --------------------------------------------------------------------------------------------------------


def noise_rows(
    conditions: Sequence[Condition], latent: Sequence[int], words: int, count: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """``count`` rows for a model without a pipeline, at a latent of this height and width and a text of ``words``.

    Masks of pictures and guidance are drawn as ever, no word is masked; what hangs on a picture or a text is normal
    noise, as the latents are.
    """
    rows = drawn_rows(conditions, count, generator)
    for condition in conditions:
        if condition.name == "mask":
            rows["mask"] = torch.stack([draw_mask(latent, generator) for _ in range(count)])
        elif condition.words:
            rows[condition.name] = torch.ones(count, words, dtype=torch.int64)
        elif condition.of_picture or condition.of_text:
            rows[condition.name] = torch.randn(count, *condition.row_shape(*latent), generator=generator)
    return rows
