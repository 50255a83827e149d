"""The text encoders of a pipeline as one part: numbers of words in, text out, put together as its class does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.errors import BackendError
from prune_lab.families import conditions_of, family_of, model_of, text_form
from prune_lab.families.drawing import text_length
from prune_lab.runtime import seeded
from prune_lab.runtimes import Part

ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}
TEXT = "text_encoder"


def refused(pipeline: Any, found: str) -> BackendError:
    """The error that names ``pipeline`` and what was ``found`` in it."""
    return BackendError(
        f"asked to export a {type(pipeline).__name__} for another runtime, found {found}; known are pipelines that "
        "draw pictures of a text with one text encoder, or with more as SDXL, SD3 and FLUX: use it in diffusers"
    )


# Put together ------------------------------------------------------------------------------------------------------


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


class _ThreeEncoders(nn.Module):
    """SD3's: numbers of words (B, L) for two of CLIP and, where there is one, (B, M) for T5 -> text (B, L + M, D), the
    pooled texts of CLIP (B, D1 + D2). Without T5 its ``words`` are zeros, as in diffusers.
    """

    def __init__(self, encoders: list[nn.Module], words: int, width: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.words, self.width = words, width

    def forward(self, *ids: Tensor) -> tuple[Tensor, Tensor]:
        found = [
            encoder(one, output_hidden_states=True)
            for encoder, one in zip(self.encoders[:2], ids[:2], strict=True)
        ]
        clip = torch.cat([one.hidden_states[-2] for one in found], dim=-1)
        clip = nn.functional.pad(clip, (0, self.width - clip.shape[-1]))
        if len(self.encoders) > 2:
            more = self.encoders[2](ids[2])[0]
        else:
            more = clip.new_zeros(clip.shape[0], self.words, self.width)
        return torch.cat([clip, more], dim=-2), torch.cat([one[0] for one in found], dim=-1)


class _PooledAndLong(nn.Module):
    """FLUX's: numbers of words (B, L) for CLIP and (B, M) for T5 -> text of T5 (B, M, D), pooled of CLIP (B, D1)."""

    def __init__(self, encoders: list[nn.Module]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)

    def forward(self, *ids: Tensor) -> tuple[Tensor, Tensor]:
        clip, long = self.encoders
        return long(ids[1])[0], clip(ids[0]).pooler_output


_CLIP, _PROJECTED, _T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
_KNOWN: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "in a row": ((_PROJECTED, _PROJECTED), (_PROJECTED, _PROJECTED, _T5)),
    "pooled beside": ((_CLIP, _T5),),
}
"""By how the family joins texts, where that is otherwise than SDXL's: the encoders that are known."""

# The part ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """The part that encodes texts, and what goes before it."""

    part: Part
    tokenizers: Mapping[str, Any]  # by the name of their file
    told: list[dict[str, Any]]  # what generate.py reads of each
    tokens: int  # of the text that the model is given


def _encoders(pipeline: Any, joins: str, masks: list[str], pooled: list[str]) -> dict[str, Any]:
    """The text encoders of ``pipeline`` by name. Raises BackendError where they are not known."""
    encoders = {name: part for name in ENCODERS if (part := getattr(pipeline, name, None)) is not None}
    kinds = tuple(type(one).__name__ for one in encoders.values())
    known = kinds in _KNOWN[joins] if joins in _KNOWN else len(encoders) == (2 if pooled else 1)
    if not known or len(masks) > 1 or (masks and pooled):
        raise refused(
            pipeline, f"{len(encoders)} text encoders that it reads in a way that is not known here"
        )
    if any(getattr(one.config, "use_attention_mask", False) for one in encoders.values()):
        raise refused(pipeline, "a text encoder that is told which words count")
    return encoders


def _joined(
    model: nn.Module, encoders: list[nn.Module], lengths: list[int], long: int, pooled: list[str]
) -> tuple[nn.Module, int]:
    """(``encoders`` as one module, tokens of its text), by ``lengths`` of each one's; ``long``: those asked of T5."""
    joins = family_of(model).joins
    if joins == "in a row":
        after = lengths[2] if len(encoders) > 2 else long
        return _ThreeEncoders(encoders, after, text_form(model)[1]), lengths[0] + after
    if joins == "pooled beside":
        return _PooledAndLong(encoders), lengths[1]
    return (_TwoEncoders(encoders) if pooled else _OneEncoder(encoders[0])), lengths[0]


def texts_of(pipeline: Any) -> Texts:
    """What encodes the texts of ``pipeline``. Raises BackendError where that is not known here."""
    model = model_of(pipeline)
    joins = family_of(model).joins
    conditions = conditions_of(model)
    masks = [one.name for one in conditions if one.words]
    pooled = [one.name for one in conditions if one.of_text and not one.words]  # masks are, too
    encoders = _encoders(pipeline, joins, masks, pooled)
    long = text_length(pipeline)
    tokenizers, told, inputs, words = {}, [], [], {}
    for number, (name, encoder) in enumerate(encoders.items()):
        tokenizer = getattr(pipeline, ENCODERS[name])
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise refused(
                pipeline, f"a {type(tokenizer).__name__}, which the tokenizers library does not run"
            )
        file, ids = f"{ENCODERS[name]}.json", "input_ids" if number == 0 else f"input_ids_{number + 1}"
        tokenizers[file], words[ids] = backend, int(getattr(encoder.config, "vocab_size", 2))
        inputs += [ids, *masks]
        # where T5 reads beside CLIP, its texts alone are as long as the pipeline is told
        asks = joins not in _KNOWN or type(encoder).__name__ == _T5
        length = int((asks and long) or tokenizer.model_max_length)
        told.append(
            {
                "file": file,
                "ids": ids,
                "mask": masks[0] if masks else "",
                "length": length,
                "pad_id": tokenizer.pad_token_id,
                "pad_token": tokenizer.pad_token,
            }
        )
    lengths = {one["ids"]: one["length"] for one in told}

    def examples(batch: int, side: int | None) -> dict[str, Tensor]:
        del side  # texts have none
        found: dict[str, Tensor] = {}
        for ids, length in lengths.items():
            found[ids] = torch.randint(0, words[ids], (batch, length), generator=seeded(0))
            if masks:
                found[masks[0]] = (
                    (torch.arange(length) < (length + 1) // 2).long().expand(batch, -1).contiguous()
                )
        return found

    joined, tokens = _joined(model, list(encoders.values()), list(lengths.values()), int(long or 0), pooled)
    varying = {name: {0: "batch"} for name in inputs}
    part = Part(TEXT, joined.float().eval(), tuple(inputs), ("text", *pooled), examples, varying)
    return Texts(part, tokenizers, told, tokens)
