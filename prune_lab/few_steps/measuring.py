"""What a configuration of model, scheduler, steps and reuse draws, and how long one picture takes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prune_lab.errors import UnsupportedModelError
from prune_lab.evaluation import asked_side, draw_once, drawing_of, generate
from prune_lab.families import model_of
from prune_lab.few_steps.frontier import OWN
from prune_lab.few_steps.schedulers import fitting_scheduler
from prune_lab.models import usual_drawing
from prune_lab.models.parts import why_no_text_to_image
from prune_lab.models.schedulers import steps_complaint
from prune_lab.models.silence import quiet
from prune_lab.profiling import Turns, time_in_turns
from prune_lab.profiling.latency import call_ms
from prune_lab.reuse import inside_of, reusing
from prune_lab.runtime import seeded


@dataclass(frozen=True, slots=True)
class Configuration:
    """One way to draw: with a model, by a scheduler, in some steps, of which every ``reuse``-th is whole."""

    model: str
    scheduler: str
    steps: int
    reuse: int = 1  # 1: every pass is whole

    @property
    def name(self) -> str:
        """The configuration in one word."""
        return f"{self.model}/{self.scheduler}/{self.steps}/{self.reuse}"


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """Pictures uint8 (N, 3, H, W), and the calls of the model that one of them took."""

    pictures: Tensor
    passes: float
    whole: float  # calls that computed everything


def guidance_of(pipeline: Any, guidance: float) -> float:
    """The guidance to ask ``pipeline`` for: 1 of one that was distilled for few steps, whose guidance is baked in."""
    usual = usual_drawing(pipeline)
    return usual.guidance if usual.baked else guidance


def _refused(pipeline: Any, scheduler: Any) -> str:
    """Why ``pipeline`` does not draw by ``scheduler``; empty where it does, or draws by none."""
    with _set_up(pipeline, scheduler):
        try:
            drawing_of(pipeline)
        except UnsupportedModelError:
            why = why_no_text_to_image(type(pipeline), type(scheduler))
            return f"the pipeline {why}" if why else ""
    return ""


def _fitting(model: str, pipeline: Any, schedulers: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(those of ``schedulers`` that fit ``pipeline``, by name; lines on the others)."""
    found: dict[str, Any] = {}
    lines: list[str] = []
    for name in dict.fromkeys(schedulers):
        scheduler, why = fitting_scheduler(name, pipeline.scheduler)
        same = [
            other
            for other, one in found.items()
            if scheduler and one.to_json_string() == scheduler.to_json_string()
        ]
        why = f"it is what {same[0]} is" if same else why or _refused(pipeline, scheduler)
        if why:
            lines.append(f"{model}: {name} is left out, {why}")
        else:
            found[name] = scheduler
    return found, lines


def _reusable(model: str, pipeline: Any, reuse: Sequence[int]) -> tuple[list[int], list[str]]:
    """(1 and those of ``reuse`` that the model can; lines on the others)."""
    try:
        if max(reuse, default=1) > 1:
            inside_of(model_of(pipeline))
    except UnsupportedModelError as error:
        return [1], [f"{model}: reuse is left out, {error}"]
    return list(dict.fromkeys((1, *reuse))), []


def configurations(
    pipelines: Mapping[str, Any],
    schedulers: Sequence[str],
    steps: Sequence[int],
    reuse: Sequence[int],
    many: int,
) -> tuple[list[Configuration], list[str]]:
    """(all configurations of the ``pipelines`` by name, and lines on what is left out and why).

    Each pipeline also draws in ``many`` steps by its own scheduler, which few steps are compared with.
    """
    found: list[Configuration] = []
    lines: list[str] = []
    for model, pipeline in pipelines.items():
        fitting, why = _fitting(model, pipeline, schedulers)
        every, more = _reusable(model, pipeline, reuse)
        lines += [*why, *more]
        wanted = {(name, count, one): None for name in fitting for count in steps for one in every}
        wanted[OWN, many, 1] = None
        for name, count, one in wanted:
            scheduler, _ = fitting_scheduler(name, pipeline.scheduler)
            if complaint := steps_complaint(scheduler, count, pipeline):
                lines.append(
                    f"{model}: {count} steps of {name} are left out, its scheduler is one {complaint}"
                )
            else:
                found.append(Configuration(model, name, count, one))
    return found, list(dict.fromkeys(lines))


@contextlib.contextmanager
def _set_up(pipeline: Any, scheduler: Any) -> Iterator[Any]:
    """``pipeline`` with ``scheduler`` and without its progress bar; both return."""
    own, bar = pipeline.scheduler, getattr(pipeline, "_progress_bar_config", {})
    try:
        pipeline.scheduler = scheduler
        pipeline.set_progress_bar_config(disable=True)
        yield pipeline
    finally:
        pipeline.scheduler = own
        pipeline.set_progress_bar_config(**bar)


def draw_in(
    pipeline: Any,
    configuration: Configuration,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    guidance: float,
    batch: int = 8,
) -> Drawn:
    """What ``pipeline`` draws in this ``configuration`` for ``prompts`` with ``seeds``, from the same noise in all."""
    asked = guidance_of(pipeline, guidance)
    scheduler, _ = fitting_scheduler(configuration.scheduler, pipeline.scheduler)
    with (
        _set_up(pipeline, scheduler) as given,
        reusing(model_of(pipeline), configuration.reuse) as reuse,
    ):
        pictures = generate(given, prompts, seeds, steps=configuration.steps, guidance=asked, batch=batch)
    batches = math.ceil(len(pictures) / batch)
    return Drawn(pictures, reuse.passes / batches, reuse.whole / batches)


def time_pictures(
    pipelines: Mapping[str, Any],
    asked: Sequence[Configuration],
    prompt: str,
    *,
    guidance: float,
    rounds: int,
    device: torch.device,
    seed: int = 0,
) -> Turns:
    """The time of one picture in each configuration, timed in turns: one picture of each in every round.

    It is that of the pipeline's call, with the text's encoding and the picture's decoding, as a user waits for it.
    """
    sides = {name: asked_side(pipeline) for name, pipeline in pipelines.items()}
    scales = {name: guidance_of(pipeline, guidance) for name, pipeline in pipelines.items()}

    def timed(one: Configuration) -> Callable[[], float]:
        pipeline, side = pipelines[one.model], sides[one.model]
        scheduler, _ = fitting_scheduler(one.scheduler, pipeline.scheduler)
        drawing = drawing_of(pipeline)

        def picture() -> float:
            more = drawing.picture(pipeline, 1) if drawing.picture else {}
            how: dict[str, Any] = {
                "steps": one.steps,
                "guidance": scales[one.model],
                "side": side,
                "more": more,
            }
            with quiet(), _set_up(pipeline, scheduler) as given, reusing(model_of(pipeline), one.reuse):
                return call_ms(lambda: draw_once(given, (prompt,), (seeded(seed),), **how), device)

        return picture

    return time_in_turns({one.name: timed(one) for one in asked}, rounds=rounds, warmup=1, seed=seed)


def psnr(pictures: Tensor, others: Tensor) -> float:
    """Mean over pictures (N, 3, H, W) uint8 of the ratio of the largest value to their difference, in decibels."""
    errors = (pictures.float() - others.float()).square().flatten(1).mean(dim=1)
    return float((10 * (255**2 / errors.clamp(min=1e-4)).log10()).mean())
