"""How alike pictures are, in the eyes of the model that judges them against prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from prune_lab.models import ScorerInputs


def picture_embeddings(scorer: tuple[Any, ScorerInputs], pictures: Tensor, *, batch: int = 64) -> Tensor:
    """The embedding of each of ``pictures`` (N, 3, H, W) uint8, of length 1, (N, D) float32 on the CPU."""
    model, inputs = scorer
    found = [torch.empty(0, int(model.config.projection_dim))]
    with torch.inference_mode():
        for start in range(0, len(pictures), batch):
            pixels = inputs.pictures(pictures[start : start + batch], model.device)
            pooled = model.vision_model(pixel_values=pixels).pooler_output
            found.append(normalize(model.visual_projection(pooled), dim=-1).float().cpu())
    return torch.cat(found)


def likeness(scorer: tuple[Any, ScorerInputs], pictures: Tensor, others: Tensor) -> Tensor:
    """Mean cosine of each of ``pictures`` with all ``others``, by their embeddings, (N,) float32 on the CPU.

    As the CLIP-I score of DreamBooth (arXiv:2208.12242). Misleads when: compared between scorers; and backgrounds count
    as much as what stands before them.
    """
    return (picture_embeddings(scorer, pictures) @ picture_embeddings(scorer, others).T).mean(dim=1)
