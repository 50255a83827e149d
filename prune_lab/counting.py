"""Multiply-adds of a U-Net from its config alone: a forward pass on ``meta`` tensors, no weights, no memory.

Convention: one fused multiply-add counts as one. Convolutions, linear layers and attention products (QK^T and
AV) are counted; normalisation, activations, additions, softmax and resampling are not. Torch counts a
multiply-add as two flops, so MACs are half of its figure.

Shares no formula with ``prune_lab.profiling``, which traces with fvcore: each checks the other.
"""

from __future__ import annotations

import copy
import functools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prune_lab.errors import UnsupportedModelError

CLIP_TOKENS = 77  # the context length of every CLIP text encoder that Stable Diffusion uses
SDXL_TIME_IDS = 6  # original size, crop corner and target size, two numbers each

# On `meta`, scaled_dot_product_attention decomposes into two `bmm`; where a kernel is fused it stays whole.
_PRODUCT_OPERATORS = frozenset(
    {
        "aten.bmm",
        "aten.baddbmm",
        "aten._scaled_dot_product_efficient_attention",
        "aten._scaled_dot_product_flash_attention",
        "aten._scaled_dot_product_flash_attention_for_cpu",
        "aten._scaled_dot_product_cudnn_attention",
    }
)


@dataclass(frozen=True, slots=True)
class MetaCount:
    """Multiply-adds of one forward pass over a whole batch, attention products included."""

    total: int
    attention: int  # the part in attention products, QK^T and AV
    by_module: Mapping[str, tuple[int, int]]  # module path -> (whole, attention); "" is the whole model

    @property
    def without_attention(self) -> int:
        """The paper's convention: attention products left out."""
        return self.total - self.attention


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a U-Net without diffusers' own bookkeeping (names that begin with ``_``)."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def meta_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """The U-Net of ``config`` on the ``meta`` device: every shape, no memory, in evaluation mode."""
    with torch.device("meta"):
        unet: UNet2DConditionModel = UNet2DConditionModel.from_config(plain_config(config))
    return unet.eval()


def meta_copy(module: nn.Module) -> nn.Module:
    """A copy of ``module`` as it is now, bypasses included, with its tensors on ``meta``: no weights are copied."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(module, memo).eval()


def latent_shape(config: Mapping[str, Any], latent: int | None = None) -> tuple[int, int]:
    """Height and width of the latent: ``latent`` squared, or the size the model was trained at."""
    size = config.get("sample_size") if latent is None else latent
    if size is None:
        raise UnsupportedModelError(
            "asked for the latent size of a U-Net; its config has no sample_size; pass a latent size"
        )
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def embedding_width(config: Mapping[str, Any]) -> int:
    """Width of the text embedding the U-Net expects."""
    width = config.get("encoder_hid_dim") or config.get("cross_attention_dim")
    if not isinstance(width, int):  # one width per stage: they all read the same embedding
        widths = set(width or ())
        if len(widths) != 1:
            raise UnsupportedModelError(
                f"asked for the text width of a U-Net; its cross_attention_dim is {width!r}; one is needed"
            )
        (width,) = widths
    return int(width)


def _added_conditioning(
    config: Mapping[str, Any], batch: int, device: torch.device | str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What SDXL adds to the time embedding: a pooled text embedding and six numbers about the picture."""
    kind = config.get("addition_embed_type")
    if kind is None:
        return {}
    if kind != "text_time":
        raise UnsupportedModelError(
            f"asked for inputs of a U-Net with addition_embed_type {kind!r}; inputs are known for none and "
            "for 'text_time' (SDXL)"
        )
    pooled = (
        config["projection_class_embeddings_input_dim"] - SDXL_TIME_IDS * config["addition_time_embed_dim"]
    )
    return {
        "text_embeds": torch.zeros(batch, pooled, device=device, dtype=dtype),
        "time_ids": torch.zeros(batch, SDXL_TIME_IDS, device=device, dtype=dtype),
    }


def example_inputs(
    config: Mapping[str, Any],
    *,
    batch: int = 1,
    latent: int | None = None,
    tokens: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Keyword arguments for ``unet.forward``: zeros of the right shapes.

    sample (B, C, H, W), timestep (B,), encoder_hidden_states (B, L, D) and, for SDXL, added_cond_kwargs with
    text_embeds (B, P) and time_ids (B, 6). None for ``latent`` and ``tokens`` means the model's size and 77.
    """
    height, width = latent_shape(config, latent)
    length = CLIP_TOKENS if tokens is None else tokens
    made = {"device": device, "dtype": dtype}
    inputs: dict[str, Any] = {
        "sample": torch.zeros(batch, config["in_channels"], height, width, **made),  # type: ignore[call-overload]
        "timestep": torch.zeros(batch, device=device, dtype=torch.long),
        "encoder_hidden_states": torch.zeros(batch, length, embedding_width(config), **made),  # type: ignore[call-overload]
    }
    if added := _added_conditioning(config, batch, device, dtype):
        inputs["added_cond_kwargs"] = added
    return inputs


def _multiply_adds(flops: Mapping[Any, int]) -> tuple[int, int]:
    """(all, in products of batches of matrices) multiply-adds of one row of torch's table."""
    products = sum(count for operator, count in flops.items() if str(operator) in _PRODUCT_OPERATORS)
    return sum(flops.values()) // 2, products // 2


def count_module(module: nn.Module, inputs: Mapping[str, Any]) -> MetaCount:
    """Multiply-adds of ``module(**inputs)``; right on ``meta`` only, see check_attention_is_counted."""
    check_attention_is_counted()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        module(**inputs)
    root = type(module).__name__
    flops = counter.get_flop_counts()
    rows = {
        path: _multiply_adds(flops.get(f"{root}.{path}" if path else root, {}))
        for path, _ in module.named_modules()
    }
    # Torch runs a linear layer as `bmm` when its input's rows are not contiguous (SD-v2's proj_in). A product
    # inside a layer that has a weight is that layer's own work; one outside is attention.
    weighted = [path for path, part in module.named_modules() if isinstance(part, nn.Linear)]
    own: Counter[str] = Counter()
    for path in weighted:
        parts = path.split(".")
        for depth in range(len(parts) + 1):
            own[".".join(parts[:depth])] += rows[path][1]
    by_module = {path: (total, products - own[path]) for path, (total, products) in rows.items()}
    return MetaCount(*by_module[""], by_module)


@functools.lru_cache(maxsize=1)
def check_attention_is_counted() -> None:
    """Raise RuntimeError when torch's counter gives attention products another count than the formula's.

    Torch 2.13 does so on CPU tensors: the fused CPU kernel has no formula there and counts as nothing, which
    silently drops a sixth of SD-v1.4. The path relied on is ``meta``, so that is the one tested.
    """
    batch, heads, queries, keys, width = 2, 3, 5, 7, 4
    query = torch.empty(batch, heads, queries, width, device="meta")
    key = torch.empty(batch, heads, keys, width, device="meta")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        F.scaled_dot_product_attention(query, key, key)
    expected = 2 * batch * heads * queries * keys * width  # QK^T and AV
    found = _multiply_adds(counter.get_flop_counts().get("Global", {}))
    if found != (expected, expected):
        raise RuntimeError(
            f"torch {torch.__version__} counts {found} multiply-adds (all, attention) for an attention "
            f"product of {expected} on meta tensors: its counts are wrong; install a torch that "
            "pyproject.toml allows"
        )


@functools.lru_cache(maxsize=64)
def _count_config(config: str, batch: int, latent: int | None, tokens: int | None) -> MetaCount:
    settings = json.loads(config)
    unet = meta_unet(settings)
    # Missing settings take the class's defaults, which only the built model knows.
    return count_module(
        unet, example_inputs(unet.config, batch=batch, latent=latent, tokens=tokens, device="meta")
    )


def count_on_meta(
    config: Mapping[str, Any], *, batch: int = 1, latent: int | None = None, tokens: int | None = None
) -> MetaCount:
    """Multiply-adds of the U-Net of ``config``, whole convention, per module; no weights needed.

    ``latent`` is the side of the square latent (None: the config's sample_size), ``tokens`` the length of the
    text (None: 77). Answers are kept, so asking again costs nothing. Raises UnsupportedModelError for a
    conditioning this project has no inputs for.
    """
    text = json.dumps(plain_config(config), sort_keys=True, separators=(",", ":"))
    return _count_config(text, batch, latent, tokens)
