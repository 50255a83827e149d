"""The parts of a pipeline that draw a picture of a text: encoder, model and decoder, and what goes between them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.errors import BackendError
from prune_lab.families import conditions_of, family_of, latent_form, model_of
from prune_lab.families.drawing import call_inputs, draws_videos, text_length
from prune_lab.probes.latents import pixels_per_latent, scaling_of, vae_of
from prune_lab.runtime import seeded
from prune_lab.runtimes import Part, model_part, sizes_of

ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}
TEXT, DECODER = "text_encoder", "vae_decoder"
_STEPS = 25


@dataclass(frozen=True, slots=True, eq=False)
class Drawing:
    """What draws a picture of a text: the parts in order, and how ``generate.py`` puts them together."""

    parts: tuple[Part, Part, Part]
    tokenizers: Mapping[str, Any]  # by the name of their file
    told: Mapping[str, Any]  # what generate.py reads


def _refused(pipeline: Any, found: str) -> BackendError:
    return BackendError(
        f"asked to export a {type(pipeline).__name__} for another runtime, found {found}; known are pipelines that "
        "draw pictures of a text with one text encoder, or with two as SDXL: use it in diffusers"
    )


# Texts -------------------------------------------------------------------------------------------------------------


class _OneEncoder(nn.Module):
    """Numbers of words (B, L), and which of them count where the model asks -> text (B, L, D)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, *given: Tensor) -> Tensor:
        ids, *mask = given
        found: Tensor = self.encoder(ids, attention_mask=mask[0] if mask else None)[0]
        return found


class _TwoEncoders(nn.Module):
    """Numbers of words (B, L) for each encoder -> text (B, L, D1 + D2) before the last layers, pooled text (B, D)."""

    def __init__(self, encoders: list[nn.Module]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)

    def forward(self, *ids: Tensor) -> tuple[Tensor, Tensor]:
        found = [
            encoder(one, output_hidden_states=True) for encoder, one in zip(self.encoders, ids, strict=True)
        ]
        pooled = next(one[0] for one in found if one[0].ndim == 2)
        return torch.cat([one.hidden_states[-2] for one in found], dim=-1), pooled


def _length(pipeline: Any, tokenizer: Any) -> int:
    """Tokens of every text: what the pipeline asks for, or what the tokenizer says that its encoder takes."""
    return int(text_length(pipeline) or tokenizer.model_max_length)


def _text_part(pipeline: Any) -> tuple[Part, dict[str, Any], list[dict[str, Any]]]:
    """(part, tokenizers by the name of their file, what generate.py is told of each)."""
    encoders = {name: part for name in ENCODERS if (part := getattr(pipeline, name, None)) is not None}
    conditions = {one.name: one for one in conditions_of(model_of(pipeline))}
    masks = [name for name, one in conditions.items() if one.words]
    pooled = [name for name, one in conditions.items() if one.of_text and not one.words]  # masks are, too
    if len(encoders) != (2 if pooled else 1) or len(masks) > 1 or (masks and pooled):
        raise _refused(
            pipeline, f"{len(encoders)} text encoders that it reads in a way that is not known here"
        )
    if any(getattr(one.config, "use_attention_mask", False) for one in encoders.values()):
        raise _refused(pipeline, "a text encoder that is told which words count")
    tokenizers, told, inputs, lengths = {}, [], [], {}
    for number, name in enumerate(encoders):
        tokenizer = getattr(pipeline, ENCODERS[name])
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise _refused(
                pipeline, f"a {type(tokenizer).__name__}, which the tokenizers library does not run"
            )
        file, ids = f"{ENCODERS[name]}.json", "input_ids" if number == 0 else f"input_ids_{number + 1}"
        tokenizers[file], lengths[ids] = backend, _length(pipeline, tokenizer)
        inputs += [ids, *masks]
        told.append(
            {
                "file": file,
                "ids": ids,
                "mask": masks[0] if masks else "",
                "length": lengths[ids],
                "pad_id": tokenizer.pad_token_id,
                "pad_token": tokenizer.pad_token,
            }
        )
    first = next(iter(encoders.values()))
    words = int(getattr(first.config, "vocab_size", 2))

    def examples(batch: int, side: int | None) -> dict[str, Tensor]:
        del side  # texts have none
        found: dict[str, Tensor] = {}
        for ids, length in lengths.items():
            found[ids] = torch.randint(0, words, (batch, length), generator=seeded(0))
            if masks:
                found[masks[0]] = (
                    (torch.arange(length) < (length + 1) // 2).long().expand(batch, -1).contiguous()
                )
        return found

    module: nn.Module = _TwoEncoders(list(encoders.values())) if pooled else _OneEncoder(first)
    varying = {name: {0: "batch"} for name in inputs}
    part = Part(TEXT, module.float().eval(), tuple(inputs), ("text", *pooled), examples, varying)
    return part, tokenizers, told


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
        raise _refused(pipeline, "no VAE")

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
        raise _refused(pipeline, "that it draws videos, or no texts")
    if "image" in taken or "latents" not in taken:
        raise _refused(pipeline, "that it begins with a picture, not with noise")
    model = model_of(pipeline)
    others = [one.name for one in conditions_of(model) if not (one.words or one.of_text or one.of_size)]
    if others:
        raise _refused(pipeline, f"that its model takes {', '.join(others)} beside the text")
    if family_of(model).frames:
        raise _refused(pipeline, "that its model makes frames")
    text, tokenizers, told = _text_part(pipeline)
    predicting = model_part(model.float(), tokens=told[0]["length"])
    channels, height, width = latent_form(model)
    return Drawing(
        (text, predicting, _decoder_part(pipeline)),
        tokenizers,
        {
            "tokenizers": told,
            "texts": list(text.outputs),
            "zeros_for_no_text": bool(getattr(pipeline.config, "force_zeros_for_empty_prompt", False)),
            "latent": [channels, height, width],
            "pixels": pixels_per_latent(pipeline),
            "guidance": _guidance(pipeline),
            "steps": _STEPS,
        },
    )
