"""What the trainings share: the learning-rate schedule, batches and noise by step, averaged weights, resuming.

Everything random is a function of (seed, step), so a training that was stopped and resumed equals one that was not.
"""

from __future__ import annotations

import contextlib
import csv
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from prune_lab.errors import DataError
from prune_lab.runtime import atomic_write, track
from recipes.reference_model.settings import Recipe

_CLIP_NORM = 1.0
_SAVE_EVERY = 250


@dataclass(slots=True)
class Curve:
    """Named numbers by step, written as CSV; reading it back and cutting it keeps a resumed curve whole."""

    columns: tuple[str, ...]
    rows: list[tuple[float, ...]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path, columns: tuple[str, ...], before: int) -> Curve:
        """The curve at `path` up to (not with) step `before`; empty where there is none."""
        curve = cls(columns)
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as handle:
                found = [tuple(float(cell) for cell in row) for row in list(csv.reader(handle))[1:]]
            curve.rows = [row for row in found if row[0] < before]
        return curve

    def write(self, path: Path) -> None:
        """Write the curve as CSV, columns first."""
        with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle)
            writer.writerow(self.columns)
            writer.writerows([[int(row[0]), *(f"{cell:.6g}" for cell in row[1:])] for row in self.rows])


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """A CPU random generator fixed by seed, step and stream alone."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 16 + stream)


def training_precision(device: str) -> contextlib.AbstractContextManager[object]:
    """bfloat16 autocast where it pays: on an accelerator and on a CPU with matrix tiles (AMX); else float32.

    On a CPU without them a step in bfloat16 takes a quarter longer than one in float32.
    """
    kind = torch.device(device).type
    pays = kind != "cpu" or bool(torch.cpu.get_capabilities().get("amx_tile", False))
    return torch.autocast(kind, torch.bfloat16, enabled=pays)


def batch_indices(count: int, batch: int, seed: int, step: int) -> torch.Tensor:
    """Row numbers (batch,) of the step: every row once per pass, in an order drawn anew for every pass."""
    start = step * batch
    picked, passes = [], {}
    for position in range(start, start + batch):
        number, offset = divmod(position, count)
        if number not in passes:
            passes[number] = torch.randperm(count, generator=step_generator(seed, number, stream=1))
        picked.append(passes[number][offset])
    return torch.stack(picked)


def _save(
    path: Path,
    model: nn.Module,
    average: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    step: int,
) -> None:
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.items()}
    for name, parameter in zip(names, optimizer.param_groups[0]["params"], strict=True):
        state = optimizer.state[parameter]
        tensors |= {f"first.{name}": state["exp_avg"], f"second.{name}": state["exp_avg_sq"]}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={"step": str(step)})


def _load(
    path: Path, model: nn.Module, average: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> int:
    with safe_open(path, framework="pt") as handle:
        step = int(handle.metadata()["step"])
        read = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (a safetensors file is no mapping)
    try:
        model.load_state_dict(
            {n.removeprefix("model."): v for n, v in read.items() if n.startswith("model.")}
        )
        for name, value in average.items():
            value.copy_(read[f"average.{name}"])
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        for name, parameter in zip(names, optimizer.param_groups[0]["params"], strict=True):
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device),
                "exp_avg": read[f"first.{name}"].to(parameter.device),
                "exp_avg_sq": read[f"second.{name}"].to(parameter.device),
            }
    except (KeyError, RuntimeError) as error:
        raise DataError(
            f"the checkpoint {path} is of another model than the configuration asks for; "
            "remove it or use another work folder"
        ) from error
    return step


def train(
    model: nn.Module,
    loss_at: Callable[[int], dict[str, torch.Tensor]],
    recipe: Recipe,
    folder: Path,
    name: str,
    *,
    say: Callable[[str], None] | None = None,
    until: int | None = None,
    save_every: int = _SAVE_EVERY,
) -> dict[str, torch.Tensor]:
    """Averaged weights of `model` after the recipe's steps; the model itself holds the last ones.

    `loss_at(step)` gives named scalar terms, of which "loss" is minimised. Checkpoints go to
    `folder/<name>.ckpt.safetensors` every `save_every` steps, and the curve to `folder/<name>.csv`; a later call with
    the same folder goes on from there. `until` stops early, as an interruption would.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, curve_path = folder / f"{name}.ckpt.safetensors", folder / f"{name}.csv"
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay, fused=True
    )
    average = {key: value.detach().clone() for key, value in model.named_parameters() if value.requires_grad}
    start = _load(checkpoint, model, average, optimizer) if checkpoint.is_file() else 0
    curve: Curve | None = None
    model.train()
    began = time.perf_counter()
    end = min(recipe.steps, until if until is not None else recipe.steps)
    for step in track(range(start, end), f"training the {name}"):
        optimizer.param_groups[0]["lr"] = recipe.rate_at(step)
        terms = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, _CLIP_NORM)
        optimizer.step()
        decay = recipe.ema_at(step)
        with torch.no_grad():
            trained: list[torch.Tensor] = list(parameters)
            torch._foreach_lerp_(list(average.values()), trained, 1 - decay)
        values = {key: float(value.detach()) for key, value in terms.items()}
        if not math.isfinite(values["loss"]):
            raise DataError(
                f"training the {name} diverged at step {step} (loss {values['loss']}); lower the rate"
            )
        seconds = (time.perf_counter() - began) / (step - start + 1)
        if curve is None:
            curve = Curve.read(curve_path, ("step", *values, "rate", "seconds"), before=start)
        curve.rows.append((step, *values.values(), recipe.rate_at(step), seconds))
        if (step + 1) % save_every == 0 or step + 1 == end:
            _save(checkpoint, model, average, optimizer, step + 1)
            curve.write(curve_path)
        if say is not None and (step + 1) % 50 == 0:
            recent = [row[1] for row in curve.rows[-50:]]
            left = seconds * (end - step - 1) / 60
            loss = sum(recent) / len(recent)
            say(
                f"{name} {step + 1}/{recipe.steps}: loss {loss:.4f}, {seconds:.2f} s a step, {left:.0f} min left"
            )
    return average


def slices(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover range(count)."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
