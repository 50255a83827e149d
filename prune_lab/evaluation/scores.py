"""CLIP embeddings and scores of pictures and their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prune_lab.errors import DataError
from prune_lab.models import ScorerInputs
from prune_lab.probes import (
    cut_texts,
)


def clip_embeddings(
    scorer: tuple[Any, ScorerInputs], pictures: Tensor, prompts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """The CLIP embeddings, of length one, of each image and its prompt, (N, D) float32 on the CPU, in one pass.

    ``scorer`` is what ``models.load_scorer`` returns, ``pictures`` are images uint8 (N, 3, H, W).
    """
    model, inputs = scorer
    with torch.inference_mode():
        embedded = model(
            pixel_values=inputs.pictures(pictures, model.device),
            **inputs.captions(cut_texts(prompts), model.device),
        )
        # The model has normalised both embeddings.
        return embedded.image_embeds.float().cpu(), embedded.text_embeds.float().cpu()


def clip_scores(
    scorer: tuple[Any, ScorerInputs], pictures: Tensor, prompts: Sequence[str], *, batch: int = 64
) -> Tensor:
    """Cosine between the CLIP embeddings of each image and its prompt, (N,) float32 on the CPU.

    ``scorer`` is what ``models.load_scorer`` returns, ``pictures`` are images uint8 (N, 3, H, W). As in BK-SDM, the
    cosine is not multiplied by 100 and not clipped at zero. Misleads when: compared between scorers.
    Raises DataError when the numbers of images and prompts differ.
    """
    if len(pictures) != len(prompts):
        raise DataError(
            f"asked to score {len(pictures)} images against {len(prompts)} prompts; give one prompt for each image"
        )
    scores = [torch.empty(0)]
    for start in range(0, len(prompts), batch):
        rows = slice(start, start + batch)
        images, texts = clip_embeddings(scorer, pictures[rows], prompts[rows])
        scores.append((images * texts).sum(dim=-1))
    return torch.cat(scores)
