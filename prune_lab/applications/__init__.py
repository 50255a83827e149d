"""What a model, pruned or not, is used for: a subject that it learns from a few pictures, pictures that it changes."""

from __future__ import annotations

from prune_lab.applications.personal import Learnt, PersonalSettings, learn_subject
from prune_lab.applications.personalise import Personalised, check_personal, personalise

__all__ = [
    "Learnt",
    "PersonalSettings",
    "Personalised",
    "check_personal",
    "learn_subject",
    "personalise",
]
