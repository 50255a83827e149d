"""The parts of a pipeline that draw a picture of a text: encoder, model and decoder, and what goes between them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.export.edge.texts import refused, texts_of
from prune_lab.families import conditions_of, family_of, latent_form, model_of
from prune_lab.families.drawing import call_inputs, draws_videos, latents_per_halving, latents_per_patch
from prune_lab.probes.latents import pixels_per_latent, scaling_of, vae_of
from prune_lab.runtime import seeded
from prune_lab.runtimes import Part, model_part, sizes_of

DECODER = "vae_decoder"
_STEPS = 25


@dataclass(frozen=True, slots=True, eq=False)
class Drawing:
    """What draws a picture of a text: the parts in order, and how ``generate.py`` puts them together."""

    parts: tuple[Part, Part, Part]
    tokenizers: Mapping[str, Any]  # by the name of their file
    told: Mapping[str, Any]  # what generate.py reads


# Pictures ----------------------------------------------------------------------------------------------------------


class _Decoding(nn.Module):
    """Latents (B, C, h, w) as the model sees them -> pictures (B, 3, H, W) from 0 to 1."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.scale: Tensor
        self.shift: Tensor
        scale, shift = scaling_of(vae)
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float32))
        self.register_buffer("shift", torch.as_tensor(shift, dtype=torch.float32))

    def forward(self, *given: Tensor) -> Tensor:
        [latents] = given
        found: Tensor = self.vae.decode(latents / self.scale + self.shift, return_dict=False)[0]
        return (found / 2 + 0.5).clamp(0, 1)


def _decoder_part(pipeline: Any) -> Part:
    vae, model = vae_of(pipeline), model_of(pipeline)
    if vae is None:
        raise refused(pipeline, "no VAE")

    def examples(batch: int, side: int | None) -> dict[str, Tensor]:
        return {"latents": torch.randn(batch, *latent_form(model, side), generator=seeded(1))}

    return Part(
        DECODER,
        _Decoding(vae).float().eval(),
        ("latents",),
        ("pictures",),
        examples,
        {"latents": sizes_of(examples(1, 8)["latents"])},
    )


# All of it ---------------------------------------------------------------------------------------------------------


def _guidance(pipeline: Any) -> float:
    """How much guidance ``pipeline`` draws with where nobody says."""
    found = call_inputs(pipeline).get("guidance_scale")
    return float(found.default) if found is not None and found.default is not inspect.Parameter.empty else 1.0


def drawing_of(pipeline: Any) -> Drawing:
    """What ``pipeline``, in float32, draws pictures of texts with.

    Raises BackendError for a pipeline that draws in another way than ``generate.py`` does.
    """
    taken = call_inputs(pipeline)
    if "prompt" not in taken or draws_videos(pipeline):
        raise refused(pipeline, "that it draws videos, or no texts")
    if "image" in taken or "latents" not in taken:
        raise refused(pipeline, "that it begins with a picture, not with noise")
    model = model_of(pipeline)
    inside = "true_cfg_scale" in taken  # FLUX's: what guidance_scale says is a number that the model takes
    others = [
        one.name
        for one in conditions_of(model)
        if not (one.words or one.of_text or one.of_size or (inside and one.name == "guidance"))
    ]
    if others:
        raise refused(pipeline, f"that its model takes {', '.join(others)} beside the text")
    if family_of(model).frames:
        raise refused(pipeline, "that its model makes frames")
    texts = texts_of(pipeline)
    predicting = model_part(model.float(), tokens=texts.tokens)
    channels, height, width = latent_form(model)
    pixels = pixels_per_latent(pipeline)
    return Drawing(
        (texts.part, predicting, _decoder_part(pipeline)),
        texts.tokenizers,
        {
            "tokenizers": texts.told,
            "texts": list(texts.part.outputs),
            "zeros_for_no_text": bool(getattr(pipeline.config, "force_zeros_for_empty_prompt", False)),
            "latent": [channels, height, width],
            "pixels": pixels,
            "multiple": pixels * math.lcm(latents_per_patch(pipeline), latents_per_halving(model)),
            "guidance": _guidance(pipeline),
            "guided_inside": inside,
            "steps": _STEPS,
        },
    )
