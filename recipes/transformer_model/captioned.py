"""Latents with the states of their captions, as the pipeline gives them to its transformer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import CLIPTextModel, CLIPTokenizer

from recipes.reference_model.captions import CaptionedLatents, embed_tokens


def real_tokens(ids: torch.Tensor, end: int) -> torch.Tensor:
    """Mask (N, L), 1 up to the first `end` of token ids (N, L) and 0 behind: the tokenizer's own attention mask."""
    ends = ids == end
    return (ends.cumsum(1) - ends.long() == 0).long()


@dataclass(frozen=True, slots=True)
class Captioned:
    """Latents with caption numbers, and the states (M, L, D) and masks (M, L) of the captions.

    The states are those that the text encoder gives without a mask: it reads from left to right, so the padding behind
    a caption changes nothing in front of it, and the transformer sees nothing of the padding.
    """

    data: CaptionedLatents
    text: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, data: CaptionedLatents, encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> Captioned:
        """The same with what the encoder makes of the captions."""
        assert tokenizer.pad_token_id == tokenizer.eos_token_id  # else the mask would end too late
        return cls(data, embed_tokens(encoder, data.ids), real_tokens(data.ids, tokenizer.eos_token_id))
