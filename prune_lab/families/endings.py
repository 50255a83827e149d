"""How modules of each class write their output and read their input: what a closed-form repair may change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

Layer: TypeAlias = nn.Conv2d | nn.Linear


@dataclass(frozen=True, slots=True, eq=False)
class Ending:
    """A unit writes ``(shortcut(input) + last(...)) / divisor`` where it adds its input, else ``last(...)``.

    Where it is gated it writes ``input + gate * last(...)``, with a gate per channel that follows from the timestep.
    """

    last: Layer
    adds_input: bool = False
    shortcut: nn.Conv2d | None = None  # None: the input is added as it is
    divisor: float = 1.0
    norm: str = ""  # name of the norm that reads the input
    linear: bool = False  # whether ``last`` alone reads the input, so that a map of its channels goes through
    gated: bool = False
    adds_positions: bool = False  # numbers of each place are added, which no map of the channels may change


def _residual_block(module: Any) -> Ending:
    divisor = float(module.output_scale_factor)
    return Ending(module.conv2, adds_input=True, shortcut=module.conv_shortcut, divisor=divisor, norm="norm1")


def _transformer(module: Any) -> Ending:
    return Ending(module.proj_out, adds_input=True, norm="norm")


def _sampler(module: Any) -> Ending | None:
    return Ending(module.conv, linear=True) if isinstance(module.conv, nn.Conv2d) else None


def _feed_forward_last(module: Any) -> Ending | None:
    last = module.ff.net[-1]
    if not isinstance(last, nn.Linear) or last.bias is None or module._chunk_size is not None:
        return None
    gated = module.norm_type in ("ada_norm_single", "ada_norm_zero")
    return Ending(last, adds_input=True, norm="norm1", gated=gated)


def _patches(module: Any) -> Ending | None:
    """Of PatchEmbed: its convolution, and the embedding of positions beside it."""
    if module.layer_norm or not module.flatten or module.proj.bias is None:
        return None
    return Ending(module.proj, adds_positions=module.pos_embed is not None)


_ENDINGS: Mapping[str, Callable[[Any], Ending | None]] = {
    "ResnetBlock2D": _residual_block,
    "Transformer2DModel": _transformer,
    "Downsample2D": _sampler,
    "Upsample2D": _sampler,
    "BasicTransformerBlock": _feed_forward_last,
    "PatchEmbed": _patches,
}


def ending_of(module: nn.Module) -> Ending | None:
    """How ``module``, a unit or a single layer, writes its output; None where it is not known."""
    by_class = _ENDINGS.get(type(module).__name__)
    if by_class is not None:
        return by_class(module)
    return Ending(module) if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None else None


def known_ending(module: nn.Module) -> Ending:
    """The same of a module of which it is known."""
    ending = ending_of(module)
    assert ending is not None, f"nothing is folded into a {type(module).__name__}"
    return ending
