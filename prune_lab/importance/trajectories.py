"""Criteria on whole trajectories: the change of the final latents and of the generated images without a group.

One trajectory per group, prompt and seed gives all of them: whichever criterion is asked for, the values of the others
are put into the cache too. They include the errors that add up over the steps, and cost as much as generating all the
images.
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
from prune_lab.evaluation import clip_scores, generate
from prune_lab.importance.cache import set_key
from prune_lab.importance.context import GenerationSettings, SampleScores, ScoringContext, require_finite
from prune_lab.plans import gone_with
from prune_lab.prefix_sharing import ComputeCost
from prune_lab.probes import decode_latents
from prune_lab.runtime import track
from prune_lab.surgery import bypassed

_ROWS = 8  # images per batch if the context does not say
_LEVELS = 255.0


def latent_change(teacher: Tensor, pruned: Tensor) -> Tensor:
    """(N,) change of the mean and of the standard deviation of each latent (N, C, h, w).

    Each is the norm over channels of the change of that statistic over the latent's pixels; the two are added.
    """
    changes = [
        statistic(pruned.double().flatten(2), -1) - statistic(teacher.double().flatten(2), -1)
        for statistic in (torch.mean, torch.std)
    ]
    return torch.stack([one.norm(dim=1) for one in changes]).sum(0)


def pixel_mse(teacher: Tensor, pruned: Tensor) -> Tensor:
    """(N,) mean squared difference of uint8 images (N, 3, H, W), pixels scaled to 0..1; PSNR is -10 log10 of it."""
    return ((pruned.double() - teacher.double()) / _LEVELS).square().flatten(1).mean(1)


def psnr(mse: float) -> float:
    """The peak signal-to-noise ratio in dB for a mean squared error of pixels in 0..1; infinite for 0."""
    return -10 * math.log10(mse) if mse > 0 else math.inf


def with_psnr(scores: pd.DataFrame) -> pd.DataFrame:
    """``scores`` (as ``ImportanceTable.frame``), with a column psnr in dB if ``image-change`` is among the criteria."""
    of_images = scores["criterion"] == "image-change"
    if not of_images.any():
        return scores
    return scores.assign(psnr=scores["impact"].where(of_images).map(psnr, na_action="ignore"))


def _latents_without(
    context: ScoringContext, generation: GenerationSettings, removed: Sequence[str], compute: ComputeCost
) -> Tensor:
    with bypassed(context.model, removed, stand_in=True) as model:
        latents = generate(
            generation.pipeline,
            generation.prompts,
            generation.seeds,
            steps=generation.steps,
            guidance=generation.guidance,
            model=model,
            batch=context.batch or _ROWS,
            latents=True,
        )
    compute.forward_macs = context.architecture.total_macs
    compute.macs += compute.forward_macs * generation.forwards  # what the bypassed blocks save is ignored
    return latents


def _measure(
    generation: GenerationSettings, teacher: tuple[Tensor, Tensor], latents: Tensor
) -> dict[str, np.ndarray]:
    """(samples,) values by criterion of ``latents``, compared with the latents and images of ``teacher``."""
    images = decode_latents(generation.pipeline, latents)
    values = {
        "latent-shift": latent_change(teacher[0], latents).numpy(),
        "image-change": pixel_mse(teacher[1], images).numpy(),
    }
    if generation.scorer is not None:
        prompts = [prompt for prompt in generation.prompts for _ in generation.seeds]
        before, after = (clip_scores(generation.scorer, one, prompts) for one in (teacher[1], images))
        values["clip-score"] = (before - after).double().numpy()
    return values


def _by_trajectory(criterion: str, context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    generation = context.generation_for(criterion)
    if criterion == "clip-score" and generation.scorer is None:
        raise DataError(
            "clip-score needs a CLIP model that scores the images; name one (reference, a folder, a hub id)"
        )
    # The context's cache is for the probe, but these values depend on prompts, seeds and sampler settings.
    samples, cache = generation.samples, context.cache.for_inputs(generation.digest)
    rows, compute = len(samples), ComputeCost(forward_macs=context.architecture.total_macs)
    keys = [set_key(gone_with(context.architecture, group.blocks, stand_in=True)) for group in groups]
    missing = {
        key: group
        for key, group in zip(keys, groups, strict=True)
        if np.isnan(cache.values(criterion, key, rows)).any()
    }
    if missing:
        latents = _latents_without(context, generation, (), compute)
        teacher = (latents, decode_latents(generation.pipeline, latents))
        for key, group in track(missing.items(), "generating without each group", len(missing)):
            latents = _latents_without(context, generation, group.blocks, compute)
            for name, values in _measure(generation, teacher, latents).items():
                require_finite(values[None], [group], name)
                cache.put(name, key, rows, slice(None), values)
            cache.save(now=False)
    values = np.stack([cache.values(criterion, key, rows) for key in keys])
    return SampleScores(values, np.ones(rows), samples, compute)


def latent_shift(context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    """Change of the mean and standard deviation of the final latents, per channel over each latent's pixels.

    Measures: the error at the end of a trajectory, without decoding or scoring images.
    Reads as: in units of the latents' standard deviation, which is about 1.
    Misleads when: the content changes but mean and deviation do not: another image with the same colours scores 0.
    Statistics are of each latent, not of the whole set as in the paper, so that every trajectory is a sample.
    Cost: a trajectory for each group, prompt and seed: a forward pass per step, two with guidance.
    Reference: LD-Pruner, arXiv:2404.11936.
    """
    return _by_trajectory("latent-shift", context, groups)


def clip_score(context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    """Decrease of the CLIP score (a cosine) of the generated images.

    Measures: how much worse the images match their prompts without the group, as a CLIP model sees it.
    Reads as: 0, they match as well as before; negative, better than before.
    Misleads when: prompts are few, because the score of one image is noisy; or when quality drops in a way that the
    CLIP model does not see.
    Cost: as latent-shift, and a decoding and a CLIP pass for each image.
    Reference: BK-SDM, arXiv:2305.15798 (ECCV 2024), footnote 1 and its block-level sensitivity analysis.
    """
    return _by_trajectory("clip-score", context, groups)


def image_change(context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    """Mean squared change of the generated images, pixels in 0..1; PSNR in dB is -10 log10 of the impact.

    Measures: how different the image of the same prompt and seed is.
    Reads as: 0.01 is a PSNR of 20 dB, a different image; 0.0001 is 40 dB, hard to see.
    Misleads when: images are different but equally good: early steps decide the layout, and small changes alter it.
    Cost: as latent-shift, and a decoding for each image.
    Reference: PSNR between images of one seed, as reports on quantised diffusion models give it.
    """
    return _by_trajectory("image-change", context, groups)
