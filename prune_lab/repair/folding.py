"""Exact folds of a change at a cut into the weights beside it, and why others do not exist.

Let h (C channels) be what a unit writes, and ``A h + b`` what is wanted.

- Convolutions (the first one, down- and upsamplers) write ``h = K x + k``: the weights become ``A K`` and ``A k + b``.
- A residual block with a shortcut convolution writes ``h = (S x + s + K u + k) / f``: ``A S``, ``A s``, ``A K`` and
  ``A k + f b``. It is what every residual block of an up stage has, and one that changes the width.
- A residual block without one, and an attention block, write ``h = (x + K u + k) / f``: a shift folds, ``k + f b``.
  ``A`` would have to change x as well, which the block's own norm reads; a group norm does not let ``A`` pass.
- A sampler that reads h does so by a convolution ``K``, after padding with zeros or after repeating pixels, and ``A``
  goes through both: ``K A``. A shift does not go through the padding.

Beside them a *refit* changes only K and k of the unit's last layer, by what least squares finds on that layer's own
input u: there is nothing to fold.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_lab.families.endings import Layer, ending_of
from prune_lab.repair.fitting import Change

Kind = Literal["shift", "scale-shift", "linear", "refit"]
Side = Literal["before", "after"]

MOST_UNKNOWNS = 6000  # per channel of a refit: the sums alone take their square, 8 bytes each, for every fold


def last_layer(unit: nn.Module) -> Layer:
    """The layer whose output a unit adds to its residual, or hands on where it has none."""
    return ending_of(unit).last


def layer_features(layer: Layer, entering: Tensor) -> Tensor:
    """(B, P, F): for each output pixel the inputs that ``layer`` weighs, in the order of its flattened weight."""
    if isinstance(layer, nn.Linear):
        return entering
    unfolded = F.unfold(
        entering,
        cast("tuple[int, int]", layer.kernel_size),
        dilation=cast("tuple[int, int]", layer.dilation),
        padding=cast("tuple[int, int]", layer.padding),
        stride=cast("tuple[int, int]", layer.stride),
    )
    return unfolded.transpose(1, 2)


def why_not(kind: Kind, side: Side, unit: nn.Module | None, name: str) -> str:
    """Why a change of ``kind`` has no exact fold into ``unit``, which is called ``name``; empty when it has one.

    ``side`` says where the unit stands; ``None`` stands for the model's last norm and layer.
    """
    ending = None if unit is None else ending_of(unit)
    if side == "after":
        if ending is not None and ending.linear:
            return (
                "" if kind in ("scale-shift", "linear") else f"a {kind} does not go through {name}'s padding"
            )
        reading = f"{ending.norm} of {name}" if ending is not None else f"the norm ahead of {name}"
        return f"{reading} reads it: no map goes through a group norm"
    assert ending is not None
    if kind == "refit":
        unknowns = ending.last.weight[0].numel()
        if unknowns > MOST_UNKNOWNS:
            return (
                f"the last layer of {name} weighs {unknowns:,} inputs; {MOST_UNKNOWNS:,} are solved for here"
            )
        return ""
    if kind == "shift" or not ending.adds_input or ending.shortcut is not None:
        return ""
    return f"{name} adds its own input, which its {ending.norm} reads as well: only a shift folds into it"


def _mapped(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Let ``layer`` (a convolution or linear layer) write ``weight @ output + bias``."""
    old = cast("Tensor", layer.weight).double()
    cast("Tensor", layer.weight).copy_((weight @ old.flatten(1)).view_as(old))
    cast("Tensor", layer.bias).copy_(weight @ cast("Tensor", layer.bias).double() + bias)


@torch.no_grad()
def fold(unit: nn.Module, kind: Kind, side: Side, change: Change) -> None:
    """Change the weights of ``unit`` as the module's text says; in place, computed in float64.

    Only for what ``why_not`` has nothing against.
    """
    ending = ending_of(unit)
    layer, bias = ending.last, ending.divisor * change.bias
    old = layer.weight.double()
    if side == "after":
        # (out, in, k, k): the map acts on what is read
        layer.weight.copy_(torch.einsum("oikl,ij->ojkl", old, change.map))
    elif kind == "refit":
        layer.weight.copy_(old + ending.divisor * change.weight.view_as(old))
        cast("Tensor", layer.bias).add_(bias)
    elif kind == "shift":
        cast("Tensor", layer.bias).add_(bias)
    else:
        _mapped(layer, change.map, bias)
        if ending.shortcut is not None:
            _mapped(ending.shortcut, change.map, torch.zeros_like(change.bias))


def folded_parameters(unit: nn.Module) -> list[nn.Parameter]:
    """The parameters that ``fold`` may change."""
    ending = ending_of(unit)
    layers: list[nn.Module] = [ending.last, *([ending.shortcut] if ending.shortcut is not None else [])]
    return [parameter for layer in layers for parameter in layer.parameters()]
