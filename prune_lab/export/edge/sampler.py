"""Samplers in numpy, driven by the ``scheduler_config.json`` of a pipeline; needs nothing else, and is copied along.

One function a scheduler, of one signature: (config, steps, noise (B, C, h, w), predict) -> latents (B, C, h, w), where
``predict(latents, timestep)`` asks the model. Names of settings and what they mean are those of diffusers. Beside them
stands what its pipelines decide: ``latents_per_patch``, the side of what a model of flow counts as one token of the
picture, and ``evenly_from_one``, that the shares of noise begin as 1, ..., 2 / steps, 1 / steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]  # in single precision between steps
Config = Mapping[str, Any]
Predict = Callable[[Array, float], Array]
Sampler = Callable[[Config, int, Array, Predict], Array]

_ALMOST_NONE = 2.0**-24  # what diffusers keeps of the picture at the last timestep where it must not be zero


def _alphas(config: Config, *, least: float = 0.0) -> Array:
    """(timesteps,) shares of the picture's variance in noisy latents: the cumulative products of 1 - beta.

    In single precision, as diffusers computes them: a thousand roundings are seen in the last digits of a picture.
    """
    first, last, count = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], dtype=np.float64)
    elif config["beta_schedule"] == "linear":
        betas = np.linspace(first, last, count)
    elif config["beta_schedule"] == "scaled_linear":
        betas = np.linspace(first**0.5, last**0.5, count) ** 2
    else:
        raise ValueError(f"the beta_schedule {config['beta_schedule']}; known are linear and scaled_linear")
    alphas = np.cumprod(1 - betas.astype(np.float32))
    if config.get("rescale_betas_zero_snr"):  # arXiv:2305.08891, algorithm 1
        roots = np.sqrt(alphas)
        shares = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
        alphas = np.cumprod(np.append(shares[:1], shares[1:] / shares[:-1]))
        alphas[-1] = least
    return np.asarray(alphas, dtype=np.float64)


def _timesteps(config: Config, steps: int, *, more: int = 0) -> Array:
    """(steps,) timesteps from noise to picture; ``more`` are spaced along and left out at the end."""
    total, spacing = config["num_train_timesteps"], config["timestep_spacing"]
    if not 0 < steps <= total:
        raise ValueError(f"{steps} steps; the schedule has 1 to {total}")
    if spacing == "linspace":
        return np.linspace(0, total - 1, steps + more)[::-1][:steps]
    if spacing == "leading":
        found = np.arange(steps + more)[::-1][:steps] * (total // (steps + more))
        return np.asarray(found + config.get("steps_offset", 0), dtype=np.float64)
    if spacing == "trailing":
        return np.arange(total, 0, -total / steps).round() - 1.0
    raise ValueError(f"the timestep_spacing {spacing}; known are linspace, leading and trailing")


def _parts(
    config: Config, prediction: Array, noisy: Array, alpha: float, sigma: float
) -> tuple[Array, Array]:
    """(picture, noise) that ``prediction`` says are in ``noisy`` = alpha * picture + sigma * noise."""
    kind = config["prediction_type"]
    if kind == "epsilon":
        return (noisy - sigma * prediction) / alpha, prediction
    if kind == "sample":
        return prediction, (noisy - alpha * prediction) / sigma
    if kind == "v_prediction":
        return alpha * noisy - sigma * prediction, alpha * prediction + sigma * noisy
    raise ValueError(f"the prediction_type {kind}; known are epsilon, sample and v_prediction")


def _single(latents: Any) -> Array:
    return np.asarray(latents, dtype=np.float32)


def _ddim(config: Config, steps: int, noise: Array, predict: Predict) -> Array:
    alphas, latents = _alphas(config), noise
    last = 1.0 if config["set_alpha_to_one"] else float(alphas[0])
    stride = config["num_train_timesteps"] // steps
    for time in _timesteps(config, steps).round().astype(int):
        here = float(alphas[time])
        there = float(alphas[time - stride]) if time >= stride else last
        picture, added = _parts(config, predict(latents, time), latents, here**0.5, (1 - here) ** 0.5)
        if config["clip_sample"]:
            picture = np.clip(picture, -config["clip_sample_range"], config["clip_sample_range"])
        latents = _single(there**0.5 * picture + (1 - there) ** 0.5 * added)
    return latents


def _sigmas(config: Config, timesteps: Array) -> Array:
    """(steps + 1,) deviations of the noise beside a picture of full size, 0 at the end."""
    alphas = _alphas(config, least=_ALMOST_NONE)
    sigmas = np.sqrt((1 - alphas) / alphas)
    return np.append(np.interp(timesteps, np.arange(len(sigmas)), sigmas), 0.0)


def _euler(config: Config, steps: int, noise: Array, predict: Predict) -> Array:
    timesteps = _timesteps(config, steps)
    sigmas = _sigmas(config, timesteps)
    most = float(sigmas.max())
    latents = _single(noise * ((most**2 + 1) ** 0.5 if config["timestep_spacing"] == "leading" else most))
    for time, sigma, following in zip(timesteps, sigmas, sigmas[1:], strict=False):
        alpha = float(1 / (sigma**2 + 1) ** 0.5)
        shown = _single(latents * alpha)
        _, added = _parts(config, predict(shown, time), shown, alpha, float(sigma) * alpha)
        latents = _single(latents + float(following - sigma) * added)
    return latents


def _plms(config: Config, steps: int, noise: Array, predict: Predict) -> Array:
    """PNDM without its Runge-Kutta steps (arXiv:2202.09778): four predictions back, the second step made twice."""
    alphas, latents = _alphas(config), noise
    last = 1.0 if config["set_alpha_to_one"] else float(alphas[0])
    stride = config["num_train_timesteps"] // steps
    times = _timesteps(config, steps).round().astype(int)
    past: list[Array] = []
    begun = latents
    for turn, time in enumerate([*times[:1], *times[1:2], *times[1:]]):
        told = predict(latents, time)
        start, end = time, time - stride
        if turn == 1:  # the first step again, with the mean of the predictions at both of its ends
            start, end, latents, told = time + stride, time, begun, (told + past[-1]) / 2
        else:
            past = [*past[-3:], told]
            weights = _MULTISTEP[len(past)]
            told = np.tensordot(weights, past[::-1], axes=1)
        here = float(alphas[start])
        there = float(alphas[end]) if end >= 0 else last
        _, added = _parts(config, _single(told), latents, here**0.5, (1 - here) ** 0.5)
        below = here * (1 - there) ** 0.5 + (here * (1 - here) * there) ** 0.5
        latents = _single((there / here) ** 0.5 * latents - (there - here) / below * added)
    return latents


_MULTISTEP: dict[int, tuple[float, ...]] = {  # of Adams and Bashforth, the newest first
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def _dpm(config: Config, steps: int, noise: Array, predict: Predict) -> Array:
    """DPM-Solver++ (arXiv:2211.01095) of first or second order, multistep."""
    timesteps = _timesteps(config, steps, more=config["timestep_spacing"] != "trailing").round()
    sigmas, latents, before = _sigmas(config, timesteps), noise, noise
    for turn, time in enumerate(timesteps.astype(int)):
        sigma, following = float(sigmas[turn]), float(sigmas[turn + 1])
        alpha, after = 1 / (sigma**2 + 1) ** 0.5, 1 / (following**2 + 1) ** 0.5
        picture, _ = _parts(config, predict(latents, time), latents, alpha, sigma * alpha)
        wanted = picture
        if config["solver_order"] > 1 and 0 < turn < len(timesteps) - 1:
            ratio = np.log(sigmas[turn - 1] / sigma) / np.log(sigma / following)
            wanted = picture + (picture - before) / (2 * ratio)
        kept = following * after / (sigma * alpha)
        latents, before = _single(kept * latents + after * (1 - following / sigma) * wanted), picture
    return latents


def _flow_sigmas(config: Config, steps: int, tokens: int) -> Array:
    """(steps + 1,) shares of noise from 1 to 0; ``tokens`` are those of the picture, by which they may be shifted."""
    total, shift = config["num_train_timesteps"], config["shift"]
    if steps < 1:
        raise ValueError(f"{steps} steps; at least 1 is needed")
    moves = bool(config.get("use_dynamic_shifting"))
    shares: Array
    if config.get("evenly_from_one"):
        shares = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    else:
        ends = np.array([total, 1], np.float32) / np.float32(total)
        if not moves:  # as diffusers does it: these are shifted once more below
            ends = shift * ends / (1 + (shift - 1) * ends)
        shares = np.linspace(float(ends[0]) * total, float(ends[1]) * total, steps) / total
    if moves:
        low, high = config["base_image_seq_len"], config["max_image_seq_len"]
        slope = (config["max_shift"] - config["base_shift"]) / (high - low)
        moved = config["base_shift"] + slope * (tokens - low)
        kind = config.get("time_shift_type", "exponential")
        if kind not in ("exponential", "linear"):
            raise ValueError(f"the time_shift_type {kind}; known are exponential and linear")
        shift = float(np.exp(moved)) if kind == "exponential" else moved
        shares = shift / (shift + (1 / shares - 1))
    else:
        shares = shift * shares / (1 + (shift - 1) * shares)
    return np.append(shares.astype(np.float32), np.float32(0))


def _flow(config: Config, steps: int, noise: Array, predict: Predict) -> Array:
    """Euler's steps along straight lines from noise to picture (arXiv:2403.03206)."""
    each = config.get("latents_per_patch", 1)
    shares = _flow_sigmas(config, steps, (noise.shape[-2] // each) * (noise.shape[-1] // each))
    latents = noise
    for share, following in itertools.pairwise(shares):
        told = predict(latents, float(share * np.float32(config["num_train_timesteps"])))
        latents = _single(latents + (following - share) * _single(told))
    return latents


_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_SAMPLERS: dict[str, tuple[Sampler, Config]] = {
    "DDIMScheduler": (_ddim, {"thresholding": False}),
    "EulerDiscreteScheduler": (
        _euler,
        {**_SIGMAS, "interpolation_type": "linear", "timestep_type": "discrete", "final_sigmas_type": "zero"},
    ),
    "PNDMScheduler": (_plms, {"skip_prk_steps": True}),
    "DPMSolverMultistepScheduler": (
        _dpm,
        {
            **_SIGMAS,
            "algorithm_type": "dpmsolver++",
            "solver_type": "midpoint",
            "final_sigmas_type": "zero",
            "thresholding": False,
            "use_lu_lambdas": False,
            "use_flow_sigmas": False,
            "variance_type": None,
            "lambda_min_clipped": -float("inf"),
            "use_dynamic_shifting": False,
        },
    ),
    "FlowMatchEulerDiscreteScheduler": (
        _flow,
        {**_SIGMAS, "shift_terminal": None, "invert_sigmas": False, "stochastic_sampling": False},
    ),
}
"""By the class of the scheduler: the sampler, and the values of settings that it is written for."""


def sampler_of(config: Config) -> Sampler:
    """The sampler of a ``scheduler_config.json``. Raises ValueError for one that is not known here."""
    name = config.get("_class_name")
    if name not in _SAMPLERS:
        raise ValueError(f"the scheduler {name}; known are {', '.join(_SAMPLERS)}")
    sampler, needed = _SAMPLERS[name]
    for key, value in needed.items():
        if config.get(key, value) != value:
            raise ValueError(f"the {name} with {key} {config[key]}; known is {value}")
    if config.get("solver_order", 2) > 2:
        raise ValueError(f"the {name} of order {config['solver_order']}; known are 1 and 2")
    if sampler is _flow:
        _flow_sigmas(config, 1, 1)
    else:
        _alphas(config)
        _timesteps(config, 1)
    return sampler
