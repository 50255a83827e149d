"""What the text encoder and the U-Net are trained on: every picture's latent, and its caption in two wordings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from prune_lab.runtime import atomic_write
from recipes.reference_model.clip import tokens
from recipes.reference_model.steps import slices

_NO_CAPTION = 0.1  # share of pictures drawn without a caption, for classifier-free guidance
_STYLELESS = 0.1  # share of captions drawn without their style word


@dataclass(frozen=True, slots=True)
class CaptionedLatents:
    """Latents (N, C, h, w) of pictures and, by caption number, the token ids (M, L) of every wording.

    `full` and `plain` give a row's caption number with and without the style word; number 0 is the empty caption.
    `weight` is how often a row is drawn, relative to the others.
    """

    latents: torch.Tensor
    ids: torch.Tensor
    full: torch.Tensor
    plain: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def of(
        cls,
        latents: torch.Tensor,
        captions: Sequence[str],
        plain: Sequence[str],
        weight: torch.Tensor,
        tokenizer: CLIPTokenizer,
    ) -> CaptionedLatents:
        """The latents with their captions, each distinct wording kept once."""
        number = {caption: index for index, caption in enumerate(dict.fromkeys(["", *captions, *plain]))}
        return cls(
            latents=latents,
            ids=tokens(tokenizer, list(number)),
            full=torch.tensor([number[caption] for caption in captions]),
            plain=torch.tensor([number[caption] for caption in plain]),
            weight=weight,
        )

    def draw(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """(size,) rows by weight, and (size,) numbers of the captions they are shown with."""
        rows = torch.multinomial(self.weight, size, replacement=True, generator=generator)
        share = torch.rand(size, generator=generator)
        caption = torch.where(share < _NO_CAPTION + _STYLELESS, self.plain[rows], self.full[rows])
        return rows, caption.masked_fill(share < _NO_CAPTION, 0)

    def save(self, path: Path) -> None:
        """Write the tensors as safetensors."""
        tensors = {name: getattr(self, name).contiguous() for name in CaptionedLatents.__slots__}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary)

    @classmethod
    def load(cls, path: Path) -> CaptionedLatents:
        """The latents saved at `path`."""
        return cls(**load_file(path))


@torch.no_grad()
def embed_tokens(tower: CLIPTextModel, ids: torch.Tensor, batch: int = 256) -> torch.Tensor:
    """Last hidden states (M, L, D) of token ids (M, L), float32 on the CPU: what the pipeline's U-Net attends to."""
    parts = [
        tower(ids[part].to(tower.device)).last_hidden_state.float().cpu() for part in slices(len(ids), batch)
    ]
    return torch.cat(parts)
