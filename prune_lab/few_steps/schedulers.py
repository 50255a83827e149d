"""Other schedulers for a pipeline: those of diffusers that know how the noise of its model was mixed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch

from prune_lab.errors import ConfigError
from prune_lab.few_steps.frontier import OWN
from prune_lab.models.schedulers import goes_by_flow, scheduler_complaint
from prune_lab.models.silence import quiet
from prune_lab.probes import schedule_of


def _flow_sigmas(config: Mapping[str, Any]) -> dict[str, Any]:
    shift = config.get("shift", config.get("flow_shift", 1.0))
    return {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}


def _nothing(config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, slots=True)
class _Known:
    """A scheduler by the names of diffusers' classes: for noise by betas, and for that of a flow; empty: there is none.

    ``more`` are settings beside those of the pipeline's own scheduler, ``usual`` those that hold where it says nothing:
    latents are not clipped.
    """

    betas: str
    flow: str = ""
    more: Mapping[str, object] = field(default_factory=dict)
    usual: Mapping[str, object] = field(default_factory=dict)
    of_flow: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing


SCHEDULERS: Mapping[str, _Known] = {
    "dpmsolver++": _Known(
        "DPMSolverMultistepScheduler",
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++"},
        of_flow=_flow_sigmas,
    ),
    "ddim": _Known("DDIMScheduler", usual={"clip_sample": False, "set_alpha_to_one": False}),
    "unipc": _Known("UniPCMultistepScheduler", "UniPCMultistepScheduler", of_flow=_flow_sigmas),
    "euler": _Known("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
    "pndm": _Known("PNDMScheduler"),
    "lcm": _Known("LCMScheduler", usual={"clip_sample": False}),
}


def _other_noise(own: Any, found: Any) -> bool:
    """Whether ``found`` takes the noise at some timestep for more or less than the model was trained with."""
    kept, wanted = found.alphas_cumprod.float(), schedule_of(own.config).kept
    # the last may be nought, for which some put a number next to nought
    return kept.shape != wanted.shape or not torch.allclose(kept, wanted, rtol=1e-4, atol=1e-6)


def fitting_scheduler(name: str, own: Any) -> tuple[Any, str]:
    """(the scheduler called ``name`` for a pipeline that comes with ``own``, or None; why there is none).

    Raises ConfigError for a name that is not known.
    """
    if name == OWN:
        return type(own).from_config(own.config), ""
    known = SCHEDULERS.get(name)
    if known is None:
        raise ConfigError(f"asked for the scheduler {name!r}; known are {OWN}, {', '.join(SCHEDULERS)}")
    by_flow, config = goes_by_flow(own), dict(own.config)
    if type(own).__name__ == "LCMScheduler" and known.betas != "LCMScheduler":
        return None, "the model was distilled for the few steps of its LCMScheduler"
    class_name = known.flow if by_flow else known.betas
    if not class_name:
        return None, "the model goes by flow matching, which it does not know"
    if by_flow and config.get("use_dynamic_shifting") and known.of_flow is _flow_sigmas:
        return None, "the shift of its own hangs on the size of the picture"
    kind = getattr(diffusers, class_name)
    settings = {**known.usual, **config, **known.more, **(known.of_flow(config) if by_flow else {})}
    settings = {key: value for key, value in settings.items() if not key.startswith("_")}
    if complaint := scheduler_complaint(kind, settings, by_flow=by_flow):
        return None, complaint
    with quiet():  # settings that the other class does not know are left out, which is meant
        found = kind.from_config(settings)
    wanted = config.get("prediction_type", found.config.get("prediction_type"))
    if not by_flow and found.config.get("prediction_type", "epsilon") != wanted:
        return None, f"it does not know models that predict {wanted}"
    if not by_flow and _other_noise(own, found):
        return None, "its schedule of noise is another than the one that the model was trained on"
    return found, ""
