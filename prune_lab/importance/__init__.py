"""What a group of blocks is worth: criteria, scores with intervals, and how far a score can be trusted."""

from __future__ import annotations

from prune_lab.importance.agreement import (
    AGREEMENT_COLUMNS,
    STABILITY_COLUMNS,
    additivity,
    agreement,
    conclusions,
    foretold,
    random_plans,
    stability,
    steadiness,
)
from prune_lab.importance.cache import ScoreCache
from prune_lab.importance.criteria import CRITERIA, DRAWING, WALKED, Criterion, check_race, criterion_named
from prune_lab.importance.measured import Drawing, Measured, Samples, Subject
from prune_lab.importance.racing import Race
from prune_lab.importance.scoring import score, score_groups
from prune_lab.importance.tables import (
    COLUMNS,
    PARTS_COLUMNS,
    Importance,
    ImportanceTable,
    importance_from_frame,
)
from prune_lab.importance.trajectories import with_psnr

__all__ = [
    "AGREEMENT_COLUMNS",
    "COLUMNS",
    "CRITERIA",
    "DRAWING",
    "PARTS_COLUMNS",
    "STABILITY_COLUMNS",
    "WALKED",
    "Criterion",
    "Drawing",
    "Importance",
    "ImportanceTable",
    "Measured",
    "Race",
    "Samples",
    "ScoreCache",
    "Subject",
    "additivity",
    "agreement",
    "check_race",
    "conclusions",
    "criterion_named",
    "foretold",
    "importance_from_frame",
    "random_plans",
    "score",
    "score_groups",
    "stability",
    "steadiness",
    "with_psnr",
]
