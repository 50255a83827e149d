"""Who is better at equal effort: paired comparisons, the tournament that saves effort, and the order of everyone.

Differences are paired over common random numbers (the same held-out pictures, noise and timesteps for everyone), and
an order that their intervals do not support is called a tie.
"""

from __future__ import annotations

from prune_lab.ranking.halving import (
    Fate,
    HeldoutLosses,
    Tournament,
    Verdict,
    first_rung,
    play,
    rungs,
    tournament_from_frame,
)
from prune_lab.ranking.paired import Difference, paired_difference, tie_groups
from prune_lab.ranking.places import (
    Contender,
    Origin,
    Place,
    Ranking,
    Status,
    pareto_front,
    rank,
    ranking_from_frame,
)

__all__ = [
    "Contender",
    "Difference",
    "Fate",
    "HeldoutLosses",
    "Origin",
    "Place",
    "Ranking",
    "Status",
    "Tournament",
    "Verdict",
    "first_rung",
    "paired_difference",
    "pareto_front",
    "play",
    "rank",
    "ranking_from_frame",
    "rungs",
    "tie_groups",
    "tournament_from_frame",
]
