"""Comparing candidates after equal training: paired differences, the tournament that saves training, the ranking.

Differences are paired over common random numbers (the same held-out pictures, noise and timesteps for all candidates).
Where the interval of a difference contains zero, the two candidates are tied.
"""

from __future__ import annotations

from prune_lab.ranking.halving import (
    HeldoutLosses,
    Tournament,
    Verdict,
    first_rung,
    run_tournament,
    rungs,
    tournament_from_frame,
)
from prune_lab.ranking.paired import Difference, paired_difference, tie_groups
from prune_lab.ranking.results import CandidateResult, Ranking, rank, ranking_from_frame

__all__ = [
    "CandidateResult",
    "Difference",
    "HeldoutLosses",
    "Ranking",
    "Tournament",
    "Verdict",
    "first_rung",
    "paired_difference",
    "rank",
    "ranking_from_frame",
    "run_tournament",
    "rungs",
    "tie_groups",
    "tournament_from_frame",
]
