"""Pictures drawn from prompts by whole pipelines of any kind, one seed of noise each."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prune_lab.config import EvaluateConfig
from prune_lab.errors import ConfigError, DataError, UnsupportedModelError
from prune_lab.families import (
    REFINER_TIME_IDS,
    conditions_of,
    embedding_width,
    family_of,
    model_of,
    plain_config,
)
from prune_lab.families.drawing import (
    asked,
    class_numbers,
    class_texts,
    draws_videos,
    gives_latents,
    latents_in,
    pictures_in,
    reads_text,
    takes_classes,
    takes_guidance_scale,
)
from prune_lab.models.parts import why_no_text_to_image
from prune_lab.models.schedulers import steps_complaint
from prune_lab.models.silence import quiet
from prune_lab.probes import (
    check_side,
    class_count,
    cut_texts,
    encode_pixels,
    note_cut,
    picture_side,
    pipeline_conditions,
    takes_frames,
    to_uint8,
)
from prune_lab.runtime import generator_for, note_once, seeded, track


@dataclass(frozen=True, slots=True)
class _Drawing:
    """How a pipeline draws from a prompt alone: whether as its text-to-image kind, and what else it is given."""

    as_text_to_image: bool = False
    picture: Callable[[Any, int], dict[str, Any]] | None = None  # (pipeline, images) -> further arguments


def _everything_masked(pipeline: Any, count: int) -> dict[str, Any]:
    """Of an inpainting model: grey pictures that are masked whole, so that all of each is drawn."""
    side = picture_side(pipeline)
    return {
        "image": torch.full((count, 3, side, side), 0.5),
        "mask_image": torch.ones(count, 1, side, side),
        "height": side,
        "width": side,
        "strength": 1.0,
    }


def _no_picture(pipeline: Any, count: int) -> dict[str, Any]:
    """Of a model that edits pictures: latents of nothing, which it was trained to take for no picture."""
    side = int(pipeline.unet.config.sample_size)
    return {"image": torch.zeros(count, int(pipeline.vae.config.latent_channels), side, side)}


def _check_text_to_image(pipeline: Any) -> None:
    """Raise UnsupportedModelError unless ``pipeline`` is of a class, with a scheduler, that draws from prompts."""
    if why := why_no_text_to_image(type(pipeline), type(pipeline.scheduler)):
        raise UnsupportedModelError(
            f"asked to draw from prompts with a {type(pipeline).__name__}, which {why}; if its U-Net draws with a "
            "plain pipeline too, name that one in model_index.json (_class_name)"
        )


def drawing_of(pipeline: Any) -> _Drawing:
    """How ``pipeline`` draws from prompts alone.

    Pipelines that start from a picture or a ControlNet's draw as their text-to-image kind; an inpainting model paints a
    picture that is masked whole, one that edits pictures (instruct-pix2pix) gets none.
    Raises UnsupportedModelError for a U-Net that refines pictures, or takes what cannot be made here.
    """
    conditions = {condition.name: condition for condition in pipeline_conditions(pipeline)}
    if "time_ids" in conditions and conditions["time_ids"].shape == (REFINER_TIME_IDS,):
        raise UnsupportedModelError(
            "asked to draw from prompts, found a refiner, which only goes on with pictures of another model; "
            "it can be scored, pruned and distilled, and is judged by its held-out loss"
        )
    if "mask" in conditions:
        return _Drawing(picture=_everything_masked)
    if "picture_latents" in conditions:
        note_once(
            "the model edits pictures: asked for prompts alone, it is given none (zeros), as in a share of its training"
        )
        return _Drawing(picture=_no_picture)
    needed = inspect.signature(pipeline.__call__).parameters
    if any(name in needed for name in ("image", "control_image")):
        return _Drawing(as_text_to_image=True)
    _check_text_to_image(pipeline)
    return _Drawing()


@contextlib.contextmanager
def _pipeline_with(pipeline: Any, model: Any) -> Iterator[Any]:
    """``pipeline`` with ``model`` (None: its own), a fresh scheduler and no progress bar; all are restored on exit."""
    own = model_of(pipeline)
    part = family_of(own).component
    scheduler, bar = pipeline.scheduler, getattr(pipeline, "_progress_bar_config", {})
    try:
        setattr(pipeline, part, own if model is None else model)
        pipeline.scheduler = type(scheduler).from_config(scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        yield pipeline
    finally:
        setattr(pipeline, part, own)
        pipeline.scheduler = scheduler
        pipeline.set_progress_bar_config(**bar)


def _text_to_image(pipeline: Any) -> Any:
    """The text-to-image pipeline of the same parts as ``pipeline``, which may draw from pictures or a ControlNet's."""
    from diffusers import AutoPipelineForText2Image

    more = {"controlnet": None} if hasattr(pipeline, "controlnet") else {}
    try:
        own = AutoPipelineForText2Image.from_pipe(pipeline, **more)
    except (ValueError, TypeError) as error:
        raise UnsupportedModelError(
            f"asked to draw from prompts with a {type(pipeline).__name__}, which draws from pictures; diffusers knows "
            f"no text-to-image pipeline for it ({str(error).splitlines()[0]})"
        ) from None
    _check_text_to_image(own)
    own.set_progress_bar_config(disable=True)
    return own


def check_step_count(timesteps: object, steps: int, setting: str = "steps") -> None:
    """Raise ConfigError when a scheduler of so many ``timesteps`` has fewer than ``steps``: it would draw noise."""
    if isinstance(timesteps, int) and timesteps and steps > timesteps:
        raise ConfigError(
            f"asked for {setting} = {steps:,}, found a scheduler of {timesteps:,} timesteps, which has no more steps "
            f"to draw in; give at most {timesteps:,}, 25 are usual"
        )


def check_steps(pipeline: Any, steps: int, setting: str = "steps") -> None:
    """The same for the scheduler of ``pipeline``, and where so many steps lead out of its timesteps."""
    check_step_count(pipeline.scheduler.config.get("num_train_timesteps"), steps, setting)
    if reason := steps_complaint(pipeline.scheduler, steps, pipeline):
        raise ConfigError(
            f"asked for {setting} = {steps:,}, found a {type(pipeline.scheduler).__name__} {reason}; give "
            f"{'fewer' if steps > 1 else 'more'}, 25 are usual"
        )


def _noise_of(pipeline: Any, text: str, seed: int) -> torch.Generator:
    """Where the noise of the picture of ``text`` comes from: its seed, and of a model that is asked for nothing the
    name of the picture, too, since all of its pictures would be the same.
    """
    if reads_text(pipeline) or class_count(pipeline):
        return seeded(seed)
    return generator_for(seed, text, 0)


def asked_side(pipeline: Any) -> int | None:
    """Pixels per side that ``pipeline`` is to be told; None where it draws pictures of its model's own form."""
    if draws_videos(pipeline) or isinstance(getattr(pipeline, "default_sample_size", None), int):
        return picture_side(pipeline)
    model = model_of(pipeline)
    height, width = family_of(model).size(plain_config(model))
    return picture_side(pipeline) if height == width else None


@contextlib.contextmanager
def _showing_classes(pipeline: Any, texts: Sequence[str]) -> Iterator[None]:
    """A context in which the model of ``pipeline`` is told the classes that ``texts`` name, where it takes classes and
    the pipeline knows none (a ``DDPMPipeline``).
    """
    count, model = class_count(pipeline), model_of(pipeline)
    if not count or takes_classes(pipeline):
        yield
        return
    patched, labels = "forward" in vars(model), torch.tensor(class_numbers(texts, count), device=model.device)
    forward = model.forward
    try:
        model.forward = functools.partial(forward, class_labels=labels)
        yield
    finally:
        if patched:
            model.forward = forward
        else:
            del model.forward


def prompts_for(config: Mapping[str, Any], prompts: Sequence[str]) -> tuple[str, ...]:
    """``prompts``; where there are none and the model of ``config`` reads no text, its class 0, or a name of a picture.

    Raises DataError where there are none and it does.
    """
    if prompts:
        return tuple(prompts)
    if embedding_width(config):
        raise DataError("asked to draw without saying what; give at least one prompt")
    classes = next((one.classes for one in conditions_of(config) if one.classes), 0)
    return class_texts(classes, 1)


def draw_once(
    pipeline: Any,
    texts: Sequence[str],
    noise: Sequence[torch.Generator],
    *,
    steps: int,
    guidance: float,
    latents: bool = False,
    side: int | None = None,
    more: Mapping[str, Any] | None = None,
) -> Tensor:
    """Pictures (N, 3, H, W) from 0 to 1 that ``pipeline`` draws for ``texts`` out of ``noise``, N of both, in one pass.

    With ``latents`` their final latents (N, C, h, w), scaled and not packed, of a model of videos (N, C, 1, h, w).
    ``side`` in pixels (None: that of the model); ``more`` are further arguments of the call. Raises DataError for
    values that are not finite, and for a text that names no class of a model of classes.
    """
    given = {
        **asked(pipeline, texts, side=side, classes=class_count(pipeline)),
        "num_inference_steps": steps,
        "generator": list(noise),
        "output_type": "latent" if latents and gives_latents(pipeline) else "pt",
        **({"guidance_scale": guidance} if takes_guidance_scale(pipeline) else {}),
        **(more or {}),
    }
    with _showing_classes(pipeline, texts):
        answer = pipeline(**given)
    if not latents:
        found = pictures_in(answer)
    elif gives_latents(pipeline):
        own = model_of(pipeline)
        found = latents_in(pipeline, answer, side or picture_side(pipeline), frames=takes_frames(own))
    else:
        found = encode_pixels(pipeline, pictures_in(answer) * 2 - 1)
    if not found.isfinite().all():
        raise DataError("asked for images, found values that are not finite; use float32 or another model")
    return found


def drawn_batches(
    pipeline: Any,
    pairs: Sequence[tuple[str, int]],
    *,
    steps: int,
    guidance: float,
    model: Any = None,
    batch: int = 8,
    latents: bool = False,
    resolution: int | None = None,
) -> Iterator[Tensor]:
    """The images of ``pairs`` of a prompt and its seed, ``batch`` at a time, as ``generate`` draws them.

    The pipeline is as it was when the last is drawn, or the iterator is closed.
    """
    check_steps(pipeline, steps)
    note_cut(pipeline, [prompt for prompt, _ in pairs], "prompts")
    drawing, side = drawing_of(pipeline), resolution or asked_side(pipeline)
    if resolution:
        check_side(pipeline, resolution)
    with quiet(), _pipeline_with(pipeline, model) as given:
        own = _text_to_image(given) if drawing.as_text_to_image else given
        for start in range(0, len(pairs), batch):
            named, numbers = zip(*pairs[start : start + batch], strict=True)
            texts = cut_texts(named)
            images = draw_once(
                own,
                texts,
                [_noise_of(own, text, seed) for text, seed in zip(texts, numbers, strict=True)],
                steps=steps,
                guidance=guidance,
                latents=latents,
                side=side,
                more=drawing.picture(own, len(texts)) if drawing.picture else {},
            )
            yield images.cpu() if latents else to_uint8(images)


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    model: Any = None,
    batch: int = 8,
    latents: bool = False,
    resolution: int | None = None,
) -> Tensor:
    """Images uint8 (prompts x seeds, 3, H, W) on the CPU: every prompt with every seed, prompt by prompt.

    With ``latents`` the final latents of these images, float32 (prompts x seeds, C, h, w), for ``decode_latents``.
    Each image starts from the noise of its seed, drawn on the CPU, so it is the same for teacher and students and does
    not depend on batch or device. A model of classes is asked for them by number ("class 7"); one that is asked for
    nothing draws another picture for each text. ``model`` is used instead of the pipeline's own model, which is put
    back. ``guidance`` is the scale of classifier-free guidance; 1 turns it off. ``resolution`` is in pixels of a side
    (None: the model's own). Raises DataError when there is nothing
    to generate, or when the images are not finite, ConfigError for more steps than the scheduler has, or a number out
    of range.
    """
    if not prompts or not seeds:
        raise DataError(
            f"asked to generate images of {len(prompts)} prompts with {len(seeds)} seeds; give at least one of each"
        )
    EvaluateConfig(steps=steps, guidance=guidance, seeds=tuple(seeds))  # raises for what is out of range
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    drawn = drawn_batches(
        pipeline,
        pairs,
        steps=steps,
        guidance=guidance,
        model=model,
        batch=batch,
        latents=latents,
        resolution=resolution,
    )
    return torch.cat(list(track(drawn, "generating", math.ceil(len(pairs) / batch))))
