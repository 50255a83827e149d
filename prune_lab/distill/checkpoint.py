"""The state of a training in one safetensors file, from which it resumes bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prune_lab.distill.data import with_prefix
from prune_lab.errors import RunError
from prune_lab.runs.tensor_files import read_entry, read_tensors
from prune_lab.runtime import atomic_write

_FORMAT = "prune_lab checkpoint 2"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(slots=True)
class TrainingState:
    """The parts of a training that change from step to step."""

    student: nn.Module
    optimizer: torch.optim.AdamW
    ema: Any  # diffusers.training_utils.EMAModel; None: no average is kept
    step: int  # finished steps
    seconds: float  # wall-clock time spent so far, over all resumed parts
    history: list[tuple[float, ...]]  # one row per finished step; nan: not measured
    # (rows,) float32 by step, of the averaged weights
    heldout: dict[int, Tensor] = field(default_factory=dict)

    def parameters(self) -> dict[str, nn.Parameter]:
        """All of the student by name; of one without an average those alone that are trained, such as a LoRA's."""
        named = self.student.named_parameters()
        return {name: one for name, one in named if self.ema is not None or one.requires_grad}

    def tensors(self) -> dict[str, Tensor]:
        """Weights, averaged weights and AdamW moments by name; the live tensors, not copies."""
        named: dict[str, Tensor] = {}
        parameters = self.parameters()
        if self.ema is not None:
            averages = zip(parameters, self.ema.shadow_params, strict=True)
            named |= {f"ema.{name}": average for name, average in averages}
        for name, parameter in parameters.items():
            named[f"student.{name}"] = parameter.detach()
            for moment in _MOMENTS:
                if moment in self.optimizer.state[parameter]:
                    named[f"{moment}.{name}"] = self.optimizer.state[parameter][moment]
        return named


@dataclass(frozen=True, slots=True)
class _Progress:
    step: int
    seconds: float


def check_fingerprint(found: Mapping[str, Any], asked: Mapping[str, Any], path: Path) -> None:
    """Raise RunError when ``path`` was made with other settings, data or weights than those asked for now."""
    changed = sorted(name for name in asked.keys() | found.keys() if asked.get(name) != found.get(name))
    if changed:
        differences = ", ".join(
            f"{name}={found.get(name)!r} instead of {asked.get(name)!r}" for name in changed
        )
        raise RunError(
            f"asked to go on with the training in {path.parent}, found {path.name} made with {differences}; "
            "use the same settings, or --force to start again"
        )


def save_checkpoint(path: Path, state: TrainingState, fingerprint: Mapping[str, Any]) -> None:
    """Write ``state`` to ``path``, whole or not at all. Raises StorageError."""
    tensors = {name: tensor.contiguous() for name, tensor in state.tensors().items()}
    tensors["history"] = torch.tensor(state.history, dtype=torch.float64)
    tensors |= {f"heldout.{step}": losses for step, losses in state.heldout.items()}
    metadata = {
        "format": _FORMAT,
        "state": json.dumps(asdict(_Progress(state.step, state.seconds))),
        "fingerprint": json.dumps(dict(fingerprint)),
    }
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata)


def load_checkpoint(path: Path, state: TrainingState, fingerprint: Mapping[str, Any]) -> None:
    """Set ``state`` to the one that ``save_checkpoint`` wrote to ``path``.

    Raises RunError when the checkpoint belongs to other settings, data or weights, DataError when it is damaged.
    """
    remedy = "remove it to start this training again"
    asked = "go on from"
    metadata, saved = read_tensors(path, _FORMAT, asked, remedy)
    check_fingerprint(
        read_entry(path, metadata, "fingerprint", dict[str, Any], asked, remedy), fingerprint, path
    )
    progress: _Progress = read_entry(path, metadata, "state", _Progress, asked, remedy)
    state.step, state.seconds = progress.step, progress.seconds
    state.history[:] = [tuple(row) for row in saved["history"].tolist()]
    state.heldout = {int(step): losses for step, losses in with_prefix("heldout.", saved).items()}
    if state.ema is not None:
        state.ema.optimization_step = state.step
    (group,) = state.optimizer.param_groups
    for name, parameter in state.parameters().items():
        if f"{_MOMENTS[0]}.{name}" in saved:
            moments = {moment: torch.zeros_like(parameter) for moment in _MOMENTS}
            place = parameter.device if group.get("fused") else "cpu"  # where AdamW itself keeps it
            steps = torch.tensor(float(state.step), device=place)
            state.optimizer.state[parameter] = {"step": steps, **moments}
    with torch.no_grad():
        for name, tensor in state.tensors().items():
            tensor.copy_(saved[name])
