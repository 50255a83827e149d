"""Whether a scheduler can draw with a model: the words and numbers of its config, its schedule, and a pass with it.

The libraries take nearly every number there without a word, and draw noise with it or fail in the middle.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from prune_lab.errors import ModelFormatError, PruneLabError
from prune_lab.models.components import reason_of
from prune_lab.models.files import json_object
from prune_lab.models.parts import classes_wanted
from prune_lab.models.silence import quiet
from prune_lab.runtime import seeded

FILE = "scheduler_config.json"
_WORDS: Mapping[str, tuple[str, ...]] = {
    "prediction_type": ("epsilon", "sample", "v_prediction", "flow_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp"),
}
_TIMESTEPS = 1000  # of every scheduler by betas that does not say
_SHIFTS = (
    "shift",
    "flow_shift",
    "base_shift",
    "max_shift",
)  # of flow matching: how much longer noise stays noise
_MOST_SHIFT = 100.0
_WHOLE = 1 + 1e-5  # the share of noise where nothing else is left, as float32 rounds it
_STEPS = 25  # of the pass that is tried, the usual number; fewer are beyond some good schedulers
_SHAPE = (1, 4, 8, 8)  # of latents
_OF_ONE_STEP = ("PixArtAlphaPipeline",)  # take one step for that of a model that was distilled for it


def _is_share(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < 1  # type: ignore[operator]


def _is_count(value: object, least: int) -> bool:
    return type(value) is int and value >= least  # `type`: true is an int to Python


def goes_by_flow(scheduler: Any) -> bool:
    """Whether a ``scheduler`` mixes picture and noise by straight lines, as flow matching does."""
    config = scheduler.config
    return bool(
        "FlowMatch" in type(scheduler).__name__
        or config.get("use_flow_sigmas")
        or config.get("prediction_type") == "flow_prediction"
    )


def _complaint_of_settings(config: Mapping[str, Any]) -> str:
    for name, words in _WORDS.items():
        if name in config and config[name] not in words:
            return f"whose {name} is {config[name]!r:.60}; known are {', '.join(words)}"
    count = config.get("num_train_timesteps", _TIMESTEPS)
    if not _is_count(count, 1):
        return f"whose num_train_timesteps is {count!r:.60}, where a whole number from 1 on belongs"
    for name in ("beta_start", "beta_end"):
        if name in config and not _is_share(config[name]):
            return f"whose {name} is {config[name]!r:.60}, where a number between 0 and 1 belongs"
    betas = config.get("trained_betas")
    if betas is not None and not (isinstance(betas, list) and all(map(_is_share, betas))):
        return "whose trained_betas are no list of numbers between 0 and 1"
    if betas is not None and len(betas) != count:
        return f"whose trained_betas are {len(betas):,} numbers for {count:,} timesteps (num_train_timesteps)"
    offset = config.get("steps_offset", 0)
    if not _is_count(offset, 0) or offset >= count:
        return f"whose steps_offset is {offset!r:.60}, where a whole number from 0 to {count - 1:,} belongs"
    for name in _SHIFTS:
        if name in config and not (type(config[name]) in (int, float) and 0 < config[name] <= _MOST_SHIFT):
            return f"whose {name} is {config[name]!r:.60}, where a number above 0 belongs"
    return ""


def _complaint_of_sigmas(scheduler: Any) -> str:
    """What is wrong with the shares of noise at each timestep of flow matching (``sigmas``)."""
    # Mochi's go the other way round: its sampler tells what is left of the picture
    sigmas = 1 - scheduler.sigmas if scheduler.config.get("invert_sigmas") else scheduler.sigmas
    if not sigmas.isfinite().all() or sigmas.min() < 0 or sigmas.max() > _WHOLE or sigmas.diff().gt(0).any():
        return (
            "whose shares of noise (shift, shift_terminal, invert_sigmas) make no schedule of flow matching: they must "
            "fall from at most 1 to 0 or more"
        )
    return ""


def _complaint_of_schedule(scheduler: Any, *, by_flow: bool) -> str:
    """What is wrong with the shares of a picture that are left at each timestep (``alphas_cumprod``)."""
    if by_flow:
        return (
            ""
            if goes_by_flow(scheduler)
            else f"whose class, {type(scheduler).__name__}, works by betas, where the model of such a pipeline goes by "
            "flow matching; take a scheduler such as FlowMatchEulerDiscreteScheduler"
        )
    left = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(left, torch.Tensor):
        return (
            f"whose class, {type(scheduler).__name__}, does not work by betas as the models of such pipelines "
            "do; take a scheduler such as PNDMScheduler, DDIMScheduler or EulerDiscreteScheduler"
        )
    # the last may be nought, where all of a picture is noise (rescale_betas_zero_snr)
    sound = left.isfinite().all() and left[:-1].gt(0).all() and left[-1] >= 0 and left[0] <= 1
    if not sound or not left.diff().le(0).all():
        return (
            "whose betas (beta_start, beta_end, beta_schedule or trained_betas) make no noise schedule: what is left "
            "of a picture must fall from at most 1 to 0 or more"
        )
    return ""


def set_steps(scheduler: Any, steps: int) -> None:
    """Set so many ``steps``: of a ``scheduler`` that shifts them by the size of the picture, for a middling one."""
    config = scheduler.config
    shift = {"mu": (config.get("base_shift", 0.5) + config.get("max_shift", 1.15)) / 2}
    scheduler.set_timesteps(steps, **(shift if config.get("use_dynamic_shifting") else {}))


def _complaint_of_pass(scheduler: Any, steps: int) -> str:
    """What is wrong with a pass of ``steps``: its timesteps, and what it makes of random numbers for a model."""
    count = scheduler.config.get("num_train_timesteps")
    set_steps(scheduler, steps)
    if goes_by_flow(scheduler) and (found := _complaint_of_sigmas(scheduler)):
        return found
    most = count if goes_by_flow(scheduler) else count - 1 if isinstance(count, int) else None
    outside = [step for step in scheduler.timesteps.tolist() if most is not None and not 0 <= step <= most]
    if outside:
        return (
            f"with which a pass of {steps:,} steps has the timestep {outside[0]:g}, outside of 0 to {most:,}: "
            "look at steps_offset and timestep_spacing"
        )
    inverted = bool(scheduler.config.get("invert_sigmas"))
    if (scheduler.timesteps[0] < scheduler.timesteps[-1]) != inverted:
        return f"whose class, {type(scheduler).__name__}, goes from pictures to noise; take one that draws"
    generator = seeded(0)
    sample = torch.randn(_SHAPE, generator=generator) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for step in scheduler.timesteps:
        if hasattr(scheduler, "scale_model_input"):  # flow matching has none
            scheduler.scale_model_input(sample, step)
        noise = torch.randn(_SHAPE, generator=generator)
        sample = scheduler.step(noise, step, sample, return_dict=False)[0]
    return "" if sample.isfinite().all() else f"with which {steps:,} steps give numbers that are not finite"


@contextlib.contextmanager
def _trial() -> Iterator[None]:
    """Trying a scheduler: some draw noise of their own, and some warn of how they call numpy."""
    with quiet(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        yield


def _complaint_of_one_step(scheduler: Any, pipeline: str) -> str:
    """What is wrong with one step of ``scheduler`` for the class ``pipeline``, which draws from what is told beside the
    next latents.
    """
    set_steps(scheduler, 1)
    sample = torch.zeros(_SHAPE)
    answer = scheduler.step(sample, scheduler.timesteps[0], sample, return_dict=False)
    return "" if len(answer) > 1 else f"with which a {pipeline} draws in two steps or more"


def steps_complaint(scheduler: Any, steps: int, pipeline: Any = None) -> str:
    """Why ``scheduler`` cannot draw in so many ``steps`` of ``pipeline``, as the end of a line; empty where it can."""
    kind, count = type(pipeline).__name__, scheduler.config.get("num_train_timesteps")
    if isinstance(count, int) and steps > count:
        return f"of {count:,} timesteps, which has no more steps to draw in"
    try:
        with _trial():
            found = _complaint_of_pass(type(scheduler).from_config(scheduler.config), steps)
            if found or steps > 1 or kind not in _OF_ONE_STEP:
                return found
            return _complaint_of_one_step(type(scheduler).from_config(scheduler.config), kind)
    except Exception as error:  # each class has its own bounds, and words for them
        return f"which cannot take so many: {reason_of(error)}"


def scheduler_complaint(scheduler_class: Any, config: Mapping[str, Any], *, by_flow: bool = False) -> str:
    """What is wrong with a scheduler of that class and ``config``, as the end of a line; empty where nothing is.

    ``by_flow``: whether it must be one of flow matching, else one that works by betas.
    """
    if found := _complaint_of_settings(config):
        return found
    plain = {name: value for name, value in config.items() if not name.startswith("_")}
    try:
        with _trial():
            scheduler = scheduler_class.from_config(plain)
            steps = scheduler.config.get("original_inference_steps") or _STEPS
            steps = min(_STEPS, steps, scheduler.config.num_train_timesteps)
            return _complaint_of_schedule(scheduler, by_flow=by_flow) or _complaint_of_pass(scheduler, steps)
    except (PruneLabError, MemoryError):
        raise
    except Exception as error:  # whatever the libraries raise about settings that make no sense
        return f"with which no {scheduler_class.__name__} works: {reason_of(error)}"


def check_scheduler(folder: Path, scheduler_class: Any, named: str, pipeline: Any) -> None:
    """Raise ModelFormatError unless the scheduler in ``folder`` can draw in the class ``pipeline``.

    ``named`` says whose it is.
    """
    config = json_object(folder / FILE)
    by_flow = any("FlowMatch" in name for name in classes_wanted(pipeline).get("scheduler", ()))
    if found := scheduler_complaint(scheduler_class, config, by_flow=by_flow):
        raise ModelFormatError(
            f"asked for {named}, which cannot be loaded as a {scheduler_class.__name__} from "
            f"{folder.name}/{FILE}, {found}; correct it, or fetch the model again"
        )
