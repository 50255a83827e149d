"""Where the work of a run is done: in this process (or those of one ``accelerate launch``), or on a Ray cluster.

``engine.kind`` in the settings chooses a row of ``ENGINES``. All engines train the same steps on the same data, and
score and draw the same inputs. Rungs differ: the local engine compares all candidates of a rung at once, Ray as they
come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from prune_lab.blocks import BlockGroup
from prune_lab.candidates import Candidate
from prune_lab.engines import local, ray_driver
from prune_lab.engines.pictures import PictureJob, clip_of, draw_prompts, picture_frame
from prune_lab.engines.training import needs_scores, rungs_of
from prune_lab.importance import ImportanceTable
from prune_lab.ranking import Tournament
from prune_lab.session import Session


@dataclass(frozen=True, slots=True)
class Engine:
    """How candidates are trained, plans scored and pictures drawn."""

    train: Callable[[Session, Sequence[Candidate], Sequence[int]], Tournament]
    """Trains candidates to the last of the rungs, with fewer at each; with one rung nobody is dropped."""
    score: Callable[[Session, Sequence[BlockGroup]], ImportanceTable]
    """The impact of groups by the run's criterion on its probe, without intervals."""
    draw: Callable[[Session, Sequence[PictureJob]], Iterable[Tensor]]
    """The pictures of each job, uint8 (prompts x seeds, 3, H, W)."""


ENGINES: dict[str, Engine] = {
    "local": Engine(local.train, local.score_groups, local.draw),
    "ray": Engine(ray_driver.train, ray_driver.score_groups, ray_driver.draw),
}


def engine_of(session: Session) -> Engine:
    """The engine that the run's settings name."""
    return ENGINES[session.config.engine.kind]


__all__ = [
    "ENGINES",
    "Engine",
    "PictureJob",
    "clip_of",
    "draw_prompts",
    "engine_of",
    "needs_scores",
    "picture_frame",
    "rungs_of",
]
