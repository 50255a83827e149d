"""Torch's counter, the oracle of the tests: multiply-adds of a U-Net on ``meta`` tensors.

Convention: one fused multiply-add counts as one. Convolutions, linear layers and attention products (QK^T and
AV) are counted; normalisation, activations, additions, softmax and resampling are not. Torch counts a
multiply-add as two flops, so MACs are half of its figure. Shares no formula with ``prune_lab.counting``.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prune_lab.families import example_inputs, meta_model, plain_config

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
    unet = meta_model(settings)
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
