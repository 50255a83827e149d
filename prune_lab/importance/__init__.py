"""The importance of groups of blocks: criteria, scores with intervals, and how reliable a score is."""

from __future__ import annotations

from prune_lab.importance.agreement import (
    additivity,
    agreement,
    describe_agreement,
    describe_stability,
    predictive_correlation,
    random_plans,
    stability,
)
from prune_lab.importance.cache import ScoreCache
from prune_lab.importance.context import GenerationSettings, Samples, SampleScores, ScoringContext
from prune_lab.importance.criteria import (
    CRITERIA,
    NEEDS_PIPELINE,
    ONE_STEP,
    check_race,
    criterion_named,
)
from prune_lab.importance.racing import Race
from prune_lab.importance.scoring import score
from prune_lab.importance.tables import Importance, ImportanceTable, importance_from_frame
from prune_lab.importance.trajectories import with_psnr
from prune_lab.importance.unit_scores import (
    UNIT_CRITERIA,
    UnitScores,
    score_units,
    unit_impacts_from,
    width_scores_frame,
)
from prune_lab.importance.untrained import untrained, untrained_like

__all__ = [
    "CRITERIA",
    "NEEDS_PIPELINE",
    "ONE_STEP",
    "UNIT_CRITERIA",
    "GenerationSettings",
    "Importance",
    "ImportanceTable",
    "Race",
    "SampleScores",
    "Samples",
    "ScoreCache",
    "ScoringContext",
    "UnitScores",
    "additivity",
    "agreement",
    "check_race",
    "criterion_named",
    "describe_agreement",
    "describe_stability",
    "importance_from_frame",
    "predictive_correlation",
    "random_plans",
    "score",
    "score_units",
    "stability",
    "unit_impacts_from",
    "untrained",
    "untrained_like",
    "width_scores_frame",
    "with_psnr",
]
