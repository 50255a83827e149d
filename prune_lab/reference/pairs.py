"""What the reference U-Net is trained on: every picture's latent and every caption's embedding, made once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from prune_lab.reference.clip import tokens
from prune_lab.reference.steps import slices
from prune_lab.runtime import atomic_write


@dataclass(frozen=True, slots=True)
class CachedPairs:
    """What the U-Net is trained on: latents (N, C, h, w) and, by caption number, text embeddings (M, L, D).

    `full` and `plain` give a row's caption number with and without the style word; number 0 is the empty caption.
    `weight` is how often a row is drawn, relative to the others.
    """

    latents: torch.Tensor
    embeddings: torch.Tensor
    full: torch.Tensor
    plain: torch.Tensor
    weight: torch.Tensor

    def save(self, path: Path) -> None:
        """Write the tensors as safetensors; embeddings in float16, which the text tower ships in anyway."""
        tensors = {
            "latents": self.latents.contiguous(),
            "embeddings": self.embeddings.half().contiguous(),
            "full": self.full,
            "plain": self.plain,
            "weight": self.weight,
        }
        with atomic_write(path) as temporary:
            save_file(tensors, temporary)

    @classmethod
    def load(cls, path: Path) -> CachedPairs:
        """The pairs saved at `path`."""
        read = load_file(path)
        return cls(
            **{name: value.float() if value.is_floating_point() else value for name, value in read.items()}
        )


@torch.no_grad()
def embed_captions(
    tower: CLIPTextModel, tokenizer: CLIPTokenizer, captions: Sequence[str], batch: int = 256
) -> torch.Tensor:
    """Last hidden states (N, L, D), float32 on the CPU: what the pipeline's U-Net attends to."""
    ids = tokens(tokenizer, captions)
    parts = [
        tower(ids[part].to(tower.device)).last_hidden_state.float().cpu() for part in slices(len(ids), batch)
    ]
    return torch.cat(parts)


def cache_pairs(
    latents: torch.Tensor,
    captions: Sequence[str],
    plain: Sequence[str],
    weight: torch.Tensor,
    tower: CLIPTextModel,
    tokenizer: CLIPTokenizer,
) -> CachedPairs:
    """The training pairs of latents (N, C, h, w) with their captions, each distinct caption embedded once."""
    number = {caption: index for index, caption in enumerate(dict.fromkeys(["", *captions, *plain]))}
    return CachedPairs(
        latents=latents,
        embeddings=embed_captions(tower, tokenizer, list(number)),
        full=torch.tensor([number[caption] for caption in captions]),
        plain=torch.tensor([number[caption] for caption in plain]),
        weight=weight,
    )
