"""The steps of a run, each done once: ``prune-lab run`` does all in order, the other verbs one at a time.

Every ``ensure_*`` function returns the result of its step. It reads what is there where its manifest holds: the files
are those that the step wrote, from what is there now. Otherwise it computes and writes them, so the same command again
resumes. There are no algorithms here: a step reads files, calls a
function of another module and writes files. They share a ``Session``, so that the model is
loaded once.
"""

from __future__ import annotations

from prune_lab.session import Session
from prune_lab.workflow.comparing import block_maps, compared_plans, compared_with, comparison, kind_of_target
from prune_lab.workflow.consistent import distil_consistent
from prune_lab.workflow.criteria import compared_criteria
from prune_lab.workflow.distilling import (
    distilled_notes,
    ensure_distilled,
    recovery_frame,
    save_students,
    student_folders,
)
from prune_lab.workflow.doctoring import diagnosis, is_well
from prune_lab.workflow.estimating import RunEstimate, estimate, macs_per_second
from prune_lab.workflow.exploring import (
    choices_frame,
    picture_changes,
    rungs_frame,
    surprises_frame,
    wider_frame,
)
from prune_lab.workflow.few_steps import StepsAsked, StepsFound, compare_steps, is_of_steps, steps_work
from prune_lab.workflow.measuring import ensure_scores, scores_frame
from prune_lab.workflow.narrowing import Narrowing, levels_frame, narrow, stage_channels
from prune_lab.workflow.pipeline import run_all, steps_frame
from prune_lab.workflow.ranking import ensure_ranking, quality, quality_frame, written_report
from prune_lab.workflow.searching import (
    ensure_plans,
    goes_by,
    plan_named,
    plan_notes,
    plans_frame,
    timed_plans,
)
from prune_lab.workflow.sizing import settings_for
from prune_lab.workflow.starting import borrow_scores, check_effect, forget, start_run, use_scores
from prune_lab.workflow.steps import why_left_out
from prune_lab.workflow.students import ensure_candidates, ensure_repaired
from prune_lab.workflow.targets import check_budgets, check_controls, check_drawing
from prune_lab.workflow.widths import check_unit_criterion, ensure_width_scores, score_notes, width_frame

__all__ = [
    "Narrowing",
    "RunEstimate",
    "Session",
    "StepsAsked",
    "StepsFound",
    "block_maps",
    "borrow_scores",
    "check_budgets",
    "check_controls",
    "check_drawing",
    "check_effect",
    "check_unit_criterion",
    "choices_frame",
    "compare_steps",
    "compared_criteria",
    "compared_plans",
    "compared_with",
    "comparison",
    "diagnosis",
    "distil_consistent",
    "distilled_notes",
    "ensure_candidates",
    "ensure_distilled",
    "ensure_plans",
    "ensure_ranking",
    "ensure_repaired",
    "ensure_scores",
    "ensure_width_scores",
    "estimate",
    "forget",
    "goes_by",
    "is_of_steps",
    "is_well",
    "kind_of_target",
    "levels_frame",
    "macs_per_second",
    "narrow",
    "picture_changes",
    "plan_named",
    "plan_notes",
    "plans_frame",
    "quality",
    "quality_frame",
    "recovery_frame",
    "run_all",
    "rungs_frame",
    "save_students",
    "score_notes",
    "scores_frame",
    "settings_for",
    "stage_channels",
    "start_run",
    "steps_frame",
    "steps_work",
    "student_folders",
    "surprises_frame",
    "timed_plans",
    "use_scores",
    "why_left_out",
    "wider_frame",
    "width_frame",
    "written_report",
]
