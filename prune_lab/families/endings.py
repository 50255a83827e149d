"""How modules of each class write their output and read their input: what a closed-form repair may change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

Layer: TypeAlias = nn.Conv2d | nn.Linear


@dataclass(frozen=True, slots=True, eq=False)
class Ending:
    """A unit writes ``(shortcut(input) + last(...)) / divisor`` where it adds its input, else ``last(...)``."""

    last: Layer
    adds_input: bool = False
    shortcut: nn.Conv2d | None = None  # None: the input is added as it is
    divisor: float = 1.0
    norm: str = ""  # name of the norm that reads the input
    linear: bool = False  # whether ``last`` alone reads the input, so that a map of its channels goes through


def _residual_block(module: Any) -> Ending:
    divisor = float(module.output_scale_factor)
    return Ending(module.conv2, adds_input=True, shortcut=module.conv_shortcut, divisor=divisor, norm="norm1")


def _transformer(module: Any) -> Ending:
    return Ending(module.proj_out, adds_input=True, norm="norm")


def _sampler(module: Any) -> Ending:
    return Ending(module.conv, linear=True)


_ENDINGS: Mapping[str, Callable[[Any], Ending]] = {
    "ResnetBlock2D": _residual_block,
    "Transformer2DModel": _transformer,
    "Downsample2D": _sampler,
    "Upsample2D": _sampler,
}


def ending_of(module: nn.Module) -> Ending:
    """How ``module``, a unit or a single layer, writes its output."""
    by_class: Callable[[Any], Ending] = _ENDINGS.get(type(module).__name__, Ending)
    return by_class(module)
