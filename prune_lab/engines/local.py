"""The local engine: this process, or all processes of one ``accelerate launch``, which train together."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor

from prune_lab.blocks import BlockGroup
from prune_lab.candidates import Candidate
from prune_lab.engines.pictures import PictureJob, clip_of, draw_job
from prune_lab.engines.training import controls_among, heldout_losses_after, train_to
from prune_lab.importance import ImportanceTable, score
from prune_lab.processes import is_main
from prune_lab.ranking import HeldoutLosses, Tournament, run_tournament
from prune_lab.runtime import note, track
from prune_lab.session import Session, run_scoring_context


def _clip_scores_now(session: Session, candidates: Sequence[Candidate]) -> dict[str, NDArray[np.float64]]:
    """CLIP score of every prompt and seed, drawn with the averaged weights as they are now, by plan id.

    One process draws for all, so that all decide alike.
    """
    found = {}
    for one in candidates if is_main() else ():
        scores = clip_of(session, draw_job(session, one, "distilled"))
        found[one.plan.id] = scores.double().numpy()
    first: dict[str, NDArray[np.float64]] = gather_object([found])[0]
    return first


def train(session: Session, candidates: Sequence[Candidate], rungs: Sequence[int]) -> Tournament:
    """Train ``candidates`` together from rung to rung; who was kept where, by paired differences in held-out loss.

    Those that go on do so from their state. An interrupted tournament goes on where it was: what was measured at a rung
    is read, and the same is decided again. With one rung nobody is dropped.
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
        if settings.clip
        else None,
    )


def score_groups(session: Session, groups: Sequence[BlockGroup]) -> ImportanceTable:
    """What each of ``groups`` is worth by the run's criterion on its probe, without intervals."""
    return score(run_scoring_context(session), groups, session.config.score.criterion, bootstrap=0)


def draw(session: Session, jobs: Sequence[PictureJob]) -> Iterator[Tensor]:
    """The pictures of each of ``jobs``, uint8 (prompts x seeds, 3, H, W)."""
    for job in track(jobs, "drawing for each model"):
        yield draw_job(session, job.candidate, job.state)
