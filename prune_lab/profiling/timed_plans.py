"""A model and what plans leave of it, timed in turns: in this process, or each in a process of its own."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from diffusers import ModelMixin

from prune_lab.blocks import Architecture
from prune_lab.errors import UnsupportedModelError
from prune_lab.forms import layout_of
from prune_lab.plans import PruningPlan
from prune_lab.prefix_sharing import compiling
from prune_lab.probes import evaluating
from prune_lab.profiling.activations import activation_table
from prune_lab.profiling.cost_table import cost_table
from prune_lab.profiling.latency import call_ms, fitting, random_inputs
from prune_lab.profiling.own_process import TimingProcess, Usage
from prune_lab.profiling.random_weights import compile_blocks, random_model, shell_of
from prune_lab.profiling.runtime_process import RuntimeProcess, check_runtime, write_for_runtime
from prune_lab.profiling.service import Service
from prune_lab.profiling.turns import TimedCall, Turns, time_in_turns
from prune_lab.runtime import free_bytes, pick_dtype, track
from prune_lab.runtimes import RUNTIMES
from prune_lab.surgery import materialise

TEACHER = "teacher"  # the name of the whole model, which the others are compared with
_SHARE = (
    0.85  # of the free memory; the rest is for workspaces and an allocator's rounding, which are not counted
)

_WRITTEN_TOGETHER = 10**9  # bytes of weights that one process writes for a runtime, one model after another


def fits_into_one_process(
    architecture: Architecture,
    service: Service,
    *,
    loaded: bool = False,
    free: int | None = None,
    params: int | None = None,
) -> bool:
    """Whether the whole model and all that plans leave of it are expected to fit into this process together.

    They share one set of weights, so what is needed is that set, unless it is ``loaded`` already, and the activations
    of the largest pass. ``params`` are those of all of them where they share none, ``free`` is the memory there is
    (None: what the device has now).
    """
    dtype = pick_dtype(service.dtype)
    needed = 0 if loaded else (params or architecture.total_params) * dtype.itemsize
    with contextlib.suppress(UnsupportedModelError):  # activations that cannot be foretold are left out
        table = activation_table(architecture, latent=service.latent, tokens=service.tokens, dtype=dtype)
        needed += table.total * service.batch
    return needed <= _SHARE * (free_bytes(torch.device(service.device)) if free is None else free)


@contextlib.contextmanager
def _in_this_process(
    architecture: Architecture,
    plans: Mapping[str, PruningPlan],
    service: Service,
    model: ModelMixin | None,
    seed: int,
) -> Iterator[dict[str, TimedCall]]:
    device, dtype = torch.device(service.device), pick_dtype(service.dtype)
    whole = (
        random_model(architecture.config, device=device, dtype=dtype, seed=seed) if model is None else model
    )
    inputs = random_inputs(architecture.config, **service.sizes, device=device, dtype=dtype, seed=seed)
    compiled = service.backend == "compiled"
    with evaluating(whole), torch.inference_mode(), compiling(compiled):
        # The smaller models hold the tensors of the whole one, so all take the memory of one.
        models = {TEACHER: whole} | {
            name: materialise(whole, plan, hand_over=True) for name, plan in plans.items()
        }
        if compiled:
            # Of the whole a shell with the same tensors: what the caller handed over stays as it is.
            models[TEACHER] = shell_of(whole)
            for model in models.values():
                compile_blocks(model)

        def timed(model: ModelMixin) -> TimedCall:
            return lambda: call_ms(lambda: model(**inputs), device)

        yield {name: timed(model) for name, model in models.items()}


def _params_of_all(architecture: Architecture, plans: Iterable[PruningPlan]) -> int:
    """Parameters of the whole model and of all that ``plans`` leave, together."""
    costs = cost_table(architecture)
    return costs.total.params + sum(costs.of(plan).params for plan in plans)


@contextlib.contextmanager
def _in_own_processes(
    architecture: Architecture,
    plans: Mapping[str, PruningPlan],
    service: Service,
    warmup: int,
    seed: int,
    usage: dict[str, Usage] | None,
) -> Iterator[dict[str, TimedCall]]:
    configs = {TEACHER: architecture.config}
    configs |= {name: layout_of(architecture, plan).config for name, plan in plans.items()}
    with contextlib.ExitStack() as stack:
        processes: dict[str, TimingProcess] = {}
        # What is measured of a process is that of a model which stays loaded, as where it serves.
        stays = usage is not None or service.backend in RUNTIMES
        keep = stays and fits_into_one_process(
            architecture, service, params=_params_of_all(architecture, plans.values())
        )
        if service.backend in RUNTIMES:
            check_runtime(service, architecture.config)
            folders = {name: Path(stack.enter_context(tempfile.TemporaryDirectory())) for name in configs}
            together = max(1, _WRITTEN_TOGETHER // (4 * architecture.total_params))
            batches = [list(configs)[at : at + together] for at in range(0, len(configs), together)]
            for batch in track(batches, f"writing models for {service.backend}"):
                write_for_runtime({folders[name]: configs[name] for name in batch}, service, seed=seed)
            for name, folder in folders.items():
                processes[name] = RuntimeProcess(
                    folder, service, warmup=warmup, keep=keep, threads=torch.get_num_threads()
                )
        else:
            for name, config in configs.items():
                processes[name] = TimingProcess(config, service, warmup=warmup, seed=seed, keep=keep)
        if usage is not None:
            usage |= {name: process.usage for name, process in processes.items()}
        yield {name: stack.enter_context(process).turn for name, process in processes.items()}


def time_plans(
    architecture: Architecture,
    plans: Mapping[str, PruningPlan],
    service: Service,
    *,
    rounds: int = 20,
    warmup: int = 3,
    mark: float | None = None,
    model: ModelMixin | None = None,
    own_processes: bool | None = None,
    usage: dict[str, Usage] | None = None,
    seed: int = 0,
) -> Turns:
    """One forward pass of the whole model, called TEACHER, and of what each of ``plans`` leaves, timed in turns.

    All in this process where they fit (None for ``own_processes``), with weights that they share: those of ``model``,
    which is on the service's device in its number format, or random ones. Else each has a process of its own: it waits
    for its turn without weights, then makes random ones, warms up, is timed, and lets them go. Weights decide nothing
    about the time of a pass. In another runtime than torch each always has a process of its own, without torch, and
    keeps its weights between turns where all fit. Into ``usage`` goes, by name, what processes of their own took
    beside time. ``rounds``, ``warmup`` and ``mark`` are those of ``time_in_turns``. Raises FormError for a plan that
    cannot be built, before anything is timed.
    """
    for plan in plans.values():
        layout_of(architecture, plan)
    if service.backend in RUNTIMES:
        own_processes = True
    if own_processes is None:
        own_processes = not fits_into_one_process(architecture, service, loaded=model is not None)
    if own_processes:
        with _in_own_processes(architecture, plans, service, warmup, seed, usage) as calls:
            return time_in_turns(
                calls, rounds=rounds, warmup=0, seed=seed, mark=mark, processes="own processes"
            )
    with fitting(), _in_this_process(architecture, plans, service, model, seed) as calls:
        return time_in_turns(calls, rounds=rounds, warmup=warmup, seed=seed, mark=mark)
