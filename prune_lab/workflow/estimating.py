"""What a run is expected to take before it starts: time by step, memory while training, room on disk."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any, cast

import torch

from prune_lab.blocks import Architecture, GroupKind, block_groups
from prune_lab.config import BUDGET_CONTROLS, PLAN_FILES, RunConfig
from prune_lab.errors import PruneLabError
from prune_lab.families import example_inputs
from prune_lab.profiling import cost_table
from prune_lab.profiling.random_weights import random_model
from prune_lab.ranking import first_rung, rungs
from prune_lab.runtime import bytes_text, duration_text, synchronize
from prune_lab.search import parse_budget, split_budgets
from prune_lab.session import SHOWN_PROMPTS, Origin
from prune_lab.workflow.sizing import SMALL_MACS, memory_of
from prune_lab.workflow.targets import budgets_of, controls_among

_CHANNELS, _SIDE, _BATCH = 320, 64, 2  # of the convolution that is timed: one of SD's own
_PREFIX_SAVING = 1.7  # forward passes that a naive loop over blocks takes for one of ours
_LATENCY_PASSES = 100  # the most that a table of latency takes
_BACKWARD = 2  # passes forward that a pass back costs
_PROOF = 8.0  # seconds that the process takes to start which proves a candidate
_REPAIR_PASSES = 20  # of the probe for each candidate, with the fits
_REPORT = 10.0  # seconds that figures and pages take
_UNKNOWN_SHARE = 0.85  # of the teacher, of a student whose budget does not say


def _pass_macs(architecture: Architecture, latent: int | None) -> int:
    """Multiply-adds of a pass of one sample whose latent has sides of ``latent``; None: the size of the config."""
    return architecture.total_macs if latent is None else cost_table(architecture, latent=latent).total.macs


def _convolution(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    layer = torch.nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1, device=device, dtype=dtype)
    inputs = torch.zeros(_BATCH, _CHANNELS, _SIDE, _SIDE, device=device, dtype=dtype)
    return lambda: layer(inputs), _BATCH * _SIDE**2 * 9 * _CHANNELS**2


def _whole_model(
    architecture: Architecture, device: torch.device, dtype: torch.dtype, latent: int | None
) -> tuple[Callable[[], object], int]:
    model: Any = random_model(architecture.config, device=device, dtype=dtype)
    sizes: dict[str, Any] = {"batch": _BATCH, "tokens": architecture.tokens, "latent": latent}
    inputs = example_inputs(architecture.config, device=device, dtype=dtype, **sizes)
    return lambda: model(**inputs, return_dict=False), _BATCH * _pass_macs(architecture, latent)


def macs_per_second(
    architecture: Architecture, device: torch.device, dtype: torch.dtype, latent: int | None = None
) -> float:
    """Multiply-adds a second of ``architecture`` on ``device``, at the side ``latent`` of the latent (None: that of the
    config): the best of three calls.

    Of a large model by one convolution of Stable Diffusion's own size; of a small one, whose operators take longer to
    start than to compute, by itself with random weights. Misleads when: the device is busy now.
    """
    small = _pass_macs(architecture, latent) < SMALL_MACS
    call, macs = _whole_model(architecture, device, dtype, latent) if small else _convolution(device, dtype)
    times = []
    with torch.inference_mode():
        for _ in range(4):  # the first one is not counted
            start = time.perf_counter()
            call()
            synchronize(device)
            times.append(time.perf_counter() - start)
    return macs / min(times[1:])


@dataclasses.dataclass(frozen=True, slots=True)
class RunEstimate:
    """What a run is expected to take: seconds by step, bytes of memory while training (0: it trains nothing), bytes
    on disk.
    """

    seconds: dict[str, float]  # empty where the device is not here, so that its speed is unknown
    memory: int
    disk: int

    @property
    def line(self) -> str:
        """The estimate in one line for a person; steps that are not named in it take little."""
        room = f"{bytes_text(self.disk)} on disk"
        if self.memory:
            room = f"{bytes_text(self.memory)} of memory while training, {room}"
        if not self.seconds:
            return f"estimate: {room}; time unknown, the device is not here"
        total = sum(self.seconds.values())
        longest = sorted(self.seconds.items(), key=lambda pair: -pair[1])[:3]
        parts = ", ".join(f"{name} {duration_text(seconds)}" for name, seconds in longest if seconds > 0)
        return f"estimate: {duration_text(total)} ({parts}), {room}"


def _largest_share(config: RunConfig, architecture: Architecture, budgets: tuple[str, ...]) -> float:
    """The parameters of the largest student that the run may train, as a share of the teacher's."""
    costs, shares = cost_table(architecture), []
    for text in budgets:
        counted = [one for one in split_budgets(text) if re.match(r"\s*params", one)]
        limits = [int(parse_budget(one, architecture, costs).limit) for one in counted]
        shares.append(min(limits) / architecture.total_params if limits else _UNKNOWN_SHARE)
    shares += [
        costs.of(plan).params / architecture.total_params
        for plan in controls_among(config.search, architecture)
    ]
    return min(1.0, max(shares, default=_UNKNOWN_SHARE))


def _num_candidates(config: RunConfig, architecture: Architecture, budgets: tuple[str, ...]) -> int:
    settings = config.search
    found = sum(name in BUDGET_CONTROLS for name in settings.controls)
    return len(controls_among(settings, architecture)) + len(budgets) * (settings.count + found)


def _student_steps(config: RunConfig, candidates: int) -> int:
    """Steps of all students together; with a tournament the best 1/eta of each rung go on."""
    rank, distill = config.rank, config.distill
    if not rank.eta:
        return candidates * distill.steps
    first = rank.first or first_rung(distill.steps, rank.eta, distill.warmup)
    total, done, running = 0, 0, candidates
    for rung in rungs(distill.steps, rank.eta, first):
        total += running * (rung - done)
        done, running = rung, math.ceil(running / rank.eta)
    return total


def _passes(config: RunConfig, architecture: Architecture, origin: Origin) -> dict[str, float]:
    """Forward passes of one sample of the teacher that each step is worth."""
    budgets = budgets_of(config, architecture)
    candidates = _num_candidates(config, architecture, budgets)
    share = _largest_share(config, architecture, budgets)
    probe, distill, shown, data = config.probe, config.distill, config.evaluate, config.data
    twice = 2 if shown.guidance > 1 else 1
    kinds = [kind for kind in config.score.groups if not kind.endswith(PLAN_FILES)]
    groups = sum(len(block_groups(architecture, cast("GroupKind", kind))) for kind in kinds)
    criteria = 1 + len(config.score.also)
    steps = _student_steps(config, candidates)
    trained = 1 + share * (1 + _BACKWARD + distill.gradient_checkpointing)
    judged = probe.samples * candidates * (2 + distill.steps // distill.validate_every)
    pictures = len(shown.prompts or range(SHOWN_PROMPTS)) * len(shown.seeds)
    timed = config.profile.batch * (config.profile.runs + config.profile.warmup)
    passes = {
        "probe": min(probe.drawn, probe.samples) * probe.steps * twice if origin == "drawn" else 0,
        "scores": probe.samples * groups * criteria / _PREFIX_SAVING,
        "plans": _LATENCY_PASSES * config.profile.batch if "latency" in " ".join(budgets) else 0,
        "candidates": timed * candidates * (1 + share),
        "data": data.count * data.steps * (2 if data.guidance > 1 else 1) if origin == "drawn" else 0,
        "repaired": 0 if config.repair.kind == "none" else _REPAIR_PASSES * probe.samples * candidates,
        "distilled": steps * distill.batch * trained + judged * share,
        "pictures": pictures * shown.steps * twice * (1 + 2 * candidates * share),
    }
    return passes if origin != "none" else {name: passes[name] for name in ("scores", "plans", "candidates")}


def estimate(
    config: RunConfig,
    architecture: Architecture,
    origin: Origin,
    *,
    dtype: torch.dtype,
    speed: float | None,
    free: int,
    latent: int | None = None,
) -> RunEstimate:
    """What a run with these settings is expected to take on a device of ``speed`` multiply-adds a second, if known.

    From the number of passes of each step and the MACs of one at the side ``latent`` of the latent (None: that of the
    config); what text encoder and VAE take is left out, and ``free``
    is the memory by which samples are divided. Misleads when: the device is shared, or a model is very small.
    """
    seconds = {
        name: passes * _pass_macs(architecture, latent) / speed
        for name, passes in _passes(config, architecture, origin).items()
        if speed
    }
    budgets = budgets_of(config, architecture)
    if speed:
        seconds["candidates"] += _PROOF * _num_candidates(config, architecture, budgets)
        seconds["report"] = _REPORT
    share = _largest_share(config, architecture, budgets)
    if origin == "none":  # students are cut, and none is trained
        cut = _num_candidates(config, architecture, budgets) * architecture.total_params * share
        return RunEstimate(seconds, 0, int(cut * dtype.itemsize))
    how, candidates = config.distill, _num_candidates(config, architecture, budgets)
    memory = memory_of(
        architecture,
        dtype=dtype,
        checkpointing=how.gradient_checkpointing,
        free=free,
        share=share,
        latent=latent,
    )
    together, samples = memory.fit(
        min(how.together or candidates, max(1, candidates)), how.micro_batch or how.batch
    )
    params = architecture.total_params * share
    # Of each candidate the cut and the distilled model, and while it trains its state: weights, moments and average.
    disk = candidates * params * (dtype.itemsize + 4) + together * params * 16
    if origin == "drawn":
        disk += config.data.count * _row_bytes(architecture)
    return RunEstimate(seconds, memory.needed(together, samples), int(disk))


def _row_bytes(architecture: Architecture) -> int:
    """Bytes of one row of training data in float32: its latent and the embedding of its caption."""
    try:
        shapes = example_inputs(architecture.config, tokens=architecture.tokens, device="meta")
    except PruneLabError:
        return 0
    sizes = [shapes[name].numel() for name in ("sample", "encoder_hidden_states") if name in shapes]
    return 4 * int(sum(sizes))
