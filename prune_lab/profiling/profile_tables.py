"""The tables of ``profile``: what plans leave of a model, what its blocks cost, what a picture costs a pipeline."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from prune_lab.blocks import Architecture, architecture_of
from prune_lab.counting import count_call, meta_copy
from prune_lab.errors import ConfigError
from prune_lab.families import (
    FAMILIES,
    as_loaded,
    base_name,
    conditions_of,
    family_of,
    film_frames,
    format_of,
    latent_form,
    model_of,
    plain_config,
    takes_guidance,
    text_form,
)
from prune_lab.families.drawing import text_length, usual_length
from prune_lab.forms import why_not
from prune_lab.models.schedulers import set_steps
from prune_lab.plans import PruningPlan, is_native, plan_of
from prune_lab.probes import picture_side, pixels_per_latent
from prune_lab.profiling.cost_table import cost_table
from prune_lab.profiling.latency import check_runs, measure_latency, random_inputs
from prune_lab.profiling.plan_matrix import REST
from prune_lab.profiling.service import Service
from prune_lab.profiling.timed_plans import TEACHER, time_plans
from prune_lab.profiling.turns import ComparedLatency
from prune_lab.runtime import pick_dtype, seeded, synchronize, track
from prune_lab.schemas import (
    BLOCK_PROFILE_COLUMNS,
    PIPELINE_COLUMNS,
    REDUCTION_COLUMNS,
    REDUCTION_LATENCY_COLUMNS,
)

_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOTAL = "total"  # the last row of a pipeline's table

# Plans -----------------------------------------------------------------------------------------------------------


def uncounted_text(uncounted: Mapping[str, int]) -> str:
    """Operators without a formula and how often they run: ``add:108 div:55``; empty when the counter says nothing."""
    calls = sorted(uncounted.items())
    return " ".join(f"{operator.removeprefix('aten::')}:{count}" for operator, count in calls)


def reduction_table(
    architecture: Architecture,
    plans: Sequence[PruningPlan],
    *,
    model: str = "",
    batch: int = 1,
    latent: int | None = None,
    tokens: int | None = None,
    frames: int | None = None,
    latency: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
    runs: int = 20,
    warmup: int = 3,
    times: Mapping[str, ComparedLatency] | None = None,
    where: str = "",
    own_processes: bool | None = None,
) -> pd.DataFrame:
    """What each plan leaves of ``architecture``, the teacher first; no weights needed.

    Columns REDUCTION_COLUMNS, with ``latency`` also REDUCTION_LATENCY_COLUMNS. Changes are fractions of the teacher,
    negative for savings. MACs are of one forward pass over ``batch`` samples with ``tokens`` words (None: the
    architecture's), at ``frames`` of the latent of a film (None: what the model is meant for), ``paper_macs`` without
    attention products. Latency is that of the same networks with random
    weights on ``device`` in ``dtype``, timed in turns in ``runs`` rounds as ``time_plans`` does, or ``times`` by plan
    id where they are known already; ``where`` is the service in words. Empty for a plan that cannot be built in its
    form. Its change
    is the median of the ratios within a round, with its interval. Raises PlanError for a plan of another architecture.
    """
    words = architecture.tokens if tokens is None else tokens
    sizes = {"batch": batch, "latent": latent, "tokens": words, "frames": frames}
    costs = cost_table(architecture, **sizes)  # type: ignore[arg-type]
    whole = costs.total
    rows: list[dict[str, Any]] = []
    everything = plan_of(architecture, (), name=TEACHER)
    for plan in track([everything, *plans], "profiling plans"):
        cost = costs.of(plan)
        rows.append(
            {
                "model": model,
                "plan": plan.label if plan.changes else TEACHER,
                "params": cost.params,
                "params_change": cost.params / whole.params - 1,
                "macs": cost.macs,
                "macs_change": cost.macs / whole.macs - 1,
                "paper_macs": cost.paper_macs,
                "paper_macs_change": cost.paper_macs / whole.paper_macs - 1,
                "blocks_removed": len(plan.removed),
                "tokens": costs.tokens,
                "native": is_native(architecture, plan),
                "uncounted": uncounted_text(costs.uncounted(plan)),
            }
        )
    frame = pd.DataFrame(rows, columns=list(REDUCTION_COLUMNS))
    if not latency and times is None:
        return frame
    if times is None:
        service = Service(str(device), str(dtype).removeprefix("torch."), **sizes)  # type: ignore[arg-type]
        native = {plan.id: plan for plan in plans if plan.changes and not why_not(architecture, plan)}
        timing = {"rounds": runs, "warmup": warmup, "own_processes": own_processes}
        times = time_plans(architecture, native, service, **timing).compared()  # type: ignore[arg-type]
        where = where or service.text(architecture.config)
    found = [times.get(plan.id if plan.changes else TEACHER) for plan in (everything, *plans)]
    cells = pd.DataFrame(
        [{} if one is None else one.columns() for one in found], columns=list(REDUCTION_LATENCY_COLUMNS)
    )
    # The teacher is not compared with itself.
    cells.loc[0, ["latency_low", "latency_high", "latency_verdict"]] = None
    cells["service"] = [None if one is None else where for one in found]
    return pd.concat([frame, cells], axis=1)


# Blocks ---------------------------------------------------------------------------------------------------------


@contextmanager
def _timed(modules: Mapping[str, nn.Module], device: torch.device) -> Iterator[dict[str, float]]:
    """A mapping that each call of ``modules`` adds its milliseconds to; the hooks are gone on exit."""
    spent = dict.fromkeys(modules, 0.0)
    started: dict[str, float] = {}
    handles = []

    def start(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            synchronize(device)
            started[name] = time.perf_counter()

        return hook

    def stop(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            synchronize(device)
            spent[name] += 1e3 * (time.perf_counter() - started[name])

        return hook

    try:
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(start(name)))
            handles.append(module.register_forward_hook(stop(name)))
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def profile_blocks(
    model: ModelMixin,
    *,
    batch: int = 1,
    latent: int | None = None,
    tokens: int | None = None,
    frames: int | None = None,
    runs: int = 10,
    warmup: int = 2,
) -> pd.DataFrame:
    """One row per block, sampler and the rest: columns BLOCK_PROFILE_COLUMNS.

    Costs are those of the cost table for one forward pass over ``batch`` samples. Time is measured where the model is,
    around each block with the device idle, so the parts together take a little longer than an undisturbed pass;
    ``share`` is the part's median in the sum of all medians. Raises ConfigError for fewer than two runs.
    """
    check_runs(runs, warmup)
    architecture = architecture_of(model, tokens=tokens)
    sizes: dict[str, Any] = {"batch": batch, "latent": latent, "tokens": tokens, "frames": frames}
    costs = cost_table(architecture, **sizes, dtype=model.dtype)
    paths = {block.name: block.path for block in architecture.blocks}
    paths |= {sampler.name: sampler.path for sampler in architecture.samplers}
    parts = {name: model.get_submodule(path) for name, path in paths.items()}
    inputs = random_inputs(model.config, **sizes, device=model.device, dtype=model.dtype)
    samples: dict[str, list[float]] = {part.name: [] for part in costs.parts}
    whole = "whole"
    with torch.inference_mode():
        for run in track(range(warmup + runs), "timing blocks"):
            with _timed({whole: model, **parts}, model.device) as spent:
                model(**inputs)
            if run >= warmup:
                total = spent.pop(whole)
                for name, milliseconds in spent.items():
                    samples[name].append(milliseconds)
                samples[REST].append(max(0.0, total - sum(spent.values())))
    medians = {name: statistics.median(times) for name, times in samples.items()}
    frame = costs.frame()
    frame["median_ms"] = [medians[name] for name in frame["name"]]
    frame["share"] = frame["median_ms"] / frame["median_ms"].sum()
    return frame[list(BLOCK_PROFILE_COLUMNS)]


# Pipelines ------------------------------------------------------------------------------------------------------


class _Decoder(nn.Module):
    """The half of the VAE that making a picture needs."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        decoded: Tensor = self.decoder(latents)
        return decoded


class _OtherDecoder(nn.Module):
    """A VAE of videos, or of another class, that decodes by its own ways."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        decoded: Tensor = self.vae.decode(latents, return_dict=False)[0]
        return decoded


def _decoder(vae: Any) -> nn.Module:
    of_videos = any(isinstance(part, nn.Conv3d) for part in vae.modules())
    return _OtherDecoder(vae) if of_videos or not hasattr(vae, "post_quant_conv") else _Decoder(vae)


def _size_of(module: nn.Module) -> int:
    """Its parameters, without those of the half of a VAE that encodes."""
    halves = ("vae.encoder.", "vae.quant_conv.")
    return sum(
        parameter.numel() for name, parameter in module.named_parameters() if not name.startswith(halves)
    )


@dataclass(frozen=True, slots=True)
class _Part:
    name: str
    calls: int
    tokens: int | None  # of the text it reads; None where it reads none
    module: nn.Module
    inputs: Callable[[torch.device, torch.dtype], dict[str, Any]]  # of one call


def model_calls(scheduler: Any, steps: int) -> int:
    """How often the model runs for ``steps`` denoising steps; PNDM runs it once more than it is asked."""
    mine = type(scheduler).from_config(scheduler.config)
    set_steps(mine, steps)
    return len(mine.timesteps)


def _encoders(pipeline: Any) -> dict[str, nn.Module]:
    found = {name: getattr(pipeline, name, None) for name in _ENCODERS}
    return {name: part for name, part in found.items() if part is not None}


def _words(pipeline: Any, asked: int | None) -> tuple[dict[str, int], int | None]:
    """Words of text that each encoder of ``pipeline`` reads, and that its model does; None where that reads none.

    Raises ConfigError where more are ``asked`` for than its one encoder takes.
    """
    family, config = family_of(model_of(pipeline)), model_of(pipeline).config
    usual = text_length(pipeline) or family.tokens(config)
    read: dict[str, int] = {}
    for name, encoder in _encoders(pipeline).items():
        limit: Any = getattr(encoder.config, "max_position_embeddings", None)
        most = limit if isinstance(limit, int) and (limit < usual or family.component == "unet") else usual
        alone = family.component == "unet" or len(_encoders(pipeline)) == 1
        if asked is not None and isinstance(limit, int) and asked > limit and alone:
            raise ConfigError(
                f"asked for {asked} tokens of text, found a text encoder that takes {limit}; give at most {limit}"
            )
        longest = limit if isinstance(limit, int) else asked or usual
        read[name] = most if asked is None else min(asked, longest)
    if not read:
        return read, None
    lengths = tuple(read.values())
    first, last = lengths[0], lengths[-1]
    if family.component == "unet" or len(read) == 1:
        return read, last
    # The texts of several may lie one behind the other, those of the first in front.
    front = min(max(0, family.tokens(config) - (usual_length(pipeline) or usual)), first)
    return read, asked or usual + front


def _parts(
    pipeline: Any,
    steps: int,
    batch: int,
    guided: bool,
    latent: int | None,
    asked: int | None,
    frames: int | None,
) -> Iterator[_Part]:
    model = model_of(pipeline)
    film = film_frames(model, frames)
    if latent is None and "sample_size" not in model.config:
        latent = picture_side(pipeline) // pixels_per_latent(pipeline)
    words, tokens = _words(pipeline, asked)
    for name, encoder in _encoders(pipeline).items():
        shape = (batch, words[name])
        yield _Part(
            name,
            2 if guided else 1,  # the prompt, and the empty prompt that guidance starts from
            words[name],
            encoder,
            lambda device, dtype, shape=shape: {
                "input_ids": torch.zeros(shape, dtype=torch.long, device=device)
            },  # type: ignore[misc]
        )
    yield _Part(
        family_of(model).component,
        model_calls(pipeline.scheduler, steps),
        tokens,
        model,
        lambda device, dtype: random_inputs(
            plain_config(model),
            batch=(1 + guided) * batch,
            latent=latent,
            tokens=tokens,
            frames=film,
            device=device,
            dtype=dtype,
        ),
    )
    vae = getattr(pipeline, "vae", None)
    if vae is None:  # it draws pixels
        return
    channels, *_, height, width = latent_form(model, latent)
    sides = (height, width) if film is None else (film, height, width)
    latents = torch.randn(batch, channels, *sides, generator=seeded(0))
    yield _Part(
        "vae_decoder",
        1,
        None,
        _decoder(vae),
        lambda device, dtype: {"latents": latents.to(device=device, dtype=dtype)},
    )


@contextmanager
def _placed(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[nn.Module]:
    """``module`` on ``device`` in ``dtype``: itself when it is so already, else a copy that is dropped on exit."""
    if next(module.parameters()).device == device and format_of(module) == dtype:
        training = module.training
        try:
            yield module.eval()
        finally:
            module.train(training)
        return
    copied = copy.deepcopy(module)
    if base_name(type(module).__name__) in FAMILIES:  # of which some modules may stay in float32
        copied = as_loaded(nn.Module.to(copied, torch.float32), dtype)
        yield nn.Module.to(copied, device=device).eval()
    else:
        yield nn.Module.to(copied, device=device, dtype=dtype).eval()


def profile_pipeline(
    pipeline: Any,
    *,
    steps: int = 25,
    batch: int = 1,
    latent: int | None = None,
    tokens: int | None = None,
    frames: int | None = None,
    guidance: float = 7.5,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    runs: int = 5,
    warmup: int = 1,
) -> pd.DataFrame:
    """One row per part of a pipeline that works while it draws, and ``total`` last: columns PIPELINE_COLUMNS.

    ``calls`` is how often the part runs to make ``batch`` pictures in ``steps`` steps. ``macs`` (attention products
    included) and ``median_ms`` are of one call; a guided call (``guidance`` above 1) takes twice the batch.
    ``latent`` is the side of the square latent (None: the model's own size), ``tokens`` the length of the text (None:
    the longest that the text encoders take, or that the pipeline asks of them), ``frames`` those of the latent of a
    film (None: what the model is meant for). ``share`` is calls x median_ms in the
    sum over the parts. The total is one call of everything: all the MACs and milliseconds behind these pictures.
    None for ``dtype`` and ``device`` means the model's own. The pipeline is left as it is found. Raises ConfigError
    for fewer than two runs, and for a text that is longer than the text encoder takes.
    """
    # An empty tensor knows which card "cuda" is.
    model = model_of(pipeline)
    kind = torch.empty(0, device=model.device if device is None else device).device
    form = pick_dtype(dtype) if isinstance(dtype, str) else model.dtype if dtype is None else dtype
    asked = bool(text_form(model)[1] or conditions_of(model))  # for a text, or a class
    guided = guidance > 1 and asked and not takes_guidance(model)
    rows = []
    for part in track(
        list(_parts(pipeline, steps, batch, guided, latent, tokens, frames)), "timing the pipeline"
    ):
        counted = count_call(
            meta_copy(part.module), part.inputs(torch.device("meta"), format_of(part.module))
        )
        with _placed(part.module, kind, form) as module:
            inputs = part.inputs(kind, form)
            latency = measure_latency(
                lambda module=module, inputs=inputs: module(**inputs),  # type: ignore[misc]
                warmup=warmup,
                runs=runs,
                device=kind,
            )
        params = _size_of(part.module)
        rows.append((part.name, part.calls, part.tokens, params, counted.total, latency.median_ms))
    macs = sum(calls * macs for _, calls, _, _, macs, _ in rows)
    spent = sum(calls * milliseconds for _, calls, *_, milliseconds in rows)
    rows.append((TOTAL, 1, None, sum(row[3] for row in rows), macs, spent))
    frame = pd.DataFrame(rows, columns=list(PIPELINE_COLUMNS[:-1])).astype({"tokens": "Int64"})
    return frame.assign(share=frame["calls"] * frame["median_ms"] / spent)
