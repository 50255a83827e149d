"""Criteria on whole trajectories: what changes in the latents and pictures that the pipeline draws without a group.

One trajectory per group, prompt and seed gives all of them: whichever is asked for, the values of the others are kept
in the cache beside it. They see errors add up over the steps, and cost as much as drawing all the pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from prune_lab.blocks import BlockGroup
from prune_lab.errors import DataError
from prune_lab.evaluation import clip_scores, decode_latents, draw_latents
from prune_lab.importance.cache import set_key
from prune_lab.importance.context import GenerationSettings, SampleScores, ScoringContext, checked
from prune_lab.plans import gone_with
from prune_lab.prefix_sharing import ComputeCost
from prune_lab.runtime import track
from prune_lab.surgery import bypassed

_ROWS = 8  # pictures at a time
_LEVELS = 255.0


def latent_change(teacher: Tensor, pruned: Tensor) -> Tensor:
    """(N,) how far the mean and the spread of each latent (N, C, h, w) moved: the norms over channels, added up."""
    moved = [
        statistic(pruned.double().flatten(2), -1) - statistic(teacher.double().flatten(2), -1)
        for statistic in (torch.mean, torch.std)
    ]
    return torch.stack([one.norm(dim=1) for one in moved]).sum(0)


def picture_change(teacher: Tensor, pruned: Tensor) -> Tensor:
    """(N,) mean squared change of uint8 pictures (N, 3, H, W), of pixels in 0..1; PSNR is -10 log10 of it."""
    return ((pruned.double() - teacher.double()) / _LEVELS).square().flatten(1).mean(1)


def psnr(change: float) -> float:
    """The peak signal-to-noise ratio in dB of a mean squared change of pixels in 0..1; infinite for none."""
    return -10 * math.log10(change) if change > 0 else math.inf


def with_psnr(scores: pd.DataFrame) -> pd.DataFrame:
    """Rows of ``ImportanceTable.frame``, with a column psnr in dB where ``image-change`` is among the criteria."""
    drawn = scores["criterion"] == "image-change"
    if not drawn.any():
        return scores
    return scores.assign(psnr=scores["impact"].where(drawn).map(psnr, na_action="ignore"))


def _draw(
    context: ScoringContext, drawing: GenerationSettings, gone: Sequence[str], compute: ComputeCost
) -> Tensor:
    batch = context.batch or _ROWS
    with bypassed(context.unet, gone, stand_in=True) as unet:
        latents = draw_latents(
            drawing.pipeline,
            drawing.prompts,
            drawing.seeds,
            steps=drawing.steps,
            guidance=drawing.guidance,
            unet=unet,
            batch=batch,
        )
    compute.forward_macs = context.architecture.total_macs
    # A bypassed block saves a little, which is not taken off.
    compute.macs += compute.forward_macs * drawing.forwards
    return latents


def _compare(
    drawing: GenerationSettings, teacher: tuple[Tensor, Tensor], latents: Tensor
) -> dict[str, np.ndarray]:
    pictures = decode_latents(drawing.pipeline, latents)
    found = {
        "latent-shift": latent_change(teacher[0], latents).numpy(),
        "image-change": picture_change(teacher[1], pictures).numpy(),
    }
    if drawing.scorer is not None:
        prompts = [prompt for prompt in drawing.prompts for _ in drawing.seeds]
        before, after = (clip_scores(drawing.scorer, one, prompts) for one in (teacher[1], pictures))
        found["clip-score"] = (before - after).double().numpy()
    return found


def _by_trajectory(criterion: str, context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    drawing = context.drawn(criterion)
    if criterion == "clip-score" and drawing.scorer is None:
        raise DataError(
            "clip-score needs a CLIP model that judges the pictures; name one (reference, a folder, a hub id)"
        )
    # The probe's digest says nothing about pictures.
    samples, cache = drawing.samples, context.cache.for_inputs(drawing.digest)
    rows, compute = len(samples), ComputeCost(forward_macs=context.architecture.total_macs)
    keys = [set_key(gone_with(context.architecture, group.blocks, stand_in=True)) for group in groups]
    missing = {
        key: group
        for key, group in zip(keys, groups, strict=True)
        if np.isnan(cache.values(criterion, key, rows)).any()
    }
    if missing:
        latents = _draw(context, drawing, (), compute)
        teacher = (latents, decode_latents(drawing.pipeline, latents))
        for key, group in track(missing.items(), "drawing without each group", len(missing)):
            found = _compare(drawing, teacher, _draw(context, drawing, group.blocks, compute))
            for name, values in found.items():
                checked(values[None], [group.name], name)
                cache.put(name, key, rows, slice(None), values)
            cache.save(now=False)
    values = np.stack([cache.values(criterion, key, rows) for key in keys])
    return SampleScores(values, np.ones(rows), samples, compute)


def latent_shift(context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    """How far mean and spread of the final latents move, per channel over each latent's pixels.

    Measures: what is left of an error at the end of a trajectory, without decoding or judging pictures.
    Reads as: in units of the latents' own spread (about 1): 0.1, a tenth of it.
    Misleads when: content moves without a change of mean and spread: another picture with the same colours scores 0.
    Statistics are of each latent, not of the set as in the paper, so that every trajectory is a sample.
    Cost: a trajectory for each group, prompt and seed: steps forward passes, twice with guidance.
    Reference: LD-Pruner, arXiv:2404.11936.
    """
    return _by_trajectory("latent-shift", context, groups)


def clip_score(context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    """Drop of the CLIP score of the drawn pictures, a cosine.

    Measures: what a CLIP model misses in pictures drawn without the group.
    Reads as: 0, the prompts are met as before; negative, better than before.
    Misleads when: prompts are few, since the score of one picture is noisy; the scorer judges what it was trained on,
    and a drop of quality that it does not see costs nothing.
    Cost: as latent-shift, and a decoding and a CLIP pass for each picture.
    Reference: BK-SDM, arXiv:2305.15798 (ECCV 2024), footnote 1 and its block-level sensitivity analysis.
    """
    return _by_trajectory("clip-score", context, groups)


def image_change(context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    """Mean squared change of the drawn pictures, pixels in 0..1; PSNR in dB is -10 log10 of the impact.

    Measures: how different the picture of the same prompt and seed is.
    Reads as: 0.01 is a PSNR of 20 dB: another picture; 0.0001, 40 dB: hard to see.
    Misleads when: pictures may be as good and different: early steps decide the layout, and any push changes it.
    Cost: as latent-shift, and a decoding for each picture.
    Reference: PSNR between pictures of one seed, as reports on quantised diffusion models give it.
    """
    return _by_trajectory("image-change", context, groups)
