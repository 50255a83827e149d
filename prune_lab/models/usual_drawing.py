"""In how many steps a model draws, and with what guidance, where nobody says: 25 and 7.5, but of models of few steps.

Such a model says it by its scheduler. What was distilled for few steps (LCM, arXiv:2310.04378) comes with an
LCMScheduler, in plain diffusers too, and its guidance is baked in or told to it as a number. Drawn as others are it
gives wrong pictures, and no error.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from prune_lab.errors import ConfigError, UnsupportedModelError
from prune_lab.families import CLASS_NAME, model_of, takes_guidance
from prune_lab.families.drawing import call_inputs
from prune_lab.models.files import json_object
from prune_lab.models.parts import pipeline_class
from prune_lab.models.sources import ModelSource
from prune_lab.runtime import note_once

_STEPS, _GUIDANCE = 25, 7.5
_FEW, _MOST = 4, 8  # steps of a consistency model: usual, and the most that its authors draw in


@dataclass(frozen=True, slots=True)
class UsualDrawing:
    """How a model is meant to draw."""

    steps: int = _STEPS
    guidance: float = _GUIDANCE
    whole: int = _STEPS  # steps of which a part is taken where a picture is changed
    few: bool = False  # whether it was distilled for few steps
    baked: bool = False  # whether its guidance is inside: more would be guidance twice

    def complaint(self, named: str, steps: int, guidance: float) -> str:
        """What is amiss with drawing so with the model called ``named``, in one line; empty where nothing is."""
        asked = [f"{steps} steps"] if self.few and steps > _MOST else []
        asked += [f"a guidance of {guidance:g}"] if self.baked and guidance > 1 else []
        if not asked:
            return ""
        return (
            f"asked for {' and '.join(asked)} of {named}, which was distilled to draw in few steps"
            f"{' with its guidance inside' if self.baked else ''}: give {self.steps} steps and a guidance of "
            f"{self.guidance:g}, or leave them out"
        )


def usual_drawing(given: ModelSource | Any) -> UsualDrawing:
    """How the pipeline ``given``, loaded or not, draws where nobody says; of a model alone what is usual everywhere."""
    if isinstance(given, ModelSource):
        if given.folder is None or not given.is_pipeline:
            return UsualDrawing()
        index = json_object(given.folder / "model_index.json")
        scheduler = (index.get("scheduler") or [None, None])[-1]
        kind, model = pipeline_class(index[CLASS_NAME]), given.config
    else:
        scheduler, kind, model = type(given.scheduler).__name__, type(given), model_of(given)
    if scheduler != "LCMScheduler":
        return UsualDrawing()
    if not takes_guidance(model):
        return UsualDrawing(_FEW, 1.0, _MOST, few=True, baked=True)
    told = call_inputs(kind).get("guidance_scale")
    known = told is not None and told.default is not inspect.Parameter.empty
    return UsualDrawing(_FEW, float(told.default) if told and known else _GUIDANCE, _MOST, few=True)


def drawing_asked(
    source: ModelSource, steps: int | None, guidance: float | None, *, changing: bool = False
) -> tuple[int, float]:
    """(steps, guidance) as asked for of ``source``; None: as it is meant. A line says where that is amiss.

    ``changing``: whether a picture is changed, for which a part of the steps is taken.
    """
    usual = usual_drawing(source)
    meant = usual.whole if changing else usual.steps
    found = (meant if steps is None else steps, usual.guidance if guidance is None else guidance)
    if complaint := usual.complaint(source.name, *found):
        note_once(complaint)
    return found


def note_trained_for_many(source: ModelSource) -> None:
    """Say so where ``source`` was distilled for few steps and is to be trained as models of many steps are."""
    if usual_drawing(source).few:
        note_once(
            f"{source.name} was distilled for few steps, and this training is that of models of many, so what comes of "
            "it may draw worse in few; better train the model that it was distilled from, and then prune-lab "
            "distill-steps"
        )


def check_teaches_few(source: ModelSource) -> None:
    """Raise UnsupportedModelError for a teacher of few steps that was itself distilled for few: no path of many steps
    leads from its noise to its pictures, and its guidance would count twice.
    """
    if usual_drawing(source).few:
        raise UnsupportedModelError(
            f"asked to teach few steps from {source.text}, which was distilled for few steps itself; give the model "
            "that it was distilled from with --teacher"
        )


def check_draws_in(source: ModelSource, base: ModelSource) -> None:
    """Raise ConfigError for a model of few steps alone, as its provenance says, that is to draw in one of many."""
    path = None if source.model_folder is None else source.model_folder / "provenance.json"
    if source.is_pipeline or path is None or not path.is_file() or usual_drawing(base).few:
        return
    if "consistency" in json_object(path):
        raise ConfigError(
            f"asked to draw with {source.text}, which was distilled for few steps of an LCMScheduler, in the pipeline "
            f"{base.text}, which has another; give the pipeline folder that prune-lab distill-steps wrote"
        )
