"""The session of a run: what its steps and its workers share, loaded when first asked for.

``Session(run)`` knows settings, architecture, model, pipeline, scorer and held-out rows; beside it stand the inputs
that are read from the run folder, or made and written there.
"""

from __future__ import annotations

from prune_lab.session.inputs import (
    deciding_probe,
    ensure_captions,
    ensure_data,
    ensure_probe,
    probe_of,
    read_scores,
    run_scoring_context,
    scoring_context_of,
    training_and_validation,
)
from prune_lab.session.roles import DataRoles, Role, data_roles, tell_roles
from prune_lab.session.session import SHOWN_PROMPTS, Origin, Session, origin_of

__all__ = [
    "SHOWN_PROMPTS",
    "DataRoles",
    "Origin",
    "Role",
    "Session",
    "data_roles",
    "deciding_probe",
    "ensure_captions",
    "ensure_data",
    "ensure_probe",
    "origin_of",
    "probe_of",
    "read_scores",
    "run_scoring_context",
    "scoring_context_of",
    "tell_roles",
    "training_and_validation",
]
