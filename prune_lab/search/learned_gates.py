"""A mask learned by gradient, beside a low-rank update of the layers that stay: it learns what can be recovered.

Every block has a gate. In each step the gates are perturbed by Gumbel noise and the 0-1 program of the search gives the
plan of least perturbed value within budgets and rules (perturb and optimise, arXiv:2002.08676), so each mask that is
tried meets the budget. The model runs with that mask, hard, and the derivative of the loss by each gate goes straight
through to its logit. Where two blocks compete for leaving, the logits settle where their difference is the logarithm of
the ratio of what is lost without them: the exponential of a logit is a value that adds up. Meanwhile a low-rank update
of every layer (LoRA, arXiv:2106.09685) learns to make up for the masks, as in TinyFusion (arXiv:2412.01199).

The model's own weights are not touched: the update is added by hooks, and thrown away at the end.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import Tensor, nn

from prune_lab.blocks import Architecture, architecture_of
from prune_lab.errors import ConfigError, DataError
from prune_lab.importance.gates import gated
from prune_lab.importance.hooks import only_requires_grad
from prune_lab.plans import PruningPlan
from prune_lab.prefix_sharing import ComputeCost
from prune_lab.probes import Probe, evaluating, predict
from prune_lab.profiling import CostTable, Metric
from prune_lab.runtime import device_of, seeded, track
from prune_lab.search.budgets import Budget
from prune_lab.search.constraints import Constraints
from prune_lab.search.effects import Effects
from prune_lab.search.exact import NATIVE, check_reachable, search_plans
from prune_lab.search.program import Program
from prune_lab.search.space import Removed, spaces_of

_PASSES = 3  # a forward pass, and a backward pass that counts as two
_MEMORY = 0.9  # of the size of the gradients, from step to step
_LEAST = 1e-4  # of the largest score: below it blocks start alike
_NORMAL = 1.959964  # of a standard normal variable 95 % lie within it


@dataclass(frozen=True, slots=True)
class GateStep:
    """One step: the loss with its mask, relative to the mean square of the prediction, the number of removed blocks,
    and the share of the result's metric that the mask leaves.
    """

    loss: float
    removed: int
    left: float


@dataclass(frozen=True, slots=True)
class Gate:
    """What was learnt of one block, from the second half of the steps.

    ``stays`` is the share of their masks in which the block stayed, which estimates the probability of its gate to be
    open within the budgets, and ``low`` to ``high`` its 95 % interval by the number of ``masks``. ``spread`` is the
    standard deviation of the ``logit`` over these steps: a logit that still moves has not settled.
    """

    block: str
    stays: float
    low: float
    high: float
    masks: int
    logit: float
    spread: float

    def sure(self, removed: bool) -> float:
        """The share of the masks that decide on the block as a plan does in which it is ``removed`` or stays."""
        return 1 - self.stays if removed else self.stays


@dataclass(frozen=True, slots=True)
class GateResult:
    """The plans found, best first; the value of each block, its loss up to a factor; its gate; the steps, in order; and
    what was computed.
    """

    plans: tuple[PruningPlan, ...]
    values: Mapping[str, float]
    gates: tuple[Gate, ...]
    steps: tuple[GateStep, ...]
    metric: Metric
    """Of which the steps say what their masks leave."""
    compute: ComputeCost

    @property
    def losses(self) -> tuple[float, ...]:
        """The loss of each step, relative to the mean square of the prediction."""
        return tuple(step.loss for step in self.steps)


class _Update:
    """A low-rank update of the linear and convolutional layers of a model: ``layer(x) + up(down(x))``."""

    def __init__(self, model: Any, architecture: Architecture, rank: int, seed: int) -> None:
        self.macs = 0
        self._pairs: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        generator = seeded(seed)
        for unit in architecture.units:
            for module in model.get_submodule(unit.path).modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)) and self._worth(module, rank):
                    shape = (rank, *module.weight.shape[1:])
                    inputs = math.prod(shape[1:])
                    down = torch.randn(shape, generator=generator) / math.sqrt(inputs)
                    up = torch.zeros(len(module.weight), rank)
                    device = module.weight.device
                    self._pairs[module] = (
                        down.to(device).requires_grad_(),
                        up.to(device).requires_grad_(),
                    )

    @staticmethod
    def _worth(module: nn.Linear | nn.Conv2d, rank: int) -> bool:
        wide = min(len(module.weight), module.weight[0].numel()) > rank
        return wide and (isinstance(module, nn.Linear) or module.groups == 1)

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return [tensor for pair in self._pairs.values() for tensor in pair]

    def _added(self, module: Any, inputs: Tensor) -> Tensor:
        down, up = (one.to(inputs.dtype) for one in self._pairs[module])
        if isinstance(module, nn.Linear):
            added = F.linear(F.linear(inputs, down), up)
            places = added.numel() // len(up)
        else:
            how = {name: getattr(module, name) for name in ("stride", "padding", "dilation")}
            added = F.conv2d(F.conv2d(inputs, down, **how), up[:, :, None, None])
            places = added.numel() // len(up)
        self.macs += places * (down.numel() + up.numel())
        return added

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the layers give what they give with the update."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return output + self._added(module, args[0])

        with contextlib.ExitStack() as stack:
            for module in self._pairs:
                stack.enter_context(module.register_forward_hook(hook))
            yield


class _Masks:
    """The plans that the program gives for perturbed logits."""

    def __init__(self, programs: Sequence[Program], budgets: Sequence[Budget], seed: int) -> None:
        self._programs, self._budgets = programs, budgets
        self.metric: Metric = budgets[0].metric if budgets else "macs"
        self._generator = np.random.default_rng(seed)

    def drawn(self, logits: Mapping[str, float]) -> tuple[Removed, float]:
        """The blocks that leave for one draw of the noise, and the share of the metric that is left without them."""
        noise = self._generator.gumbel(size=len(logits))
        perturbed = np.array(list(logits.values())) + noise
        values = dict(zip(logits, np.exp(perturbed - perturbed.max()).tolist(), strict=True))
        found = []
        for program in self._programs:
            objective = np.zeros(program.size)
            for name in program.blocks:
                objective += 1e4 * values[name] * program.gone(name)
            removed = program.least(objective, self._budgets)
            if removed is not None:
                found.append((sum(values[name] for name in removed), removed, program))
        _, best, program = min(found, key=lambda one: one[0])
        return best, self._left(program, best)

    def _left(self, program: Program, removed: Removed) -> float:
        return program.amount(removed, self.metric) / program.amount(frozenset(), self.metric)


def _started(names: Sequence[str], scores: Mapping[str, float] | None) -> Tensor:
    """The logits at the start: those of the ``scores``, or all alike."""
    if scores is None:
        return torch.zeros(len(names), dtype=torch.float64)
    values = torch.tensor([scores[name] for name in names], dtype=torch.float64)
    return values.clamp(min=_LEAST * float(values.abs().max()) or 1.0).log()


def learned_gates(
    model: ModelMixin,
    probe: Probe,
    costs: CostTable,
    budgets: Sequence[Budget],
    constraints: Constraints = NATIVE,
    *,
    scores: Mapping[str, float] | None = None,
    steps: int = 300,
    rank: int = 4,
    rate: float = 0.1,
    update_rate: float = 1e-3,
    batch: int = 8,
    count: int = 1,
    diverse: int = 1,
    seed: int = 0,
) -> GateResult:
    """The plans of least learned value within ``budgets`` and ``constraints``.

    The loss is the mean squared difference to the prediction of the model itself on rows of the ``probe``. ``scores``
    are impacts of blocks to start from; without them all blocks start alike. ``rate`` is that of the logits, relative
    to the size of their gradient, ``update_rate`` that of the low-rank update of ``rank`` (0: none). The values are the
    mean over the second half of the ``steps``. Samplers that leave with an innermost stage have no gate and stay while
    gates are learnt. Equal arguments give equal plans. Raises BudgetError when no plan meets the budgets, ConfigError
    for settings out of range, DataError for a loss that is not finite.
    """
    if steps < 2 or rank < 0 or batch < 1 or not rate > 0 or not update_rate > 0:
        raise ConfigError(
            f"asked for gates with steps {steps}, rank {rank}, batch {batch} and rates {rate:g} and {update_rate:g}; "
            "give at least 2 steps, a rank of 0 or more, rows and rates above 0"
        )
    architecture = architecture_of(model)
    check_reachable(architecture, costs, budgets, constraints=constraints)
    nothing = Effects({block.name: 0.0 for block in architecture.named})
    programs = [Program(space, nothing) for space in spaces_of(architecture, costs, budgets, constraints)]
    names = list(dict.fromkeys(name for program in programs for name in program.blocks))
    masks, compute = _Masks(programs, budgets, seed), ComputeCost(forward_macs=architecture.total_macs)
    if not names:  # nothing can leave: there is one plan, and nothing to learn
        plans = search_plans(architecture, nothing, costs, budgets, constraints=constraints)
        return GateResult(plans, {}, (), (), masks.metric, compute)
    logits = _started(names, scores)
    prediction = predict(model, probe, batch=batch)
    compute.macs += architecture.total_macs * len(probe)
    scale = float(prediction.double().square().mean())
    if not scale > 0 or not math.isfinite(scale):
        raise DataError(
            "asked to learn gates of a model whose prediction is 0 or not finite; check its weights"
        )
    update = _Update(model, architecture, rank, seed) if rank else None
    optimiser = torch.optim.Adam(update.parameters, lr=update_rate) if update and update.parameters else None
    order, taken = seeded(seed), torch.empty(0, dtype=torch.int64)
    course: list[GateStep] = []
    kept: list[Removed] = []  # of the second half
    settling: list[Tensor] = []
    mean, size = torch.zeros_like(logits), 0.0
    with only_requires_grad(model, ()), evaluating(model), torch.inference_mode(False), torch.enable_grad():
        for step in track(range(steps), "learning gates", steps):
            if len(taken) < min(batch, len(probe)):
                taken = torch.randperm(len(probe), generator=order)
            rows, taken = taken[:batch].tolist(), taken[batch:]
            removed, left = masks.drawn(dict(zip(names, logits.tolist(), strict=True)))
            given = {
                name: torch.full(
                    (len(rows),), float(name not in removed), device=device_of(model)
                ).requires_grad_()
                for name in names
            }
            part = probe.rows(rows)
            ((where, inputs),) = part.batches(len(rows), model)
            adding = update.applied() if update else contextlib.nullcontext()
            with adding, gated(model, architecture, given):
                predicted = part.predicted(where, model, inputs)
                wanted = prediction[rows].to(predicted.device)
                loss = (predicted.float() - wanted).square().mean() / scale
                loss.backward()  # type: ignore[no-untyped-call]
            course.append(GateStep(float(loss.detach()), len(removed), left))
            slopes = torch.stack([_slope(gate) for gate in given.values()])
            if not (math.isfinite(course[-1].loss) and slopes.isfinite().all()):
                raise DataError(
                    f"asked to learn gates, found a loss that is not finite in step {step + 1}; use float32, or a "
                    "smaller update rate"
                )
            if optimiser:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            now = float(slopes.abs().max())
            size = now if not step else _MEMORY * size + (1 - _MEMORY) * now
            logits = logits - rate * slopes / size if size else logits
            logits = logits - logits.mean()
            compute.macs += _PASSES * architecture.total_macs * len(rows)
            if step >= steps // 2:
                mean += logits / (steps - steps // 2)
                kept.append(removed)
                settling.append(logits)
    if update:
        compute.macs += _PASSES * update.macs
    values = dict(zip(names, (mean - mean.max()).exp().tolist(), strict=True))
    effects = Effects(dict(nothing.impacts) | values)
    plans = search_plans(
        architecture, effects, costs, budgets, count=count, diverse=diverse, constraints=constraints
    )
    in_order = {block.name: place for place, block in enumerate(architecture.named)}
    gates = tuple(sorted(_gates(names, kept, settling), key=lambda gate: in_order[gate.block]))
    return GateResult(plans, values, gates, tuple(course), masks.metric, compute)


def _gates(names: Sequence[str], masks: Sequence[Removed], logits: Sequence[Tensor]) -> tuple[Gate, ...]:
    """The gates of the blocks ``names``, after the ``masks`` and the ``logits`` (blocks,) of some steps."""
    course, count = torch.stack(list(logits)), len(masks)
    found = []
    for place, name in enumerate(names):
        kept = sum(name not in removed for removed in masks)
        own = course[:, place]
        spread = float(own.std(correction=0))
        found.append(Gate(name, kept / count, *_wilson(kept, count), count, float(own.mean()), spread))
    return tuple(found)


def _wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval, after Wilson, of a share with ``hits`` among ``count`` draws; never a point."""
    share, square = hits / count, _NORMAL**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = _NORMAL * math.sqrt(share * (1 - share) / count + square / (4 * count**2)) / (1 + square / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def _slope(gate: Tensor) -> Tensor:
    """The derivative of the loss by a gate, summed over rows; 0 where the loss does not hang on it."""
    return torch.zeros((), dtype=torch.float64) if gate.grad is None else gate.grad.double().sum().cpu()
