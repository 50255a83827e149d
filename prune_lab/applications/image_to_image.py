"""Pictures that a model changes towards a prompt: noise is added up to a strength and taken away again (SDEdit).

Models draw with the pipeline of diffusers that changes pictures, made of the same parts, or, with a mask, with the one
that inpaints. A pipeline for which diffusers has none (PixArt) starts its own steps in the middle, from the mixture of
picture and noise that the others start from, too (arXiv:2108.01073, algorithm 1).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from prune_lab.errors import ConfigError, DataError, UnsupportedModelError
from prune_lab.evaluation import check_steps
from prune_lab.families import REFINER_TIME_IDS, family_of, model_of
from prune_lab.families.drawing import asked, call_inputs, pictures_in, takes_guidance_scale
from prune_lab.models.silence import quiet
from prune_lab.probes import cut_texts, encode_pixels, note_cut, picture_side, pipeline_conditions, to_uint8
from prune_lab.runtime import seeded


def check_share(strength: float) -> None:
    """Raise ConfigError for a ``strength`` that is no share of the steps."""
    if not (math.isfinite(strength) and 0 < strength <= 1):
        raise ConfigError(
            f"asked for the strength {strength!r:.60}; give a number above 0, which changes nothing, up to 1, which "
            "keeps nothing"
        )


def check_strength(strength: float, steps: int) -> int:
    """How many of ``steps`` are taken at ``strength``. Raises ConfigError where that is none, or it is out of range."""
    check_share(strength)
    taken = min(int(steps * strength), steps)
    if not taken:
        raise ConfigError(
            f"asked for the strength {strength:g} in {steps} steps, which takes none of them; give "
            f"{math.ceil(1000 / steps) / 1000:g} or more, or more steps"
        )
    return taken


# Which pipeline ----------------------------------------------------------------------------------------------------


def _of_same_parts(pipeline: Any, mask: bool) -> Any | None:
    """What of diffusers changes pictures, made of the parts of ``pipeline``; None where there is no such class."""
    with quiet():  # importing them logs advice about torchvision, which is not used here
        from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    kind: Any = AutoPipelineForInpainting if mask else AutoPipelineForImage2Image
    try:
        with quiet():
            return kind.from_pipe(pipeline)
    except (ValueError, TypeError):
        return None


def _refuse(pipeline: Any, what: str, why: str, instead: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"asked to {what} with a {type(pipeline).__name__}, {why}; {instead}")


def changing_pipeline(pipeline: Any, *, mask: bool) -> tuple[Any, bool]:
    """(what changes pictures, made of the parts of ``pipeline``; whether it takes the picture itself).

    Where it does not, its steps are started in the middle. Raises UnsupportedModelError, which names the reason, for a
    model that cannot change a picture, or with ``mask`` not inpaint.
    """
    what = "inpaint" if mask else "change a picture"
    model = model_of(pipeline)
    conditions = {one.name: one for one in pipeline_conditions(pipeline)}
    if "mask" in conditions and not mask:
        why = f"whose {family_of(model).called} takes a mask beside the picture"
        raise _refuse(pipeline, what, why, "give one with --mask")
    if "picture_latents" in conditions and "mask" not in conditions:
        why = "which edits by instruction what it is shown, and does not start from it"
        raise _refuse(pipeline, what, why, "draw with plain diffusers")
    if "time_ids" in conditions and conditions["time_ids"].shape == (REFINER_TIME_IDS,) and mask:
        raise _refuse(pipeline, what, "a refiner", "give a model that draws from prompts")
    if getattr(pipeline, "controlnet", None) is not None:
        raise _refuse(pipeline, what, "which needs a picture for its ControlNet", "give one without")
    found = _of_same_parts(pipeline, mask)
    if found is not None:
        return found, True
    if mask:
        why = "for which diffusers has no pipeline that inpaints"
        raise _refuse(pipeline, what, why, "give a model like Stable Diffusion, SDXL, SD3 or FLUX")
    inputs, scheduler = call_inputs(pipeline), pipeline.scheduler
    if not {"prompt", "latents"} <= inputs.keys() or "image" in inputs or "num_frames" in inputs:
        why = "for which diffusers has no pipeline that changes pictures, and which starts from no latents of a picture"
        raise _refuse(pipeline, what, why, "give a text-to-image model")
    if not hasattr(scheduler, "add_noise") or float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0:
        why = f"whose {type(scheduler).__name__} mixes noise in another way than is known here"
        raise _refuse(pipeline, what, why, "give it a DDIMScheduler or a DPMSolverMultistepScheduler")
    return pipeline, False


# Drawing -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _fresh_scheduler(pipeline: Any) -> Iterator[Any]:
    """``pipeline`` with a scheduler of its own that nothing was drawn with, and no progress bar; put back on exit."""
    scheduler, bar = pipeline.scheduler, getattr(pipeline, "_progress_bar_config", {})
    try:
        pipeline.scheduler = type(scheduler).from_config(scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        yield pipeline
    finally:
        pipeline.scheduler = scheduler
        pipeline.set_progress_bar_config(**bar)


def _begin_late(scheduler: Any, taken: int) -> None:
    """Let ``scheduler`` hand out only the last ``taken`` steps of whatever number it is set to, as the pipelines of
    diffusers that change pictures take them.

    The pipeline reads them once; with the first step ``scheduler`` has all of them again, by whose number it knows
    which is the last. A pipeline may say that it begins with the first step, which is the first of those that are left.
    """
    whole, step, begin = scheduler.set_timesteps, scheduler.step, getattr(scheduler, "set_begin_index", None)
    every: list[Tensor] = []

    def late(count: int, *args: Any, **given: Any) -> None:
        whole(count, *args, **given)
        left_out = (count - taken) * scheduler.order
        every[:] = [scheduler.timesteps]
        scheduler.timesteps = scheduler.timesteps[left_out:]
        if begin is not None:
            begin(left_out)
            scheduler.set_begin_index = lambda index=0: begin(left_out + index)

    def first_step(*args: Any, **given: Any) -> Any:
        scheduler.timesteps = every[0]
        scheduler.step = step
        return step(*args, **given)

    scheduler.set_timesteps, scheduler.step = late, functools.wraps(step)(first_step)


def _noisy(pipeline: Any, pixels: Tensor, noise: Sequence[torch.Generator], steps: int, taken: int) -> Tensor:
    """Latents of ``pixels`` (N, 3, H, W) from 0 to 1, mixed with noise as they are before the last ``taken`` steps."""
    latents = encode_pixels(pipeline, pixels * 2 - 1)
    drawn = torch.stack([torch.randn(latents.shape[1:], generator=one) for one in noise])
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    _begin_late(scheduler, taken)
    scheduler.set_timesteps(steps)
    start = scheduler.timesteps[:1].repeat(len(latents))
    mixed: Tensor = scheduler.add_noise(latents, drawn, start)
    model = model_of(pipeline)
    return mixed.to(model.device, model.dtype)


def change_picture(
    pipeline: Any,
    picture: Tensor,
    prompt: str,
    seeds: Sequence[int],
    *,
    strength: float,
    steps: int,
    guidance: float,
    mask: Tensor | None = None,
) -> Tensor:
    """What ``pipeline`` makes of ``picture`` (3, H, W) uint8 for ``prompt``, once for each of ``seeds``, (N, 3, H, W)
    uint8 on the CPU.

    ``strength`` is the share of ``steps`` that are taken, from the mixture of picture and noise with which they begin;
    1 keeps nothing of the picture. Noise comes from the seed alone, so it is the same for teacher and students. With
    ``mask`` (H, W) bool only what is true is drawn anew. The pipeline's own parts and scheduler are left as they were.
    Raises UnsupportedModelError for a pipeline that cannot, ConfigError for a number out of range, DataError for
    pictures of another size or that are not finite.
    """
    taken = check_strength(strength, steps)
    check_steps(pipeline, steps)
    side = picture_side(pipeline)
    if picture.shape != (3, side, side) or (mask is not None and mask.shape != (side, side)):
        raise DataError(
            f"asked to change a picture of shape {tuple(picture.shape)}; the model takes (3, {side}, {side})"
        )
    note_cut(pipeline, [prompt], "prompts")
    texts, noise = cut_texts([prompt] * len(seeds)), [seeded(seed) for seed in seeds]
    own, takes_picture = changing_pipeline(pipeline, mask=mask is not None)
    pixels = picture.float().div(255).expand(len(seeds), -1, -1, -1)
    with quiet(), _fresh_scheduler(own):
        given = {
            **asked(own, texts, side=side),
            "num_inference_steps": steps,
            "generator": noise,
            "output_type": "pt",
            **({"guidance_scale": guidance} if takes_guidance_scale(own) else {}),
        }
        if takes_picture:
            given |= {"image": pixels, "strength": strength}
        else:
            given["latents"] = _noisy(own, pixels, noise, steps, taken)
            _begin_late(own.scheduler, taken)
        if mask is not None:
            given["mask_image"] = mask.float().expand(len(seeds), 1, -1, -1)
        found = pictures_in(own(**given))
    if not found.isfinite().all():
        raise DataError("asked to change a picture, found values that are not finite; use float32")
    return to_uint8(found)
