"""The local engine: this process, or all processes of one ``accelerate launch``, which train together."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor

from prune_lab.blocks import BlockGroup
from prune_lab.candidates import Candidate
from prune_lab.engines.pictures import PictureJob, clip_of, draw_set
from prune_lab.engines.training import controls_among, heldout_losses_after, train_to
from prune_lab.importance import ImportanceTable, score
from prune_lab.processes import is_main
from prune_lab.ranking import HeldoutLosses, Tournament, run_tournament
from prune_lab.runtime import note, track
from prune_lab.session import Session, run_scoring_context


def _clip_scores_now(session: Session, candidates: Sequence[Candidate]) -> dict[str, NDArray[np.float64]]:
    """CLIP score of every prompt and seed, drawn with the averaged weights, by plan id.

    One process draws, and all get its scores, so that all decide alike.
    """
    found = {}
    for one in candidates if is_main() else ():
        scores = clip_of(session, draw_set(session, one, "distilled"))
        found[one.plan.id] = scores.double().numpy()
    first: dict[str, NDArray[np.float64]] = gather_object([found])[0]
    return first


def train(session: Session, candidates: Sequence[Candidate], rungs: Sequence[int]) -> Tournament:
    """The tournament of ``candidates``, trained together from rung to rung; paired held-out losses decide.

    Candidates that are kept go on from their state. An interrupted tournament resumes: losses that were measured at a
    rung are read, and the same decisions follow. With one rung no candidate is dropped.
    """
    named, several = {one.plan.id: one for one in candidates}, len(rungs) > 1

    def chosen(names: Collection[str]) -> list[Candidate]:
        return [named[name] for name in names]

    def measure(names: Sequence[str], steps: int) -> Mapping[str, HeldoutLosses]:
        if several:
            note(f"rung of {steps} steps: {len(names)} candidates")
        train_to(session, chosen(names), steps, keep_checkpoint=several)
        return heldout_losses_after(chosen(names), steps)

    settings = session.config.rank
    return run_tournament(
        list(named),
        rungs,
        max(1, settings.eta),
        measure,
        keep=controls_among(session, candidates),
        clip_scores=(lambda names, _steps: _clip_scores_now(session, chosen(names)))
        if settings.clip and session.scorer_choice.text
        else None,
    )


def score_groups(session: Session, groups: Sequence[BlockGroup]) -> ImportanceTable:
    """The scores of ``groups`` by the run's criterion on its probe, without intervals."""
    return score(run_scoring_context(session), groups, session.config.score.criterion, bootstrap=0)


def draw(session: Session, jobs: Sequence[PictureJob]) -> Iterator[Tensor]:
    """The pictures of each of ``jobs``, uint8 (prompts x seeds, 3, H, W)."""
    for job in track(jobs, "drawing for each model"):
        yield draw_set(session, job.candidate, job.state)
