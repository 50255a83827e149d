"""The table of criteria: functions of one signature, (context, groups) -> values per group and sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prune_lab.blocks import BlockGroup
from prune_lab.errors import ConfigError, UnknownCriterionError
from prune_lab.importance.activations import similarity
from prune_lab.importance.context import SampleScores, ScoringContext
from prune_lab.importance.gates import gate_fisher, gate_gradient, gate_path
from prune_lab.importance.outputs import denoising_loss, output_cosine, output_mse
from prune_lab.importance.trajectories import clip_score, image_change, latent_shift
from prune_lab.importance.untrained import architecture_prior
from prune_lab.importance.weights import magnitude, random_scores, taylor

Criterion = Callable[[ScoringContext, Sequence[BlockGroup]], SampleScores]

CRITERIA: dict[str, Criterion] = {
    "output-mse": output_mse,
    "output-cosine": output_cosine,
    "denoising-loss": denoising_loss,
    "latent-shift": latent_shift,
    "clip-score": clip_score,
    "image-change": image_change,
    "magnitude": magnitude,
    "taylor": taylor,
    "gate-gradient": gate_gradient,
    "gate-fisher": gate_fisher,
    "gate-path": gate_path,
    "similarity": similarity,
    "architecture-prior": architecture_prior,
    "random": random_scores,
}
ONE_STEP = frozenset({"output-mse", "output-cosine", "denoising-loss"})
"""The criteria on the prediction of one denoising step; one computation gives all of them."""
NEEDS_PIPELINE = frozenset({"latent-shift", "clip-score", "image-change"})
"""The criteria that generate images, and so need a whole pipeline."""


def criterion_named(name: str) -> Criterion:
    """The criterion called ``name``. Raises UnknownCriterionError, which lists the known names."""
    try:
        return CRITERIA[name]
    except KeyError:
        raise UnknownCriterionError(
            f"no criterion is called {name!r}; choose one of: {', '.join(CRITERIA)}"
        ) from None


def check_race(name: str) -> None:
    """Raise ConfigError when the criterion called ``name`` is not one of ``ONE_STEP``, which measure single samples."""
    if name not in ONE_STEP:
        raise ConfigError(
            f"asked to race by {name}, which does not measure single samples; race by {', '.join(sorted(ONE_STEP))}, "
            "or score without a race"
        )
