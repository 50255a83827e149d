"""What is scored, on which samples, and what a criterion found there: the nouns that all criteria share."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from diffusers import ModelMixin
from numpy.typing import NDArray

from prune_lab.blocks import Architecture, architecture_of
from prune_lab.errors import DataError
from prune_lab.importance.cache import ScoreCache
from prune_lab.models import ScorerInputs
from prune_lab.prefix_sharing import ComputeCost
from prune_lab.probes import Probe


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """What the columns of a criterion's values were measured on, R of them.

    ``pictures`` (R,) says which samples belong together: they come and go as one in the bootstrap. ``timesteps`` (R,)
    is None where a sample has none (a whole trajectory, a weight); ``prompts`` (R,) is the kind of prompt.
    """

    pictures: NDArray[np.int64]
    timesteps: NDArray[np.int64] | None = None
    prompts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pictures)

    @classmethod
    def of(cls, probe: Probe) -> Samples:
        """The rows of a probe."""
        return cls(probe.pictures.numpy(), probe.timesteps.numpy(), probe.groups)

    def rows(self, wanted: NDArray[np.int64]) -> Samples:
        """These samples alone, in this order."""
        times = None if self.timesteps is None else self.timesteps[wanted]
        return Samples(self.pictures[wanted], times, tuple(self.prompts[row] for row in wanted))


@dataclass(frozen=True, slots=True, eq=False)
class SampleScores:
    """What a criterion found: ``values`` (G, R) per group and sample, relative to ``scales`` (R,).

    The impact of a group is the sum of its values over the sum of the scales. A value that was not measured is NaN:
    see ``intervals.impacts_of``.
    """

    values: NDArray[np.float64]
    scales: NDArray[np.float64]
    samples: Samples
    compute: ComputeCost


@dataclass(frozen=True, slots=True, eq=False)
class GenerationSettings:
    """How pictures are drawn and judged, for the criteria that look at pictures."""

    pipeline: Any
    prompts: tuple[str, ...]
    kinds: tuple[str, ...] = ()  # of the prompts, one each; none: all the same
    seeds: tuple[int, ...] = (0,)
    steps: int = 25
    guidance: float = 7.5
    scorer: tuple[Any, ScorerInputs] | None = None  # as `models.load_scorer` gives it
    scorer_name: str = ""

    def __post_init__(self) -> None:
        if self.kinds and len(self.kinds) != len(self.prompts):
            raise DataError(
                f"asked to draw {len(self.prompts)} prompts, found {len(self.kinds)} kinds; give one for each, or none"
            )

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of everything but the pipeline's own weights."""
        how = [self.prompts, self.seeds, self.steps, self.guidance, self.scorer_name]
        how.append(dict(self.pipeline.scheduler.config) if self.pipeline is not None else None)
        return hashlib.sha256(json.dumps(how, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @property
    def forwards(self) -> int:
        """Forward passes of one sample through the U-Net that all its pictures take."""
        return len(self.prompts) * len(self.seeds) * self.steps * (2 if self.guidance > 1 else 1)

    @property
    def samples(self) -> Samples:
        """One sample per prompt and seed; those of one prompt belong together."""
        kinds = self.kinds or ("",) * len(self.prompts)
        order = np.arange(len(self.prompts)).repeat(len(self.seeds))
        return Samples(order, None, tuple(kinds[prompt] for prompt in order))


@dataclass(frozen=True, eq=False)  # no slots: the architecture is kept in the instance
class ScoringContext:
    """A U-Net and what it is asked: everything that a criterion needs to know."""

    unet: ModelMixin
    probe: Probe
    batch: int | None = None  # rows at a time; None: as many as fit into memory
    seed: int = 0
    drawing: GenerationSettings | None = None
    guidance: float = 1.0  # scale of classifier-free guidance in the predictions that are compared; 1: none
    unconditional: Probe | None = None  # the probe with the empty caption, which guidance needs
    cache: ScoreCache = field(default_factory=ScoreCache)
    compiled: bool = False  # whether output criteria walk blocks that torch.compile has seen

    def __post_init__(self) -> None:
        if (self.guidance == 1) != (self.unconditional is None):
            found = "no" if self.unconditional is None else "a"
            raise DataError(
                f"asked to score with guidance {self.guidance:g}, found {found} probe with the empty caption to guide "
                "away from; give one (a whole pipeline encodes it) exactly where guidance is not 1"
            )

    @cached_property
    def architecture(self) -> Architecture:
        """The inventory of the U-Net."""
        return architecture_of(self.unet)

    def drawn(self, criterion: str) -> GenerationSettings:
        """How to draw pictures; DataError when nobody has said so."""
        if self.drawing is None:
            raise DataError(
                f"{criterion} draws pictures, and there is no pipeline to draw them with; give a whole pipeline "
                "(reference, a pipeline folder or a hub id) with prompts, or another criterion"
            )
        return self.drawing


def checked(values: NDArray[np.float64], names: list[str], criterion: str) -> NDArray[np.float64]:
    """``values`` (G, R); DataError naming the first of the groups ``names`` whose values are not finite."""
    for name, row in zip(names, values, strict=True):
        bad = int((~np.isfinite(row)).sum())
        if bad:
            raise DataError(
                f"asked for {criterion} of {name}, found values that are not finite in {bad} of {len(row)} "
                "samples; score in float32, or check the weights"
            )
    return values
