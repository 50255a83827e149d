"""The paper's reduction table, from our own counting: what each plan leaves of a U-Net, the teacher first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from prune_lab.blocks import Architecture
from prune_lab.families import meta_unet
from prune_lab.plans import PruningPlan, is_native, native_layout, plan_of
from prune_lab.profiling.costs import ModelLike, architecture_from, cost_table
from prune_lab.profiling.latency import Latency, measure_latency, random_inputs
from prune_lab.runtime import pick_dtype, seeded, track
from prune_lab.schemas import REDUCTION_COLUMNS, REDUCTION_LATENCY_COLUMNS

TEACHER = "teacher"


def random_unet(
    config: Mapping[str, Any],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> UNet2DConditionModel:
    """A U-Net of ``config`` with random weights in evaluation mode, for timing: made in seconds, good for nothing else.

    The same 4,096 normal numbers are repeated through all weights; no kernel's time depends on which they are.
    """
    unet: UNet2DConditionModel = nn.Module.to(meta_unet(config), dtype).to_empty(device=device)
    noise = 0.02 * torch.randn(4096, generator=seeded(seed)).to(device=device, dtype=dtype)
    with torch.no_grad():
        for tensor in (*unet.parameters(), *unet.buffers()):
            count = tensor.numel()
            tensor.copy_(noise.repeat(-(-count // len(noise)))[:count].view_as(tensor))
    return unet


def uncounted_text(uncounted: Mapping[str, int]) -> str:
    """Operators without a formula and how often they run: ``add:108 div:55``; empty when the counter says nothing."""
    calls = sorted(uncounted.items())
    return " ".join(f"{operator.removeprefix('aten::')}:{count}" for operator, count in calls)


def _latency(
    architecture: Architecture,
    plan: PruningPlan,
    sizes: Mapping[str, Any],
    timing: Mapping[str, Any],
    device: torch.device | str,
    dtype: torch.dtype,
) -> Latency | None:
    """The latency of the student that ``plan`` leaves; None when it cannot be built."""
    if not is_native(architecture, plan):
        return None
    unet = random_unet(native_layout(architecture, plan).config, device=device, dtype=dtype)
    inputs = random_inputs(unet.config, device=device, dtype=dtype, **sizes)
    return measure_latency(lambda: unet(**inputs), device=device, **timing)


def reduction_table(
    source: ModelLike,
    plans: Sequence[PruningPlan],
    *,
    model: str = "",
    counter: str = "fvcore",
    batch: int = 1,
    latent: int | None = None,
    tokens: int | None = None,
    latency: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
    runs: int = 20,
    warmup: int = 3,
) -> pd.DataFrame:
    """What each plan leaves of ``source`` (an architecture, a U-Net or a config), the teacher first; no weights needed.

    Columns: model, plan, params, params_change, macs, macs_change, paper_macs, paper_macs_change, blocks_removed,
    native, uncounted; with ``latency`` also median_ms, p10_ms, p90_ms, runs, latency_change. Changes are fractions of
    the teacher, negative for savings. MACs are of one forward pass over ``batch`` samples, ``paper_macs`` without
    attention products. Latency is that of the same networks with random weights on ``device`` in ``dtype``, empty for
    a plan that is not native. Raises PlanError for a plan of another architecture.
    """
    architecture = architecture_from(source)
    sizes = {"batch": batch, "latent": latent, "tokens": tokens}
    costs = cost_table(architecture, counter=counter, **sizes)  # type: ignore[arg-type]
    form = pick_dtype(dtype) if isinstance(dtype, str) else dtype
    whole = costs.total
    rows: list[dict[str, Any]] = []
    times: list[Latency | None] = []
    everything = plan_of(architecture, (), name=TEACHER)
    for plan in track([everything, *plans], "profiling plans"):
        cost = costs.of(plan)
        rows.append(
            {
                "model": model,
                "plan": plan.label if plan.removed else TEACHER,
                "params": cost.params,
                "params_change": cost.params / whole.params - 1,
                "macs": cost.macs,
                "macs_change": cost.macs / whole.macs - 1,
                "paper_macs": cost.paper_macs,
                "paper_macs_change": cost.paper_macs / whole.paper_macs - 1,
                "blocks_removed": len(plan.removed),
                "native": is_native(architecture, plan),
                "uncounted": uncounted_text(cost.uncounted),
            }
        )
        if latency:
            timing = {"runs": runs, "warmup": warmup}
            times.append(_latency(architecture, plan, sizes, timing, device, form))
    frame = pd.DataFrame(rows, columns=list(REDUCTION_COLUMNS))
    if latency:
        for column in REDUCTION_LATENCY_COLUMNS[:-1]:
            frame[column] = [None if time is None else getattr(time, column) for time in times]
        frame["latency_change"] = frame["median_ms"] / frame["median_ms"].iloc[0] - 1
    return frame
