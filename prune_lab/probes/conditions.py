"""Rows of what a U-Net takes beside noisy latents, timestep and text: guidance, masks, pictures and sizes.

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
from prune_lab.families import REFINER_TIME_IDS, SDXL_TIME_IDS, Condition, known_conditions
from prune_lab.probes.latents import encode_pixels

# Guidance scales less one that LCM was trained with: uniform between these (arXiv:2310.04378, section 5.1).
GUIDANCE = (2.0, 14.0)
_AESTHETIC_SCORE = 6.0  # what SDXL's refiner is told by default
_ALL_MASKED = 0.25  # share of the pictures that Stable Diffusion's inpainting models were shown nothing of
_BOXES = 4  # in one mask, at most


def pipeline_conditions(pipeline: Any) -> tuple[Condition, ...]:
    """What the U-Net of ``pipeline`` takes beside noisy latents, timestep and text.

    Raises UnsupportedModelError where no rows of it are made here, or where the pipeline cannot give it to the U-Net.
    """
    found = known_conditions(pipeline.unet)
    for condition in found:
        if condition.giver and not hasattr(pipeline, condition.giver):
            raise UnsupportedModelError(
                f"asked for the inputs of the U-Net of a {type(pipeline).__name__}, found that it takes "
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


def drawn_rows(conditions: Sequence[Condition], count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """``count`` rows of each condition that needs no picture and is drawn anew for each row: the guidance.

    Uniform over the range that LCM was trained with. Nothing is drawn for a model without one.
    """
    rows = {}
    for condition in conditions:
        if condition.name == "guidance":
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
            f"asked for the size conditioning of a U-Net, found {left} channels for it beside pooled texts of width "
            f"{pooled.shape[-1]}; known are six numbers (SDXL) and five (its refiner)"
        )
    return torch.tensor([known[count]] * len(pooled), dtype=torch.float32)


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
    conditions: Sequence[Condition], latent: Sequence[int], count: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """``count`` rows for a U-Net without a pipeline, at a latent of height and width ``latent``.

    Masks and guidance are drawn as ever; what hangs on a picture is normal noise, as the latents are.
    """
    rows = drawn_rows(conditions, count, generator)
    for condition in conditions:
        if condition.name == "mask":
            rows["mask"] = torch.stack([draw_mask(latent, generator) for _ in range(count)])
        elif condition.of_picture:
            rows[condition.name] = torch.randn(count, *condition.row_shape(*latent), generator=generator)
    return rows
