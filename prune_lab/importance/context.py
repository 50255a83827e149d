"""The data types that all criteria share: the model and inputs to score, the samples, and the values per sample."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from diffusers import ModelMixin

from prune_lab.blocks import Architecture, BlockGroup, architecture_of
from prune_lab.errors import DataError
from prune_lab.families import model_of, takes_guidance
from prune_lab.importance.cache import ScoreCache
from prune_lab.importance.intervals import Floats, Integers
from prune_lab.models import ScorerInputs
from prune_lab.prefix_sharing import ComputeCost
from prune_lab.probes import Probe


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """The R samples that a criterion was measured on: the columns of its values.

    ``pictures`` (R,) numbers the picture or prompt of each sample. The bootstrap resamples pictures, so all samples of
    one picture are drawn together. ``timesteps`` (R,) is None where samples have no timestep (whole trajectories,
    weights). ``prompts`` (R,) is the kind of prompt of each sample.
    """

    pictures: Integers
    timesteps: Integers | None = None
    prompts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pictures)

    @classmethod
    def of(cls, probe: Probe) -> Samples:
        """The rows of a probe."""
        return cls(probe.pictures.numpy(), probe.timesteps.numpy(), probe.groups)

    def rows(self, index: Integers) -> Samples:
        """The samples ``index``, in that order."""
        timesteps = None if self.timesteps is None else self.timesteps[index]
        return Samples(self.pictures[index], timesteps, tuple(self.prompts[row] for row in index))


@dataclass(frozen=True, slots=True, eq=False)
class SampleScores:
    """The result of a criterion: ``values`` (G, R) for G groups and R samples, and ``scales`` (R,).

    The impact of a group is the sum of its values divided by the sum of the scales. A value that was not measured is
    NaN; ``intervals.impacts_of`` estimates the impact from the others.
    """

    values: Floats
    scales: Floats
    samples: Samples
    compute: ComputeCost


@dataclass(frozen=True, slots=True, eq=False)
class GenerationSettings:
    """How images are generated and scored, for the criteria that need a pipeline."""

    pipeline: Any
    prompts: tuple[str, ...]
    kinds: tuple[str, ...] = ()  # the kind of each prompt; empty: all are of one kind
    seeds: tuple[int, ...] = (0,)
    steps: int = 25
    guidance: float = 7.5
    scorer: tuple[Any, ScorerInputs] | None = None  # as `models.load_scorer` returns it
    scorer_name: str = ""

    def __post_init__(self) -> None:
        if self.kinds and len(self.kinds) != len(self.prompts):
            raise DataError(
                f"asked to generate images of {len(self.prompts)} prompts, found {len(self.kinds)} kinds of prompt; "
                "give one for each prompt, or none"
            )

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of all settings except the pipeline's weights."""
        settings = [self.prompts, self.seeds, self.steps, self.guidance, self.scorer_name]
        settings.append(dict(self.pipeline.scheduler.config) if self.pipeline is not None else None)
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @property
    def forwards(self) -> int:
        """Forward passes of the model (of one sample each) that one set of all images takes."""
        twice = self.guidance > 1 and not takes_guidance(model_of(self.pipeline))
        return len(self.prompts) * len(self.seeds) * self.steps * (2 if twice else 1)

    @property
    def samples(self) -> Samples:
        """One sample per prompt and seed, prompt by prompt; samples of one prompt are resampled together."""
        kinds = self.kinds or ("",) * len(self.prompts)
        order = np.arange(len(self.prompts)).repeat(len(self.seeds))
        return Samples(order, None, tuple(kinds[prompt] for prompt in order))


@dataclass(frozen=True, eq=False)  # no slots: the architecture is kept in the instance
class ScoringContext:
    """A model with the inputs and settings to score it on: everything that a criterion needs.

    Criteria run the model on its own device and in its own number format, and leave it as it was.
    """

    model: ModelMixin
    probe: Probe
    batch: int | None = None  # rows at a time; None: as many as fit into memory
    seed: int = 0
    generation: GenerationSettings | None = None  # for the criteria that generate images
    guidance: float = 1.0  # of classifier-free guidance in the predictions that are compared; 1: none
    unconditional: Probe | None = None  # the probe with the empty caption, needed for guidance
    cache: ScoreCache = field(default_factory=ScoreCache)
    compiled: bool = False  # whether criteria of one step run the blocks through torch.compile

    def __post_init__(self) -> None:
        self.cache.keep_for(self.model)
        if (self.guidance == 1) != (self.unconditional is None):
            found = "no" if self.unconditional is None else "a"
            raise DataError(
                f"asked to score with guidance {self.guidance:g}, found {found} probe with the empty caption; guidance "
                "needs one (a whole pipeline encodes it), and without guidance (1) there must be none"
            )

        if self.guidance != 1 and takes_guidance(self.model):
            raise DataError(
                f"asked to score with guidance {self.guidance:g}, found a model that takes the guidance as an input "
                "and was distilled to need no other; set score.guidance = 1"
            )

    @cached_property
    def architecture(self) -> Architecture:
        """The inventory of the model."""
        return architecture_of(self.model)

    def generation_for(self, criterion: str) -> GenerationSettings:
        """The settings to generate images with. Raises DataError, which names ``criterion``, when there are none."""
        if self.generation is None:
            raise DataError(
                f"{criterion} generates images, and there is no pipeline for that; give a whole pipeline "
                "(reference, a pipeline folder or a hub id) with prompts, or choose another criterion"
            )
        return self.generation


def require_finite(values: Floats, groups: Sequence[BlockGroup], criterion: str) -> Floats:
    """``values`` (G, R) unchanged. Raises DataError naming the first of ``groups`` (G) with one that is not finite."""
    for group, row in zip(groups, values, strict=True):
        bad = int((~np.isfinite(row)).sum())
        if bad:
            raise DataError(
                f"asked for {criterion} of {group.name}, found values that are not finite in {bad} of {len(row)} "
                "samples; score in float32, or check the weights"
            )
    return values
