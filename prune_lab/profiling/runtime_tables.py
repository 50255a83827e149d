"""One model and what plans leave of it, timed in several runtimes: one table."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

import pandas as pd
import torch

from prune_lab.blocks import Architecture
from prune_lab.forms import why_not
from prune_lab.plans import PruningPlan
from prune_lab.profiling.cost_table import cost_table
from prune_lab.profiling.own_process import Usage
from prune_lab.profiling.runtime_process import check_runtime
from prune_lab.profiling.service import Service
from prune_lab.profiling.timed_plans import TEACHER, time_plans
from prune_lab.runtimes import RUNTIMES
from prune_lab.schemas import RUNTIME_COLUMNS


def runtime_table(
    architecture: Architecture,
    plans: Sequence[PruningPlan],
    services: Sequence[Service],
    *,
    model: str = "",
    rounds: int = 20,
    warmup: int = 3,
    pixels: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """What a forward pass takes in each of ``services``: of the whole model, and of what each of ``plans`` leaves.

    One row for each, columns RUNTIME_COLUMNS. The models of one service are timed in turns, each in a process of its
    own, with random weights: milliseconds on the clock (median, middle four fifths), those of all processors together,
    the change against the whole model within a round with its 95 % interval, and the most memory that the process had
    in use. Times are empty for a plan that cannot be built in its form. ``pixels`` is behind one side of a latent.
    Raises BackendError for a runtime that is not installed or a format that it does not do, before anything is timed.
    """
    for service in services:
        if service.backend in RUNTIMES:
            check_runtime(service, architecture.config)
    native = {plan.id: plan for plan in plans if plan.changes and not why_not(architecture, plan)}
    rows: list[dict[str, object]] = []
    for service in services:
        sizes = {**service.sizes, "tokens": service.tokens or architecture.tokens}
        costs = cost_table(architecture, **sizes)
        usage: dict[str, Usage] = {}
        turns = time_plans(
            architecture,
            native,
            service,
            own_processes=True,
            usage=usage,
            rounds=rounds,
            warmup=warmup,
            seed=seed,
        )
        compared = turns.compared()
        for name, plan in {TEACHER: None, **{plan.id: plan for plan in plans if plan.changes}}.items():
            used = usage.get(name, Usage())
            rows.append(
                {
                    **(compared[name].columns() if name in compared else {}),
                    "model": model,
                    "backend": service.backend,
                    "plan": TEACHER if plan is None else plan.label,
                    "cpu_ms": statistics.median(used.cpu_ms) if used.cpu_ms else math.nan,
                    "macs_change": 0.0 if plan is None else costs.of(plan).macs / costs.total.macs - 1,
                    "threads": torch.get_num_threads(),
                    "dtype": service.dtype,
                    "tokens": costs.tokens,
                    "peak_bytes": used.peak_bytes,
                    "service": service.text(architecture.config, pixels),
                }
            )
            if plan is None:  # the whole model is not compared with itself
                rows[-1] |= {"latency_low": None, "latency_high": None, "latency_verdict": None}
    return pd.DataFrame(rows, columns=list(RUNTIME_COLUMNS)).astype({"peak_bytes": "Int64"})


def services_of(service: Service, backends: Sequence[str]) -> list[Service]:
    """``service`` in each of ``backends``."""
    return [dataclasses.replace(service, backend=backend) for backend in backends]  # type: ignore[arg-type]
