"""What a model, pruned or not, is used for: a subject that it learns from a few pictures, pictures that it changes."""

from __future__ import annotations

from prune_lab.applications.before_and_after import BeforeAndAfter
from prune_lab.applications.class_drawing import ClassPictures, class_pictures
from prune_lab.applications.image_to_image import change_picture, changing_pipeline, check_strength
from prune_lab.applications.likeness import likeness, picture_embeddings
from prune_lab.applications.personal import Learnt, PersonalSettings, learn_subject
from prune_lab.applications.personalise import Personalised, check_personal, personalise
from prune_lab.applications.pictures import read_own_mask, read_own_picture
from prune_lab.applications.sweep_means import sweep_means
from prune_lab.applications.sweeps import Sweep, SweepSettings, sweep

__all__ = [
    "BeforeAndAfter",
    "ClassPictures",
    "Learnt",
    "PersonalSettings",
    "Personalised",
    "Sweep",
    "SweepSettings",
    "change_picture",
    "changing_pipeline",
    "check_personal",
    "check_strength",
    "class_pictures",
    "learn_subject",
    "likeness",
    "personalise",
    "picture_embeddings",
    "read_own_mask",
    "read_own_picture",
    "sweep",
    "sweep_means",
]
