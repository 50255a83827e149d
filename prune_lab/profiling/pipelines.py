"""What share of a picture the U-Net is: text encoder, every denoising step with guidance, and the decoder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from prune_lab.counting import count_module, meta_copy
from prune_lab.profiling.latency import measure_latency, random_inputs
from prune_lab.runtime import pick_dtype, track
from prune_lab.schemas import PIPELINE_COLUMNS


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


@dataclass(frozen=True, slots=True)
class _Part:
    name: str
    calls: int
    module: nn.Module
    inputs: Callable[[torch.device, torch.dtype], dict[str, Any]]  # of one call


def unet_calls(scheduler: Any, steps: int) -> int:
    """How often the U-Net runs for ``steps`` denoising steps; PNDM runs it once more than it is asked."""
    mine = type(scheduler).from_config(scheduler.config)
    mine.set_timesteps(steps)
    return len(mine.timesteps)


def _parts(pipeline: Any, steps: int, batch: int, guided: bool) -> Iterator[_Part]:
    unet = pipeline.unet
    tokens = None
    for name in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipeline, name, None)
        if encoder is None:
            continue
        tokens = encoder.config.max_position_embeddings
        shape = (batch, tokens)
        yield _Part(
            name,
            2 if guided else 1,  # the prompt, and the empty prompt that guidance starts from
            encoder,
            lambda device, dtype, shape=shape: {
                "input_ids": torch.zeros(shape, dtype=torch.long, device=device)
            },  # type: ignore[misc]
        )
    yield _Part(
        "unet",
        unet_calls(pipeline.scheduler, steps),
        unet,
        lambda device, dtype: random_inputs(
            unet.config, batch=(1 + guided) * batch, tokens=tokens, device=device, dtype=dtype
        ),
    )
    decoder = _Decoder(pipeline.vae)
    sample = random_inputs(unet.config, batch=batch)["sample"]
    yield _Part(
        "vae_decoder", 1, decoder, lambda device, dtype: {"latents": sample.to(device=device, dtype=dtype)}
    )


@contextmanager
def _placed(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[nn.Module]:
    """``module`` on ``device`` in ``dtype``: itself when it is so already, else a copy that is dropped on exit."""
    there = next(module.parameters())
    if there.device == device and there.dtype == dtype:
        training = module.training
        try:
            yield module.eval()
        finally:
            module.train(training)
    else:
        yield nn.Module.to(copy.deepcopy(module), device=device, dtype=dtype).eval()


def profile_pipeline(
    pipeline: Any,
    *,
    steps: int = 25,
    batch: int = 1,
    guidance: float = 7.5,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    runs: int = 5,
    warmup: int = 1,
) -> pd.DataFrame:
    """One row per part of a Stable Diffusion pipeline: part, calls, params, macs, median_ms, share.

    ``calls`` is how often the part runs to make ``batch`` pictures in ``steps`` steps. ``macs`` (torch's counter,
    attention products included) and ``median_ms`` are of one call; a guided U-Net call (``guidance`` above 1) takes
    twice the batch. ``share`` is calls x median_ms in the sum over the parts. None for ``dtype`` and ``device`` means
    the U-Net's own. The pipeline is left as it is found. Raises ConfigError for fewer than two runs.
    """
    # An empty tensor knows which card "cuda" is.
    kind = torch.empty(0, device=pipeline.unet.device if device is None else device).device
    form = pick_dtype(dtype) if isinstance(dtype, str) else pipeline.unet.dtype if dtype is None else dtype
    rows = []
    for part in track(list(_parts(pipeline, steps, batch, guidance > 1)), "timing the pipeline"):
        counted = count_module(
            meta_copy(part.module), part.inputs(torch.device("meta"), next(part.module.parameters()).dtype)
        )
        with _placed(part.module, kind, form) as module:
            inputs = part.inputs(kind, form)
            latency = measure_latency(
                lambda module=module, inputs=inputs: module(**inputs),  # type: ignore[misc]
                warmup=warmup,
                runs=runs,
                device=kind,
            )
        params = sum(parameter.numel() for parameter in part.module.parameters())
        rows.append((part.name, part.calls, params, counted.total, latency.median_ms))
    frame = pd.DataFrame(rows, columns=list(PIPELINE_COLUMNS[:-1]))
    spent = frame["calls"] * frame["median_ms"]
    frame["share"] = spent / spent.sum()
    return frame
