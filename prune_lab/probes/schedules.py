"""The schedule that a model was trained on: how noise is added to latents, and what the model is asked for then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from diffusers import CogVideoXDDIMScheduler, DDPMScheduler
from torch import Tensor

from prune_lab.errors import UnsupportedModelError

Kind = Literal["epsilon", "v_prediction", "sample", "flow"]
_PLAIN: tuple[Kind, ...] = ("epsilon", "v_prediction", "sample")
# What a model may predict on the straight way of a flow, by the word for it. The velocity of arXiv:2202.00512 is
# defined on the way of betas alone.
_OF_FLOW: Mapping[str, Kind] = {"flow_prediction": "flow", "epsilon": "epsilon", "sample": "sample"}


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """Noisy latents are ``signal * latents + noise * noise``, with the numbers of a timestep.

    Timesteps are whole numbers, and what the model is told. A schedule has ``length`` places that training draws from
    evenly; the timestep of each is in ``timesteps``.
    """

    kind: Kind
    signal: Tensor  # by timestep
    noise: Tensor  # by timestep
    kept: Tensor  # by timestep: the share of signal in the variance
    timesteps: Tensor  # (length,) int64, by place: the place itself unless timesteps are shifted

    @property
    def length(self) -> int:
        """Number of places."""
        return len(self.timesteps)

    def _of(self, numbers: Tensor, timesteps: Tensor, latents: Tensor) -> Tensor:
        """``numbers`` of these timesteps, in the form of ``latents`` (N, ...)."""
        found = numbers.to(latents.device)[timesteps.to(latents.device)]
        return found.to(latents.dtype).reshape(-1, *[1] * (latents.ndim - 1))

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents (N, ...) at ``timesteps`` (N,)."""
        signal, scale = (self._of(one, timesteps, latents) for one in (self.signal, self.noise))
        return signal * latents + scale * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model was trained to predict (N, ...): the noise, the latents, the velocity of arXiv:2202.00512, or
        of a flow (arXiv:2210.02747) the way from the latents to the noise.
        """
        if self.kind == "flow":
            return noise - latents
        if self.kind == "v_prediction":
            signal, scale = (self._of(one, timesteps, latents) for one in (self.signal, self.noise))
            return signal * noise - scale * latents
        return noise if self.kind == "epsilon" else latents

    def parts(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """The latents and the noise (N, ...) that ``noisy`` is made of by a ``prediction``: the opposite of ``target``.

        Raises UnsupportedModelError for noise that is predicted where nothing but noise is left.
        """
        signal, scale = (self._of(one, timesteps, noisy) for one in (self.signal, self.noise))
        if self.kind == "flow":
            return noisy - scale * prediction, noisy + signal * prediction
        if self.kind == "v_prediction":
            return signal * noisy - scale * prediction, scale * noisy + signal * prediction
        if self.kind == "sample":
            return prediction, (noisy - signal * prediction) / scale
        if not bool((signal > 0).all()):
            raise UnsupportedModelError(
                "asked for the latents behind predicted noise, found a timestep with nothing but noise (a schedule of "
                "rescale_betas_zero_snr); such a model has to predict the velocity or the latents"
            )
        return (noisy - scale * prediction) / signal, prediction


# Classes of schedulers that know the way of a flow alone, by the beginnings of their names.
_OF_FLOWS = ("FlowMatch", "FlowMap", "LTXEulerAncestralRF")


def _goes_by_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler of this config goes the straight way of a flow: its class knows no other, or it says so."""
    of_class = "shift" in config or str(config.get("_class_name", "")).startswith(_OF_FLOWS)
    return (
        of_class or bool(config.get("use_flow_sigmas")) or config.get("prediction_type") == "flow_prediction"
    )


def _refuse_prediction(kind: object, known: Sequence[str]) -> NoReturn:
    raise UnsupportedModelError(
        f"asked for the schedule that a model was trained on, found a scheduler that says it predicts {kind!r}; "
        f"known are {', '.join(known)}"
    )


def _flow(config: Mapping[str, Any]) -> Schedule:
    """The straight way from latents to noise, whose timestep is the share of noise.

    Places are shifted towards noise as the sampler's are. A shift that hangs on the size of the picture
    (``use_dynamic_shifting``) is that of sampling alone: places are even then.
    """
    kind: Kind = "flow"
    # one that can go other ways says what its model predicts; those of flows have no such setting
    if config.get("use_flow_sigmas"):
        said = config.get("prediction_type", "epsilon")
        if said not in _OF_FLOW:
            _refuse_prediction(said, [f"{', '.join(_OF_FLOW)} where noise is mixed by use_flow_sigmas"])
        kind = _OF_FLOW[said]
    length = int(config.get("num_train_timesteps", 1000))
    shift = (
        1.0
        if config.get("use_dynamic_shifting")
        else float(config.get("shift", config.get("flow_shift", 1.0)))
    )
    share = torch.arange(1, length + 1, dtype=torch.float64) / length
    timesteps = (length * shift * share / (1 + (shift - 1) * share)).round().long().clamp(min=1)
    noise = torch.arange(length + 1, dtype=torch.float32) / length
    signal = 1 - noise
    return Schedule(kind, signal, noise, signal**2 / (signal**2 + noise**2), timesteps)


def schedule_of(scheduler_config: Mapping[str, Any]) -> Schedule:
    """The schedule of training behind the config of any scheduler.

    Raises UnsupportedModelError for a prediction type that is not known.
    """
    if _goes_by_flow(scheduler_config):
        return _flow(scheduler_config)
    kind = scheduler_config.get("prediction_type", "epsilon")
    if kind not in _PLAIN:
        _refuse_prediction(kind, [*_PLAIN, "flow_prediction"])
    # CogVideoX shifts its schedule in a way of its own
    maker = CogVideoXDDIMScheduler if "snr_shift_scale" in scheduler_config else DDPMScheduler
    kept: Tensor = maker.from_config(dict(scheduler_config)).alphas_cumprod.float()
    return Schedule(kind, kept**0.5, (1 - kept) ** 0.5, kept, torch.arange(len(kept)))
