"""The folder of a run: where its files lie, how it is opened, and how what was written is read back."""

from __future__ import annotations

from prune_lab.runs.lock import check_free, writing
from prune_lab.runs.manifest_files import Part
from prune_lab.runs.manifests import GIVEN, Manifests, Verdict
from prune_lab.runs.opening import FORMAT, load_run_config, open_run
from prune_lab.runs.paths import CandidatePaths, PathIn, Run, is_plan_id
from prune_lab.runs.plan_files import (
    PlanFile,
    check_plan_file,
    listed_plans,
    place_of,
    plan_file,
    plan_id_of,
    read_plan_file,
    those_in,
    told_plan_id,
)
from prune_lab.runs.records import damaged, read_picture, read_records, read_typed, run_around, typed

__all__ = [
    "FORMAT",
    "GIVEN",
    "CandidatePaths",
    "Manifests",
    "Part",
    "PathIn",
    "PlanFile",
    "Run",
    "Verdict",
    "check_free",
    "check_plan_file",
    "damaged",
    "is_plan_id",
    "listed_plans",
    "load_run_config",
    "open_run",
    "place_of",
    "plan_file",
    "plan_id_of",
    "read_picture",
    "read_plan_file",
    "read_records",
    "read_typed",
    "run_around",
    "those_in",
    "told_plan_id",
    "typed",
    "writing",
]
